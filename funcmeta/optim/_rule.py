"""From a rule for one tensor to a transform of a tree: the part that all optimizers share."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import StructureError
from funcmeta._typing import Tree
from funcmeta.optim._hyper import Hypers, Values, is_zero
from funcmeta.optim._transform import Transform

Slot = Callable[[Tensor, Values], Tensor]
"""The initial value that a parameter keeps in the state."""

Rule = Callable[..., tuple[Tensor, ...]]
"""(values, parameter, gradient, *slots) -> (update, *new slots)."""


class StepState(NamedTuple):
    """The number of steps taken, of a transform that keeps nothing else; empty when no schedule reads it."""

    step: Tree = ()


def zeros(param: Tensor, values: Values) -> Tensor:
    """A slot that starts at zero."""
    return torch.zeros_like(param)


def per_tensor(
    hypers: Hypers,
    rule: Rule,
    *,
    state: Callable[..., Any] = StepState,
    slots: Mapping[str, Slot] | None = None,
    prepare: Callable[[Values, Any], Values] | None = None,
    counted: bool = True,
    decoupled: bool = False,
    maximize: bool = False,
) -> Transform:
    """The transform that applies ``rule`` to each tensor.

    ``prepare(values, step)`` adds what the rule needs of the 0-d step (from 0), once for all parameters where none has
    hyper-parameters of its own. A ``weight_decay`` among these is added here, to the gradient or (``decoupled``) to the
    update. Everything returned has the dtype that went in, whatever the hyper-parameters are promoted to.
    """
    slots = slots or {}
    counted = counted or hypers.scheduled
    sign = -1 if maximize else 1

    def values_of(step: Any, params: Tree, leaves: list[Tensor]) -> list[Values]:
        shared, own = hypers.resolve(step, params, leaves)
        if not own:
            return [{**shared, **prepare(shared, step)} if prepare else shared] * len(leaves)
        merged: list[Values] = [{**shared, **each} for each in own]
        return [{**each, **prepare(each, step)} for each in merged] if prepare else merged

    def init(params: Tree) -> Any:
        tree.check_tensors(params, name="params")
        leaves, rebuild = _split(params)
        step = step_zero(leaves) if counted else ()
        values = values_of(step, params, leaves)
        columns = {name: [slot(*row) for row in zip(leaves, values, strict=True)] for name, slot in slots.items()}
        return state(step=step, **{name: rebuild(column) for name, column in columns.items()})

    def update(grads: Tree, old: Any, params: Tree) -> tuple[Tree, Any]:
        leaves, rebuild = _split(params)
        columns = [_column(params, grads, "grads"), *[_column(params, getattr(old, name), name) for name in slots]]
        values = values_of(old.step, params, leaves)
        results = [_one(*row) for row in zip(values, leaves, *columns, strict=True)]
        new = list(zip(*results, strict=True)) or [()] * (1 + len(slots))
        step = old.step + 1 if counted else ()
        fields = {name: rebuild(column) for name, column in zip(slots, new[1:], strict=True)}
        return rebuild(new[0]), state(step=step, **fields)

    def _one(values: Values, param: Tensor, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(grad, Tensor) or grad.shape != param.shape:
            raise StructureError(
                f"a gradient is {tree.describe(grad)}, but its parameter is {tree.describe(param)}. Pass one gradient "
                "of the same shape for each parameter; zeros where the loss does not depend on it."
            )
        decay = values.get("weight_decay", 0)
        if sign < 0:
            grad = -grad
        if not decoupled and not is_zero(decay):
            grad = grad + decay * param
        update, *fresh = rule(values, param, grad, *kept)
        if decoupled and not is_zero(decay):
            update = update - values["lr"] * decay * param
        pairs = zip((update, *fresh), (param, *kept), strict=True)
        return tuple(value if value.dtype == like.dtype else value.to(like.dtype) for value, like in pairs)

    return Transform(init, update)


def step_zero(leaves: list[Tensor]) -> Tensor:
    """The step count before the first step, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def _split(params: Tree) -> tuple[list[Tensor], Callable[[Any], Tree]]:
    """The leaves, and the function that puts as many others in their place; quick for a flat dict."""
    if _is_flat(params):
        return list(params.values()), lambda column: dict(zip(params, column, strict=True))
    leaves, spec = tree.flatten(params)
    return leaves, lambda column: tree.unflatten(list(column), spec)


def _column(params: Tree, other: Tree, name: str) -> list[Any]:
    """The leaves of a tree like the parameters, in their order."""
    if _is_flat(params) and type(other) is dict and other.keys() == params.keys():
        return [other[key] for key in params]
    return tree.aligned(params, other, name=name)


def _is_flat(params: Tree) -> bool:
    return type(params) is dict and all(isinstance(leaf, Tensor) for leaf in params.values())
