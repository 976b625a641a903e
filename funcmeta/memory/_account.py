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
        self, bytes: int, judge: Judge | None, windows: Sequence[tuple[int, int]] = (), *, copies: int = 0
    ) -> None:
        self._bytes, self._judge, self._windows, self._copies = bytes, judge, windows, copies
        self._measure: Measure | None = None
        self._shares, self._spent, self._initial = False, 0, 0

    def over(self, windows: Sequence[tuple[int, int]]) -> "Account":
        """The same for windows of steps, of which the last one is judged."""
        return Account(self._bytes, self._judge, windows, copies=self._copies)

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
        path = chosen.memory.run(step, meta, state, start, stop)
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
        if measure.sizes.whole is None and measure.sizes.one.longer(2 * measure.sizes.one.further).peak <= room:
            measure.whole()
        if not fits(0, steps) and steps > 1:
            if measure.sizes.single is None:
                measure.single()
            single = measure.sizes.single
            if measure.sizes.paired is None and steps > 2 and single and single.peak + single.further <= room:
                measure.paired()
        chosen = best()
        if chosen is None and measure.sizes.whole is None:
            measure.whole()
            chosen = best()
        if chosen is None:
            runs = [measure.sizes.run(steps, *each) for each in ((0, steps), (1, 1))]
            raise MemoryBudgetError(self._bytes, min(need for each in runs if (need := peak(each)) is not None))
        needed = peak(_run(measure.sizes, chosen))
        assert needed is not None
        return replace(chosen, estimate=Estimate(needed, measure.sizes.factor(chosen)))

    def _peak(self, sizes: Sizes, found: Run, steps: int, windows: int, to_come: int) -> int:
        """The most bytes alive at once in all windows, when those to come run as this one does."""
        peak = sizes.initial + max(found.peak, self._kept(sizes, found))
        if windows == 1:
            return peak
        peak += self._spent + (windows - 1) * steps * sizes.notes
        # Going back through an earlier window, the gradients by meta of the later ones wait to be added to.
        return peak + (to_come * self._kept(sizes, found) + sizes.meta if self._shares else 0)

    def _kept(self, sizes: Sizes, found: Run) -> int:
        """Bytes alive between the forward and the backward pass, copies of the result among them."""
        return found.kept + self._copies * sizes.state


def _run(sizes: Sizes, chosen: Plan) -> Run:
    part = max(each.stop - each.start for each in chosen.actions if isinstance(each, Backward))
    found = sizes.run(chosen.steps, chosen.peak_states, part)
    assert found is not None
    return found
