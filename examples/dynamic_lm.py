"""A language model that goes on learning while it reads, by gates that were learned.

Wolf, Chaumond and Delangue 2018, "Meta-Learning a Dynamical Language Model" (arXiv:1803.10631). The static model is
trained as usual. Then gates COPY, UPDATE and FLUSH learn to change its weights while it reads articles one after the
other. The baseline is dynamic evaluation (Krause et al. 2018, arXiv:1709.07432): constant gates, chosen on a grid.
Gates and grid see the validation articles only; all are judged on articles by which nothing was chosen. ``--folds 3``
does all of it three times, so that every article is judged on once, and takes the intervals over all articles.
"""

import math
import random
import sys
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from _show import save

import funcmeta as fm
from funcmeta.algorithms import dynamic_lm
from funcmeta.tasks import Article, Corpus

STATIC, PLAIN, DECAYING = "static", "dynamic evaluation", "dynamic evaluation, decay"
UNFLUSHED, THREE = "gates without FLUSH", "gates"
FLUSHING = {THREE: UNFLUSHED, DECAYING: PLAIN}
RATES, DECAYS = (0.2, 0.4, 0.7), (0.0, 0.002, 0.01)


class Sizes(NamedTuple):
    """What is done how often."""

    vocabulary: int = 4000
    width: int = 96
    longest: int = 2000
    epochs: int = 14
    passes: int = 3
    segment: int = 20
    window: int = 40
    opening: int = 50


FULL = {
    "pydoc": Sizes(),
    "wikipedia": Sizes(longest=1000, epochs=8),
    "wikitext": Sizes(longest=1000, epochs=8, passes=2),
    "invented": Sizes(width=16, epochs=4, passes=2, segment=10, window=20, opening=30),
}
QUICK = Sizes(vocabulary=2000, width=48, longest=400, epochs=6, passes=1, window=10)


def invented(seed: int, articles: int = 90, words: int = 300) -> list[Article]:
    """Articles that are about 6 of 60 words each: 7 words of 10 are among these. A small model learns all there is."""
    draw, names = random.Random(seed), [f"word{number}" for number in range(60)]
    found = []
    for number in range(articles):
        own = draw.sample(names, 6)
        text = [draw.choice(own) if draw.random() < 0.7 else draw.choice(names) for _ in range(words)]
        found.append(Article(f"{number}: {', '.join(own)}", ("<eos>", *text)))
    return found


def load(data: str, path: Path | None, sizes: Sizes, seed: int, folds: int = 1) -> list[Corpus]:
    """The articles, cut to their first words, in three parts; for several folds each article is tested on once."""
    if data == "wikitext":
        if path is None:
            raise typer.BadParameter("wikitext needs --path, a folder with valid.txt (to learn from) and test.txt.")
        if folds > 1:
            raise typer.BadParameter(f"folds is {folds}, expected 1: wikitext has a file of test articles.")
        known, test = (fm.tasks.wikitext_articles(path / name) for name in ("valid.txt", "test.txt"))
        train, validation, _ = fm.tasks.split(known, validation=15, test=0, seed=seed)
        return [cut(train, validation, test, sizes)]
    sources = {
        "pydoc": fm.tasks.pydoc_articles,
        "wikipedia": lambda: fm.tasks.wikipedia_articles(path),
        "invented": lambda: invented(seed),
    }
    known = sources[data]()
    share = len(known) // 4
    if folds == 1:
        return [cut(*fm.tasks.split(known, validation=share, test=share + 4, seed=seed), sizes)]
    if not 1 < folds <= len(known) // 2:
        raise typer.BadParameter(
            f"folds is {folds}, expected 1 to {len(known) // 2}: a test reads two articles or more."
        )
    order, parts = torch.randperm(len(known), generator=fm.rng.generator(seed)), []
    for held in order.tensor_split(folds):
        test = [known[index] for index in sorted(held.tolist())]
        others = [article for index, article in enumerate(known) if index not in held]
        train, validation, _ = fm.tasks.split(others, validation=share, test=0, seed=seed)
        parts.append(cut(train, validation, test, sizes))
    return parts


def cut(train: Any, validation: Any, test: Any, sizes: Sizes) -> Corpus:
    """One corpus; the articles to choose and to judge by are cut to their first words."""
    validation, test = (
        [Article(each.title, each.words[: sizes.longest]) for each in part] for part in (validation, test)
    )
    return fm.tasks.corpus(train, validation, test, vocabulary=sizes.vocabulary)


def pretrain(corpus: Corpus, sizes: Sizes) -> dynamic_lm.LanguageModel:
    """The static model: the state, of all epochs, that the validation articles are least surprising to."""
    net = dynamic_lm.LanguageModel(len(corpus.vocabulary), sizes.width, dropout=0.3)
    text, check = (torch.cat([corpus.tokens(each) for each in part]) for part in (corpus.train, corpus.validation))
    epochs = dynamic_lm.train_static(net, text, check, epochs=sizes.epochs)
    list(track(epochs, "static model", total=sizes.epochs))
    return net


