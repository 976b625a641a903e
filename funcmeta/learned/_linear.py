"""The bare meta-learner: one weight for the gradient, one for the parameter."""

import math

import torch
from torch import Tensor, nn

from funcmeta._errors import ArgumentError
from funcmeta.learned._coordinatewise import Coordinatewise
from funcmeta.learned._optimizer import LearnedOptimizer


def linear(*, gradient: float = -0.01, parameter: float = 0.0) -> LearnedOptimizer:
    """A linear map of gradient and parameter, shared over all coordinates.

    u = w₁ g + w₂ θ. With w₂ = 0 it is gradient descent of rate −w₁, and −w₂ is a weight decay.

    Args:
        gradient: w₁ before meta-training.
        parameter: w₂ before meta-training.

    Returns:
        A ``LearnedOptimizer`` with 2 weights and no memory.

    Raises:
        ArgumentError: a weight is not a finite number.

    Examples:
        >>> optimizer = linear(gradient=-0.1)
        >>> update, state = optimizer(torch.ones(3), torch.ones(3), optimizer.init_state(torch.ones(3)))
        >>> update.detach()
        tensor([-0.1000, -0.1000, -0.1000])

    Source: T. Wolf (2018), "From zero to research: an introduction to meta-learning".
    """
    return _Linear(gradient=gradient, parameter=parameter)


class _Linear(Coordinatewise):
    """The module behind ``linear``."""

    def __init__(self, *, gradient: float, parameter: float) -> None:
        super().__init__()
        for name, value in (("gradient", gradient), ("parameter", parameter)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ArgumentError(f"{name} is {value!r}, expected a finite number. Pass e.g. {name}=-0.01.")
        self.kind, self.config = "linear", {"gradient": gradient, "parameter": parameter}
        self.weight = nn.Parameter(torch.tensor([float(gradient), float(parameter)]))

    def observe(self, param: Tensor, grad: Tensor, slots: tuple[()], step: Tensor) -> tuple[Tensor, tuple[()]]:
        """Gradient and parameter."""
        return torch.stack([grad, param]), slots

    def decide(self, features: Tensor, hidden: tuple[()], sizes: object) -> tuple[Tensor, tuple[()]]:
        """The linear map."""
        return self.weight[None] @ features, hidden
