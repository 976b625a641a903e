"""From settings to an algorithm and its tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcmeta import learned, rng, tree
from funcmeta._errors import ArgumentError, DataError
from funcmeta._typing import Meta
from funcmeta.algorithms import anil, dynamic_lm, l2l, maml, meta_lstm, meta_sgd, reptile
from funcmeta.cli._settings import Settings
from funcmeta.cli._subject import Apart, Subject, subject
from funcmeta.estimators import (
    Estimator,
    EvolutionStrategies,
    FirstOrder,
    MixedMode,
    PersistentES,
    Reverse,
    Truncated,
)
from funcmeta.memory import Memory, Revolve, Segments, StoreAll
from funcmeta.optim import sgd
from funcmeta.problem import InnerLoss, Predict
from funcmeta.tasks import Task, pydoc_articles, quadratics, split, wikipedia_articles, wikitext_articles
from funcmeta.tasks import corpus as corpus_of
from funcmeta.training import autocast, load, save
from funcmeta.training._carries import Spread
from funcmeta.training._objective import Score
from funcmeta.training._ranks import Ranks

STATIC = "static.safetensors"
"""The file in a run's folder with the language model that ``dynamic_lm`` begins with."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how it is judged."""

    title: str
    algorithm: Any
    tasks: Callable[[str], Any]
    score: Score | None
    score_name: str
    higher_is_better: bool = False
    spread: Spread = "tasks"
    most: dict[str, int] | None = None

    def number(self, part: str, wanted: int) -> int:
        """How many tasks there are to judge on, if so many are wanted."""
        return wanted if self.most is None else min(wanted, self.most[part])


def recipe(settings: Settings, folder: Path, ranks: Ranks) -> Recipe:
    """The recipe that settings describe. A language model is trained first, and kept in the folder.

    Raises:
        ArgumentError: a setting that does not go with the others.
        DataError: the data are not there.
    """
    if settings.algorithm == "l2l":
        return _learned_optimizer(settings, ranks)
    if settings.algorithm == "dynamic_lm":
        return _language_model(settings, folder, ranks)
    return _few_shot(settings, ranks)


def estimator(settings: Settings, ranks: Ranks) -> Estimator:
    """The estimator that a setting names."""
    name, *numbers = settings.estimator.split(":")
    share = (ranks.rank, ranks.number)
    makers: dict[str, tuple[Callable[..., Estimator], str]] = {
        "second": (Reverse, "second"),
        "first": (FirstOrder, "first"),
        "mixed": (MixedMode, "mixed"),
        "truncated": (lambda length: Truncated(int(length)), "truncated:STEPS"),
        "es": (lambda sigma, pairs: EvolutionStrategies(float(sigma), int(pairs), share=share), "es:SIGMA:PAIRS"),
        "pes": (
            lambda sigma, pairs: PersistentES(float(sigma), int(pairs), settings.window, share=share),
            "pes:SIGMA:PAIRS",
        ),
    }
    return _made("estimator", settings.estimator, name, numbers, makers)  # type: ignore[no-any-return]


def memory(settings: Settings) -> Memory:
    """The memory policy that a setting names."""
    name, *numbers = settings.memory.split(":")
    makers: dict[str, tuple[Callable[..., Memory], str]] = {
        "store": (StoreAll, "store"),
        "segments": (lambda length=None: Segments(length and int(length)), "segments[:LENGTH]"),
        "revolve": (lambda snapshots: Revolve(int(snapshots)), "revolve:SNAPSHOTS"),
    }
    return _made("memory", settings.memory, name, numbers, makers)  # type: ignore[no-any-return]


def _made(setting: str, value: str, name: str, numbers: list[str], makers: dict[str, Any]) -> Any:
    try:
        return makers[name][0](*numbers)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        forms = ", ".join(form for _, form in makers.values())
        raise ArgumentError(f"{setting} is '{value}', expected one of {forms}. Pass one of them.") from error


