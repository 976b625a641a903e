"""What a memory policy is: a way to repeat a step."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from funcmeta import tree
from funcmeta._typing import Meta
from funcmeta.memory._plan import Plan
from funcmeta.problem import StepInfo

Step = Callable[[Meta, Any, int], tuple[Any, StepInfo]]
"""One inner step with its task and seed bound: (meta, state, index) -> (state, info)."""


class Trajectory(NamedTuple):
    """Where a run of steps ended, and what was met on the way.

    Attributes:
        state: the state after the last step, attached.
        share: 0-d tensor, the sum of the steps' shares of the meta-loss, attached; None when there are none.
        losses: one detached inner loss a step.
        aux: one detached ``StepInfo.aux`` a step.
        memory: the ``Plan`` that was followed; None for a plain loop.

    Examples:
        >>> Trajectory(None, None, [], []).losses
        []

    Source: this library.
    """

    state: Any
    share: Tensor | None
    losses: list[Tensor]
    aux: list[Any]
    memory: Plan | None = None


class Memory(Protocol):
    """What an exact estimator keeps of the trajectory: one method, and whether it runs steps a second time.

    A policy gets the step as an argument and knows nothing else of the problem, so a new one is one new file: a list of
    ``actions`` (see ``Planned``) that ``follow`` executes.

    Attributes:
        replays: whether steps are run again in the backward pass, so that batches must be reproducible.

    Examples:
        >>> from funcmeta.memory import StoreAll
        >>> policy: Memory = StoreAll()
        >>> policy.replays
        False

    Source: this library; the plug-in idea is that of the adjoints of Optimistix (Rader, Lyons and Kidger 2024).
    """

    @property
    def replays(self) -> bool:
        """Whether steps are run again in the backward pass, so that batches must be reproducible."""

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps ``start`` to ``stop - 1`` from ``state``."""


def advance(step: Step, meta: Meta, state: Any, start: int, stop: int, *, share: Tensor | None = None) -> Trajectory:
    """Take the steps ``start`` to ``stop - 1`` in a plain loop.

    Args:
        step: (meta, state, index) → (state, info), a pure function.
        meta: tree of tensors.
        state: the state before the first step.
        start: first index.
        stop: index after the last.
        share: 0-d tensor, what the steps before gave to the meta-loss.

    Returns:
        The trajectory, attached as far as grad mode lets it be.

    Examples:
        >>> import torch
        >>> def halve(meta, state, index):
        ...     return state / 2, StepInfo(state)
        >>> advance(halve, None, torch.tensor(8.0), 0, 3).state
        tensor(1.)

    Source: this library.
    """
    losses, aux = [], []
    for index in range(start, stop):
        state, info = step(meta, state, index)
        if info.meta_loss is not None:
            share = info.meta_loss if share is None else share + info.meta_loss
        losses.append(info.loss.detach())
        aux.append(tree.detach(info.aux))
        del info  # whose loss has a graph, not to be alive beside the next step
    return Trajectory(state, share, losses, aux)
