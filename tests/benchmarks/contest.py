"""Contestants that compute the same gradient, a race between them, and what it says."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], Sequence[Any]]
"""One computation of a meta-gradient: a list of arrays, the same list for every contestant of a workload."""

TOLERANCE = 1e-4
"""How far two gradients in single precision may lie apart, as a part of their norm."""

LONG = 1.0
"""Seconds from which on a run is long."""


@dataclass(frozen=True)
class Settings:
    """What a person asks for on the command line."""

    quick: bool = False
    peers: bool = True
    seconds: float = 10.0
    """How long a contestant's turns may take in all, once it has had the fewest."""

    @property
    def rounds(self) -> tuple[int, int]:
        """The fewest and the most turns of a contestant."""
        return (1, 1) if self.quick else (5, 101)


@dataclass(frozen=True)
class Row:
    """What one contestant was measured to need."""

    name: str
    seconds: list[float] = field(default_factory=list)
    live_bytes: int | None = None
    """The most bytes of tensors alive at once."""
    resident_bytes: int | None = None
    """The most memory of a process of its own, above what it had before the computation."""

    @property
    def median(self) -> float:
        """The median wall time, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, as a part of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / 2 / self.median


@dataclass(frozen=True)
class Bar:
    """A ratio that was promised to be at most ``limit``; None when one side of it could not be measured."""

    name: str
    ratio: float | None
    limit: float
    beyond: bool = False
    """Whether the limit is a wish beyond what was promised."""

    @property
    def verdict(self) -> str:
        """Reached or not, in words."""
        if self.ratio is None:
            return "not measured"
        return "reached" if self.ratio <= self.limit else "not reached"


@dataclass(frozen=True)
class Floor:
    """The work of a computation, and the seconds that it takes at the measured rates of the machine."""

    operations: float
    traffic: float
    operation_seconds: float
    traffic_seconds: float

    def times(self, factor: float) -> "Floor":
        """Of a computation so many times as long."""
        return Floor(*(factor * each for each in astuple(self)))


@dataclass(frozen=True)
class Result:
    """One workload, measured."""

    workload: str
    title: str
    rows: list[Row]
    bars: list[Bar]
    floor: Floor | None = None
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "Result":
        """From the JSON file."""
        return cls(
            known["workload"],
            known["title"],
            [Row(**row) for row in known["rows"]],
            [Bar(**bar) for bar in known["bars"]],
            known["floor"] and Floor(**known["floor"]),
            known["notes"],
            known["machine"],
        )


IN_DOUBLE = 1e-8
"""The tolerance where single precision says nothing: at the kinks of many ReLUs, or after many steps."""


class Disagreement(AssertionError):
    """A contestant computes another gradient than the reference."""


def flat(arrays: Iterable[Any]) -> Tensor:
    """All numbers of a gradient in one vector, whichever library made them."""
    tensors = [array if isinstance(array, Tensor) else torch.from_numpy(np.array(array)) for array in arrays]
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def check_agreement(contestants: Mapping[str, Run], reference: str, tolerance: float = TOLERANCE) -> dict[str, float]:
    """The distance of each gradient from the reference's; raise when one is larger than the tolerance."""
    expected = flat(contestants[reference]())
    distances = {}
    for name, run in contestants.items():
        got = flat(run())
        distances[name] = float((got - expected).norm() / expected.norm())
        if not distances[name] <= tolerance:
            raise Disagreement(
                f"{name} differs from {reference} by {distances[name]:.1e} of the gradient's norm, "
                f"allowed {tolerance:.1e}."
            )
    return distances


def race(contestants: Mapping[str, Run], settings: Settings) -> list[Row]:
    """Time the contestants in turns, so that a busy moment of the machine meets them all.

    Before each timed run comes one that is not: threads of the contestant before may still be spinning. A run that
    takes longer than a second is spared that after its first turn, and has three turns at least.
    """
    fewest, most = settings.rounds
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for turn in range(most):
        long = sum(each[-1] for each in seconds.values() if each) > LONG * len(contestants)
        if turn >= min(fewest, 3 if long else fewest) and time.perf_counter() - began > settings.seconds * len(
            contestants
        ):
            break
        for name, run in contestants.items():
            if not seconds[name] or seconds[name][-1] < LONG:
                run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return [Row(name, each) for name, each in seconds.items()]


def fastest(rows: Iterable[Row], *prefixes: str) -> float | None:
    """The least median among the contestants whose names begin so; None when there are none."""
    return min((row.median for row in rows if row.name.startswith(prefixes)), default=None)


def ratio(one: float | None, other: float | None) -> float | None:
    """The quotient, where both are known."""
    return None if one is None or other is None else one / other
