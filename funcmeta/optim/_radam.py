"""RAdam."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

import torch
from torch import Tensor

from funcmeta._typing import Hyper
from funcmeta.optim._adam import AdamState
from funcmeta.optim._hyper import Hypers, Values, blend, blend_square, double, pair, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


def radam(
    lr: Hyper = 1e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """RAdam: Adam without adaptation while the mean of the squares is not to be trusted, rectified afterwards.

    m, v, m̂ as in `adam`; ρ∞ = 2 / (1 - β₂) - 1; ρ = ρ∞ - 2tβ₂ᵗ / (1 - β₂ᵗ).
    Where ρ > 5: u = -lr · m̂ · r · √(1 - β₂ᵗ) / (√v + ε), r² = (ρ - 4)(ρ - 2)ρ∞ / ((ρ∞ - 4)(ρ∞ - 2)ρ); else u = -lr · m̂.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        decoupled_weight_decay: whether lr · λθ is taken from the parameters instead.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `exp_avg`, `exp_avg_sq`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.radam(0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.2000])}

    Source: Liu et al. 2020 (arXiv:1908.03265), algorithm 2, with 5 for its threshold 4 as in torch.optim.RAdam.
    """
    beta1, beta2 = pair(betas)
    hypers = Hypers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def prepare(values: Values, step: Tensor) -> Values:
        time, decay = (step + 1).double(), double(values["beta2"])
        bias = 1 - decay**time
        limit = 2 / (1 - decay) - 1
        length = limit - 2 * time * decay**time / bias
        adapt = length > 5
        # Where nothing is adapted, 6 keeps the root and its derivative finite.
        limit, length = torch.where(adapt, limit, 6.0), torch.where(adapt, length, 6.0)
        rectification = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        return {
            "descent": -values["lr"] / (1 - values["beta1"] ** time),
            "adapt": adapt,
            "rectified": (rectification * bias).sqrt(),
        }

    def rule(values: Values, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, ...]:
        exp_avg = blend(exp_avg, grad, values["beta1"])
        exp_avg_sq = blend_square(exp_avg_sq, grad, values["beta2"])
        scale = torch.where(values["adapt"], safe_sqrt(exp_avg_sq) + values["eps"], 1.0)
        factor = torch.where(values["adapt"], values["rectified"] / scale, 1.0)
        return exp_avg * factor * values["descent"], exp_avg, exp_avg_sq

    return per_tensor(
        hypers,
        rule,
        state=AdamState,
        slots={"exp_avg": zeros, "exp_avg_sq": zeros},
        prepare=prepare,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )
