"""What a memory policy is: a way to repeat a step."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from funcmeta import tree
from funcmeta._typing import Meta
from funcmeta.problem import StepInfo

Step = Callable[[Meta, Any, int], tuple[Any, StepInfo]]
"""One inner step with its task and seed bound: (meta, state, index) -> (state, info)."""


class Trajectory(NamedTuple):
    """Where a run of steps ended, and what was met on the way.

    ``share`` is the sum of the steps' shares of the meta-loss, attached, or None; ``losses`` and ``aux`` are detached.
    """

    state: Any
    share: Tensor | None
    losses: list[Tensor]
    aux: list[Any]


class Memory(Protocol):
    """What an exact estimator keeps of the trajectory. One method, and whether it runs steps a second time."""

    @property
    def replays(self) -> bool:
        """Whether steps are run again in the backward pass, so that batches must be reproducible."""

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps ``start`` to ``stop - 1`` from ``state``."""


def advance(step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
    """The plain loop over steps."""
    share: Tensor | None = None
    losses, aux = [], []
    for index in range(start, stop):
        state, info = step(meta, state, index)
        if info.meta_loss is not None:
            share = info.meta_loss if share is None else share + info.meta_loss
        losses.append(info.loss.detach())
        aux.append(tree.detach(info.aux))
    return Trajectory(state, share, losses, aux)
