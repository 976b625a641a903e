"""Keep a given number of states, and run steps again from these as seldom as can be."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from funcmeta._check import check_count
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._follow import follow
from funcmeta.memory._plan import Action, Advance, Backward, Drop, Restore, Store


@dataclass(frozen=True)
class Revolve:
    """Keep at most m states and the graph of one step; the backward pass runs steps again from the nearest state.

    The binomial schedule takes the fewest evaluations that m states allow: for K steps
    K + r · K - binom(m + r, m + 1), with r the least number such that binom(m + r, m) ≥ K. That is about
    (1 + r) · K: with 12 states 2.95 K for 100 steps, 4.44 K for 1000. Under ``create_graph=True`` the graph of all
    steps is built, as with ``StoreAll``.

    Args:
        snapshots: m, the most states that are kept at once, the initial one among them; at least 1.

    Raises:
        ArgumentError: ``snapshots`` is not a positive integer.

    Examples:
        >>> from funcmeta.memory import plan
        >>> print(plan(Revolve(snapshots=12), 100))
        Revolve(snapshots=12): 100 steps in 295 evaluations (2.95 a step), at most 12 states kept

    Source: Griewank and Walther (2000), "Algorithm 799: Revolve", section 2.
    """

    snapshots: int
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("snapshots", self.snapshots, advice="Pass e.g. snapshots=10.")

    def actions(self, steps: int) -> Iterator[Action]:
        """Halve the steps at the best place, differentiate the later part with a state less, then the earlier part."""
        todo = [(0, steps, self.snapshots, False)] if steps else []
        while todo:
            start, stop, snapshots, stored = todo.pop()
            if stored:
                yield Restore(start)
            if stop - start == 1:
                if stored:
                    yield Drop(start)
                yield Backward(start, stop)
                continue
            if not stored:
                yield Store(start)
            middle = start + _first_part(stop - start, snapshots)
            yield Advance(start, middle)
            todo += [(start, middle, snapshots, True), (middle, stop, snapshots - 1, False)]

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps one by one."""
        return follow(self, step, meta, state, start, stop)


def _first_part(steps: int, snapshots: int) -> int:
    """How many of the steps to advance before the next state is stored, for the fewest evaluations."""
    if snapshots == 1:
        return steps - 1
    repeats, most, before = 0, 1, 0  # most = binom(snapshots + repeats, snapshots), before: for one repeat less
    while most < steps:
        repeats, before = repeats + 1, most
        most = most * (snapshots + repeats) // repeats
    fewest_after = before * snapshots // (snapshots + repeats - 1)  # binom(snapshots + repeats - 2, snapshots - 1)
    return min(before, steps - fewest_after)
