"""RMSprop."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

from torch import Tensor

from funcmeta._check import check_flag
from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, blend_square, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class RmspropState(NamedTuple):
    """What RMSprop keeps: the number of steps, the mean square, the mean where centered, the momentum if any."""

    step: Tensor
    square_avg: Tree
    grad_avg: Tree = ()
    momentum_buffer: Tree = ()
    missed: Tree = ()


def rmsprop(
    lr: Hyper = 1e-2,
    *,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Transform:
    """RMSprop: gradients over the root of the mean of their squares.

    v ← αv + (1 - α)g²; d = g / (√v + ε); u = -lr · d, or with momentum b ← μb + d and u = -lr · b.
    Centered, √(v - a²) takes the place of √v, with a ← αa + (1 - α)g.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        alpha: α, at least 0.
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        momentum: μ, at least 0; the number 0 keeps no buffer.
        centered: whether the squares are taken around the mean.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `square_avg`, `grad_avg` if centered, `momentum_buffer` if any.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.rmsprop(0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.2000])}

    Source: Tieleman and Hinton 2012 (lecture 6.5); Graves 2013 (arXiv:1308.0850), equation 38; torch.optim.RMSprop.
    """
    check_flag("centered", centered)
    hypers = Hypers(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    heavy = hypers.uses("momentum")

    def rule(values: Values, param: Tensor, grad: Tensor, square_avg: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        square = square_avg = blend_square(square_avg, grad, values["alpha"])
        fresh: tuple[Tensor, ...] = ()
        if centered:
            fresh = (blend(kept[0], grad, values["alpha"]),)
            square = square_avg - fresh[0] * fresh[0]
        step = grad / (safe_sqrt(square) + values["eps"])
        if heavy:
            step = values["momentum"] * kept[-1] + step
            fresh = (*fresh, step)
        return -values["lr"] * step, square_avg, *fresh

    names = ["square_avg", *(["grad_avg"] if centered else []), *["momentum_buffer"] * heavy]
    return per_tensor(hypers, rule, state=RmspropState, slots=dict.fromkeys(names, zeros), maximize=maximize)
