"""Hyper-parameters: what may be passed for one, and what a single parameter gets of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import is_number
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Hyper, Tree

Value: TypeAlias = Any
"""What one parameter gets of a hyper-parameter: a number or a tensor that broadcasts to the parameter."""

Values: TypeAlias = Mapping[str, Value]

_Range: TypeAlias = tuple[Callable[[float], bool], str]  # comparisons only: torch.compile traces no math.isfinite

_NOT_NEGATIVE: _Range = (lambda number: 0 <= number < math.inf, "at least 0 and finite")
_FRACTION: _Range = (lambda number: 0 <= number < 1, "in [0, 1)")
_FINITE: _Range = (lambda number: -math.inf < number < math.inf, "that is finite")
_BOUND: _Range = (lambda number: number >= 0, "at least 0")
_RANGES = {
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "rho": (lambda number: 0 <= number <= 1, "in [0, 1]"),
    "dampening": _FINITE,
    "factor": _FINITE,
    "limit": _BOUND,
    "max_norm": _BOUND,
}


_SINGLE = frozenset({"max_norm"})
"""Hyper-parameters that are one number for a whole tensor."""


class Hypers:
    """The hyper-parameters of one transform, validated once and resolved at each step."""

    def __init__(self, **hypers: Hyper) -> None:
        for name, hyper in hypers.items():
            _check(name, hyper)
        self.fixed = {name: _plain(hyper) for name, hyper in hypers.items() if _is_single(hyper)}
        self.rest = {name: hyper for name, hyper in hypers.items() if name not in self.fixed}
        self.scheduled = any(callable(hyper) for hyper in self.rest.values())

    def uses(self, name: str) -> bool:
        """Whether there is work to do for this one: not so when it is absent or the Python number 0."""
        if name in self.rest:
            return True
        hyper = self.fixed.get(name, 0)
        return isinstance(hyper, Tensor) or hyper != 0

    def single(self, name: str, step: Any) -> Value:
        """The value that all parameters share at this step; an error where it differs within them."""
        hyper = {**self.fixed, **self.rest}[name]
        value = _plain(hyper(step)) if callable(hyper) else hyper
        if (isinstance(value, Tensor) and value.ndim == 0) or is_number(value):
            return value
        raise StructureError(
            f"{name} is {tree.describe(value)}, expected one number or 0-d tensor for all parameters together. "
            "Pass a single value, or use a transform that treats each tensor by itself."
        )

    def resolve(self, step: Any, params: Tree, leaves: Sequence[Tensor]) -> tuple[Values, list[Values]]:
        """What all parameters share at this step, and what each leaf has of its own (empty when all is shared)."""
        shared: Values = self.fixed
        columns: dict[str, list[Value]] = {}
        for name, hyper in self.rest.items():
            value = hyper(step) if callable(hyper) else hyper
            if callable(hyper):
                _check_type(f"{name}(step)", value)
            if _is_single(value):
                shared = {**shared, name: _plain(value)}
            else:
                columns[name] = [_plain(own) for own in tree.aligned(params, value, name=name)]
                for own, leaf in zip(columns[name], leaves, strict=True):
                    check_reachable(name, own, leaf)
        for name, value in shared.items():
            if isinstance(value, Tensor):
                for leaf in leaves:
                    check_reachable(name, value, leaf)
                if value.ndim:
                    columns[name] = [value] * len(leaves)
        if not columns:
            return shared, []
        rows: list[Values] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for name, column in columns.items():
            for index, (value, leaf) in enumerate(zip(column, leaves, strict=True)):
                if isinstance(value, Tensor) and not _broadcasts(value, leaf):
                    path = tree.named_leaves(params, "params")[index][0]
                    raise StructureError(
                        f"{name} is {tree.describe(value)}, which does not broadcast to {path} of shape "
                        f"{list(leaf.shape)}. Pass a 0-d tensor, or a tree like the parameters."
                    )
        return shared, rows


def pair(betas: tuple[Hyper, Hyper]) -> tuple[Hyper, Hyper]:
    """The two members of ``betas``."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ArgumentError(f"betas is {betas!r}, expected a pair (beta1, beta2). Pass for example betas=(0.9, 0.999).")
    return betas[0], betas[1]


