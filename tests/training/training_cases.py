"""Small meta-trainings of each kind, which end on the same bytes each time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.algorithms import dynamic_lm, l2l, maml
from funcmeta.tasks import Article
from funcmeta.training import Validation


class Case(NamedTuple):
    """What ``fit`` is called with."""

    algorithm: Any
    tasks: Any
    options: dict[str, Any]


def squared(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(10))


def quadratic(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    W, y = batch
    return (W @ predict.params["theta"] - y).square().sum()


def start(seed: int) -> dict[str, Tensor]:
    return {"theta": torch.randn(10, generator=torch.Generator().manual_seed(seed))}


def adam(meta: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad], lr=1e-2)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)


def few_shot(**options: Any) -> Case:
    """MAML with dropout, on sine curves."""
    with fm.rng.forked(0):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    algorithm = maml.build(net, squared, steps=2, lr=0.01, strategy="vmap", **options)
    held_out = Validation(fm.tasks.sinusoids(shots=7), every=3, number=2)
    return Case(algorithm, fm.tasks.sinusoids(), {"scheduler": cosine, "clip": 5.0, "validation": held_out})


def windows(**options: Any) -> Case:
    """A learned optimizer on quadratics, trainings of random lengths in windows."""
    with fm.rng.forked(0):
        optimizer = fm.learned.hierarchical(coordinate=4, tensor=3)
    algorithm = l2l.build(
        optimizer, Point(), quadratic, steps=(4, 14), window=4, start=start, strategy="vmap", **options
    )
    return Case(algorithm, fm.tasks.quadratics(), {"accumulate": 2})


def particles(**options: Any) -> Case:
    """The same, by persistent evolution strategies."""
    return windows(estimator=fm.PersistentES(0.01, 4, 4), **options)


def reading(**options: Any) -> Case:
    """Gates of a language model, on invented articles."""
    articles = [Article(str(size), ("a", "b", "c", "<eos>") * size) for size in (3, 9, 5, 7)]
    corpus = fm.tasks.corpus(articles, articles, articles)
    with fm.rng.forked(0):
        net = dynamic_lm.LanguageModel(len(corpus.vocabulary), 4)
        gates = fm.learned.gates(copy=0.99, update=0.1, flush=0.01)
    algorithm = dynamic_lm.build(net, gates, window=3, **options)
    return Case(algorithm, corpus.streams(articles, 5), {"batch_size": 2})


class Down(NamedTuple):
    """An algorithm that lowers a number by the learning rate of SGD in each step."""

    init: Any
    loss: Any
    adapt: Any


def down() -> Down:
    return Down(
        lambda: torch.tensor(3.0, requires_grad=True),
        lambda meta, tasks, seed=0: meta + 0 * tasks.support[0].sum(),
        lambda meta, task, seed=0, evaluate=False: meta,
    )


def sgd(meta: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([meta], lr=1.0)


KINDS = {"few shot": few_shot, "windows": windows, "particles": particles, "reading": reading}
