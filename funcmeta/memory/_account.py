"""A budget as it is spent: measure, choose a policy that fits, and follow it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch

from funcmeta import tree
from funcmeta._errors import ArgumentError, MemoryBudgetError
from funcmeta._graph import inside_functorch
from funcmeta._live_bytes import LiveBytes
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._plan import Backward, Estimate, Plan, plan
from funcmeta.memory._sizes import Judge, Measure, Run, Sizes
from funcmeta.memory.revolve import Revolve
from funcmeta.memory.segments import Segments
from funcmeta.memory.store_all import StoreAll


class Account:
    """The budget of one run, or of windows of steps that follow on one another.

    When windows give shares of the meta-loss, what each keeps for the backward pass is alive until the end. So they are
    measured once and planned together, by the length of the last one, the longest: a plan fits when there is room for
    what the windows before keep, its own peak, and what as many windows as are to come keep under the same plan.
    """

    replays: ClassVar[bool] = True

    def __init__(
        self, bytes: int, judge: Judge | None, windows: Sequence[tuple[int, int]] = (), *, runs: int = 1
    ) -> None:
        self._given, self._judge, self._windows, self._runs = bytes, judge, windows, runs
        self._bytes = bytes // runs
        self._measure: Measure | None = None
        self._shares, self._spent, self._initial = False, 0, 0

    def over(self, windows: Sequence[tuple[int, int]]) -> "Account":
        """The same for windows of steps, of which the last one is judged."""
        return Account(self._given, self._judge, windows, runs=self._runs)

    def begun(self, init: Callable[[Meta], Any], meta: Meta) -> Any:
        """The initial state, whose bytes count as far as it is made here."""
        with nullcontext() if inside_functorch() or self._measure else LiveBytes() as live:
            state = init(meta)
            self._initial = live.live if live else self._initial
        return state

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Measure the first time, choose, and take the steps."""
        if inside_functorch():
            raise ArgumentError("budget(...) cannot measure steps inside torch.func. Use StoreAll() there.")
        attached = any(leaf.requires_grad for leaf in tree.tensors((meta, state)))
        if stop == start or not (attached and torch.is_grad_enabled()):
            return StoreAll().run(step, meta, state, start, stop)
        windows = self._windows or [(start, stop)]
        if self._measure is None:
            self._measure = Measure(step, self._judge, meta, state, start, windows[-1][1], self._initial)
            self._shares = self._measure.sizes.shares
        longest = windows[-1][1] - windows[-1][0]
        to_come = sum(begin >= stop for begin, _ in windows)
        chosen = self._choose(self._measure, longest, len(windows), to_come)
        path: Trajectory = chosen.memory.run(step, meta, state, start, stop)
        if path.share is not None:
            self._shares = True
            self._spent += self._kept(self._measure.sizes, _run(self._measure.sizes, chosen))
        return path._replace(memory=replace(plan(chosen.memory, stop - start), estimate=chosen.estimate))

    def _choose(self, measure: Measure, steps: int, windows: int, to_come: int) -> Plan:
        """The plan with the fewest evaluations that fits; among equals the simpler one."""

        def peak(found: Run | None) -> int | None:
            return None if found is None else self._peak(measure.sizes, found, steps, windows, to_come)

        def fits(states: int, part: int) -> bool:
            needed = peak(measure.sizes.run(steps, states, part))
            return needed is not None and needed <= self._bytes

        def best() -> Plan | None:
            counts = range(steps - 1, 0, -1)  # the more the fewer evaluations
            policies: list[Any] = [
                StoreAll() if fits(0, steps) else None,
                next((Segments(n) for n in counts if n > 1 and fits(-(-steps // n) - 1, n)), None),
                next((Revolve(n) for n in counts if fits(n, 1)), None),  # Segments(1) is Revolve(steps - 1)
            ]
            plans = [plan(each, steps) for each in policies if each is not None]
            return min(plans, key=lambda each: each.evaluations, default=None)

        # A short run is counted only where its own peak cannot break the budget, until nothing else is left to try.
        room = self._bytes - self._spent - measure.sizes.initial
        _count_whole(measure, room)
        if not fits(0, steps) and steps > 1:
            if measure.sizes.single is None:
                measure.single()
            single = measure.sizes.single
            if measure.sizes.paired is None and steps > 2 and single and single.peak + single.further <= room:
                measure.paired()
        chosen = best()
        if chosen is None and measure.sizes.whole is None:
            measure.whole(3)
            chosen = best()
        if chosen is None:
            runs = [measure.sizes.run(steps, *each) for each in ((0, steps), (1, 1))]
            smallest = min(need for each in runs if (need := peak(each)) is not None)
            raise MemoryBudgetError(self._given, smallest * self._runs)
        needed = peak(_run(measure.sizes, chosen))
        assert needed is not None
        return replace(chosen, estimate=Estimate(needed, measure.sizes.factor(chosen)))

    def _peak(self, sizes: Sizes, found: Run, steps: int, windows: int, to_come: int) -> int:
        """The most bytes alive at once in all windows, when those to come run as this one does."""
        peak = sizes.initial + max(found.peak, self._kept(sizes, found))
        if windows == 1:
            return peak
        peak += self._spent + sizes.state + (windows - 1) * steps * (sizes.notes + sizes.loss)
        # Going back through an earlier window, the gradients by meta of the later ones wait to be added to.
        return peak + (to_come * self._kept(sizes, found) + sizes.meta if self._shares else 0)

    def _kept(self, sizes: Sizes, found: Run) -> int:
        """Bytes alive between the forward and the backward pass, with copies of the state where several are stacked."""
        return found.kept + (2 * sizes.state if self._runs > 1 else 0)  # for the result, and for the carry


def _count_whole(measure: Measure, room: int) -> None:
    one = measure.sizes.one
    if measure.sizes.whole is not None or one.peak + one.further > room:
        return
    counted = measure.whole(3 if one.peak + 2 * one.further <= room else 2)
    if counted.steps == 2 and counted.peak + counted.further <= room:
        measure.whole(3)


def _run(sizes: Sizes, chosen: Plan) -> Run:
    part = max(each.stop - each.start for each in chosen.actions if isinstance(each, Backward))
    found = sizes.run(chosen.steps, chosen.peak_states, part)
    assert found is not None
    return found