def _dtype(settings: Settings) -> torch.dtype:
    return torch.float64 if settings.dtype == "float64" else torch.float32


def _loss(settings: Settings, loss_fn: InnerLoss) -> InnerLoss:
    return autocast(loss_fn, torch.bfloat16) if settings.dtype == "bfloat16" else loss_fn


def _few_shot(settings: Settings, ranks: Ranks) -> Recipe:
    topic: Subject = subject(
        settings.tasks,
        settings.model,
        ways=settings.ways,
        shots=settings.shots,
        queries=settings.queries,
        size=settings.size,
        filters=settings.filters,
        seed=settings.seed,
    )
    net, loss = topic.net.to(_dtype(settings)), _loss(settings, topic.loss)
    common: dict[str, Any] = {"steps": settings.inner_steps, "strategy": settings.strategy}
    spread: Spread = "tasks"
    if settings.algorithm == "reptile":
        algorithm = reptile.build(net, loss, optimizer=sgd(settings.inner_lr), **common)
    else:
        spread = _spread(settings)
        common |= {"estimator": estimator(settings, ranks), "memory": memory(settings)}
        if settings.algorithm == "meta_lstm":
            with rng.forked(rng.fold(settings.seed, 20)):
                algorithm = meta_lstm.build(net, loss, **common)
        elif settings.algorithm == "anil":
            algorithm = anil.build(net, loss, head="head", lr=settings.inner_lr, **common)
        else:
            build = maml.build if settings.algorithm == "maml" else meta_sgd.build
            algorithm = build(net, loss, lr=settings.inner_lr, **common)

    def score(predict: Predict, task: Task) -> Tensor:
        x, y = task.query  # type: ignore[misc]
        return topic.score(predict(x), y)

    return Recipe(
        f"{settings.algorithm} on {topic.title}",
        algorithm,
        lambda part: topic.sampler(part, _dtype(settings)),
        score,
        topic.score_name,
        topic.higher_is_better,
        spread,
    )


def _spread(settings: Settings) -> Spread:
    return "particles" if settings.estimator.partition(":")[0] in ("es", "pes") else "tasks"


