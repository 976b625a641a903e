"""Plans: known costs, the rules that every plan keeps, and what is said of plans that break them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import funcmeta as fm
from funcmeta.memory import Action, Advance, Backward, Drop, Estimate, Plan, Restore, Store


def least_evaluations(steps: int, snapshots: int) -> int:
    """The closed form of Griewank and Walther."""
    repeats = next(r for r in range(steps + 1) if math.comb(snapshots + r, snapshots) >= steps)
    return steps + repeats * steps - math.comb(snapshots + repeats, snapshots + 1)


def test_known_costs_of_revolve() -> None:
    of_hundred = [fm.plan(fm.Revolve(snapshots), 100).evaluations for snapshots in range(1, 13)]
    assert of_hundred == [5050, 945, 590, 474, 416, 380, 355, 345, 334, 322, 309, 295]
    assert fm.plan(fm.Revolve(10), 1000).evaluations == 4636
    assert fm.plan(fm.Revolve(50), 1000).evaluations == 2948


def check_rules(plan: Plan) -> None:
    """Each step is differentiated once, from the last to the first, from states that are there when they are needed."""
    kept: set[int] = set()
    at: int | None = 0
    parts, most, evaluations = [], 0, 0
    for action in plan.actions:
        match action:
            case Store(step):
                assert at == step
                assert step not in kept
                kept.add(step)
                most = max(most, len(kept))
            case Restore(step):
                assert step in kept
                at = step
            case Drop(step):
                kept.remove(step)
            case Advance(start, stop):
                assert at == start < stop
                at, evaluations = stop, evaluations + stop - start
            case Backward(start, stop):
                assert at == start < stop
                at, evaluations = None, evaluations + stop - start
                parts.append((start, stop))
    assert not kept
    assert all(later[0] == earlier[1] for later, earlier in pairwise(parts))
    assert (parts[0][1], parts[-1][0]) == (plan.steps, 0) if plan.steps else not parts
    assert (evaluations, most) == (plan.evaluations, plan.peak_states)


@given(st.integers(0, 400), st.integers(1, 450))
def test_revolve(steps: int, snapshots: int) -> None:
    plan = fm.plan(fm.Revolve(snapshots), steps)
    check_rules(plan)
    assert plan.peak_states <= snapshots
    assert plan.evaluations == (least_evaluations(steps, snapshots) if steps else 0)
    assert all(each.stop - each.start == 1 for each in plan.actions if isinstance(each, Backward))


@given(st.integers(0, 400), st.integers(1, 450) | st.none())
def test_segments(steps: int, length: int | None) -> None:
    plan = fm.plan(fm.Segments(length), steps)
    check_rules(plan)
    length = length or max(1, round(math.sqrt(steps)))
    assert plan.evaluations == (2 * steps - min(length, steps))
    assert plan.peak_states == max(0, -(-steps // length) - 1)


@given(st.integers(0, 50))
def test_store_all(steps: int) -> None:
    plan = fm.plan(fm.StoreAll(), steps)
    check_rules(plan)
    assert (plan.evaluations, plan.peak_states) == (steps, 0)


@pytest.mark.parametrize("memory", [fm.Segments(3), fm.Revolve(4)], ids=repr)
def test_offload_does_what_it_wraps_does(memory: Any) -> None:
    assert fm.plan(fm.Offload(memory), 20).actions == fm.plan(memory, 20).actions


def test_a_published_implementation_needs_as_many_evaluations() -> None:
    schedules = pytest.importorskip("checkpoint_schedules")
    for steps, snapshots in ((10, 3), (37, 4), (100, 5)):
        schedule = schedules.Revolve(steps, snapshots)
        taken = sum(
            min(each.n1, steps) - each.n0
            for each in schedule
            if isinstance(each, schedules.Forward) and each.n0 < steps
        )
        assert taken == fm.plan(fm.Revolve(snapshots), steps).evaluations


def test_ten_thousand_steps_are_planned() -> None:
    assert fm.plan(fm.Revolve(12), 10_000).evaluations == least_evaluations(10_000, 12)
    assert fm.plan(fm.Revolve(20_000), 10_000).evaluations == 19_999


def test_a_plan_prints_in_a_line() -> None:
    plan = fm.plan(fm.Revolve(3), 20)
    assert str(plan) == "Revolve(snapshots=3): 20 steps in 65 evaluations (3.25 a step), at most 3 states kept"
    plan = replace(plan, estimate=Estimate(peak_bytes=2_345_000, time_factor=2.5))
    assert str(plan).endswith("3 states kept; expected peak 2.35 MB, 2.50 times the time of StoreAll()")
    assert "Store" not in repr(plan)


# ---- refused


@dataclass(frozen=True)
class Given:
    """A policy of given actions."""

    given: tuple[Action, ...]
    replays: ClassVar[bool] = True

    def actions(self, steps: int) -> Iterable[Action]:
        return self.given


BROKEN: dict[str, tuple[tuple[Action, ...], str]] = {
    "stores what it is not at": ((Store(1),), r"Store\(step=1\) cannot follow"),
    "restores what is not stored": ((Advance(0, 2), Restore(1)), r"Restore\(step=1\) cannot follow"),
    "drops what is not stored": ((Drop(0),), r"Drop\(step=0\) cannot follow"),
    "advances from elsewhere": ((Advance(1, 2),), r"Advance\(start=1, stop=2\) cannot follow"),
    "advances beyond the end": ((Advance(0, 4),), r"Advance\(start=0, stop=4\) cannot follow"),
    "differentiates too early": ((Backward(0, 1),), r"Backward\(start=0, stop=1\) cannot follow"),
    "goes on after a derivative": (
        (Store(0), Advance(0, 2), Backward(2, 3), Backward(0, 2)),
        r"Backward\(start=0, stop=2\) cannot follow",
    ),
    "forgets a step": ((Store(0), Advance(0, 1), Backward(1, 3)), r"The actions end before step 0 was differentiated"),
}


@pytest.mark.parametrize(("actions", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_actions_that_do_not_fit(actions: tuple[Action, ...], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message + r".*store what it restores, advance from where it is"):
        fm.plan(Given(actions), 3)


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected an integer of 0 or more\. Pass e\.g\. steps=100"):
        fm.plan(fm.StoreAll(), steps)


@pytest.mark.parametrize("memory", [fm.budget(100), fm.Revolve, None, "all"])
def test_what_has_no_plan(memory: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"do not follow from a number of steps.*stands in the info.memory"):
        fm.plan(memory, 3)


@pytest.mark.parametrize("snapshots", [0, -1, 2.0, True, None])
def test_bad_snapshots(snapshots: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a positive integer\. Pass e\.g\. snapshots=10"):
        fm.Revolve(snapshots)


@pytest.mark.parametrize("inner", [fm.StoreAll(), fm.budget(100), fm.Segments, None], ids=repr)
def test_nothing_to_offload(inner: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a policy that stores states.*Pass e.g. Segments\(\) or Rev"):
        fm.Offload(inner)
