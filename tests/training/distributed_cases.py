"""Small meta-trainings in float64, for one process or for several."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.algorithms import Algorithm, dynamic_lm, l2l, maml
from funcmeta.tasks import Article
from funcmeta.training import Folder, Record, Validation, fit

Share = tuple[int, int]


class Case(NamedTuple):
    """What ``fit`` is called with."""

    algorithm: Any
    tasks: Any
    options: dict[str, Any]


CURVES = fm.tasks.sinusoids(dtype=torch.float64)


def squared(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def quadratic(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    W, y = batch
    return (W @ predict.params["theta"] - y).square().sum()


def start(seed: int) -> dict[str, Tensor]:
    return {"theta": torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def momentum(meta: Any) -> torch.optim.Optimizer:
    """An outer optimizer that does not enlarge differences in rounding, as Adam does where gradients vanish."""
    return torch.optim.SGD([leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad], lr=1e-2, momentum=0.9)


def decaying(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def few_shot(**options: Any) -> Algorithm:
    with fm.rng.forked(0):
        net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    return maml.build(net, squared, **{"steps": 4, "lr": 0.01, "strategy": "vmap", **options})


def curves(**options: Any) -> Callable[[Share], Case]:
    return lambda share: Case(few_shot(**options), CURVES, {})


def watched(share: Share) -> Case:
    """Two batches a step, clipped, with a schedule and a validation."""
    held_out = Validation(fm.tasks.sinusoids(shots=7, dtype=torch.float64), every=2, number=5)
    options = {"accumulate": 2, "clip": 0.5, "scheduler": decaying, "validation": held_out}
    return Case(few_shot(), CURVES, options)


def optimizer(**options: Any) -> l2l.L2L:
    with fm.rng.forked(0):
        learned = fm.learned.lstm(hidden=3, layers=1).double()
    fixed = {"steps": (4, 9), "window": 3, "start": start, "strategy": "vmap"}
    return l2l.build(learned, Point(), quadratic, **{**fixed, **options})


def windows(accumulate: int = 1, **options: Any) -> Callable[[Share], Case]:
    tasks = fm.tasks.quadratics(3, dtype=torch.float64)
    return lambda share: Case(optimizer(**options), tasks, {"accumulate": accumulate})


def unlike(share: Share) -> Case:
    """Each process would begin elsewhere, with matrices that are not contiguous."""
    algorithm = optimizer(estimator=fm.Reverse())

    def init() -> Any:
        def own(leaf: Tensor) -> Tensor:
            moved = leaf.detach() + share[0]
            return (moved.t().contiguous().t() if leaf.dim() == 2 else moved).requires_grad_()

        return fm.tree.map(own, algorithm.init())

    return Case(algorithm._replace(init=init), fm.tasks.quadratics(3, dtype=torch.float64), {})


def evolved(share: Share) -> Case:
    """Each process has all tasks and a part of the particles."""
    estimator = fm.EvolutionStrategies(0.01, 4, share=share)
    return Case(few_shot(estimator=estimator), CURVES, {"spread": "particles"})


def persistent(strategy: str) -> Callable[[Share], Case]:
    def case(share: Share) -> Case:
        algorithm = optimizer(estimator=fm.PersistentES(0.01, 4, 2, share=share), strategy=strategy)
        return Case(algorithm, fm.tasks.quadratics(3, dtype=torch.float64), {"spread": "particles"})

    return case


def streams(corpus: Any, articles: list[Article]) -> Any:
    if hasattr(corpus, "streams"):
        return corpus.streams(articles, 8)

    class Streams:
        def sample(self, seed: int) -> fm.Task:
            order = torch.randperm(len(articles), generator=fm.rng.generator(seed)).tolist()
            return corpus.stream([articles[index] for index in order], 8)

    return Streams()


def reading(share: Share) -> Case:
    """Gates of a language model, and its static weights, on streams."""
    articles = [Article(str(size), ("a", "b", "c", "<eos>") * size) for size in (3, 9, 5, 7)]
    corpus = fm.tasks.corpus(articles, articles, articles)
    with fm.rng.forked(0):
        net = dynamic_lm.LanguageModel(len(corpus.vocabulary), 3).double()
        gates = fm.learned.gates(copy=0.99, update=0.1, flush=0.01).double()
    algorithm = dynamic_lm.build(net, gates, window=3, learn_static=True)
    return Case(algorithm, streams(corpus, articles), {})


@dataclass(frozen=True)
class Explosive:
    """Sine curves of which one is no number, in the batches that are told."""

    batches: tuple[int, ...]
    row: int

    def sample(self, seed: int) -> fm.Task:
        return CURVES.sample(seed)

    def sample_batch(self, seed: int, tasks: int) -> fm.Task:
        batch = CURVES.sample_batch(seed, tasks)
        if seed in [fm.rng.fold(0, 0, number) for number in self.batches]:
            batch.support[1][self.row] = torch.nan
        return batch


def exploding(action: Any, accumulate: int = 1) -> Callable[[Share], Case]:
    """The second batch is bad, in the last of the processes."""
    options = {"alarm": fm.training.Alarm(action), "accumulate": accumulate}
    return lambda share: Case(few_shot(), Explosive((1,), row=3), options)


def half_used(share: Share) -> Case:
    """An algorithm of one's own, which uses one of two leaves, or in other batches the other one."""

    def init() -> Any:
        return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, 5.0)]

    def loss(meta: Any, tasks: fm.Task, *, seed: int = 0) -> Tensor:
        return meta[seed == 2].square() + 0 * tasks.support[0].sum()

    return Case(Algorithm(init, loss, lambda meta, task, seed=0, evaluate=False: meta), CURVES, {})


