"""Articles, language models that learn while they read, and loaders of files with bytes changed."""

import bz2
import io
import math
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from fuzzing import Draw, Refused, attempt, close, either, fuzz, junk, tensor
from hypothesis import strategies as st
from PIL import Image

import funcmeta as fm
from funcmeta import tasks
from funcmeta.algorithms import dynamic_lm
from funcmeta.tasks import Article, corpus

SMALL_JUNK = junk().filter(lambda value: not isinstance(value, int) or value < 9)
WORDS = ("<unk>", "<eos>", "a", "b", "c", "=")


def an_article(draw: Draw) -> Any:
    words = tuple(draw(st.lists(st.sampled_from(WORDS), max_size=9)))
    odd = st.one_of(junk(), st.just(Article("x", 3)), st.just(Article("x", (1, None))))  # type: ignore[arg-type]
    return either(draw, Article(draw(st.sampled_from(["x", "", "y"])), words), odd, 40)


def articles(draw: Draw, most: int = 4) -> Any:
    return either(draw, [an_article(draw) for _ in range(draw(st.integers(0, most)))], junk(), 20)


@fuzz()
def test_splits_corpora_and_streams(draw: Draw) -> None:
    some = articles(draw, 6)
    validation, test = (either(draw, st.integers(0, 2), SMALL_JUNK, 10) for _ in range(2))
    seed = either(draw, st.integers(0, 9), junk(), 12)
    parts = attempt(lambda: tasks.split(some, validation=validation, test=test, seed=seed), some)
    if not isinstance(parts, Refused):
        assert [len(part) for part in parts] == [len(some) - validation - test, validation, test]
        assert sorted(id(each) for part in parts for each in part) == sorted(map(id, some))
    size = either(draw, st.integers(2, 7), SMALL_JUNK, 10)
    made = attempt(lambda: corpus(some, some, [], vocabulary=size), some)
    if isinstance(made, Refused):
        return
    assert len(made.vocabulary) <= size
    length = either(draw, st.integers(1, 4), SMALL_JUNK, 10)
    stream = attempt(lambda: made.stream(some, length), some)
    if isinstance(stream, Refused):
        return
    whole = [torch.cat([made.tokens(each)[:-1] for each in some])] if some else []
    read = [stream.support(step)[0] for step in range(len(stream.spec))]
    assert torch.cat([*read, torch.zeros(0).long()]).tolist() == [number for part in whole for number in part.tolist()]
    shuffled = attempt(lambda: made.streams(some, length).sample(seed), some)
    if not isinstance(shuffled, Refused):
        assert len(shuffled.spec) == len(stream.spec)


@fuzz(cost=4)
def test_language_models_that_learn_while_they_read(draw: Draw) -> None:
    torch.manual_seed(0)
    sizes = [either(draw, st.integers(1, 3), SMALL_JUNK, 12) for _ in range(2)]
    generators = torch.get_rng_state()

    def made() -> Any:
        try:
            return dynamic_lm.LanguageModel(2 + sizes[0] if type(sizes[0]) is int else sizes[0], sizes[1])
        finally:
            torch.set_rng_state(generators)  # initial weights are drawn, as those of a module of torch

    net = attempt(made)
    net = dynamic_lm.LanguageModel(6, 2) if isinstance(net, Refused) or draw(st.booleans()) else net
    gates = either(draw, fm.learned.gates(), junk(), 15)
    keys = {
        "window": either(draw, st.integers(2, 3), SMALL_JUNK, 10),
        "learn_static": either(draw, st.booleans(), junk(), 10),
        "estimator": either(draw, st.sampled_from([fm.FirstOrder(), fm.Reverse()]), junk(), 10),
        "memory": either(draw, fm.StoreAll(), junk(), 15),
    }
    algorithm = attempt(lambda: dynamic_lm.build(either(draw, net, junk(), 20), gates, **keys), net, keys)
    if isinstance(algorithm, Refused):
        return
    meta = either(draw, algorithm.init(), junk(), 15)
    size = net.embedding.num_embeddings if hasattr(net, "embedding") else 3
    words = torch.arange(7) % min(size, 3)
    batch = either(draw, (words[:-1], words[1:]), st.one_of(junk(), st.just((words[:-1], words))), 10)
    task = either(draw, fm.Task(lambda step: batch, None, (0,) * draw(st.integers(0, 4))), junk(), 12)
    carry = either(draw, None, junk(), 12)
    out = attempt(lambda: algorithm.loss(meta, task, carry=carry), meta, task)
    reading = attempt(lambda: algorithm.adapt(meta, task, carry=carry), meta, task)
    if not isinstance(out, Refused):
        assert bool(out.loss.isfinite())
        assert out.loss.requires_grad
    if not isinstance(reading, Refused) and not isinstance(out, Refused) and len(reading.losses) == out.carry.step:
        close(torch.stack([each.mean() for each in reading.losses]).mean(), out.loss.detach(), 1e-5)


@fuzz(cost=4)
def test_static_training(draw: Draw) -> None:
    torch.manual_seed(0)
    net = either(draw, dynamic_lm.LanguageModel(3, 2), junk(), 12)
    texts = [either(draw, torch.arange(9) % 3, st.one_of(junk(), st.just(torch.arange(9))), 10) for _ in range(2)]
    keys = {name: either(draw, st.integers(1, 3), SMALL_JUNK, 10) for name in ("epochs", "rows", "length")}
    keys["lr"] = either(draw, 0.01, junk(), 10)
    losses = attempt(lambda: list(dynamic_lm.train_static(net, *texts, **keys)), *texts)
    if not isinstance(losses, Refused):
        assert len(losses) == keys["epochs"]
        assert math.isfinite(min(losses))


