"""value_key: equal for what no function can tell apart, and for nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from funcmeta._value_key import value_key


@dataclass(frozen=True, slots=True)
class Slotted:
    """A value with slots."""

    value: Any


class Plain:
    """An object without an ``==`` of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value


SAME: list[Callable[[], Any]] = [
    lambda: float("nan"),
    lambda: Slotted(float("nan")),
    lambda: (1, [2.0, {"a": None}], frozenset({"b"})),
    lambda: np.array([1.0, 2.0]),
    lambda: torch.Size([2, 3]),
    lambda: range(3),
    lambda: Decimal("1.50"),
    lambda: torch.float64,
]


@pytest.mark.parametrize("make", SAME)
def test_equal_values_have_one_key(make: Callable[[], Any]) -> None:
    assert value_key(make()) == value_key(make())
    assert hash(value_key(make())) == hash(value_key(make()))


DIFFERENT = [
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    (complex(0, 0.0), complex(0, -0.0)),
    ((0, 1), [0, 1]),
    ({1: 0}, {True: 0}),
    ({"a": 0, "b": 1}, {"b": 1, "a": 0}),
    (frozenset({1}), frozenset({1.0})),
    (Slotted(0.0), Slotted(-0.0)),
    (np.float64(0.0), np.float64(-0.0)),
    (np.float64(1.0), 1.0),
    (np.array([1, 2]), np.array([[1, 2]])),
    (Decimal("1.5"), Decimal("1.50")),
    (Plain(1), Plain(1)),
    (nn.Linear(1, 1), nn.Linear(1, 1)),
    (len, max),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_other_values_have_another(one: Any, other: Any) -> None:
    assert value_key(one) != value_key(other)
    assert value_key(one) == value_key(one)


def test_attributes_count_as_they_are_now() -> None:
    plain, holder = Plain(1), Plain(torch.zeros(2))
    before = value_key(plain), value_key(holder)
    plain.value = 2
    holder.value.add_(1)
    assert before[0] != value_key(plain)
    assert before[1] != value_key(holder)


def test_objects_may_count_by_their_attributes_alone() -> None:
    assert value_key(Plain([1]), own=False) == value_key(Plain([1]), own=False)
    assert value_key(Plain([1]), own=False) != value_key(Plain([2]), own=False)
    assert value_key(iter([1]), own=False) != value_key(iter([1]), own=False)


def test_what_holds_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert value_key(loop) == value_key(loop) != value_key([[]])
