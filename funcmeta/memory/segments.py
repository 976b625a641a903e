"""Keep the states between segments of steps, and run each segment again when its derivative is needed."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._replay import Use, replay


@dataclass(frozen=True)
class Segments:
    """Keep one state a segment; the backward pass runs each segment once more, with its graph.

    For K steps in segments of length s, memory is K/s states and the graph of s steps; loss evaluations are K forward,
    K again in the backward pass, and one of the meta-loss, whatever s is.

    Args:
        length: steps in a segment, at least 1; None takes √K rounded.

    Raises:
        ArgumentError: ``length`` is not a positive integer.

    Examples:
        >>> Segments(length=4)
        Segments(length=4)

    Source: Gruslys et al. (2016), "Memory-Efficient Backpropagation Through Time", the memorization of hidden states.
    """

    length: int | None = None
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        good = isinstance(self.length, int) and not isinstance(self.length, bool) and self.length >= 1
        if self.length is not None and not good:
            raise ArgumentError(f"length is {self.length!r}, expected a positive integer or None. Pass e.g. length=10.")

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps segment by segment."""
        length = self.length or max(1, round(math.sqrt(stop - start)))
        use = Use(start)
        share, losses, aux = None, [], []
        for first in range(start, stop, length):
            part = replay(step, meta, state, first, min(first + length, stop), use)
            state = part.state
            if part.share is not None:
                share = part.share if share is None else share + part.share
            losses += part.losses
            aux += part.aux
        return Trajectory(state, share, losses, aux)
