"""Meta-SGD: initial parameters and a learning rate for each coordinate, learned together."""

import torch
from torch import nn

from funcmeta._check import check_positive
from funcmeta._typing import Meta
from funcmeta.algorithms._algorithm import Algorithm, inner_loop
from funcmeta.estimators import Estimator, Reverse
from funcmeta.memory import Memory, StoreAll
from funcmeta.model import init_params
from funcmeta.optim import sgd
from funcmeta.problem import InnerLoss
from funcmeta.unroll_batch import Strategy

__all__ = ["build"]


def build(
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    steps: int,
    lr: float,
    estimator: Estimator = Reverse(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    strategy: Strategy = "auto",
    train: bool | None = None,
) -> Algorithm:
    """Meta-SGD: as MAML with θ_{k+1} = θ_k − α ∘ ∇ℓ(θ_k), where α has the shape of θ and is learned with θ_0.

    Args:
        module: the network, whose parameters are where meta-training begins.
        loss_fn: (meta, predict, batch) → 0-d loss, on the support inside and on the query outside.
        steps: inner steps, at least 1 (1 in the paper).
        lr: initial value of every coordinate of α, per step; positive.
        estimator: how the meta-gradient is computed.
        memory: what the estimator keeps of the trajectory.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``Algorithm``; its meta is ``{"params": ..., "lr": ...}``, two trees of the same shape.

    Raises:
        ArgumentError: ``steps`` or ``lr`` is out of range, or the module cannot be made functional.

    Examples:
        >>> from funcmeta.tasks import sinusoids
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> algorithm = build(net, loss, steps=1, lr=0.01)
        >>> meta = algorithm.init()
        >>> algorithm.loss(meta, sinusoids().sample_batch(seed=0, tasks=4)).backward()
        >>> meta["lr"]["0.weight"].grad.shape
        torch.Size([40, 1])

    Source: Li et al. (2017), "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", algorithm 1.
    """
    check_positive("lr", lr)

    def init() -> Meta:
        params = init_params(module)
        rates = {name: torch.full_like(leaf, lr).requires_grad_() for name, leaf in params.items()}
        return {"params": params, "lr": rates}

    return inner_loop(
        module,
        loss_fn,
        init=init,
        optimizer=lambda meta: sgd(meta["lr"]),
        steps=steps,
        estimator=estimator,
        memory=memory,
        strategy=strategy,
        train=train,
        names=("params", "lr"),
    )
