"""What a learned optimizer sees of gradients: scaled, averaged over time, and the time itself."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def log_sign(grad: Tensor, scale: float) -> Tensor:
    """Logarithm and sign: (log|g| / p, sgn g) where |g| ≥ e⁻ᵖ, else (−1, eᵖ g), in a first dimension of 2.

    Source: Andrychowicz et al. (2016), appendix A.
    """
    floor = math.exp(-scale)
    return torch.stack([grad.abs().clamp_min(floor).log() / scale, (grad / floor).clamp(-1, 1)])


def averaged(old: Tensor, new: Tensor, decays: Tensor) -> Tensor:
    """d · old + (1 − d) · new for each of the decays d, in a first dimension."""
    decays = decays.reshape(-1, *[1] * new.dim())
    return decays * old + (1 - decays) * new


class Factored(NamedTuple):
    """Averages of g² over columns and over rows, a first dimension for the decays; for vectors both are g² itself."""

    rows: Tensor
    columns: Tensor


class Scales(NamedTuple):
    """What ``Factored`` gives for each coordinate, [decays, *shape].

    Attributes:
        rows: average of g² over the column dimension.
        columns: average of g² over the row dimension.
        inverse_root: 1/√ of the factored estimate of g².
    """

    rows: Tensor
    columns: Tensor
    inverse_root: Tensor


def factored_zeros(param: Tensor, decays: int) -> Factored:
    """The averages before the first step."""
    dims = _two_largest(param)
    if dims is None:
        zero = param.new_zeros((decays, *param.shape))
        return Factored(zero, zero)
    shapes = [tuple(1 if dim == gone else size for dim, size in enumerate(param.shape)) for gone in reversed(dims)]
    return Factored(*[param.new_zeros((decays, *shape)) for shape in shapes])


def factored(old: Factored, grad: Tensor, decays: Tensor) -> tuple[Factored, Scales]:
    """The next averages, and what they say of each coordinate.

    The estimate of g² at (i, j) is rows_i · columns_j / mean(rows), as in Adafactor.
    """
    dims, square = _two_largest(grad), grad.square() + 1e-30
    if dims is None:
        both = averaged(old.rows, square, decays)
        return Factored(both, both), Scales(both, both, (both + 1e-9).rsqrt())
    row, column = dims
    rows = averaged(old.rows, square.mean(column, keepdim=True), decays)
    columns = averaged(old.columns, square.mean(row, keepdim=True), decays)
    relative = rows / (rows.mean(1 + row, keepdim=True) + 1e-9)
    inverse_root = relative.clamp_min(1e-9).rsqrt() * columns.clamp_min(1e-9).rsqrt()
    shape = (len(decays), *grad.shape)
    return Factored(rows, columns), Scales(rows.expand(shape), columns.expand(shape), inverse_root)


def of_unit_size(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Features [features, *shape] divided by their root mean square over the tensor."""
    over = tuple(range(1, features.dim()))
    return features * (features.square().mean(over, keepdim=True) + eps).rsqrt() if over else _unit(features, eps)


def _unit(features: Tensor, eps: float) -> Tensor:
    return features * (features.square() + eps).rsqrt()


def time_features(step: Tensor, like: Tensor) -> Tensor:
    """tanh(t/τ − 1) for τ = 1, 3, 10, …, 100,000: eleven views of the step t, from 0, the same for all coordinates."""
    scales = like.new_tensor([1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000])
    return torch.tanh(step / scales - 1).reshape(-1, *[1] * like.dim()).expand(-1, *like.shape)


def _two_largest(tensor: Tensor) -> tuple[int, int] | None:
    """The dimensions that are factored: the second largest and the largest, None for vectors and scalars."""
    if tensor.dim() < 2:
        return None
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.shape[dim])
    return order[-2], order[-1]