def learn_gates(
    net: dynamic_lm.LanguageModel, corpus: Corpus, sizes: Sizes, start: dict[str, float], seed: int
) -> tuple[dynamic_lm.DynamicLanguageModel, Any]:
    """Gates that begin as dynamic evaluation and learn window by window, the articles in another order in each pass."""
    with fm.rng.forked(seed):
        algorithm = dynamic_lm.build(net, fm.learned.gates(**start), window=sizes.window)
    meta, order = algorithm.init(), random.Random(seed)
    windows = math.ceil((len(corpus.stream(corpus.validation, sizes.segment).spec) - 1) / sizes.window)
    outer = torch.optim.Adam(meta["gates"].values(), lr=0.01)
    fading = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.0, total_iters=windows * sizes.passes)
    for each in range(sizes.passes):
        articles = order.sample(corpus.validation, len(corpus.validation))
        stream, carry = corpus.stream(articles, sizes.segment), None
        for _ in track(range(windows), f"gates {'with' if start['flush'] else 'without'} FLUSH, pass {each + 1}"):
            out = algorithm.loss(meta, stream, carry=carry)
            outer.zero_grad()
            out.loss.backward()
            outer.step()
            fading.step()
            carry = out.carry
    return algorithm, meta


def constant(net: dynamic_lm.LanguageModel, **gates: float) -> tuple[dynamic_lm.DynamicLanguageModel, Any]:
    """Gates that are constants, and not learned: dynamic evaluation, or the static model."""
    algorithm = dynamic_lm.build(net, fm.learned.gates(**gates, hidden=0))
    return algorithm, algorithm.init()


def read(
    reader: tuple[dynamic_lm.DynamicLanguageModel, Any], corpus: Corpus, articles: Any, segment: int
) -> list[Tensor]:
    """The losses of each article's words, the articles read one after the other."""
    (algorithm, meta), stream = reader, corpus.stream(articles, segment)
    losses = algorithm.adapt(meta, stream).losses
    return [
        torch.cat([each for each, place in zip(losses, stream.spec, strict=True) if place == index])
        for index in range(len(articles))
    ]


def tune(net: dynamic_lm.LanguageModel, corpus: Corpus, segment: int) -> tuple[dict[str, float], dict[str, float], Any]:
    """The best constant gates on the validation articles, without decay and with it; and the whole grid."""
    grid = {}
    for rate, decay in track(list(product(RATES, DECAYS)), "dynamic evaluation"):
        reader = constant(net, copy=1 - decay, update=rate, flush=decay)
        grid[rate, decay] = torch.cat(read(reader, corpus, corpus.validation, segment)).mean().item()

    def best(decays: tuple[float, ...]) -> dict[str, float]:
        rate, decay = min(product(RATES, decays), key=grid.__getitem__)
        return {"copy": 1 - decay, "update": rate, "flush": decay}

    return best(DECAYS[:1]), best(DECAYS[1:]), [[*setting, loss] for setting, loss in grid.items()]


