"""The LSTM on gradients scaled as Adam scales them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcmeta._check import check_count, check_fraction, check_positive
from funcmeta.learned._coordinatewise import Coordinatewise, Dense, StackedLSTM
from funcmeta.learned._optimizer import LearnedOptimizer

_EPS = 1e-8


def rnnprop(
    *, hidden: int = 20, layers: int = 2, scale: float = 0.1, beta1: float = 0.95, beta2: float = 0.95
) -> LearnedOptimizer:
    """An LSTM whose inputs do not depend on the scale of the loss, and whose updates are bounded.

    m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², both corrected for their start at 0; inputs m/√v and g/√v through a
    layer with ELU; u = scale · tanh(W h + b).

    Args:
        hidden: units of each layer.
        layers: number of LSTM layers.
        scale: the largest update of a coordinate.
        beta1: decay of the average of gradients, in [0, 1).
        beta2: decay of the average of their squares, in [0, 1).

    Returns:
        A ``LearnedOptimizer``. Its weights are drawn from torch's global generator.

    Raises:
        ArgumentError: a size or a factor is out of its range.

    Examples:
        >>> optimizer = rnnprop()
        >>> grad = torch.tensor([1e-3, 1e3])
        >>> update, state = optimizer(torch.zeros(2), grad, optimizer.init_state(grad))
        >>> torch.allclose(update[0], update[1], rtol=1e-3)
        True

    Source: Lv, Jiang and Li (2017), "Learning gradient descent: better generalization and longer horizons", section 4.
    """
    return _RNNProp(hidden=hidden, layers=layers, scale=scale, beta1=beta1, beta2=beta2)


class _Slots(NamedTuple):
    """Averages of the gradient and of its square."""

    first: Tensor
    second: Tensor


class _RNNProp(Coordinatewise):
    """The module behind ``rnnprop``."""

    def __init__(self, *, hidden: int, layers: int, scale: float, beta1: float, beta2: float) -> None:
        super().__init__()
        check_count("hidden", hidden)
        check_count("layers", layers)
        self._beta1, self._beta2 = check_fraction("beta1", beta1), check_fraction("beta2", beta2)
        self._scale = check_positive("scale", scale)
        self.kind = "rnnprop"
        self.config = {"hidden": hidden, "layers": layers, "scale": scale, "beta1": beta1, "beta2": beta2}
        self.enter = Dense(2, hidden)
        self.network = StackedLSTM(hidden, hidden, layers)
        self.out = Dense(hidden, 1)

    def slots(self, param: Tensor) -> _Slots:
        """Zeros."""
        zero = torch.zeros_like(param)
        return _Slots(zero, zero)

    def memory(self, like: Tensor, sizes: Sequence[int]) -> Any:
        """Of all layers."""
        return self.network.memory(like)

    def observe(self, param: Tensor, grad: Tensor, slots: _Slots, step: Tensor) -> tuple[Tensor, _Slots]:
        """Average and gradient over the root of the average square."""
        first = self._beta1 * slots.first + (1 - self._beta1) * grad
        second = self._beta2 * slots.second + (1 - self._beta2) * grad.square()
        taken = (step + 1).to(grad.dtype)
        root = (second / (1 - self._beta2**taken) + _EPS**2).sqrt()
        return torch.stack([first / (1 - self._beta1**taken) / root, grad / root]), _Slots(first, second)

    def decide(self, features: Tensor, hidden: Any, sizes: Sequence[int]) -> tuple[Tensor, Any]:
        """The LSTM between two layers."""
        out, hidden = self.network(F.elu(self.enter(features)), hidden)
        return self._scale * self.out(out).tanh(), hidden
