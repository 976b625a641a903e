"""The one shape of every algorithm, and how the inner-loop ones are put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import StructureError
from funcmeta._typing import Meta
from funcmeta.estimators import Estimator
from funcmeta.memory import Memory
from funcmeta.model import functionalize
from funcmeta.optim import Transform
from funcmeta.problem import InnerLoss, Predict, Problem, inner_problem
from funcmeta.tasks import Task
from funcmeta.unroll import unroll
from funcmeta.unroll_batch import Strategy, unroll_batch


class MetaLoss(Protocol):
    """The meta-loss of an algorithm over stacked tasks."""

    def __call__(self, meta: Meta, tasks: Task, *, seed: int = 0) -> Tensor:
        """0-d mean loss, attached to ``meta``."""


class Adapt(Protocol):
    """What an algorithm does with one new task."""

    def __call__(self, meta: Meta, task: Task, *, seed: int = 0, evaluate: bool = False) -> Predict:
        """Train on ``task.support`` without a graph; the module with the adapted parameters, to call on inputs.

        ``evaluate`` returns it in eval mode (no dropout, BatchNorm by its running statistics), whatever the mode of
        the training.
        """


class Algorithm(NamedTuple):
    """A meta-learning algorithm as three functions; the outer loop around them is ordinary PyTorch.

    Attributes:
        init: () → meta, fresh leaves that require grad.
        loss: (meta, tasks, seed=0) → 0-d mean loss over stacked tasks, attached to meta.
        adapt: (meta, task, seed=0, evaluate=False) → predict, the module trained on one task's support; with
            ``evaluate`` it predicts in eval mode.

    Examples:
        >>> Algorithm._fields
        ('init', 'loss', 'adapt')

    Source: this library.
    """

    init: Callable[[], Meta]
    loss: MetaLoss
    adapt: Adapt


@dataclass(frozen=True)
class EstimatedLoss:
    """A meta-loss that tells by which estimator its meta-gradient comes to every leaf that requires grad."""

    compute: Callable[..., Any]
    estimator: Estimator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The meta-loss."""
        return self.compute(*args, **kwargs)


def inner_loop(
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    init: Callable[[], Meta],
    optimizer: Transform | Callable[[Meta], Transform],
    steps: int,
    estimator: Estimator,
    memory: Memory,
    strategy: Strategy,
    train: bool | None,
    adapted: Callable[[str], bool] | None = None,
    names: tuple[str, ...] = ("params",),
) -> Algorithm:
    """The algorithm that trains ``module`` for some steps by ``optimizer`` and differentiates that by ``estimator``."""
    problem = inner_problem(module, loss_fn, optimizer=optimizer, train=train, adapt=adapted)
    return algorithm_of(
        problem,
        module,
        init=init,
        steps=steps,
        estimator=estimator,
        memory=memory,
        strategy=strategy,
        train=train,
        names=names,
    )


def algorithm_of(
    problem: Problem,
    module: nn.Module,
    *,
    init: Callable[[], Meta],
    steps: int,
    estimator: Estimator,
    memory: Memory,
    strategy: Strategy,
    train: bool | None,
    names: tuple[str, ...],
) -> Algorithm:
    """The algorithm that takes some steps of a problem, whose states hold ``params`` and ``buffers`` of ``module``."""
    check_count("steps", steps, advice="Pass e.g. steps=5.")
    model, _, _ = functionalize(module)
    unjudged = problem._replace(meta_loss=lambda meta, state, query, seed: torch.zeros(()))

    def check_meta(meta: Meta) -> None:
        for name in names:
            if not isinstance(meta, Mapping) or name not in meta:
                raise StructureError(f"meta is {tree.describe(meta)}, expected '{name}' in it. Pass what init() gave.")

    def loss(meta: Meta, tasks: Task, *, seed: int = 0) -> Tensor:
        check_meta(meta)
        out = unroll_batch(
            problem, meta, tasks, steps=steps, strategy=strategy, estimator=estimator, memory=memory, seed=seed
        )
        return out.loss

    def adapt(meta: Meta, task: Task, *, seed: int = 0, evaluate: bool = False) -> Predict:
        check_meta(meta)
        constant = tree.detach(meta)
        with torch.no_grad():
            state = unroll(unjudged, constant, task, steps=steps, seed=seed).state
        return Predict(model, {**constant["params"], **state.params}, state.buffers, train=False if evaluate else train)

    return Algorithm(init, EstimatedLoss(loss, estimator), adapt)
