"""NAdam."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend, blend_square, double, pair, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class NadamState(NamedTuple):
    """What NAdam keeps: the number of steps, both running averages, and the product of all momenta so far."""

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    mu_product: Tree
    missed: Tree = ()


def nadam(
    lr: Hyper = 2e-3,
    *,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum_decay: Hyper = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """NAdam: Adam with Nesterov's momentum.

    m, v as in `adam`; μₜ = β₁(1 - ½ · 0.96^(ψt)); Mₜ = μ₁ ⋯ μₜ;
    u = -lr · ((1 - μₜ)g / (1 - Mₜ) + μₜ₊₁m / (1 - Mₜ₊₁)) / (√v̂ + ε), with v̂ = v / (1 - β₂ᵗ).
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: learning rate, at least 0.
        betas: the pair (β₁, β₂), each in [0, 1).
        eps: ε, at least 0, in units of the gradient.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        momentum_decay: ψ, at least 0, per step.
        decoupled_weight_decay: whether lr · λθ is taken from the parameters instead.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `exp_avg`, `exp_avg_sq`, and `mu_product` in double precision.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.nadam(0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.1056])}

    Source: Dozat 2016 (ICLR workshop), algorithm 2; torch.optim.NAdam.
    """
    beta1, beta2 = pair(betas)
    hypers = Hypers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)

    def prepare(values: Values, step: Tensor) -> Values:
        time, beta1 = (step + 1).double(), double(values["beta1"])

        def momentum(time: Tensor) -> Tensor:
            decay: Tensor = 0.96 ** (time * values["momentum_decay"])
            return beta1 * (1 - 0.5 * decay)

        return {"mu": momentum(time), "next_mu": momentum(time + 1), "bias": 1 - values["beta2"] ** time}

    def rule(
        values: Values, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, mu_product: Tensor
    ) -> tuple[Tensor, ...]:
        exp_avg = blend(exp_avg, grad, values["beta1"])
        exp_avg_sq = blend_square(exp_avg_sq, grad, values["beta2"])
        mu_product = mu_product * values["mu"]
        now = values["lr"] * (1 - values["mu"]) / (1 - mu_product)
        then = values["lr"] * values["next_mu"] / (1 - mu_product * values["next_mu"])
        scale = safe_sqrt(exp_avg_sq / values["bias"]) + values["eps"]
        return -(now * grad + then * exp_avg) / scale, exp_avg, exp_avg_sq, mu_product

    return per_tensor(
        hypers,
        rule,
        state=NadamState,
        slots={"exp_avg": zeros, "exp_avg_sq": zeros, "mu_product": _one},
        prepare=prepare,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )


def _one(param: Tensor, values: Values) -> Tensor:
    """The empty product, of the shape that the momenta broadcast to."""
    return torch.ones_like(values["mu"])