def damaged(draw: Draw, content: bytes) -> bytes:
    """The content with some bytes changed, cut off or repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(changed) - 1))
        kind = draw(st.sampled_from(["byte", "byte", "byte", "cut", "twice"]))
        if kind == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif kind == "twice":
            changed = changed[:place] + changed
        else:
            changed = changed[: place + 1]
    return bytes(changed)


def a_drawing() -> bytes:
    content = io.BytesIO()
    Image.new("1", (105, 105), 1).save(content, "PNG")
    return content.getvalue()


def a_zip(*, stored: bool) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for character in (1, 2):
            for drawer in (1, 2):
                name = f"images_background/Latin/character0{character}/000{character}_0{drawer}.png"
                archive.writestr(name, DRAWING)
    return content.getvalue()


DRAWING = a_drawing()
ZIPS = [a_zip(stored=True), a_zip(stored=False)]
WIKITEXT = b" \n = One = \n \n a b c \n \n = Two = \n \n d e f <unk> \n"
DUMP = (
    b"<mediawiki><page><title>One</title><ns>0</ns><revision><text>'''One''' is {{a|b}} [[c|d]] <ref>e</ref>.\n"
    b"== F ==\n* g\n{| h\n|}</text></revision></page></mediawiki>"
)


@fuzz(cost=2)
def test_damaged_files_of_omniglot(draw: Draw) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images_background.zip"
        path.write_bytes(damaged(draw, draw(st.sampled_from(ZIPS))))
        keys = {name: either(draw, 1, SMALL_JUNK, 15) for name in ("ways", "shots", "queries")}
        split = either(draw, "train", st.one_of(st.just("test"), junk()), 10)
        sampler = attempt(lambda: tasks.omniglot(either(draw, folder, path, 2), split=split, **keys), keys)
        if isinstance(sampler, Refused):
            return
        task = attempt(lambda: sampler.sample(0))
        if not isinstance(task, Refused):
            assert task.support[0].shape == (1, 1, 28, 28)
            assert bool(((task.support[0] >= 0) & (task.support[0] <= 1)).all())


@fuzz()
def test_damaged_files_of_articles(draw: Draw) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        least = either(draw, 0, st.one_of(st.integers(0, 9), junk()), 6)
        kind = draw(st.sampled_from(["wikitext", "markup", "dump"]))
        if kind == "wikitext":
            path.write_bytes(damaged(draw, WIKITEXT))
            found = attempt(lambda: tasks.wikitext_articles(path, least=least))
        else:
            path.write_bytes(
                bz2.compress(damaged(draw, DUMP)) if kind == "markup" else damaged(draw, bz2.compress(DUMP))
            )
            found = attempt(lambda: tasks.wikipedia_articles(path, least=least))
        if not isinstance(found, Refused):
            assert found
            assert all(isinstance(word, str) and word for article in found for word in article.words)


@fuzz(cost=4)
def test_optimizers_are_evaluated(draw: Draw) -> None:
    def squares(meta: Any, predict: Any, batch: Any) -> Any:
        x, y = batch
        return ((predict(x) - y) ** 2).mean()

    net = either(draw, torch.nn.Linear(1, 1), junk(), 20)
    sampler = either(draw, tasks.sinusoids(2, 2), junk(), 20)
    course = fm.Course(net, either(draw, squares, junk(), 20), sampler, either(draw, 2, SMALL_JUNK, 12))
    course = either(draw, course, junk(), 15)
    optimizer = either(draw, st.sampled_from([fm.learned.linear(), fm.optim.sgd(0.1), fm.optim.adam]), junk(), 8)
    keys = {
        "rates": either(draw, (0.01, 0.1), st.one_of(junk(), st.just([0.1, "a"])), 10),
        "tasks": either(draw, 2, SMALL_JUNK, 12),
        "tuning_tasks": either(draw, 2, SMALL_JUNK, 12),
        "seed": either(draw, 0, junk(), 12),
        "strategy": either(draw, st.sampled_from(["vmap", "loop"]), junk(), 12),
        "baselines": either(draw, {}, st.one_of(junk(), st.just({"b": 3})), 12),
    }
    optimizers = either(draw, {"o": optimizer}, junk(), 12)
    out = attempt(lambda: fm.evaluate_optimizers(optimizers, {"c": course}, **keys), keys)
    if not isinstance(out, Refused):
        assert out.curves["c", "o"].shape == (3, 2)


@fuzz(cost=4)
def test_transforms_are_checked(draw: Draw) -> None:
    params = either(
        draw, {"w": tensor(draw, [(2,), (0,), ()], [torch.float64, torch.float64, torch.float32])}, junk(), 8
    )
    rate = either(draw, torch.tensor(0.1, dtype=torch.float64), st.one_of(junk(), st.just(())), 6)
    transform = either(
        draw, st.sampled_from([fm.optim.sgd, fm.optim.adagrad]), st.one_of(junk(), st.just(fm.optim.sgd(1.0))), 6
    )
    keys = {"steps": either(draw, 1, SMALL_JUNK, 8), "seed": either(draw, 0, junk(), 10)}
    found = attempt(lambda: fm.check_transform(transform, params, hypers=rate, **keys), params, rate)
    if not isinstance(found, Refused):
        assert all(each.error < 1e-5 for each in found)
