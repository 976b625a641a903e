"""A memory policy in integers: which states are kept, and in which order steps are taken and taken again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from funcmeta._errors import ArgumentError


class Store(NamedTuple):
    """Keep the state that the run is at, the one before step ``step``.

    Attributes:
        step: index of the step that the state comes before.

    Examples:
        >>> Store(4)
        Store(step=4)

    Source: Griewank and Walther (2000), "Algorithm 799: Revolve", the action "takeshot".
    """

    step: int


class Restore(NamedTuple):
    """Go to a kept state.

    Attributes:
        step: index of the step that the state comes before.

    Examples:
        >>> Restore(4)
        Restore(step=4)

    Source: Griewank and Walther (2000), "Algorithm 799: Revolve", the action "restore".
    """

    step: int


class Drop(NamedTuple):
    """Forget a kept state.

    Attributes:
        step: index of the step that the state comes before.

    Examples:
        >>> Drop(4)
        Drop(step=4)

    Source: this library.
    """

    step: int


class Advance(NamedTuple):
    """Take the steps ``start`` to ``stop - 1`` without a graph.

    Attributes:
        start: index of the first step.
        stop: index after the last.

    Examples:
        >>> Advance(0, 4)
        Advance(start=0, stop=4)

    Source: Griewank and Walther (2000), "Algorithm 799: Revolve", the action "advance".
    """

    start: int
    stop: int


class Backward(NamedTuple):
    """Take the steps ``start`` to ``stop - 1`` with their graph, and differentiate them.

    Attributes:
        start: index of the first step.
        stop: index after the last.

    Examples:
        >>> Backward(4, 6)
        Backward(start=4, stop=6)

    Source: Griewank and Walther (2000), "Algorithm 799: Revolve", the actions "firsturn" and "youturn".
    """

    start: int
    stop: int


Action = Store | Restore | Drop | Advance | Backward
"""One thing that a run does under a memory policy."""


class Planned(Protocol):
    """A memory policy whose actions follow from the number of steps alone.

    Attributes:
        replays: whether steps are run again in the backward pass.

    Examples:
        >>> from funcmeta.memory import StoreAll
        >>> policy: Planned = StoreAll()
        >>> list(policy.actions(3))
        [Backward(start=0, stop=3)]

    Source: this library; the idea of a schedule as a list of actions is that of checkpoint_schedules (Dolci et al.
    2024).
    """

    @property
    def replays(self) -> bool:
        """Whether steps are run again in the backward pass."""

    def actions(self, steps: int) -> Iterable[Action]:
        """What a run of so many steps does, in order; it begins at the state before step 0."""


class Estimate(NamedTuple):
    """What ``budget`` foretells of a plan from the sizes and times that it measured.

    Attributes:
        peak_bytes: most bytes alive at once above those before the steps, the meta-loss included.
        time_factor: time of forward and backward pass over that of ``StoreAll``.

    Examples:
        >>> Estimate(peak_bytes=2_000_000, time_factor=1.5).time_factor
        1.5

    Source: this library.
    """

    peak_bytes: int
    time_factor: float


@dataclass(frozen=True)
class Plan:
    """What a memory policy does in a run of some steps, and what it costs.

    Attributes:
        memory: the policy.
        steps: number of steps.
        actions: what is done, in order; states are named by the index of the step they come before.
        evaluations: how often a step is taken, forward and backward pass together.
        peak_states: most states kept at once, the initial one among them; the one that the run is at does not count.
        estimate: bytes and time, when ``budget`` chose the policy; else None.

    Examples:
        >>> from funcmeta.memory import StoreAll
        >>> print(Plan(StoreAll(), 3, (Backward(0, 3),), 3, 0))
        StoreAll(): 3 steps in 3 evaluations (1.00 a step), at most 0 states kept

    Source: this library.
    """

    memory: Any
    steps: int
    actions: tuple[Action, ...] = field(repr=False)
    evaluations: int
    peak_states: int
    estimate: Estimate | None = None

    def __str__(self) -> str:
        """The plan in a line."""
        text = (
            f"{self.memory}: {self.steps} steps in {self.evaluations} evaluations "
            f"({self.evaluations / max(self.steps, 1):.2f} a step), at most {self.peak_states} states kept"
        )
        if self.estimate is None:
            return text
        return (
            f"{text}; expected peak {self.estimate.peak_bytes / 1e6:.2f} MB, "
            f"{self.estimate.time_factor:.2f} times the time of StoreAll()"
        )


def plan(memory: Any, steps: int) -> Plan:
    """What a memory policy does in so many steps, without doing it.

    Args:
        memory: a policy whose actions follow from the number of steps: any but ``budget``, which has to measure first.
        steps: number of inner steps, 0 or more.

    Returns:
        The ``Plan``, its costs counted from its actions.

    Raises:
        ArgumentError: negative steps, or no such policy.

    Examples:
        >>> from funcmeta.memory import Revolve, Segments
        >>> for action in plan(Segments(2), 4).actions:
        ...     print(action)
        Store(step=0)
        Advance(start=0, stop=2)
        Backward(start=2, stop=4)
        Restore(step=0)
        Drop(step=0)
        Backward(start=0, stop=2)
        >>> print(plan(Revolve(10), 1000))
        Revolve(snapshots=10): 1000 steps in 4636 evaluations (4.64 a step), at most 10 states kept

    Source: this library.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"steps is {steps!r}, expected an integer of 0 or more. Pass e.g. steps=100.")
    if steps >= 2**31:
        raise ArgumentError(f"steps is {steps}, expected less than 2**31, as many as can be planned. Pass fewer.")
    if isinstance(memory, type) or not hasattr(memory, "actions"):
        raise ArgumentError(
            f"memory is {memory!r}, whose actions do not follow from a number of steps. Pass StoreAll(), Segments(), "
            f"Revolve(...) or Offload(...); what budget(...) did stands in the info.memory of an unroll."
        )
    actions = tuple(memory.actions(steps))
    evaluations, peak_states = _cost(actions, steps)
    return Plan(memory, steps, actions, evaluations, peak_states)


