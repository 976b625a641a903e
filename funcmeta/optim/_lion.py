"""Lion."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, pair
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class LionState(NamedTuple):
    """What Lion keeps: the number of steps and the running average of the gradients."""

    step: Tensor
    exp_avg: Tree


def lion(
    lr: Hyper = 1e-4,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.99),
    weight_decay: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    """Lion: the sign of an average of the gradients, with decoupled weight decay.

    u = -lr · (sign(β₁m + (1 - β₁)g) + λθ); m ← β₂m + (1 - β₂)g.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step. The derivative of
    the sign is 0, so a meta-gradient reaches `lr`, `weight_decay` and the initial parameters, but is 0 for `betas`.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        weight_decay: λ, at least 0: the parameters shrink by the factor 1 - lr · λ.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `exp_avg`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.lion(0.1)
        >>> params = {"w": torch.tensor([1.0, 1.0])}
        >>> transform.update({"w": torch.tensor([2.0, -3.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1000,  0.1000])}

    Source: Chen et al. 2023 (arXiv:2302.06675), program 1.
    """
    beta1, beta2 = pair(betas)

    def rule(values: Values, param: Tensor, grad: Tensor, exp_avg: Tensor) -> tuple[Tensor, ...]:
        update = -values["lr"] * blend(exp_avg, grad, values["beta1"]).sign()
        return update, blend(exp_avg, grad, values["beta2"])

    return per_tensor(
        Hypers(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay),
        rule,
        state=LionState,
        slots={"exp_avg": zeros},
        decoupled=True,
        maximize=maximize,
    )
