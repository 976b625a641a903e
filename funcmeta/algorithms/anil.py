"""Almost no inner loop: MAML in which the inner steps train the head only."""

from torch import nn

from funcmeta._errors import ArgumentError
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
    head: str,
    steps: int,
    lr: float,
    estimator: Estimator = Reverse(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    strategy: Strategy = "auto",
    train: bool | None = None,
) -> Algorithm:
    """ANIL: as MAML, but only the parameters whose name begins with ``head`` take inner steps; all are meta-learned.

    Args:
        module: the network, whose parameters are where meta-training begins.
        loss_fn: (meta, predict, batch) → 0-d loss, on the support inside and on the query outside.
        head: beginning of the names of the adapted parameters, as in ``named_parameters``, e.g. ``"classifier."``.
        steps: inner steps, at least 1.
        lr: inner learning rate, per step.
        estimator: how the meta-gradient is computed.
        memory: what the estimator keeps of the trajectory.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``Algorithm``; its meta is ``{"params": ...}``.

    Raises:
        ArgumentError: ``head`` begins no name, ``steps`` or ``lr`` is out of range, or the module cannot be made
            functional.

    Examples:
        >>> import torch
        >>> from funcmeta.tasks import sinusoids
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> algorithm = build(net, loss, head="2.", steps=1, lr=0.01)
        >>> predict = algorithm.adapt(algorithm.init(), sinusoids().sample(seed=0))
        >>> {name: torch.equal(leaf, net.state_dict()[name]) for name, leaf in predict.params.items()}
        {'0.weight': True, '0.bias': True, '2.weight': False, '2.bias': False}

    Source: Raghu et al. (2020), "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML".
    """
    if not isinstance(head, str) or not any(name.startswith(head) for name in init_params(module)):
        raise ArgumentError(f"head is {head!r}, with which none of {list(init_params(module))} begins. Pass e.g. '2.'.")
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
        adapted=lambda name: name.startswith(head),
    )
