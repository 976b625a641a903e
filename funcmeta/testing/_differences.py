"""Derivatives from values: central differences along a direction, and their comparison with computed gradients."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._check import is_number
from funcmeta._errors import ArgumentError, LossError, StructureError
from funcmeta._typing import Tree

_WEIGHTS = {2: (1 / 2,), 4: (2 / 3, -1 / 12), 6: (3 / 4, -3 / 20, 1 / 60)}
"""By order: the weights of fn(+h) - fn(-h), fn(+2h) - fn(-2h), ..."""

_ROUNDING = 64
"""How many units in the last place a value of a function may be off, in the estimate of the noise of differences."""


def finite_difference(
    fn: Callable[[Tree], Tensor | float], tree: Tree, direction: Tree, *, eps: float | None = None, order: int = 2
) -> Tensor:
    """The derivative of a function of a tree along a direction, from values alone.

    d/dt fn(tree + t · direction) at t = 0 by central differences, with an error of O(eps^order) where ``fn`` is smooth.
    The function sees detached copies, so nothing of the caller's is changed and no graph grows.

    Args:
        fn: from a tree to a 0-d tensor or a number; called ``order`` times.
        tree: where the derivative is taken, a tree of floating-point tensors.
        direction: a tree like ``tree``, with the same shapes, dtypes and devices.
        eps: the step in t. Default: u^(1 / (order + 1)) · max|tree| / max|direction|, where u is the spacing of the
            dtype at 1 and the maximum of the tree goes over the leaves that move; it counts 1 where it is 0, and 1e-3
            where it is less.
        order: 2, 4 or 6.

    Returns:
        The derivative, a 0-d tensor without a graph.

    Raises:
        ArgumentError: ``order`` is none of these, or ``eps`` not a positive number.
        StructureError: the trees do not agree, or a leaf is not a floating-point tensor.
        LossError: ``fn`` returned something else than one number.

    Examples:
        >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> direction = {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}
        >>> finite_difference(lambda p: (p["w"] ** 3).sum(), params, direction, order=4)
        tensor(3.0000, dtype=torch.float64)

    Source:
        Fornberg 1988 (Mathematics of Computation 51), table 1; Nocedal and Wright 2006, Numerical Optimization,
        section 8.1, for the size of the step.
    """
    _check_trees(tree, direction)
    check_order(order)
    if eps is None:
        eps = default_step(tree, direction, order)
    elif not is_number(eps) or not 0 < eps < math.inf:
        raise ArgumentError(f"eps is {eps!r}, expected a positive number. Leave it out, or pass e.g. eps=1e-5.")
    return _difference(fn, tree, direction, eps, order)


def check_order(order: Any) -> None:
    """Raise unless there is a difference of this order."""
    if type(order) is not int or order not in _WEIGHTS:
        raise ArgumentError(f"order is {order!r}, expected one of {list(_WEIGHTS)}. Pass one of them.")


def default_step(at: Tree, direction: Tree, order: int) -> float:
    """The step in t that balances the error of the formula against rounding."""
    pairs = zip(tree.leaves(at), tree.aligned(at, direction), strict=True)
    moved = [(_scale(leaf), _largest(by), torch.finfo(leaf.dtype).eps) for leaf, by in pairs if by.any()]
    if not moved:
        return 1.0
    scales, lengths, spacings = zip(*moved, strict=True)
    return float(max(spacings) ** (1 / (order + 1)) * max(scales) / max(lengths))


def _difference(fn: Callable[[Tree], Any], at: Tree, direction: Tree, eps: float, order: int) -> Tensor:
    def value(t: float) -> Tensor:
        return _number(fn(tree.map(lambda leaf, by: leaf.detach() + t * by.detach(), at, direction)))

    differences = [
        weight * (value(number * eps) - value(-number * eps)) / eps for number, weight in enumerate(_WEIGHTS[order], 1)
    ]
    return torch.stack(differences).sum()


def _number(value: Any) -> Tensor:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        raise LossError(
            f"fn returned {tree.describe(value)}, expected a 0-d floating-point tensor. Reduce it by sum()."
        )
    return value.detach()


def _check_trees(at: Tree, direction: Tree) -> None:
    for path, leaf in tree.named_leaves(at, "tree"):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise StructureError(
                f"{path} is {tree.describe(leaf)}, expected a floating-point tensor. Keep what cannot be moved out of "
                f"the tree: let fn close over it."
            )
        if leaf.is_meta:
            raise StructureError(f"{path} is {tree.describe(leaf)}, which has no data. Pass it on 'cpu' or 'cuda'.")
    tree.check_same(at, direction, name="direction", advice="Make the direction of torch.randn_like(leaf).")


class Derivative(NamedTuple):
    """A derivative along one random direction, computed and from finite differences.

    Attributes:
        leaf: the name of the leaf that moved, or "all leaves".
        computed: gradient · direction.
        expected: the central difference.
        error: |computed - expected| relative to the larger of both; where both are so small that rounding hides
            them, relative to the size that could be told from 0.

    Examples:
        >>> Derivative("meta['lr']", 1.5, 1.0, 0.5).error
        0.5

    Source: this library.
    """

    leaf: str
    computed: float
    expected: float
    error: float

    def __str__(self) -> str:
        """One line with all figures."""
        return (
            f"{self.leaf}: computed {self.computed:.9g}, finite difference {self.expected:.9g}, "
            f"relative error {self.error:.1e}"
        )


class Probe(NamedTuple):
    """A direction, the finite difference along it, and the absolute deviation that rounding may cause."""

    leaf: str
    direction: dict[str, Tensor]
    expected: float
    noise: float

    def judge(self, gradient: Mapping[str, Tensor], tolerance: float) -> Derivative:
        """Compare with a gradient; an error up to ``tolerance`` is agreement."""
        computed = float(tree.dot(self.direction, {name: gradient[name] for name in self.direction}))
        size = max(abs(computed), abs(self.expected), self.noise / tolerance)
        deviation = abs(computed - self.expected)
        return Derivative(self.leaf, computed, self.expected, deviation / size if deviation else 0.0)


def probes(
    fn: Callable[[Mapping[str, Tensor]], Tensor],
    leaves: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    *,
    value: float,
    directions: int,
    order: int,
    seed: int,
    tolerance: float,
) -> tuple[Probe, ...]:
    """Finite differences along random directions: all leaves together, then each leaf by itself.

    Every leaf moves in proportion to its own size, and none can hide behind another. Where the gradient disagrees, the
    step may be too long for a function that bends much, so shorter ones are tried as far as rounding allows.

    Args:
        fn: from some of the leaves by name to a number; the leaves it is not given stay where they are.
        leaves: where to differentiate.
        gradient: the computed one, by name.
        value: the value there, which the noise is proportional to.
        directions: how many directions of each kind.
        order: of the differences.
        seed: of the directions.
        tolerance: up to which error the gradient agrees.
    """
    generator = rng.generator(seed)
    filled = {name: leaf.detach() for name, leaf in leaves.items() if leaf.numel()}
    groups = {name: {name: leaf} for name, leaf in filled.items()}
    if len(groups) > 1:
        groups = {"all leaves": filled, **groups}

    def measured(name: str, direction: dict[str, Tensor], eps: float) -> Probe:
        expected = float(finite_difference(fn, groups[name], direction, eps=eps, order=order))
        return Probe(name, direction, expected, _ROUNDING * torch.finfo(torch.float64).eps * abs(value) / eps)

    def settled(name: str, direction: dict[str, Tensor]) -> Probe:
        eps = default_step(groups[name], direction, order)
        first = measured(name, direction, eps)
        if first.judge(gradient, tolerance).error <= tolerance:
            return first
        shorter = (measured(name, direction, eps / factor) for factor in (8, 64))
        telling = (probe for probe in shorter if probe.noise <= tolerance * abs(probe.expected))
        return next((probe for probe in telling if probe.judge(gradient, tolerance).error <= tolerance), first)

    moves = [(name, group) for name, group in groups.items() for _ in range(directions)]
    return tuple(
        settled(name, {key: _direction(leaf, generator) for key, leaf in group.items()}) for name, group in moves
    )


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the scale of the leaf."""
    numbers = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
    return numbers * _scale(leaf)


def _scale(leaf: Tensor) -> float:
    """How far a leaf can be moved: its size, as long as values beside it can be told apart, or 1 if it is zero."""
    return max(_largest(leaf), 1e-3) if leaf.any() else 1.0


def _largest(leaf: Tensor) -> float:
    return float(leaf.detach().abs().max()) if leaf.numel() else 0.0
