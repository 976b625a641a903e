"""Stochastic gradient descent."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta._check import check_flag
from funcmeta._errors import ArgumentError
from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, double
from funcmeta.optim._rule import Scaled, per_tensor, zeros
from funcmeta.optim._transform import Transform


class SgdState(NamedTuple):
    """What SGD keeps: the number of steps where something reads it, and the momentum where there is any."""

    step: Tree = ()
    momentum_buffer: Tree = ()
    missed: Tree = ()


def sgd(
    lr: Hyper,
    *,
    momentum: Hyper = 0.0,
    dampening: Hyper = 0.0,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    """Stochastic gradient descent, with momentum, dampening, Nesterov's variant and weight decay.

    g ← g + λθ; b ← μb + (1 - τ)g, for a parameter's first gradient b ← g; u = -lr · b, or -lr · (g + μb) for Nesterov's
    variant.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        momentum: μ, at least 0; the number 0 keeps no buffer.
        dampening: τ; without effect while the momentum is 0, as in torch.optim.
        nesterov: whether to look ahead; needs a momentum, and no dampening.
        weight_decay: λ, at least 0, in units of the gradient per unit of the parameter.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `momentum_buffer`, and `step` where dampening or a schedule reads it.

    Raises:
        ArgumentError: Nesterov's variant without momentum or with dampening; a hyper-parameter is none, or a number out
            of its range or not finite; or a flag is neither True nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> transform = fm.optim.sgd(lr, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)
        >>> torch.autograd.grad(updates["w"].sum(), lr)
        (tensor(-2.),)

    Source: torch.optim.SGD; Sutskever et al. 2013 (Proceedings of ICML) for Nesterov's variant.
    """
    check_flag("nesterov", nesterov)
    hypers = Hypers(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    heavy = hypers.uses("momentum")
    damped = heavy and hypers.uses("dampening")
    if nesterov and (not heavy or damped):
        raise ArgumentError(
            f"nesterov=True with momentum={momentum!r} and dampening={dampening!r}, expected a momentum and the number "
            "0 as dampening. Pass for example momentum=0.9, or nesterov=False."
        )

    def prepare(values: Values, step: Tensor) -> Values:
        descent = {"descent": -values["lr"]}
        if not damped:
            return descent
        undamped = (step == 0) | (double(values["momentum"]) == 0)
        return descent | {"fresh": 1 - torch.where(undamped, 0.0, double(values["dampening"]))}

    def rule(values: Values, param: Tensor, grad: Tensor, *kept: Tensor) -> tuple[Any, ...]:
        if not heavy:
            return (Scaled(grad, values["descent"]),)
        buffer = Scaled(kept[0], values["momentum"]).added_to(grad * values["fresh"] if damped else grad)
        ahead = Scaled(buffer, values["momentum"]).added_to(grad) if nesterov else buffer
        return Scaled(ahead, values["descent"]), buffer

    return per_tensor(
        hypers,
        rule,
        state=SgdState,
        slots={"momentum_buffer": zeros} if heavy else {},
        prepare=prepare,
        counted=damped,
        maximize=maximize,
    )
