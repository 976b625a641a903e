"""The coordinate-wise LSTM that learns to learn by gradient descent by gradient descent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcmeta._check import check_choice, check_count, check_positive
from funcmeta._errors import ArgumentError
from funcmeta.learned._coordinatewise import Coordinatewise, Dense, StackedLSTM
from funcmeta.learned._features import log_sign
from funcmeta.learned._optimizer import LearnedOptimizer

_P = 10.0

LARGEST = 80
"""The largest p whose e⁻ᵖ is a number in single precision."""


def lstm(
    *, hidden: int = 20, layers: int = 2, preprocess: str = "log_sign", p: float = _P, scale: float = 0.1
) -> LearnedOptimizer:
    """An LSTM from the gradient to the update, its weights shared by all coordinates, its memory one for each.

    u = scale · (W h + b), h, memory' = LSTM(features(g), memory). The features are log|g|/p and sgn g where |g| ≥ e⁻ᵖ,
    else −1 and eᵖ g; or g itself.

    Args:
        hidden: units of each layer.
        layers: number of layers.
        preprocess: "log_sign", or "none" for the gradient as it is.
        p: gradients below e⁻ᵖ are seen linearly, those above by logarithm and sign; for "log_sign" only.
        scale: factor of the output.

    Returns:
        A ``LearnedOptimizer``. Its weights are drawn from torch's global generator.

    Raises:
        ArgumentError: a size or a factor is not positive, ``preprocess`` is not known, or ``p`` is given for "none".

    Examples:
        >>> optimizer = lstm()
        >>> sum(weight.numel() for weight in optimizer.parameters())
        5141
        >>> state = optimizer.init_state(torch.ones(7))
        >>> update, state = optimizer(torch.ones(7), torch.ones(7), state)
        >>> update.shape
        torch.Size([7])

    Source: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent", section 2.1 and
    appendix A.
    """
    return _LSTM(hidden=hidden, layers=layers, preprocess=preprocess, p=p, scale=scale)


class _LSTM(Coordinatewise):
    """The module behind ``lstm``."""

    def __init__(self, *, hidden: int, layers: int, preprocess: str, p: float, scale: float) -> None:
        super().__init__()
        check_count("hidden", hidden)
        check_count("layers", layers)
        check_choice("preprocess", preprocess, ("log_sign", "none"))
        self._p, self._scale = check_positive("p", p), check_positive("scale", scale)
        if p > LARGEST:
            raise ArgumentError(f"p is {p!r}, expected at most {LARGEST}, as e⁻ᵖ would be 0. Pass e.g. p=10.")
        if preprocess == "none" and p != _P:
            raise ArgumentError(f"p is {p!r} with preprocess='none', which does not read it. Leave p out.")
        self.kind = "lstm"
        self.config = {"hidden": hidden, "layers": layers, "preprocess": preprocess, "p": p, "scale": scale}
        self._seen_as_it_is = preprocess == "none"
        self.network = StackedLSTM(1 if self._seen_as_it_is else 2, hidden, layers)
        self.out = Dense(hidden, 1)

    def memory(self, like: Tensor, sizes: Sequence[int]) -> Any:
        """Of all layers."""
        return self.network.memory(like)

    def observe(self, param: Tensor, grad: Tensor, slots: tuple[()], step: Tensor) -> tuple[Tensor, tuple[()]]:
        """The gradient."""
        return (torch.stack([grad]) if self._seen_as_it_is else log_sign(grad, self._p)), slots

    def decide(self, features: Tensor, hidden: Any, sizes: Sequence[int]) -> tuple[Tensor, Any]:
        """The LSTM and a linear layer."""
        out, hidden = self.network(features, hidden)
        return self._scale * self.out(out), hidden
