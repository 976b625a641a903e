"""Adagrad."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, safe_sqrt
from funcmeta.optim._rule import per_tensor
from funcmeta.optim._transform import Transform


class AdagradState(NamedTuple):
    """What Adagrad keeps: the number of steps and the sum of the squared gradients."""

    step: Tensor
    sum: Tree
    missed: Tree = ()


def adagrad(
    lr: Hyper = 1e-2,
    *,
    lr_decay: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: Hyper = 0.0,
    eps: Hyper = 1e-10,
    maximize: bool = False,
) -> Transform:
    """Adagrad: gradients over the root of the sum of their squares.

    s ← s + g², from s₀; u = -lr / (1 + (t - 1)η) · g / (√s + ε).
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        lr_decay: η, at least 0, per step.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        initial_accumulator_value: s₀, at least 0, in units of the squared gradient.
        eps: ε, at least 0, in units of the gradient.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `sum`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.adagrad(0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1000])}

    Source: Duchi et al. 2011 (Journal of Machine Learning Research 12), equation 1; torch.optim.Adagrad.
    """
    hypers = Hypers(
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
    )

    def prepare(values: Values, step: Tensor) -> Values:
        return {"descent": -values["lr"] / (1 + step.double() * values["lr_decay"])}

    def rule(values: Values, param: Tensor, grad: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        total = total + grad * grad
        return grad / (safe_sqrt(total) + values["eps"]) * values["descent"], total

    return per_tensor(hypers, rule, state=AdagradState, slots={"sum": _initial}, prepare=prepare, maximize=maximize)


def _initial(param: Tensor, values: Values) -> Tensor:
    """The sum before the first step, attached to the hyper-parameter."""
    value: Tensor = torch.zeros_like(param) + values["initial_accumulator_value"]
    return value.to(param.dtype)
