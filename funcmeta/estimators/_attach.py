"""Values that carry gradients which were computed in another way than by their graph, or that refuse to carry any."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import GraphError
from funcmeta._typing import Meta


def attach(value: Tensor, gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The value, whose backward pass leaves these gradients on the tensors; it can be differentiated once."""
    return _Attach.apply(value, *gradients, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def attach_along(value: Any, tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> Any:
    """The tree, whose backward pass contracts what comes in with the tangents; it can be differentiated once.

    Args:
        value: a tree.
        tangents: for each of its floating-point tensors its derivative by all numbers in ``tensors``, along the first
            dimension; None where it depends on none of them.
        tensors: what the derivatives are by.
    """
    made = iter(_AttachAlong.apply(floats(value), tangents, *tensors))  # type: ignore[no-untyped-call]
    return tree.map(lambda leaf: next(made) if is_float(leaf) else leaf, value)


def refuse(value: Any, name: str, meta: Meta) -> Any:
    """The tree, whose floating-point tensors say in a backward pass that this estimator gives them no gradient."""
    moving = [leaf for leaf in tree.tensors(meta) if leaf.requires_grad]
    made = iter(_Refuse.apply(floats(value), name, *moving))  # type: ignore[no-untyped-call]
    return tree.map(lambda leaf: next(made) if is_float(leaf) else leaf, value)


def refused_by(value: Any) -> str:
    """The name of the estimator that refuses gradients to a tensor of this tree, or nothing."""
    nodes: list[Any] = [leaf.grad_fn for leaf in tree.tensors(value)]
    return next((node.refusing for node in nodes if hasattr(node, "refusing")), "")


def is_float(leaf: Any) -> bool:
    """Whether this is a tensor that can be differentiated."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of a tree, left to right."""
    return [leaf for leaf in tree.tensors(value) if leaf.is_floating_point()]


class _Attach(torch.autograd.Function):
    """apply(value, *gradients, *tensors)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[: len(gradients_and_tensors) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _check_once()
        gradients = ctx.saved_tensors
        return (None, *[None] * len(gradients), *[cotangent * gradient for gradient in gradients])


class _AttachAlong(torch.autograd.Function):
    """apply(values, tangents, *tensors)."""

    @staticmethod
    def forward(
        ctx: Any, values: list[Tensor], tangents: Sequence[Tensor | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tangents)
        ctx.likes = [(leaf.shape, leaf.dtype) for leaf in tensors]
        ctx.set_materialize_grads(False)
        attached = [each.detach() for each in values]  # others may hold the tensors themselves
        ctx.mark_non_differentiable(*[each for each, along in zip(attached, tangents, strict=True) if along is None])
        return tuple(attached)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_once()
        pairs = zip(ctx.saved_tensors, cotangents, strict=True)
        rows = [(along * by).flatten(1).sum(1) for along, by in pairs if along is not None and by is not None]
        if not rows:
            return (None,) * (2 + len(ctx.likes))
        parts = torch.split(torch.stack(rows).sum(0), [shape.numel() for shape, _ in ctx.likes])
        return (
            None,
            None,
            *[part.reshape(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.likes, strict=True)],
        )


class _Refuse(torch.autograd.Function):
    """apply(values, name, *tensors)."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusing = name
        return tuple([each.detach() for each in values])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise GraphError(
            f"A loss was computed from out.state, which {ctx.refusing} does not differentiate: its gradient "
            f"is that of out.loss alone. Put the term into the problem's meta_loss or into the steps' shares, use "
            f".detach() of the state where a constant is meant, go on from out.carry, or use Reverse()."
        )


def _check_once() -> None:
    if torch.is_grad_enabled():
        raise GraphError(
            "The meta-gradient was asked for with create_graph=True, but this estimator's cannot be "
            "differentiated again: it would count as a constant. Use Reverse() or MixedMode(); so too for an unroll "
            "inside of an inner loss, whose gradient is differentiated again."
        )