def detached(share: Share) -> Case:
    """An algorithm of one's own that uses no leaf at all."""
    case = half_used(share)

    def loss(meta: Any, tasks: fm.Task, *, seed: int = 0) -> Tensor:
        return tasks.support[0].sum()

    return case._replace(algorithm=case.algorithm._replace(loss=loss))


def misshared(spread: str, own: bool) -> Callable[[Share], Case]:
    """Persistent particles whose share is not that of what is spread."""

    def case(share: Share) -> Case:
        estimator = fm.PersistentES(0.01, 4, 2, share=share if own else (0, 1))
        return Case(optimizer(estimator=estimator), fm.tasks.quadratics(3, dtype=torch.float64), {"spread": spread})

    return case


CASES: dict[str, Callable[[Share], Case]] = {
    "reverse": curves(),
    "segments": curves(memory=fm.Segments(2)),
    "revolve": curves(memory=fm.Revolve(1)),
    "mixed mode": curves(estimator=fm.MixedMode()),
    "one after the other": curves(strategy="loop"),
    "watched": watched,
    "windows": windows(),
    "exact windows": windows(estimator=fm.Reverse(), accumulate=2),
    "truncated": windows(estimator=fm.Truncated(2)),
    "learned start": windows(estimator=fm.Reverse(), start=None, learn_start=True),
    "unlike starts": unlike,
    "evolution strategies": evolved,
    "persistent particles": persistent("vmap"),
    "persistent particles in a loop": persistent("loop"),
    "particles of all tasks": windows(estimator=fm.PersistentES(0.01, 4, 2)),
    "reading": reading,
    "skipping": exploding("skip"),
    "skipping one of two": exploding("skip", accumulate=2),
    "lowering": exploding("lower"),
    "half used": half_used,
}
REFUSED: dict[str, Callable[[Share], Case]] = {
    "stopping": exploding("stop"),
    "detached": detached,
    "parts of particles for parts of tasks": misshared("tasks", own=True),
    "all particles for all tasks": misshared("particles", own=False),
}


def train(
    name: str,
    steps: int,
    share: Share = (0, 1),
    folder: str | Path | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = momentum,
    **more: Any,
) -> dict[str, Any]:
    """What a case leaves: the leaves that were learned, the figures of its steps, and how it ended."""
    case = {**CASES, **REFUSED}[name](share)
    options = {"batch_size": 4, **case.options, **more}
    kept = None if folder is None else Folder(folder, every=3, resume=True)
    try:
        fitted = fit(case.algorithm, case.tasks, optimizer, steps=steps, folder=kept, **options)
    except fm.FuncmetaError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    learned = {name: leaf.detach() for name, leaf in fm.tree.named_leaves(fitted.meta)}
    return {"learned": learned, "figures": figures(fitted.records), "ended": (fitted.ended, fitted.step)}


def figures(records: tuple[Record, ...]) -> Tensor:
    """Loss, norm, rate and validation of each step; NaN where there is none."""
    rows = [
        (record.loss, record.norm, record.rate, record.validation and record.validation.value) for record in records
    ]
    return torch.tensor([[torch.nan if each is None else each for each in row] for row in rows], dtype=torch.float64)


def here() -> Share:
    """Rank and number of ranks, as torchrun gives them."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