class _Point(nn.Module):
    """A vector that a function is minimized by."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))


_KINDS = ("linear", "lstm", "rnnprop", "mlp", "hierarchical")


def _learned_optimizer(settings: Settings, ranks: Ranks) -> Recipe:
    if settings.tasks != "quadratics":
        raise ArgumentError(f"tasks is '{settings.tasks}', expected quadratics for l2l. Others: algorithms.l2l.build.")
    if settings.optimizer not in _KINDS:
        raise ArgumentError(f"optimizer is '{settings.optimizer}', expected one of {', '.join(_KINDS)}. Name one.")
    dimension, dtype = 10, _dtype(settings)
    with rng.forked(rng.fold(settings.seed, 21)):
        optimizer = getattr(learned, settings.optimizer)().to(dtype)

    def loss(meta: Meta, predict: Predict, batch: Any) -> Tensor:
        W, y = batch
        residual: Tensor = W @ predict.params["theta"] - y
        return residual.square().sum()

    def start(seed: int) -> dict[str, Tensor]:
        return {"theta": torch.randn(dimension, generator=rng.generator(seed), dtype=torch.float64).to(dtype)}

    algorithm = l2l.build(
        optimizer,
        _Point(dimension).to(dtype),
        _loss(settings, loss),
        steps=settings.inner_steps,
        window=settings.window,
        start=start,
        estimator=estimator(settings, ranks),
        memory=memory(settings),
        strategy=settings.strategy,  # type: ignore[arg-type]
    )
    return Recipe(
        f"l2l, {settings.optimizer} on quadratics in {dimension} dimensions",
        algorithm,
        lambda part: Apart(quadratics(dimension, dtype=dtype), part),
        lambda predict, task: loss({}, predict, task.query),
        "loss at the end",
        spread=_spread(settings),
    )


def _language_model(settings: Settings, folder: Path, ranks: Ranks) -> Recipe:
    kind, _, path = settings.tasks.partition(":")
    if kind == "wikitext" and path:
        valid, test = _wikitext_files(Path(path))
        known = wikitext_articles(valid)
        parts = (*split(known, validation=len(known) // 4, test=0, seed=settings.seed)[:2], wikitext_articles(test))
    elif kind in ("pydoc", "wikipedia") and not (kind == "pydoc" and path):
        known = pydoc_articles() if kind == "pydoc" else wikipedia_articles(Path(path) if path else None)
        share = len(known) // 4
        parts = split(known, validation=share, test=share, seed=settings.seed)
    else:
        raise ArgumentError(
            f"tasks is '{settings.tasks}', expected pydoc, wikipedia, wikipedia:DUMP or wikitext:FOLDER for "
            f"dynamic_lm. Pass one of them."
        )
    if settings.dtype == "bfloat16":
        raise ArgumentError("dtype is 'bfloat16', which does not go with dynamic_lm. Pass float32 or float64.")
    if settings.estimator.partition(":")[0] in ("es", "pes"):
        raise ArgumentError(f"estimator is '{settings.estimator}', which does not go with dynamic_lm. Pass first.")
    if len(parts[1]) < 3 or len(parts[2]) < 2:
        raise DataError(
            f"tasks is '{settings.tasks}', which has {len(parts[1])} articles to train the gates on and to validate "
            f"with, and {len(parts[2])} to be judged on, expected at least 3 and 2. Pass data with more articles: a "
            f"quarter of those in a dump, or in the file valid, is for the gates."
        )
    corpus = corpus_of(*parts, vocabulary=settings.vocabulary)
    net = _static(settings, corpus, folder, ranks).to(_dtype(settings))
    with rng.forked(rng.fold(settings.seed, 22)):
        gates = learned.gates(copy=0.998, update=0.4, flush=0.002).to(_dtype(settings))
    algorithm = dynamic_lm.build(
        net, gates, window=settings.window, estimator=estimator(settings, ranks), memory=memory(settings)
    )
    third = max(2, len(corpus.validation) // 3)
    articles = {
        "train": corpus.validation[:-third],
        "validation": corpus.validation[-third:],
        "test": corpus.test,
    }
    return Recipe(
        f"dynamic_lm on {kind}",
        algorithm,
        lambda part: corpus.streams(articles[part], settings.segment),
        None,
        "nats a word",
        most={part: len(each) for part, each in articles.items()},
    )


def _wikitext_files(folder: Path) -> tuple[Path, Path]:
    """The files of a folder of WikiText that are read: for validation and for the test."""
    forms = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
    for form in forms:
        valid, test = (folder / form.format(part) for part in ("valid", "test"))
        if valid.is_file() and test.is_file():
            return valid, test
    listed = ", or ".join(f"{form.format('valid')} and {form.format('test')}" for form in forms)
    raise DataError(
        f"{folder} has no two files of WikiText, expected {listed}. Pass the folder of wikitext-2-v1 or "
        f"wikitext-103-v1, as it is unpacked."
    )


def _static(settings: Settings, corpus: Any, folder: Path, ranks: Ranks) -> nn.Module:
    """The language model, trained as usual by the first process, or as the folder has it."""
    with rng.forked(rng.fold(settings.seed, 23)):
        net = dynamic_lm.LanguageModel(len(corpus.vocabulary), settings.width, dropout=0.3)
        file = folder / STATIC
        if ranks.rank == 0 and not file.exists():
            text = [torch.cat([corpus.tokens(each) for each in part]) for part in (corpus.train, corpus.validation)]
            for _ in dynamic_lm.train_static(net, *text, epochs=settings.static_epochs):
                pass
            save(dict(net.named_parameters()), file)
    ranks.gathered(None)
    found = load(file)
    own = dict(net.named_parameters())
    tree.check_same(own, found, name=str(file), advice="Remove it, and it is made again.")
    with torch.no_grad():
        for name, leaf in own.items():
            leaf.copy_(found[name])
    return net
