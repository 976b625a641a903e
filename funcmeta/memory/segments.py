"""Keep the states between segments of steps, and run each segment again when its derivative is needed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from funcmeta._check import check_count
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._follow import follow
from funcmeta.memory._plan import Action, Advance, Backward, Drop, Restore, Store


@dataclass(frozen=True)
class Segments:
    """Keep one state a segment; the backward pass runs each segment but the last once more, with its graph.

    For K steps in segments of length s, memory is ⌈K/s⌉ - 1 states and the graph of s steps; steps are evaluated
    2K - s times. The last segment keeps its graph from the forward pass, and when s does not divide K the first one is
    shorter. Under ``create_graph=True`` the graph of all steps is built, as with ``StoreAll``.

    Args:
        length: steps in a segment, at least 1; None takes √K rounded.

    Raises:
        ArgumentError: ``length`` is not a positive integer.

    Examples:
        >>> from funcmeta.memory import plan
        >>> print(plan(Segments(length=25), 100))
        Segments(length=25): 100 steps in 175 evaluations (1.75 a step), at most 3 states kept

    Source: Gruslys et al. (2016), "Memory-Efficient Backpropagation Through Time", the memorization of hidden states.
    """

    length: int | None = None
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("length", self.length, or_none=True, advice="Pass e.g. length=10.")

    def actions(self, steps: int) -> Iterator[Action]:
        """Store a state before each segment but the last; then go back from segment to segment."""
        if not steps:
            return
        length = self.length or round(math.sqrt(steps))
        bounds = [0, *range(steps % length or length, steps + 1, length)] if steps > length else [0, steps]
        segments = list(pairwise(bounds))
        for start, stop in segments[:-1]:
            yield Store(start)
            yield Advance(start, stop)
        yield Backward(*segments[-1])
        for start, stop in reversed(segments[:-1]):
            yield Restore(start)
            yield Drop(start)
            yield Backward(start, stop)

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps segment by segment."""
        return follow(self, step, meta, state, start, stop)