def check_reachable(name: str, value: Value, leaf: Tensor) -> None:
    """Raise where a hyper-parameter is on another device than the parameter; a single number on the CPU may be."""
    if isinstance(value, Tensor) and value.device != leaf.device and (value.ndim or not value.is_cpu):
        raise StructureError(
            f"{name} is {tree.describe(value)}, but a parameter is {tree.describe(leaf)}. Move it there, or pass a 0-d "
            "tensor on the CPU."
        )


def blend(old: Tensor, new: Tensor, keep: Value) -> Tensor:
    """The running average keep · old + (1 - keep) · new."""
    if isinstance(keep, Tensor) or old.dtype != new.dtype:  # lerp takes one dtype
        blended: Tensor = old + (new - old) * (1 - keep)
        return blended
    return old.lerp(new, 1 - keep)


def blend_square(old: Tensor, grad: Tensor, keep: Value) -> Tensor:
    """The running average keep · old + (1 - keep) · grad², in which ∞ stays ∞ where lerp makes NaN of it."""
    if old.dtype != grad.dtype:
        wide = torch.promote_types(old.dtype, grad.dtype)
        old, grad = old.to(wide), grad.to(wide)
    if isinstance(keep, Tensor):
        blended: Tensor = keep * old + (1 - keep) * grad * grad
        return blended
    return old.mul(keep).addcmul(grad, grad, value=1 - keep)


def double(value: Value) -> Tensor:
    """A number or a tensor as a tensor in double precision."""
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def safe_sqrt(value: Tensor) -> Tensor:
    """The square root, with all derivatives 0 at 0: those of √(g²) = |g|, taken from both sides, at g = 0."""
    zero = value == 0
    return value.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _plain(value: Value) -> Value:
    """A number of Python in place of one of NumPy, whose product with a tensor is no tensor."""
    return value.item() if isinstance(value, np.generic) else value


def _is_single(hyper: Hyper) -> bool:
    return isinstance(hyper, Tensor) or is_number(hyper)


def _check(name: str, hyper: Hyper) -> None:
    """Raise unless this can be a hyper-parameter; numbers must also lie in their range."""
    if callable(hyper) and not isinstance(hyper, Tensor | type):
        return
    _check_type(name, hyper)
    holds, expected = _RANGES.get(name, _NOT_NEGATIVE)
    for leaf in tree.leaves(hyper):
        if not isinstance(leaf, Tensor) and not holds(leaf):
            raise ArgumentError(f"{name} is {leaf!r}, expected a number {expected}. Pass such a number, or a tensor.")


def _check_type(name: str, hyper: Hyper) -> None:
    """Raise unless every leaf is a number or a floating-point tensor."""
    if type(hyper) is float or (isinstance(hyper, Tensor) and not hyper.ndim and _is_dense_float(hyper)):
        return
    for path, leaf in tree.named_leaves(hyper, name):
        if isinstance(leaf, Tensor):
            if not _is_dense_float(leaf):
                raise StructureError(
                    f"{path} is {tree.describe(leaf)}, expected a dense floating-point tensor. Convert it by "
                    f"{'.float()' if leaf.layout is torch.strided else '.to_dense()'}."
                )
            if leaf.ndim and name.removesuffix("(step)") in _SINGLE:
                raise StructureError(
                    f"{path} is {tree.describe(leaf)}, expected one number or 0-d tensor for each tensor. Pass a "
                    "single value: a norm has no entries."
                )
        elif not is_number(leaf):
            raise ArgumentError(
                f"{path} is {tree.describe(leaf)}, expected a number, a floating-point tensor, a tree of these like "
                "the parameters, or a callable of the step."
            )


def _is_dense_float(value: Tensor) -> bool:
    return value.dtype.is_floating_point and value.layout is torch.strided


def _broadcasts(value: Tensor, leaf: Tensor) -> bool:
    """Whether the value broadcasts to the shape of the leaf, and not beyond."""
    if value.ndim > leaf.ndim:
        return False
    return all(size in (1, full) for size, full in zip(reversed(value.shape), reversed(leaf.shape), strict=False))
