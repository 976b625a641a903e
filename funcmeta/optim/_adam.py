"""Adam, AdamW and AMSGrad: one rule."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta._check import check_flag
from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, blend_square, pair, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class AdamState(NamedTuple):
    """What Adam keeps: both running averages, for AMSGrad the largest second one, and how the steps count.

    ``step`` counts the steps of the optimizer, ``missed`` those in which each parameter had no gradient.
    """

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree = ()
    missed: Tree = ()


def adam(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam: steps along the mean of the gradients over the root of the mean of their squares.

    m ← β₁m + (1 - β₁)g; v ← β₂v + (1 - β₂)g²; u = -lr · m̂ / (√v̂ + ε), with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step. Meta-gradients
    stay finite where a gradient entry is exactly 0: there the derivative of √v, which is |g|, counts as 0.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        amsgrad: whether v̂ uses the largest v so far.
        decoupled_weight_decay: whether the weight decay is that of `adamw`.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `exp_avg`, `exp_avg_sq`, and `max_exp_avg_sq` with `amsgrad`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> beta2 = torch.tensor(0.9, requires_grad=True)
        >>> transform = fm.optim.adam(0.1, betas=(0.9, beta2))
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)
        >>> updates["w"].detach(), state.step
        (tensor([-0.1000]), tensor(1))

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; torch.optim.Adam.
    """
    check_flag("amsgrad", amsgrad)
    beta1, beta2 = pair(betas)
    hypers = Hypers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def prepare(values: Values, step: Tensor) -> Values:
        time = (step + 1).double()
        return {
            "descent": -values["lr"] / (1 - values["beta1"] ** time),
            "bias_root": (1 - values["beta2"] ** time).sqrt(),
        }

    def rule(values: Values, param: Tensor, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        exp_avg = blend(kept[0], grad, values["beta1"])
        exp_avg_sq = blend_square(kept[1], grad, values["beta2"])
        second = (exp_avg_sq, torch.maximum(kept[2], exp_avg_sq)) if amsgrad else (exp_avg_sq,)
        scale = safe_sqrt(second[-1]) / values["bias_root"] + values["eps"]
        return exp_avg / scale * values["descent"], exp_avg, *second

    slots = {"exp_avg": zeros, "exp_avg_sq": zeros}
    return per_tensor(
        hypers,
        rule,
        state=AdamState,
        slots=slots | {"max_exp_avg_sq": zeros} if amsgrad else slots,
        prepare=prepare,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )


def adamw(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with decoupled weight decay.

    u = -lr · (m̂ / (√v̂ + ε) + λθ), with the running averages of `adam`, which do not see the weight decay.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: the parameters shrink by the factor 1 - lr · λ.
        amsgrad: whether v̂ uses the largest v so far.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform, with the state of `adam`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.adamw(0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1500])}

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; torch.optim.AdamW.
    """
    return adam(
        lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        decoupled_weight_decay=True,
        maximize=maximize,
    )


def amsgrad(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    """Adam whose denominator never shrinks: `adam` with `amsgrad=True`.

    u = -lr · m̂ / (√v̂ + ε), with v̂ = maxₛ≤ₜ vₛ / (1 - β₂ᵗ).
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state is that of `adam` with `max_exp_avg_sq`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.amsgrad(0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1000])}

    Source: Reddi et al. 2018 (arXiv:1904.09237), algorithm 2; torch.optim.Adam with amsgrad=True.
    """
    return adam(lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=True, maximize=maximize)
