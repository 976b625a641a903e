"""Adadelta."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

from typing import NamedTuple

from torch import Tensor

from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Values, blend_square, safe_sqrt
from funcmeta.optim._rule import per_tensor, zeros
from funcmeta.optim._transform import Transform


class AdadeltaState(NamedTuple):
    """What Adadelta keeps: the number of steps and the mean squares of the gradients and of the steps."""

    step: Tensor
    square_avg: Tree
    acc_delta: Tree
    missed: Tree = ()


def adadelta(
    lr: Hyper = 1.0,
    *,
    rho: Hyper = 0.9,
    eps: Hyper = 1e-6,
    weight_decay: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    """Adadelta: steps in the units of the parameters, without a learning rate to choose.

    v ← ρv + (1 - ρ)g²; d = √(a + ε) / √(v + ε) · g; a ← ρa + (1 - ρ)d²; u = -lr · d.
    Every hyper-parameter is a number, a tensor, a tree like the parameters or a callable of the step.

    Args:
        lr: factor of the step, at least 0.
        rho: ρ, in [0, 1].
        eps: ε, at least 0.
        weight_decay: λ, at least 0: λθ is added to the gradient.
        maximize: whether to climb instead of to descend.

    Returns:
        The transform; its state holds `step`, `square_avg`, `acc_delta`.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range or not finite; or a flag is neither True
            nor False.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.adadelta(eps=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([3.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.9487])}

    Source: Zeiler 2012 (arXiv:1212.5701), algorithm 1; torch.optim.Adadelta.
    """

    def rule(values: Values, param: Tensor, grad: Tensor, square_avg: Tensor, acc_delta: Tensor) -> tuple[Tensor, ...]:
        square_avg = blend_square(square_avg, grad, values["rho"])
        delta = safe_sqrt(acc_delta + values["eps"]) / safe_sqrt(square_avg + values["eps"]) * grad
        return -values["lr"] * delta, square_avg, blend_square(acc_delta, delta, values["rho"])

    return per_tensor(
        Hypers(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay),
        rule,
        state=AdadeltaState,
        slots={"square_avg": zeros, "acc_delta": zeros},
        maximize=maximize,
    )
