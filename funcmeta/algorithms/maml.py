"""Model-agnostic meta-learning: initial parameters from which a few SGD steps learn a task."""

from torch import nn

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
    """MAML: min over θ_0 of Σ_t ℓ_t(θ_K, query), θ_{k+1} = θ_k − lr ∇ℓ_t(θ_k, support).

    Args:
        module: the network, whose parameters are where meta-training begins.
        loss_fn: (meta, predict, batch) → 0-d loss, on the support inside and on the query outside.
        steps: K, at least 1.
        lr: inner learning rate, per step.
        estimator: ``Reverse()`` for MAML, ``FirstOrder()`` for FOMAML.
        memory: what the estimator keeps of the trajectory.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``Algorithm``; its meta is ``{"params": ...}``.

    Raises:
        ArgumentError: ``steps`` or ``lr`` is out of range, or the module cannot be made functional.

    Examples:
        >>> import torch
        >>> from funcmeta.tasks import sinusoids
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> algorithm = build(net, loss, steps=1, lr=0.01)
        >>> meta = algorithm.init()
        >>> outer = torch.optim.Adam(meta["params"].values(), lr=1e-3)
        >>> algorithm.loss(meta, sinusoids().sample_batch(seed=0, tasks=4)).backward()
        >>> outer.step()
        >>> predict = algorithm.adapt(meta, sinusoids().sample(seed=9))
        >>> predict(torch.zeros(3, 1)).shape
        torch.Size([3, 1])

    Source: Finn, Abbeel and Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    algorithm 1.
    """
    return inner_loop(
        module,
        loss_fn,
        init=lambda: {"params": init_params(module)},
        optimizer=sgd(lr),
        steps=steps,
        estimator=estimator,
        memory=memory,
        strategy=strategy,
        train=train,
    )
