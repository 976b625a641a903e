"""A value that carries gradients which were computed in another way than by its graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcmeta._errors import GraphError


def attach(value: Tensor, gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The value, whose backward pass leaves these gradients on the tensors; it can be differentiated once."""
    return _Attach.apply(value, *gradients, *tensors)  # type: ignore[no-untyped-call, no-any-return]


class _Attach(torch.autograd.Function):
    """apply(value, *gradients, *tensors)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[: len(gradients_and_tensors) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GraphError(
                "The meta-gradient was asked for with create_graph=True, but this estimator's can not be "
                "differentiated again: it would count as a constant. Use Reverse() or MixedMode()."
            )
        gradients = ctx.saved_tensors
        return (None, *[None] * len(gradients), *[cotangent * gradient for gradient in gradients])
