"""From a rule for one tensor to a transform of a tree: the part that all optimizers share."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import check_flag
from funcmeta._errors import StructureError
from funcmeta._typing import Tree
from funcmeta.optim._hyper import Hypers, Value, Values
from funcmeta.optim._transform import Transform

Slot = Callable[[Tensor, Values], Tensor]
"""The initial value that a parameter keeps in the state."""

Prepare = Callable[[Values, Any], Values]
"""(values, step) -> what the rule needs of the step."""

Rule = Callable[..., tuple[Any, ...]]
"""(values, parameter, gradient, *slots) -> (update, *new slots); the update is a tensor or ``Scaled``."""


_HALF = 65504
"""The largest number of half precision."""


class Scaled(NamedTuple):
    """The update factor · direction, which need not be computed apart from the parameter that it is added to."""

    direction: Tensor
    factor: Value

    def alone(self) -> Tensor:
        return torch.mul(self.direction, self.factor)

    def added_to(self, param: Tensor) -> Tensor:
        if isinstance(self.factor, Tensor):
            return torch.addcmul(param, self.direction, self.factor)
        if abs(self.factor) > _HALF:  # torch.add refuses a factor that the dtype does not hold
            return param + self.alone()
        return torch.add(param, self.direction, alpha=self.factor)


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
    state: type[Any] = StepState,
    slots: Mapping[str, Slot] | None = None,
    prepare: Prepare | None = None,
    counted: bool = True,
    decoupled: bool = False,
    maximize: bool = False,
) -> Transform:
    """The transform that applies ``rule`` to each tensor.

    ``prepare(values, step)`` adds what the rule needs of the 0-d step (from 0), once for all parameters where none has
    hyper-parameters of its own. A ``weight_decay`` among these is added here, to the gradient or (``decoupled``) to the
    update. Everything returned has the dtype that went in, whatever the hyper-parameters are promoted to.

    A parameter whose gradient is None stays, and so does what is kept for it. A state with a field ``missed`` counts
    there how often that was: torch.optim counts the steps of each parameter by itself, and so does ``prepare`` see
    them, as one step less the missed ones for each. Schedules see the steps of the optimizer.
    """
    check_flag("maximize", maximize)
    check_flag("decoupled_weight_decay", decoupled)
    slots = slots or {}
    tracked = counted and "missed" in state._fields
    counted = counted or hypers.scheduled
    if hypers.uses("weight_decay"):
        rule = _shrinking(rule) if decoupled else _decaying(rule)
    if maximize:
        rule = _climbing(rule)

    def values_of(step: Any, missed: Any, params: Tree, leaves: list[Tensor]) -> list[Values]:
        if not leaves:
            return []
        shared, own = hypers.resolve(step, params, leaves)
        together = isinstance(missed, tuple)  # one count for all
        if not own and (together or not prepare):
            return [{**shared, **prepare(shared, step)} if prepare else shared] * len(leaves)
        if not own and prepare:
            return [{**shared, **each} for each in _spread(prepare(shared, step - missed), len(leaves))]
        merged: list[Values] = [{**shared, **each} for each in own]
        if not prepare:
            return merged
        steps = [step] * len(leaves) if together else (step - missed).unbind()
        return [{**each, **prepare(each, taken)} for each, taken in zip(merged, steps, strict=True)]

    def init(params: Tree) -> Any:
        check_floating_leaves(params, name="params")
        flat = tree.is_flat(params)
        leaves = tree.leaves(params)
        step: Any = step_zero(leaves) if counted else ()
        missed = {"missed": step.new_zeros(len(leaves))} if tracked else {}
        rows = list(zip(leaves, values_of(step, missed.get("missed", ()), params, leaves), strict=True))
        kept = {name: _tree(params, flat, [slot(*row) for row in rows]) for name, slot in slots.items()}
        return state(step=step, **kept, **missed)

    def run(finish: Callable[[Any, Tensor], Tensor], grads: Tree, old: Any, params: Tree) -> tuple[Tree, Any]:
        flat = tree.is_flat(params)
        leaves = list(params.values()) if flat else tree.leaves(params)
        given = _column(params, flat, grads, "grads")
        check_state(old, state, counted=counted)
        kept = [_column(params, flat, getattr(old, name), name) for name in slots]
        complete = check_gradients(given, leaves)
        for name, column in zip(slots, kept, strict=True):
            check_slots(name, column, leaves)
        missed: Any = check_missed(old.missed, len(leaves), complete) if tracked else ()
        rows = zip(values_of(old.step, missed, params, leaves), leaves, given, *kept, strict=True)
        results = [
            (finish(first, row[1]), *fresh)
            for row in rows
            for first, *fresh in ((None, *row[3:]) if row[2] is None else rule(*row),)
        ]
        if tracked and not complete:
            missed = missed + missed.new_tensor([grad is None for grad in given])
        columns = list(zip(*results, strict=True)) or [()] * (1 + len(slots))
        casts = [_like(column, likes) for column, likes in zip(columns, (leaves, *kept), strict=True)]
        finished, *fresh = [_tree(params, flat, cast) for cast in casts]
        now: dict[str, Any] = dict(zip(slots, fresh, strict=True))
        if tracked:
            now["missed"] = missed
        return finished, state(step=old.step + 1 if counted else (), **now)

    def update(grads: Tree, old: Any, params: Tree) -> tuple[Tree, Any]:
        with torch._C.DisableTorchFunction():
            return run(_alone, grads, old, params)

    def advance(grads: Tree, old: Any, params: Tree) -> tuple[Tree, Any]:
        with torch._C.DisableTorchFunction():
            return run(_added, grads, old, params)

    return Transform(init, update, advance)


def _alone(update: Any, param: Tensor) -> Any:
    return update.alone() if isinstance(update, Scaled) else update


def _added(update: Any, param: Tensor) -> Tensor:
    if update is None:
        return param
    return update.added_to(param) if isinstance(update, Scaled) else param + update


def _spread(prepared: Values, count: int) -> list[Values]:
    """What each parameter gets of what was prepared on the vector of all steps."""
    columns = [
        value.unbind() if isinstance(value, Tensor) and value.ndim else [value] * count for value in prepared.values()
    ]
    return [dict(zip(prepared, row, strict=True)) for row in zip(*columns, strict=True)]


def _decaying(rule: Rule) -> Rule:
    """The rule for the gradient with weight decay added."""
    return lambda values, param, grad, *kept: rule(values, param, grad + values["weight_decay"] * param, *kept)


def _shrinking(rule: Rule) -> Rule:
    """The rule, and then decoupled weight decay."""

    def shrinking(values: Values, param: Tensor, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        update, *fresh = rule(values, param, grad, *kept)
        return _alone(update, param) - values["lr"] * values["weight_decay"] * param, *fresh

    return shrinking


def _climbing(rule: Rule) -> Rule:
    """The rule for the opposite gradient."""
    return lambda values, param, grad, *kept: rule(values, param, -grad, *kept)


def step_zero(leaves: list[Tensor]) -> Tensor:
    """The step count before the first step: on the device of the parameters, on the CPU where they are on several."""
    devices = {leaf.device for leaf in leaves}
    return torch.zeros((), dtype=torch.int64, device=devices.pop() if len(devices) == 1 else None)


def check_floating_leaves(params: Tree, *, name: str) -> None:
    """Raise unless every leaf is a dense floating-point tensor."""
    tree.check_tensors(params, name=name)
    for index, leaf in enumerate(tree.leaves(params)):
        if not leaf.dtype.is_floating_point or leaf.layout is not torch.strided:
            path = tree.named_leaves(params, name)[index][0]
            raise StructureError(
                f"{path} is {tree.describe(leaf)}, expected a dense floating-point tensor. Keep others out of it."
            )


def check_state(state: Any, kind: type[Any], *, counted: bool) -> None:
    """Raise unless the state is one of this transform, with a count of the steps where it keeps one."""
    if not isinstance(state, kind) or (counted and not isinstance(state.step, Tensor)):
        without = f" with {state.step!r} for the count of its steps" if isinstance(state, kind) else ""
        raise StructureError(
            f"state is a {type(state).__name__}{without}, expected the {kind.__name__} of this transform. Pass what "
            "its init or its latest update returned."
        )


def check_gradients(grads: list[Any], params: list[Tensor]) -> bool:
    """Whether every parameter has a gradient; raise where one does not fit."""
    complete = True
    for grad, param in zip(grads, params, strict=True):
        if grad is None:
            complete = False
            continue
        if not (isinstance(grad, Tensor) and isinstance(param, Tensor)) or (
            grad.shape != param.shape
            or grad.device != param.device
            or not grad.dtype.is_floating_point
            or grad.layout is not torch.strided
        ):
            raise StructureError(
                f"a gradient is {tree.describe(grad)}, but its parameter is {tree.describe(param)}. Pass one dense "
                "gradient of the same shape on the same device for each; None where the loss does not depend on it."
            )
    return complete


def check_missed(missed: Any, count: int, complete: bool) -> Any:
    """What a state holds of missed steps: nothing at all will do as long as no gradient is None."""
    fits = missed == () if isinstance(missed, tuple) else isinstance(missed, Tensor) and missed.shape == (count,)
    if not fits or (isinstance(missed, tuple) and not complete):
        raise StructureError(
            f"the state's missed is {tree.describe(missed)}, expected an int64 tensor of shape [{count}], the steps "
            "that each parameter has missed. Pass a state that the transform has made for these parameters."
        )
    return missed


def check_slots(name: str, column: list[Any], params: list[Tensor]) -> None:
    """Raise unless what the state keeps for each parameter has its shape, or is one number."""
    for value, param in zip(column, params, strict=True):
        if not isinstance(value, Tensor) or (value.shape != param.shape and value.shape):
            raise StructureError(
                f"the state's {name} is {tree.describe(value)}, but its parameter is {tree.describe(param)}. Pass a "
                "state that the transform has made for these parameters."
            )


def _like(fresh: Sequence[Tensor], likes: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtypes of those that they replace."""
    pairs = zip(fresh, likes, strict=True)
    return [value if value is None or value.dtype == like.dtype else value.to(like.dtype) for value, like in pairs]


def _column(params: Tree, flat: bool, other: Tree, name: str) -> list[Any]:
    """The leaves of a tree like the parameters, in their order."""
    if flat and type(other) is dict and other.keys() == params.keys():
        return [other[key] for key in params]
    return tree.aligned(params, other, name=name)


def _tree(params: Tree, flat: bool, column: Sequence[Tensor]) -> Tree:
    """The tree like the parameters with these leaves."""
    if flat:
        return dict(zip(params, column, strict=True))
    return tree.unflatten(list(column), tree.flatten(params)[1])
