"""Adam and its kin, as far as they keep the running averages of gradient and squared gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, pair, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class AdamState(NamedTuple):
    """What Adam keeps: the number of steps, both running averages, and for AMSGrad the largest second one."""

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree = ()


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
    """Adam.

    m ← β₁m + (1 - β₁)g; v ← β₂v + (1 - β₂)g²; u = -lr · m̂ / (√v̂ + ε), with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).

    Every hyper-parameter is a number, a tensor (differentiable; 0-d or broadcastable to each parameter), a tree of
    these like the parameters, or a callable of the step (a 0-d int64 tensor, from 0). Meta-gradients stay finite where a
    gradient entry is exactly 0: there the derivative of √v = |g| counts as 0.

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

    Examples:
        >>> beta2 = torch.tensor(0.9, requires_grad=True)
        >>> transform = fm.optim.adam(0.1, betas=(0.9, beta2))
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1000], grad_fn=<MulBackward0>)}

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; torch.optim.Adam.
    """
    beta1, beta2 = pair(betas)
    hypers = Hypers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def prepare(values: Values, step: Tensor) -> Values:
        time = (step + 1).double()
        return {
            "descent": -values["lr"] / (1 - values["beta1"] ** time),
            "root": (1 - values["beta2"] ** time).sqrt(),
        }

    def rule(
        values: Values, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        exp_avg = blend(exp_avg, grad, values["beta1"])
        exp_avg_sq = blend(exp_avg_sq, grad * grad, values["beta2"])
        largest = tuple(torch.maximum(each, exp_avg_sq) for each in kept)
        scale = safe_sqrt(largest[0] if amsgrad else exp_avg_sq) / values["root"] + values["eps"]
        return exp_avg / scale * values["descent"], exp_avg, exp_avg_sq, *largest

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
