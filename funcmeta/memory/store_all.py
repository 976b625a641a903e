"""Keep the graph of every step: the fastest policy while it fits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._follow import follow
from funcmeta.memory._plan import Action, Backward


@dataclass(frozen=True)
class StoreAll:
    """Keep everything that autograd keeps: memory grows with the number of steps K, evaluations are K.

    Examples:
        >>> StoreAll()
        StoreAll()

    Source: plain reverse mode.
    """

    replays: ClassVar[bool] = False

    def actions(self, steps: int) -> Iterator[Action]:
        """All steps with their graph."""
        if steps:
            yield Backward(0, steps)

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps in one graph."""
        return follow(self, step, meta, state, start, stop)
