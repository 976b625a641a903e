"""What a function sees of tensors inside the level of stacked tasks, where torch would hide whether they carry a graph.

Under ``vmap`` a tensor says that it requires no grad, whatever the tensor below it says, so that branches on it, hooks
and gradients of a step vanish without an error. Here it says the truth; what ``vmap`` cannot do for each task by itself
raises.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from funcmeta._batching import beneath, innermost_level
from funcmeta._errors import GraphError
from funcmeta._graph import inside_functorch


def _true(read: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A property as the tensor below the levels of tasks has it."""
    return lambda tensor, *rest: read(beneath(tensor), *rest)


def _refused(name: str, advice: str = "") -> GraphError:
    return GraphError(
        f"{name} was used on a tensor of stacked tasks that run as one batch, where it would see or change all tasks "
        f"together. {advice or 'Pass'} strategy='loop' (for particles: chunk=1)."
    )


def _register_hook(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def run(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if beneath(tensor) is not tensor and beneath(tensor).requires_grad:
            raise _refused(f"Tensor.{name}")
        return function(tensor, *args, **options)

    return run


def _grad_fn(tensor: Tensor) -> Any:
    level = innermost_level()
    if level is not None and level.is_alone() and beneath(tensor) is not tensor and beneath(tensor).grad_fn is not None:
        raise _refused("Tensor.grad_fn")
    return tensor.grad_fn


def _set_requires_grad(tensor: Tensor, value: bool) -> None:
    own = beneath(tensor) is not tensor or not is_functorch_wrapped_tensor(tensor)
    if innermost_level() is not None and own and value != beneath(tensor).requires_grad:
        raise _refused("Tensor.requires_grad = ...", _OWN_LEAF)
    tensor.requires_grad = value


def _requires_grad_(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    if beneath(tensor) is tensor:  # torch.func itself may ask for it; it refuses everyone else
        return tensor.requires_grad_(requires_grad)
    if requires_grad != beneath(tensor).requires_grad:
        raise _refused("Tensor.requires_grad_", _OWN_LEAF)
    return tensor


_OWN_LEAF = "Take gradients by funcmeta.value_and_grad or torch.func, or pass"


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look-up in a table; torch's batching rule drops ``padding_idx`` for all tasks but the first, and frequencies."""
    if inside_functorch():
        _check_scale(scale_grad_by_freq)
        if padding_idx is not None and max_norm is None:
            return F.embedding(input, _padded(weight, padding_idx))
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _native_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    if inside_functorch():
        _check_scale(scale_grad_by_freq)
        return torch.embedding(weight if padding_idx < 0 else _padded(weight, padding_idx), indices)
    return torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)


def _padded(weight: Tensor, padding_idx: int) -> Tensor:
    """The table, whose row for padding is a constant: no gradient comes to it, and none is passed on from it."""
    row = torch.arange(weight.shape[0], device=weight.device) == padding_idx % weight.shape[0]
    return torch.where(row[:, None], weight.detach(), weight)


def _check_scale(scale_grad_by_freq: bool) -> None:
    level = innermost_level()
    if scale_grad_by_freq and level is not None:
        raise _refused("F.embedding with scale_grad_by_freq")


READS: dict[Any, Callable[..., Any]] = {
    Tensor.requires_grad.__get__: _true(Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: _true(Tensor.is_leaf.__get__),  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__: lambda tensor, *rest: _grad_fn(tensor),  # type: ignore[union-attr]
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    Tensor.requires_grad_: _requires_grad_,
    **{
        getattr(Tensor, name): _register_hook(name)
        for name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
    },
    F.embedding: _embedding,
    torch.embedding: _native_embedding,
}
"""What a mode has to call in place of torch's own."""
