"""Three gates between what a weight is, what the gradient says, and what the weight was."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._check import check_count, is_number
from funcmeta._errors import ArgumentError
from funcmeta._typing import Tree
from funcmeta.learned._coordinatewise import Dense
from funcmeta.learned._optimizer import LearnedOptimizer

_SMALL = 1e-8
_SCALE = 0.1


def gates(*, copy: float = 0.999, update: float = 0.1, flush: float = 0.001, hidden: int = 4) -> LearnedOptimizer:
    """Gates COPY, UPDATE and FLUSH on a weight, its gradient, and what it was at first, shared over all coordinates.

    θ' = copy · θ − update · g + flush · θ_static. The gates are sigmoids of a feed-forward network that sees the size
    of the gradient and of θ − θ_static, those of the coordinate and those of its whole tensor. Before meta-training
    they are the same everywhere, which is dynamic evaluation: SGD at rate ``update`` that decays towards θ_static.

    Args:
        copy: COPY before meta-training, in (0, 1); 1 fixes it, so that weights are kept as they are.
        update: UPDATE before meta-training, in (0, 1), per gradient; 0 fixes it: nothing is learned from gradients.
        flush: FLUSH before meta-training, in (0, 1); 0 fixes it: nothing brings weights back.
        hidden: units of the network; 0 for gates that are constants, learned as such.

    Returns:
        A ``LearnedOptimizer``. θ_static, which its state holds, are the parameters that the state was made from. The
        weights of its first layer are drawn from torch's global generator.

    Raises:
        ArgumentError: a gate lies outside of its range, or ``hidden`` is negative.

    Examples:
        >>> optimizer = gates(copy=0.5, update=0.1, flush=0.5)
        >>> static = torch.tensor([1.0, 2.0])
        >>> change, _ = optimizer(torch.zeros(2), torch.tensor([0.0, 1.0]), optimizer.init_state(static))
        >>> change.detach()
        tensor([0.5000, 0.9000])

    Source: Wolf, Chaumond and Delangue (2018), "Meta-Learning a Dynamical Language Model" (arXiv:1803.10631), for the
    gates; Krause et al. (2018), "Dynamic Evaluation of Neural Sequence Models" (arXiv:1709.07432), for where they
    begin; what the network sees is this library's choice.
    """
    return Gates(copy=copy, update=update, flush=flush, hidden=hidden)


class Gates(LearnedOptimizer):
    """The module behind ``gates``; its state are the static weights."""

    whole: ClassVar[bool] = True
    features: ClassVar[int] = 4

    def __init__(self, *, copy: float, update: float, flush: float, hidden: int) -> None:
        super().__init__()
        check_count("hidden", hidden, least=0)
        self.kind = "gates"
        self.config = {"copy": copy, "update": update, "flush": flush, "hidden": hidden}
        given = {"copy": (copy, 1), "update": (update, 0), "flush": (flush, 0)}
        begin = {name: None if is_number(value) and value == fixed else value for name, (value, fixed) in given.items()}
        self._open = [name for name, value in begin.items() if value is not None]
        if not self._open:
            return
        logits = [_logit(name, value) for name, value in begin.items() if value is not None]
        self.bias = nn.Parameter(torch.tensor(logits))
        if hidden:
            self.enter = Dense(self.features, hidden)
            self.weight = nn.Parameter(torch.zeros(len(logits), hidden))

    def init_state(self, param: Tree) -> Tree:
        """The weights to come back to."""
        return param

    def forward(self, param: Tree, grad: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The changes, tensor by tensor."""
        return tree.map(self._change, param, grad, state), state

    def _change(self, param: Tensor, grad: Tensor | None, static: Tensor) -> Tensor | None:
        if grad is None:
            return None
        opened = self._opened(param, grad, static)
        change = torch.zeros_like(param)
        if "update" in opened:
            change = change - torch.sigmoid(opened["update"]) * grad
        if "copy" in opened:
            change = change - torch.sigmoid(-opened["copy"]) * param
        if "flush" in opened:
            change = change + torch.sigmoid(opened["flush"]) * static
        return change

    def _opened(self, param: Tensor, grad: Tensor, static: Tensor) -> dict[str, Tensor]:
        """The logit of each gate that is not fixed, for each coordinate."""
        if not self._open:
            return {}
        if not hasattr(self, "enter"):
            return dict(zip(self._open, self.bias, strict=True))
        given, moved = grad.to(self.bias.dtype), (param - static).to(self.bias.dtype)
        seen = torch.stack([*_sizes(given), *_sizes(moved)])
        inner = self.enter(seen.reshape(len(seen), param.numel())).tanh()
        outer = torch.addmm(self.bias[:, None], self.weight, inner)
        return {name: row.view(param.shape) for name, row in zip(self._open, outer, strict=True)}


def _sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the size of each coordinate, and that of the root of the mean square, about in [-2, 1]."""
    squares = x.square()
    mean = (squares.mean() + _SMALL**2).log() * (_SCALE / 2)
    return (squares + _SMALL**2).log() * (_SCALE / 2), mean.expand_as(x)


def _logit(name: str, value: float) -> float:
    if not is_number(value) or not 0 < value < 1:
        fixed = "1" if name == "copy" else "0"
        raise ArgumentError(
            f"{name} is {value!r}, expected a number in (0, 1), or {fixed} to fix the gate. Pass e.g. {name}=0.1."
        )
    return math.log(value / (1 - value))
