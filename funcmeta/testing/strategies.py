"""Hypothesis strategies: parameter trees, smooth losses, inner optimizers and whole problems, in float64.

What is drawn is smooth where it is run, by construction and for some ten steps: each entry of each inner gradient keeps
its sign and a size between 0.3 and 3.5, so roots, absolute values and signs stay away from 0, and clips away from their
threshold.
Hypothesis itself is imported when a strategy is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._errors import MissingExtraError
from funcmeta._gradient import value_and_grad
from funcmeta._typing import Meta, Tree
from funcmeta.optim import Transform, apply_updates
from funcmeta.problem import InnerState, Problem, StepInfo
from funcmeta.tasks import Task
from funcmeta.testing._families import FAMILIES, paired

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "Case",
    "Optimizer",
    "SmoothLoss",
    "optimizers",
    "parameter_trees",
    "problems",
    "smooth_losses",
    "transforms",
]


@dataclass(frozen=True)
class SmoothLoss:
    """A smooth function of a tree whose gradient never vanishes.

    Σ_j c_j θ_j + 0.3 sin(w_j θ_j) + mean over x of √(1 + (Σ_j p_j θ_j - x)²), where 1.5 ≤ |c| ≤ 2, 1 ≤ w ≤ 1.6 and
    |p| ≤ 0.5 follow from the seed; so 0.5 ≤ |∂/∂θ_j| ≤ 3, with one sign, and all parameters interact.

    Args:
        seed: a number from which the coefficients follow.

    Examples:
        >>> loss = SmoothLoss(seed=1)
        >>> loss({"w": torch.ones(2, dtype=torch.float64)}, torch.zeros(3, dtype=torch.float64)).shape
        torch.Size([])

    Source: this library.
    """

    seed: int

    def __call__(self, params: Tree, x: Tensor) -> Tensor:
        """The loss of float64 parameters, given a batch of numbers [n]."""
        parts, projections = [], []
        for index, leaf in enumerate(tree.leaves(params)):
            numbers = torch.as_tensor(_coefficients(self.seed, index, tuple(leaf.shape)), device=leaf.device)
            slope, frequency, projection = numbers.unbind()
            parts.append((slope * leaf + 0.3 * torch.sin(frequency * leaf)).sum())
            projections.append((projection * leaf).sum())
        return torch.stack(parts).sum() + (1 + (torch.stack(projections).sum() - x) ** 2).sqrt().mean()


@dataclass(frozen=True)
class Optimizer:
    """One of the inner optimizers of the library, its options and its hyper-parameters.

    Args:
        name: its key in the table of this module.
        options: keyword arguments that are no hyper-parameters.
        values: the hyper-parameters as numbers, by name.

    Examples:
        >>> optimizer = Optimizer("sgd", (), (("lr", 0.1),))
        >>> isinstance(optimizer.build(optimizer.hypers()), fm.Transform)
        True

    Source: this library.
    """

    name: str
    options: tuple[tuple[str, bool], ...]
    values: tuple[tuple[str, float], ...]

    def hypers(self) -> dict[str, Tensor]:
        """The hyper-parameters as float64 tensors, by name."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values}

    def build(self, hypers: Mapping[str, Any]) -> Transform:
        """The transform with these hyper-parameters."""
        return FAMILIES[self.name].make(**paired(hypers), **dict(self.options))


class Case(NamedTuple):
    """A problem with what it is run on: ``unroll(*case, steps=...)``.

    Attributes:
        problem: its state is an ``InnerState``; the optimizer's hyper-parameters are learned.
        meta: {"params": tree, "hypers": dict}; every leaf requires grad.
        task: batches of numbers, [n] or [tasks, n]; the support may be a function of the step.

    Examples:
        >>> Case(None, {}, None).meta
        {}

    Source: this library.
    """

    problem: Problem
    meta: Meta
    task: Task


def parameter_trees(*, max_leaves: int = 3) -> SearchStrategy[Tree]:
    """Trees of float64 tensors: dicts, lists and tuples in each other, with 0-d, empty and larger leaves.

    Args:
        max_leaves: about how many leaves a tree has at most.

    Returns:
        A strategy for trees with entries in [-1, 1], and at least one of them.

    Raises:
        MissingExtraError: Hypothesis is not installed.

    Examples:
        >>> strategy = parameter_trees(max_leaves=2)

    Source: this library.
    """
    st = _hypothesis()
    shapes = st.lists(st.integers(0, 3), max_size=2)
    leaves = shapes.map(lambda shape: torch.zeros(shape, dtype=torch.float64))

    def extend(children: Any) -> Any:
        several = st.lists(children, min_size=1, max_size=2)
        return several | several.map(tuple) | st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=2)

    trees = st.recursive(leaves, extend, max_leaves=max_leaves).filter(lambda tree_: _entries(tree_) > 0)
    return st.builds(_filled, trees, _seeds())  # type: ignore[no-any-return]


def smooth_losses() -> SearchStrategy[SmoothLoss]:
    """Smooth losses whose gradient never vanishes.

    Returns:
        A strategy for ``SmoothLoss``.

    Raises:
        MissingExtraError: Hypothesis is not installed.

    Examples:
        >>> strategy = smooth_losses()

    Source: this library.
    """
    return _hypothesis().builds(SmoothLoss, _seeds())  # type: ignore[no-any-return]


