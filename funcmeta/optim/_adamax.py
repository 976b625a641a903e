"""AdaMax."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, pair
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class AdamaxState(NamedTuple):
    """What AdaMax keeps: the number of steps, the running average and the decaying maximum of the gradients."""

    step: Tensor
    exp_avg: Tree
    exp_inf: Tree
    missed: Tree = ()


def adamax(
    lr: Hyper = 2e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    """AdaMax: Adam with the maximum norm in place of the Euclidean one.

    m ← β₁m + (1 - β₁)g; n ← max(β₂n, |g| + ε); u = -lr / (1 - β₁ᵗ) · m / n.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `exp_avg`, `exp_inf`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.adamax(0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1000])}

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 2; torch.optim.Adamax.
    """
    beta1, beta2 = pair(betas)
    hypers = Hypers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def prepare(values: Values, step: Tensor) -> Values:
        return {"descent": -values["lr"] / (1 - values["beta1"] ** (step + 1).double())}

    def rule(values: Values, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_inf: Tensor) -> tuple[Tensor, ...]:
        exp_avg = blend(exp_avg, grad, values["beta1"])
        exp_inf = torch.maximum(values["beta2"] * exp_inf, grad.abs() + values["eps"])
        return exp_avg / exp_inf * values["descent"], exp_avg, exp_inf

    return per_tensor(
        hypers,
        rule,
        state=AdamaxState,
        slots={"exp_avg": zeros, "exp_inf": zeros},
        prepare=prepare,
        maximize=maximize,
    )