def joined(windows: Sequence[tuple[Plan | None, bool]]) -> Plan | None:
    """The plan of windows of steps that follow on one another; None when any of them followed none.

    The actions are those of each window, its first step counted on from the window before.

    Args:
        windows: the plan of each, and whether it is differentiated: where it gives no share of the meta-loss, only the
            actions of its forward pass are done. States of differentiated windows are kept at once.
    """
    known = [each if back else _forward(each) for each, back in windows if each is not None]
    if len(known) < len(windows) or len(known) < 2:
        return known[0] if len(known) == len(windows) == 1 else None
    apart = [each.peak_states for each, (_, back) in zip(known, windows, strict=True) if not back]
    together = sum(each.peak_states for each, (_, back) in zip(known, windows, strict=True) if back)
    steps, actions = 0, list[Action]()
    for each in known:
        actions += [type(action)(*[index + steps for index in action]) for action in each.actions]
        steps += each.steps
    estimates = [each.estimate for each in known if each.estimate is not None]
    estimate = None
    if len(estimates) == len(known):
        time = sum(each.steps * its.time_factor for each, its in zip(known, estimates, strict=True)) / steps
        estimate = Estimate(max(each.peak_bytes for each in estimates), time)
    policies = {each.memory: None for each in known}
    return Plan(
        known[-1].memory if len(policies) == 1 else tuple(policies),
        steps,
        tuple(actions),
        sum(each.evaluations for each in known),
        max([together, *apart]),
        estimate,
    )


def _forward(whole: Plan) -> Plan:
    """What is done of a plan when nothing is differentiated."""
    turn = next(place for place, each in enumerate(whole.actions) if isinstance(each, Backward))
    return replace(whole, actions=whole.actions[: turn + 1], evaluations=whole.steps)


def _cost(actions: Iterable[Action], steps: int) -> tuple[int, int]:
    """Evaluations and most states kept; raise unless the actions differentiate each step once, from last to first."""
    at: int | None = 0
    left, evaluations, peak = steps, 0, 0
    kept: set[int] = set()
    for action in actions:
        match action:
            case Store(step):
                fits = step == at
                kept.add(step)
                peak = max(peak, len(kept))
            case Restore(step):
                fits = step in kept
                at = step
            case Drop(step):
                fits = step in kept
                kept.discard(step)
            case Advance(start, stop):
                fits = start == at and start < stop < left
                at = stop
                evaluations += stop - start
            case Backward(start, stop):
                fits = start == at and start < stop == left
                at, left = None, start
                evaluations += stop - start
        if not fits:
            raise ArgumentError(f"{action} cannot follow on the actions before it. {_RULES}")
    if left:
        raise ArgumentError(f"The actions end before step {left - 1} was differentiated. {_RULES}")
    return evaluations, peak


_RULES = (
    "Let the policy's actions(steps) begin at step 0, store what it restores, advance from where it is, and "
    "differentiate each step once, from the last to the first."
)
