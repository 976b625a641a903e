"""The slopes of the meta-loss along random directions, from its values alone."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta.compare._candidate import Gradient, Setting
from funcmeta.testing import finite_difference
from funcmeta.unroll import unroll

MOST_SHRINKS = 4
"""How often the step of the differences is divided by ten, at most."""


class Slopes(NamedTuple):
    """Directions, the central difference along each, and how far these move when their step shrinks, relative."""

    directions: list[Gradient]
    values: Tensor
    spread: float

    def error(self, gradient: Gradient) -> float:
        """‖g·v − D‖ / ‖D‖ over the directions v with their differences D."""
        computed = [
            sum((gradient[name].double() * by.double()).sum() for name, by in v.items()) for v in self.directions
        ]
        return _relative(torch.tensor(computed, dtype=torch.float64), self.values)


def slopes(setting: Setting, count: int) -> Slopes:
    """Central differences along ``count`` random normal directions, in which a leaf moves in proportion to its size.

    The meta-loss of a net with kinks (ReLU, max-pooling) jumps, because a step's gradient does, and a difference across
    a jump is wild. So the step is shrunk until two differences in a row agree; when rounding comes first, those that
    agree best are taken.
    """
    generator = rng.generator(rng.fold(setting.seed, 3))
    directions = [{name: _direction(leaf, generator) for name, leaf in setting.learned.items()} for _ in range(count)]
    spacing = max(torch.finfo(leaf.dtype).eps for leaf in setting.learned.values())
    eps = spacing ** (1 / 3)
    values = _differences(setting, directions, eps)
    best = Slopes(directions, values, math.inf)
    for _ in range(MOST_SHRINKS):
        eps /= 10
        smaller = _differences(setting, directions, eps)
        spread = _relative(smaller, values)
        if spread < best.spread:
            best = Slopes(directions, values, spread)
        if spread < 10 * math.sqrt(spacing):
            break
        values = smaller
    return best


def _differences(setting: Setting, directions: list[Gradient], eps: float) -> Tensor:
    everything = dict(tree.named_leaves(tree.detach(setting.meta), "meta"))
    spec = tree.flatten(setting.meta)[1]

    def loss(moved: Gradient) -> Tensor:
        meta = tree.unflatten(list((everything | moved).values()), spec)
        with torch.no_grad():
            return unroll(setting.problem, meta, setting.task, steps=setting.steps, seed=setting.seed).loss

    found = [finite_difference(loss, setting.learned, each, eps=eps).item() for each in directions]
    return torch.tensor(found, dtype=torch.float64)


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    size = leaf.detach().double().square().mean().sqrt().item() if leaf.numel() else 0.0
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) * (size or 1.0)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