def interval(values: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """The mean over articles and its 95 % interval, by 10,000 bootstrap samples of articles."""
    draws = torch.randint(len(values), (10_000, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return values.mean().item(), low, high


def growth(static: list[Tensor], dynamic: list[Tensor]) -> Tensor:
    """For each article, how much more is gained in its last third than in its first."""
    gains = [one - other for one, other in zip(static, dynamic, strict=True)]
    return torch.stack([gain[-(len(gain) // 3) :].mean() - gain[: len(gain) // 3].mean() for gain in gains])


def opening(one: list[Tensor], other: list[Tensor], words: int) -> Tensor:
    """For each article after the first, how much lower the other's loss is on the first words."""
    return torch.stack([a[:words].mean() - b[:words].mean() for a, b in zip(one[1:], other[1:], strict=True)])


def learn(corpus: Corpus, sizes: Sizes, seed: int) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """Train a static model, choose constant gates and learn gates; the losses on the test articles, and figures."""
    torch.manual_seed(seed)
    net = pretrain(corpus, sizes)
    plain, decaying, grid = tune(net, corpus, sizes.segment)
    readers = {
        STATIC: constant(net, copy=1, update=0, flush=0),
        PLAIN: constant(net, **plain),
        DECAYING: constant(net, **decaying),
        UNFLUSHED: learn_gates(net, corpus, sizes, plain, seed),
        THREE: learn_gates(net, corpus, sizes, decaying, seed),
    }
    losses = {name: read(reader, corpus, corpus.test, sizes.segment) for name, reader in readers.items()}
    return losses, {
        "articles": {part: [each.title for each in getattr(corpus, part)] for part in ("train", "validation", "test")},
        "chosen": {PLAIN: plain, DECAYING: decaying},
        "grid": grid,
        "gates": {name: {key: leaf.tolist() for key, leaf in readers[name][1]["gates"].items()} for name in FLUSHING},
    }


def judge(folds: list[dict[str, list[Tensor]]], words: int) -> dict[str, Any]:
    """What the losses on the test articles, of one fold or of all, say; printed too."""
    rows = {}
    for name in folds[0]:
        own = [each for losses in folds for each in losses[name]]
        later = [each for losses in folds for each in losses[name][1:]]
        rows[name] = {
            "loss": torch.cat(own).mean().item(),
            "first words": torch.stack([each[:words].mean() for each in later]).mean().item(),
            "growth": interval(torch.cat([growth(losses[STATIC], losses[name]) for losses in folds])),
        }
        mean, low, high = rows[name]["growth"]
        print(
            f"{name:26} loss {rows[name]['loss']:.4f}   first {words} words {rows[name]['first words']:.4f}   "
            f"gain, last third - first: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    flush = {}
    for name, without in FLUSHING.items():
        gained = torch.cat([opening(losses[without], losses[name], words) for losses in folds])
        flush[name] = mean, low, high = interval(gained)
        print(f"gained by FLUSH on the first {words} words, {name}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    return {"rows": rows, "gained by FLUSH on the first words": flush}


def draw(corpus: Corpus, losses: dict[str, list[Tensor]]) -> Figure:
    """Gain over the stream and along articles, and a text whose words are coloured by what was gained on them."""
    picture = Figure(figsize=(12, 8.5), layout="constrained")
    stream, along, text = (picture.add_subplot(place) for place in picture.add_gridspec(3, 1, height_ratios=(2, 2, 3)))
    for name in (DECAYING, UNFLUSHED, THREE):
        gains = [one - other for one, other in zip(losses[STATIC], losses[name], strict=True)]
        smooth = torch.cat(gains).unfold(0, 301, 1).mean(1)
        stream.plot(torch.arange(len(smooth)) + 150, smooth, label=name, linewidth=1)
        tenths = torch.stack([torch.stack([part.mean() for part in gain.tensor_split(10)]) for gain in gains])
        along.plot(torch.arange(10) / 10 + 0.05, tenths.mean(0), marker="o", label=name)
    for end in torch.tensor([len(each) for each in losses[STATIC]]).cumsum(0):
        stream.axvline(int(end), color="black", alpha=0.2, linewidth=0.6)
    stream.set(title="gain over the static model, article after article", xlabel="word", ylabel="nats a word")
    along.set(title="along an article, mean over articles", xlabel="part of the article", ylabel="nats a word")
    along.legend(frameon=False)
    index = max(range(len(corpus.test)), key=lambda each: len(losses[STATIC][each]))
    gain = losses[STATIC][index] - losses[THREE][index]
    text.set_axis_off()
    text.set_title(
        f"the beginning and the end of '{corpus.test[index].title}': gained on green words, lost on red ones"
    )
    for top, part in ((1.0, slice(1, 121)), (0.47, slice(-120, None))):
        paint(text, top, corpus.test[index].words[1:][part], gain[part])
    return picture


def paint(axes: Any, top: float, words: tuple[str, ...], gain: Tensor, wide: int = 170) -> None:
    """Words in lines from the height ``top`` downwards, on a colour for each."""
    from matplotlib import colormaps

    line, column = 0, 0
    for word, each in zip(words, gain.tolist(), strict=True):
        if column + len(word) > wide:
            line, column = line + 1, 0
        colour = colormaps["RdYlGn"](0.5 + max(-0.5, min(0.5, each / 8)))
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        axes.text(column / wide, top - 0.085 * line, word, family="monospace", fontsize=7.5, va="top", bbox=box)
        column += len(word) + 1


def main(
    quick: Annotated[bool, typer.Option(help="A smaller model, shorter articles, one pass.")] = False,
    data: Annotated[
        str, typer.Option(help="pydoc, wikipedia (the extra articles, or --path), wikitext, invented.")
    ] = "pydoc",
    path: Annotated[Path | None, typer.Option(help="A dump of Wikipedia, or the folder of WikiText.")] = None,
    seed: Annotated[int, typer.Option(help="Which articles are held out, and all draws.")] = 0,
    folds: Annotated[int, typer.Option(min=1, help="If over 1, cross-validation: all is done so often.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("dynamic_lm"),
) -> None:
    """Train a static model, learn gates, and compare on held-out articles."""
    if data not in FULL:
        raise typer.BadParameter(f"data is {data!r}, expected one of {', '.join(FULL)}.")
    torch.set_num_threads(1)
    began, sizes = time.perf_counter(), QUICK if quick else FULL[data]
    corpora = load(data, path, sizes, seed, folds)
    tests, parts = [], []
    for number, corpus in enumerate(corpora):
        losses, part = learn(corpus, sizes, seed + number)
        tests.append(losses)
        parts.append(part | judge([losses], sizes.opening))
        if folds > 1:
            print(f"That was fold {number + 1} of {folds}, after {time.perf_counter() - began:.0f} s.", flush=True)
    figures = parts[0] if folds == 1 else judge(tests, sizes.opening) | {"folds": parts}
    about = {"data": data, "sizes": sizes._asdict(), "seconds": time.perf_counter() - began}
    save(out, about | figures, draw(corpora[0], tests[0]))


if __name__ == "__main__":
    typer.run(main)
