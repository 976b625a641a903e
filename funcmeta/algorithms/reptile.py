"""Reptile: move the initial parameters towards where training on each task ends."""

from torch import nn

from funcmeta.algorithms._algorithm import Algorithm, inner_loop
from funcmeta.estimators import Reptile
from funcmeta.memory import StoreAll
from funcmeta.model import init_params
from funcmeta.optim import Transform
from funcmeta.problem import InnerLoss
from funcmeta.unroll_batch import Strategy

__all__ = ["build"]


def build(
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    steps: int,
    optimizer: Transform,
    strategy: Strategy = "auto",
    train: bool | None = None,
) -> Algorithm:
    """Reptile: the outer gradient is the mean over tasks of θ_0 − θ_K; outer SGD at rate ε is the paper's update.

    Args:
        module: the network, whose parameters are where meta-training begins.
        loss_fn: (meta, predict, batch) → 0-d loss on the support; the query is not used.
        steps: inner steps, at least 1; with one step of SGD the outer gradient is that of joint training.
        optimizer: the inner optimizer, e.g. ``sgd(0.02)``, or ``adam(1e-3, betas=(0.0, 0.999))`` as in the paper.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``Algorithm``; its meta is ``{"params": ...}`` and its loss the mean of the last inner losses.

    Raises:
        ArgumentError: ``steps`` is out of range, or the module cannot be made functional.

    Examples:
        >>> import torch
        >>> from funcmeta.optim import sgd
        >>> from funcmeta.tasks import sinusoids
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> algorithm = build(net, loss, steps=5, optimizer=sgd(0.02))
        >>> meta = algorithm.init()
        >>> outer = torch.optim.SGD(meta["params"].values(), lr=0.1)
        >>> algorithm.loss(meta, sinusoids().sample_batch(seed=0, tasks=4)).backward()
        >>> outer.step()

    Source: Nichol, Achiam and Schulman (2018), "On First-Order Meta-Learning Algorithms", algorithm 2.
    """
    return inner_loop(
        module,
        loss_fn,
        init=lambda: {"params": init_params(module)},
        optimizer=optimizer,
        steps=steps,
        estimator=Reptile(),
        memory=StoreAll(),
        strategy=strategy,
        train=train,
    )
