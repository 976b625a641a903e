"""A small recurrent network for each coordinate under a larger one for each tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcmeta._check import check_count, check_positive
from funcmeta.learned._coordinatewise import Coordinatewise, Dense
from funcmeta.learned._features import averaged, of_unit_size
from funcmeta.learned._optimizer import LearnedOptimizer

DECAYS = (0.5, 0.9, 0.99)
_EPS = 1e-16


def hierarchical(*, coordinate: int = 10, tensor: int = 20, scale: float = 1e-3) -> LearnedOptimizer:
    """A recurrent network for each coordinate, steered by one for each tensor.

    h' = GRU(features, H; h) for each coordinate, H' = GRU(mean of h'; H) for each tensor;
    u = −scale · exp(s) · d / √(mean of d² over the tensor), (d, s) = W h' + b. The features are averages of g with
    decays .5, .9 and .99, each over the root of the average of g² with the same decay, and the logarithms of these
    averages of squares against their mean, so that the scale of the loss does not count.

    Args:
        coordinate: units of the networks of coordinates.
        tensor: units of the networks of tensors.
        scale: root mean square of a tensor's updates at s = 0.

    Returns:
        A ``LearnedOptimizer``. Its weights are drawn from torch's global generator.

    Raises:
        ArgumentError: a size or the scale is not positive.

    Examples:
        >>> optimizer = hierarchical()
        >>> params = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
        >>> updates, state = optimizer(params, params, optimizer.init_state(params))
        >>> updates["weight"].shape
        torch.Size([3, 2])

    Source: Wichrowska et al. (2017), "Learned optimizers that scale and generalize", section 3, without its network
    across tensors, its attention and its learned time scales.
    """
    return _Hierarchical(coordinate=coordinate, tensor=tensor, scale=scale)


class _Slots(NamedTuple):
    """Averages of the gradient and of its square, one for each decay."""

    first: Tensor
    second: Tensor


class _Memory(NamedTuple):
    """Of the coordinates, [units, coordinates], and of the tensors, [units, tensors]."""

    coordinates: Tensor
    tensors: Tensor


class _Hierarchical(Coordinatewise):
    """The module behind ``hierarchical``."""

    def __init__(self, *, coordinate: int, tensor: int, scale: float) -> None:
        super().__init__()
        self._units = check_count("coordinate", coordinate), check_count("tensor", tensor)
        self._scale = check_positive("scale", scale)
        self.kind, self.config = "hierarchical", {"coordinate": coordinate, "tensor": tensor, "scale": scale}
        self.coordinate = _GRUCell(2 * len(DECAYS) + tensor, coordinate)
        self.tensor = _GRUCell(coordinate, tensor)
        self.out = Dense(coordinate, 2)

    def slots(self, param: Tensor) -> _Slots:
        """Zeros."""
        zero = param.new_zeros((len(DECAYS), *param.shape))
        return _Slots(zero, zero)

    def memory(self, like: Tensor, sizes: Sequence[int]) -> _Memory:
        """Zeros."""
        coordinate, tensor = self._units
        return _Memory(like.new_zeros((coordinate, like.shape[1])), like.new_zeros((tensor, len(sizes))))

    def observe(self, param: Tensor, grad: Tensor, slots: _Slots, step: Tensor) -> tuple[Tensor, _Slots]:
        """Scaled averages, and how the scale changes with time."""
        decays = grad.new_tensor(DECAYS)
        first, second = averaged(slots.first, grad, decays), averaged(slots.second, grad.square(), decays)
        logarithm = (second + _EPS).log()
        return torch.cat([first * (second + _EPS).rsqrt(), logarithm - logarithm.mean(0)]), _Slots(first, second)

    def decide(self, features: Tensor, hidden: _Memory, sizes: Sequence[int]) -> tuple[Tensor, _Memory]:
        """Both networks, first that of the coordinates."""
        steering = [
            column.expand(-1, size) for column, size in zip(torch.split(hidden.tensors, 1, 1), sizes, strict=True)
        ]
        coordinates = self.coordinate(torch.cat([features, torch.cat(steering, 1)]), hidden.coordinates)
        means = [part.sum(1, keepdim=True) / max(part.shape[1], 1) for part in torch.split(coordinates, list(sizes), 1)]
        tensors = self.tensor(torch.cat(means, 1), hidden.tensors)
        return self.out(coordinates), _Memory(coordinates, tensors)

    def act(self, outputs: Tensor, param: Tensor) -> Tensor:
        """A direction of unit size times a step."""
        return -self._scale * of_unit_size(outputs[:1], _EPS)[0] * outputs[1].exp()


class _GRUCell(nn.Module):
    """One step of a gated recurrent unit with coordinates last."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.gates, self.candidate = Dense(inputs + units, 2 * units), Dense(inputs + units, units)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """The next memory."""
        keep, reset = self.gates(torch.cat([x, memory])).sigmoid().chunk(2)
        candidate = self.candidate(torch.cat([x, reset * memory])).tanh()
        return torch.lerp(candidate, memory, keep)
