"""The small network over many features of each coordinate."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta._check import check_count, check_positive
from funcmeta.learned._coordinatewise import Coordinatewise, Dense
from funcmeta.learned._features import (
    Factored,
    averaged,
    factored,
    factored_zeros,
    of_unit_size,
    time_features,
)
from funcmeta.learned._optimizer import LearnedOptimizer

MOMENTA = (0.9, 0.99, 0.999)
SQUARES = (0.999,)
FEATURES = 39


def mlp(*, hidden: int = 32, layers: int = 2, step_scale: float = 1e-3, exp_scale: float = 1e-3) -> LearnedOptimizer:
    """A network from 39 features of a coordinate to the direction and the size of its update ("small_fc").

    u = −step_scale · d · exp(exp_scale · s), (d, s) = MLP(features). The features are θ, g, averages of g with decays
    .9, .99 and .999 (m), of g² with .999 (v), m/√v, 1/√v, g and m over the root of factored averages of g² (as
    Adafactor's; decays .9, .99, .999), these averages over rows and columns and their inverse roots, all of unit size
    over each tensor; and tanh(t/τ − 1) for eleven time scales τ from 1 to 100,000.

    Args:
        hidden: units of each hidden layer.
        layers: number of hidden layers.
        step_scale: factor of the direction.
        exp_scale: factor in the exponent.

    Returns:
        A ``LearnedOptimizer``. Its weights are drawn from torch's global generator.

    Raises:
        ArgumentError: a size or a factor is not positive.

    Examples:
        >>> sum(weight.numel() for weight in mlp().parameters())
        2402

    Source: Metz et al. (2022), "Practical tradeoffs between memory, compute, and performance in learned optimizers",
    section 3 and appendix; momenta and decays are fixed here.
    """
    return _MLP(hidden=hidden, layers=layers, step_scale=step_scale, exp_scale=exp_scale)


class _Slots(NamedTuple):
    """Averages of the gradient, of its square, and factored ones."""

    momenta: Tensor
    squares: Tensor
    factored: Factored


class _MLP(Coordinatewise):
    """The module behind ``mlp``."""

    def __init__(self, *, hidden: int, layers: int, step_scale: float, exp_scale: float) -> None:
        super().__init__()
        check_count("hidden", hidden)
        check_count("layers", layers)
        self._step_scale = check_positive("step_scale", step_scale)
        self._exp_scale = check_positive("exp_scale", exp_scale)
        self.kind = "mlp"
        self.config = {"hidden": hidden, "layers": layers, "step_scale": step_scale, "exp_scale": exp_scale}
        sizes = [FEATURES, *[hidden] * layers, 2]
        self.layers = torch.nn.ModuleList([Dense(*pair) for pair in pairwise(sizes)])

    def slots(self, param: Tensor) -> _Slots:
        """Zeros."""
        momenta, squares = (param.new_zeros((len(decays), *param.shape)) for decays in (MOMENTA, SQUARES))
        return _Slots(momenta, squares, factored_zeros(param, len(MOMENTA)))

    def observe(self, param: Tensor, grad: Tensor, slots: _Slots, step: Tensor) -> tuple[Tensor, _Slots]:
        """The 39 features."""
        decays = grad.new_tensor(MOMENTA)
        momenta = averaged(slots.momenta, grad, decays)
        squares = averaged(slots.squares, grad.square(), grad.new_tensor(SQUARES))
        inverse_root = (squares + 1e-6).rsqrt()
        averages, scales = factored(slots.factored, grad, decays)
        features = [
            *(grad[None], param[None], momenta, squares, momenta * inverse_root, inverse_root),
            *(grad * scales.inverse_root, scales.rows, scales.columns),
            *((scales.rows + 1e-8).rsqrt(), (scales.columns + 1e-8).rsqrt(), momenta * scales.inverse_root),
        ]
        seen = torch.cat([of_unit_size(torch.cat(features)), time_features(step, grad)])
        return seen, _Slots(momenta, squares, averages)

    def decide(self, features: Tensor, hidden: Any, sizes: Sequence[int]) -> tuple[Tensor, Any]:
        """The network."""
        *inner, last = self.layers
        for layer in inner:
            features = layer(features).relu()
        return last(features), hidden

    def act(self, outputs: Tensor, param: Tensor) -> Tensor:
        """Direction times size."""
        return -self._step_scale * outputs[0] * (self._exp_scale * outputs[1]).exp()