def optimizers(*names: str) -> SearchStrategy[Optimizer]:
    """Every inner optimizer of the library, with drawn options and hyper-parameters.

    Args:
        *names: keys of the table of this module to draw from; none for all.

    Returns:
        A strategy for ``Optimizer``, smooth in gradients as those of ``SmoothLoss``.

    Raises:
        MissingExtraError: Hypothesis is not installed.

    Examples:
        >>> strategy = optimizers("sgd", "adam")

    Source: this library.
    """
    st = _hypothesis()

    def drawn(name: str) -> Any:
        family = FAMILIES[name]
        options = st.tuples(*[st.tuples(st.just(option), st.booleans()) for option in family.options])
        values = st.tuples(*[st.tuples(st.just(key), st.floats(*ends)) for key, ends in family.hypers.items()])
        return st.builds(Optimizer, st.just(name), options, values)

    return st.sampled_from(names or tuple(FAMILIES)).flatmap(drawn)  # type: ignore[no-any-return]


def transforms() -> SearchStrategy[Transform]:
    """Every inner optimizer of the library as a finished transform.

    Returns:
        A strategy for ``Transform``; its hyper-parameters are float64 tensors without grad.

    Raises:
        MissingExtraError: Hypothesis is not installed.

    Examples:
        >>> strategy = transforms()

    Source: this library.
    """
    return optimizers().map(lambda optimizer: optimizer.build(optimizer.hypers()))


def problems(*, tasks: int | None = None, optimizer: SearchStrategy[Optimizer] | None = None) -> SearchStrategy[Case]:
    """Whole problems: a parameter tree trained on a smooth loss by some inner optimizer, judged by another loss.

    Args:
        tasks: number of stacked tasks, for ``unroll_batch``; None for one task.
        optimizer: a strategy for the inner optimizer; default ``optimizers()``.

    Returns:
        A strategy for ``Case``; the meta-loss may have shares of the steps, the inner loss may read ``meta``, and the
        support may depend on the step.

    Raises:
        MissingExtraError: Hypothesis is not installed.

    Examples:
        >>> strategy = problems(tasks=2)

    Source: this library.
    """
    st = _hypothesis()
    chosen = optimizers() if optimizer is None else optimizer
    training = st.builds(_Training, smooth_losses(), smooth_losses(), chosen, st.booleans(), st.booleans())
    return st.builds(_case, training, parameter_trees(), st.just(tasks), st.booleans(), _seeds())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Training:
    """The three functions of a problem, as methods so that a failing example prints what it is made of."""

    loss: SmoothLoss
    judge: SmoothLoss
    optimizer: Optimizer
    shares: bool
    coupled: bool

    def init(self, meta: Meta, task: Task, seed: int) -> InnerState:
        state = self.optimizer.build(meta["hypers"]).init(meta["params"])
        return InnerState(meta["params"], {}, state, torch.zeros((), dtype=torch.int64))

    def inner_loss(self, meta: Meta, params: Tree, batch: Tensor) -> Tensor:
        """The loss; when coupled with a term of the initial parameters, too small to turn a gradient around."""
        loss = self.loss(params, batch)
        return loss + 0.05 * tree.dot(params, meta["params"]) if self.coupled else loss

    def step(self, meta: Meta, state: InnerState, batch: Tensor, seed: int) -> tuple[InnerState, StepInfo]:
        loss, grads = value_and_grad(lambda params: self.inner_loss(meta, params, batch))(state.params)
        transform = self.optimizer.build(meta["hypers"])
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        following = InnerState(apply_updates(state.params, updates), {}, opt_state, state.step + 1)
        return following, StepInfo(loss, 0.1 * loss if self.shares else None)

    def meta_loss(self, meta: Meta, state: InnerState, query: Tensor, seed: int) -> Tensor:
        return self.judge(state.params, query)


def _case(training: _Training, params: Tree, tasks: int | None, moving: bool, seed: int) -> Case:
    """Put a case together."""
    shape = (2, 3) if tasks is None else (2, tasks, 3)
    x = 4 * torch.rand(shape, generator=rng.generator(seed), dtype=torch.float64) - 2
    meta = {"params": params, "hypers": training.optimizer.hypers()}
    return Case(
        Problem(training.init, training.step, training.meta_loss),
        tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), meta),
        Task((lambda step: x[0] + 0.1 * step) if moving else x[0], x[1]),
    )


@cache
def _coefficients(seed: int, index: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Slopes, frequencies and projections of one leaf; numbers of NumPy, which torch.func does not wrap."""
    slope, sign, frequency, projection = np.random.default_rng([seed, index]).random((4, *shape))
    return np.stack([np.where(sign < 0.5, -1, 1) * (1.5 + slope / 2), 1 + 0.6 * frequency, projection - 0.5])


def _filled(shapes: Tree, seed: int) -> Tree:
    """The tree with entries in [-1, 1]."""
    generator = rng.generator(seed)
    return tree.map(lambda leaf: 2 * torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype) - 1, shapes)


def _entries(shapes: Tree) -> int:
    return sum(leaf.numel() for leaf in tree.leaves(shapes))


def _seeds() -> Any:
    return _hypothesis().integers(0, 999)


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise MissingExtraError(
            "Hypothesis, which draws the examples, is not installed; it comes with the extra funcmeta[test]. "
            'Run pip install ".[test]" in a checkout of funcmeta.'
        ) from error
    return strategies
