"""States to and from torch.optim, whose names the fields of the states carry."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import is_number
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Tree
from funcmeta.optim._adadelta import AdadeltaState
from funcmeta.optim._adagrad import AdagradState
from funcmeta.optim._adam import AdamState
from funcmeta.optim._adamax import AdamaxState
from funcmeta.optim._nadam import NadamState
from funcmeta.optim._rmsprop import RmspropState
from funcmeta.optim._sgd import SgdState
from funcmeta.optim._transform import Transform, check_transform

COUNTS = ("step", "missed")
"""The fields of a state that are of no parameter by itself."""

NAMESAKES = (SgdState, AdamState, AdamaxState, NadamState, RmspropState, AdagradState, AdadeltaState)
"""The states whose fields are those of a torch.optim optimizer, ``step`` and one tensor for each parameter."""


def from_torch_optim_state(
    transform: Transform,
    source: torch.optim.Optimizer | Mapping[str, Any],
    params: Tree,
    *,
    step: int | None = None,
) -> Any:
    """The state with which a transform goes on where an optimizer of torch.optim has stopped.

    The hyper-parameters are those of the transform, not of the optimizer. What is taken over is copied, so that
    neither side writes into the other's.

    Args:
        transform: the namesake of the optimizer, such as `adam(...)` for `torch.optim.Adam`.
        source: the optimizer or its `state_dict()`.
        params: the parameters, any tree whose leaves are in the order in which the optimizer got them.
        step: number of steps that the optimizer has taken, which schedules read; default the largest that it has
            counted for a parameter. Needed for SGD with dampening or a schedule, as torch.optim.SGD does not count, and
            for a schedule where each parameter had steps without a gradient.

    Returns:
        The state, like that of `transform.init(params)`. A parameter for which the optimizer holds nothing begins anew.

    Raises:
        ArgumentError: no transform, or one without a namesake; the number of steps is not known, not whole, less than
            the optimizer has taken, or given for a transform that does not count steps.
        StructureError: the optimizer has another number of parameters, other shapes, or lacks what the state holds.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.Adam([weight])
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> state = fm.optim.from_torch_optim_state(fm.optim.adam(), optimizer, {"w": weight})
        >>> state.step, state.exp_avg
        (tensor(1), {'w': tensor([0.3000])})

    Source: torch.optim.Optimizer.state_dict (https://docs.pytorch.org/docs/stable/optim.html).
    """
    check_transform(transform)
    if step is not None:
        step = _whole(step)
    state = transform.init(params)
    _check_namesake(state)
    saved = _saved("source", source)
    count = sum(len(group["params"]) for group in saved["param_groups"])
    leaves, spec = tree.flatten(params)
    if count != len(leaves):
        raise StructureError(
            f"the optimizer holds {count} parameters, but params has {len(leaves)}. Pass the parameters that the "
            "optimizer was made with, in the same order."
        )
    entries = [saved["state"].get(index, {}) for index in range(count)]
    fields = {
        name: tree.unflatten(
            [_taken(entry, name, like) for entry, like in zip(entries, tree.leaves(initial), strict=True)], spec
        )
        for name, initial in state._asdict().items()
        if name not in COUNTS and tree.leaves(initial)
    }
    if not isinstance(state.step, Tensor):
        if step is not None:
            raise ArgumentError(
                f"step is {step}, but this transform counts no steps, as nothing in it depends on them. Leave it out."
            )
        return state._replace(**fields)
    taken = [_steps_of(entry) for entry in entries]
    counted = not isinstance(state, SgdState)  # torch.optim.SGD keeps no count, only what has begun
    total = _total(taken, step, unknown=not counted and _may_have_stepped(saved))
    fields["step"] = torch.full_like(state.step, total)
    if isinstance(state.missed, Tensor):
        fields["missed"] = state.missed.new_tensor(
            [total - own if counted or not own else 0 for own in taken], dtype=torch.int64
        )
    return state._replace(**fields)


def to_torch_optim_state(state: Any, target: torch.optim.Optimizer | Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict with which an optimizer of torch.optim goes on where a transform has stopped.

    Nothing is written into the optimizer: call `target.load_state_dict(...)` with the result. The hyper-parameters in
    it are those of the target.

    Args:
        state: the state of a transform with a namesake in torch.optim, such as that of `adam(...)`.
        target: an optimizer of that kind (or its `state_dict()`), over the same parameters in the same order.

    Returns:
        A new state_dict for the target, with copies of the tensors.

    Raises:
        ArgumentError: the state belongs to a transform without a namesake.
        StructureError: the target has another number of parameters.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> transform = fm.optim.sgd(0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> _, state = transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)
        >>> fm.optim.to_torch_optim_state(state, optimizer)["state"]
        {0: {'momentum_buffer': tensor([2.])}}

    Source: torch.optim.Optimizer.load_state_dict (https://docs.pytorch.org/docs/stable/optim.html).
    """
    _check_namesake(state)
    saved = _saved("target", target)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    columns = {name: tree.leaves(field) for name, field in state._asdict().items() if name not in COUNTS}
    kept = {name: column for name, column in columns.items() if column}
    wrong = [f"{name} of {len(column)}" for name, column in kept.items() if len(column) != len(indices)]
    if wrong:
        raise StructureError(
            f"the state holds {', '.join(wrong)} parameters, but the optimizer has {len(indices)}. Make the optimizer "
            "with the parameters that the state belongs to, in the same order."
        )
    entries = {
        index: {name: column[place].detach().clone() for name, column in kept.items()}
        for place, index in enumerate(indices)
    }
    counted = isinstance(state.step, Tensor)
    missed = state.missed if isinstance(state.missed, Tensor) else [0] * len(indices)
    for index, own in zip(indices, missed, strict=True):
        if not isinstance(state, SgdState):
            entries[index]["step"] = (state.step - own).detach().to(torch.get_default_dtype())
        elif counted and state.step == own:
            del entries[index]  # torch.optim.SGD does not dampen a parameter's first gradient, which it knows by this
    return {**saved, "state": entries}


def _saved(name: str, optimizer: Any) -> Mapping[str, Any]:
    """The state_dict of an optimizer, which may be given in its place."""
    saved = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    if not isinstance(saved, Mapping) or not saved.keys() >= {"state", "param_groups"}:
        raise ArgumentError(
            f"{name} is {optimizer!r}, expected an optimizer of torch.optim or its state_dict(). Pass one of them."
        )
    return saved


def _check_namesake(state: Any) -> None:
    if not isinstance(state, NAMESAKES):
        raise ArgumentError(
            f"got a {type(state).__name__}, which has no namesake in torch.optim. Pass a transform of sgd, adam, "
            "adamw, amsgrad, nadam, radam, adamax, rmsprop, adagrad or adadelta, outside of chain and masked."
        )


def _taken(entry: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """A copy of what the optimizer holds for one parameter under this name; what is new where it holds nothing."""
    if not _holds(entry):
        return like
    value = entry.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        raise StructureError(
            f"the optimizer's {name} is {tree.describe(value)}, expected {tree.describe(like)}. Pass the namesake "
            "of the optimizer with the same options, and the parameters in the optimizer's order."
        )
    return value.detach().to(like, copy=True)


def _whole(step: Any) -> int:
    """A number of steps, which torch.optim counts by tensors of floats."""
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta else step
    if not is_number(number) or not (0 <= number < math.inf) or number != int(number):
        raise ArgumentError(f"step is {step!r}, expected a whole number or None. Pass the number of steps taken.")
    return int(number)


def _holds(entry: Mapping[str, Any]) -> bool:
    return any(value is not None for value in entry.values())


def _steps_of(entry: Mapping[str, Any]) -> int:
    """How many steps the optimizer took with a parameter; SGD, which does not count, tells none from some."""
    return int(entry["step"]) if "step" in entry else int(_holds(entry))


def _may_have_stepped(saved: Mapping[str, Any]) -> bool:
    """Whether torch.optim.SGD may have taken a step: without momentum it keeps nothing that would tell."""
    held = any(_holds(entry) for entry in saved["state"].values())
    return held or any(group.get("momentum") == 0 for group in saved["param_groups"])


def _total(taken: list[int], step: int | None, *, unknown: bool) -> int:
    """The number of steps, as said or as counted by the optimizer."""
    least = max(taken, default=0)
    if step is None and unknown:
        raise ArgumentError(
            "the optimizer has counted no steps, expected their number. Pass step=, the number of steps taken so far."
        )
    if step is not None and step < least:
        raise ArgumentError(
            f"step is {step}, but the optimizer has taken at least {least}. Pass step=, the number of steps that it "
            f"has taken."
        )
    return least if step is None else step
