"""Whether stacked tasks give under ``vmap`` what each gives by itself.

Some of torch's batching rules are wrong, and a module may look at what ``vmap`` hides. No list of such cases would be
complete, so the first steps are taken both ways and compared: losses, states, reports, and the meta-gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcmeta import tree
from funcmeta._batching import Each
from funcmeta._typing import Meta
from funcmeta.tasks import Task


class Made(NamedTuple):
    """What an unroll made, without its graph."""

    loss: Tensor
    losses: Tensor
    state: Any
    aux: Any
    slopes: list[Tensor]


def slopes_of(loss: Tensor, meta: Meta) -> list[Tensor]:
    """The meta-gradient, leaf by leaf; empty where there is no graph."""
    wanted = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True)) if loss.requires_grad else []


class Precision(TorchFunctionMode):
    """Notes the coarsest floating-point numbers that are computed with inside the block, as by autocast."""

    coarsest = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in _HALF:
            self.coarsest = max(self.coarsest, torch.finfo(result.dtype).eps)
        return result


_HALF = (torch.float16, torch.bfloat16)


def difference(alone: Made, together: Made, coarsest: float, nudged: Callable[[int], Made]) -> str:
    """What differs beyond rounding, in words; nothing if all is the same.

    Where rounding itself is amplified, as where Adam divides a gradient that is zero by its own size, the difference
    between two runs of the tasks by themselves, with ``nudged`` inputs, tells how much of it is to be expected.
    """
    differing = _differing(alone, together, coarsest, {})
    if differing:
        one, other = (_noise(alone, nudged(units)) for units in (4, -7))
        differing = _differing(alone, together, coarsest, {name: max(one[name], other.get(name, 0.0)) for name in one})
    return differing


def _differing(alone: Made, together: Made, coarsest: float, noise: dict[str, float]) -> str:
    largest = max([float(slope.abs().max()) for slope in alone.slopes if slope.numel()], default=0.0)
    others = dict(_named(together))
    sizes = [_size(each) for _, each in _named(alone) if isinstance(each, Tensor)]
    overall = max([size for size in sizes if math.isfinite(size)], default=0.0)  # the unroll says what is not finite
    for name, expected in _named(alone):
        got = others.get(name)
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
            if not _equal(expected, got):
                return f"{name} is {_words(got)}, and {_words(expected)} for each by itself"
            continue
        if expected.shape != got.shape or expected.dtype != got.dtype:
            return f"{name} is {tree.describe(got)}, and {tree.describe(expected)} for each by itself"
        gap = _gap(expected, got)
        eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() or expected.is_complex() else 0.0
        floor = largest if name.startswith("the meta-gradient") else 0.0
        size = max([each for each in (floor, _size(expected), _size(got)) if math.isfinite(each)], default=0.0)
        if not gap <= max(eps, coarsest) ** 0.5 * size + 64 * eps * overall + 16 * noise.get(name, 0.0):
            return f"{name} differs by {gap:.2g} of {size:.2g} from that of each by itself"
    return ""


def _noise(alone: Made, nudged: Made) -> dict[str, float]:
    others = dict(_named(nudged))
    return {
        name: _gap(each, others[name])
        for name, each in _named(alone)
        if isinstance(each, Tensor) and isinstance(others.get(name), Tensor) and each.shape == others[name].shape
    }


def _named(made: Made) -> list[tuple[str, Any]]:
    return [
        ("the losses", made.losses),
        *tree.named_leaves(made.state, "the state"),
        *tree.named_leaves(made.aux, "StepInfo.aux"),
        ("the meta-loss", made.loss),
        *[(f"the meta-gradient's leaf {index}", each) for index, each in enumerate(made.slopes)],
    ]


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest distance of two entries; those that are not finite have to be the same."""
    if one.layout is not torch.strided or not one.numel():
        return 0.0
    pair = _once(one), _once(other)  # one may share its memory among tasks where the other does not
    one, other = torch.broadcast_tensors(*pair)  # type: ignore[no-untyped-call]
    if torch.equal(one, other):  # which takes no memory, unlike what follows
        return 0.0
    if one.dtype is torch.bool or not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, other) else float("inf")
    same = torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return float(torch.where(same, 0.0, (one - other).abs().to(torch.float64)).nan_to_num(float("inf")).max())


def _size(tensor: Tensor) -> float:
    if tensor.layout is not torch.strided or not tensor.numel():
        return 0.0
    tensor = _once(tensor)
    if tensor.dtype is torch.bool:
        return 0.0
    if tensor.is_complex() or not all(end.isfinite() for end in tensor.aminmax()):
        return float(tensor.abs().to(torch.float64).nan_to_num(0.0, 0.0, 0.0).max())
    return max(abs(float(end)) for end in tensor.aminmax())


def _once(tensor: Tensor) -> Tensor:
    """One of several tasks that share the memory of a frozen parameter."""
    return tensor[0] if tensor.dim() and tensor.stride(0) == 0 else tensor


def _equal(one: Any, other: Any) -> bool:
    if one is other or isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    try:
        return type(one) is type(other) and (bool(one == other) or repr(one) == repr(other))
    except Exception:
        return True  # what cannot be compared is no number


def _words(leaf: Any) -> str:
    return str(tuple(leaf)) if isinstance(leaf, Each) else tree.describe(leaf)


def nudged_task(tasks: Task, units: int) -> Task:
    """Tasks with data that are a little different."""
    support, query = tree.nudged(tuple(tasks[:2]), units)
    return tasks._replace(support=support, query=query)
