"""How near one gradient comes to another."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Agreement(NamedTuple):
    """Cosine, norm ratio and relative error of a gradient against a reference."""

    cosine: float
    norm_ratio: float
    relative_error: float


def agreement(gradient: Iterable[Tensor], reference: Iterable[Tensor]) -> Agreement:
    """Compare two gradients, each the coordinates of some tensors, in float64.

    The cosine is 0 when one of the two is zero, and NaN when both are.
    """
    got, expected = _vector(gradient), _vector(reference)
    size, expected_size = got.norm(), expected.norm()
    cosine = ratio(got.dot(expected), size * expected_size)
    if math.isnan(cosine) and (size > 0 or expected_size > 0):
        cosine = 0.0
    return Agreement(
        min(1.0, max(-1.0, cosine)) if cosine == cosine else cosine,
        ratio(size, expected_size),
        ratio((got - expected).norm(), expected_size),
    )


def ratio(part: Tensor, whole: Tensor) -> float:
    """part / whole of two 0-d tensors; 0 / 0 is NaN and anything else over 0 infinite."""
    return (part / whole).item()


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])
