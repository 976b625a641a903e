"""Keep the graph of every step: the fastest policy while it fits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory, advance


@dataclass(frozen=True)
class StoreAll:
    """Keep everything that autograd keeps: memory grows with the number of steps K, evaluations are K.

    Examples:
        >>> StoreAll()
        StoreAll()

    Source: plain reverse mode.
    """

    replays: ClassVar[bool] = False

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps in one graph."""
        return advance(step, meta, state, start, stop)
