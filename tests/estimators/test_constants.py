"""Estimators are values: they can be compared and hashed, and are not changed after they are made."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import funcmeta as fm


@pytest.mark.parametrize(
    "estimator",
    [
        fm.Reverse(),
        fm.FirstOrder(),
        fm.Reptile(),
        fm.MixedMode(),
        fm.ForwardMode(),
        fm.Truncated(3),
        fm.EvolutionStrategies(0.1, 2),
        fm.PersistentES(0.1, 2, 5),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_an_estimator_is_a_constant(estimator: Any) -> None:
    assert hash(estimator) == hash(replace(estimator))
    with pytest.raises(FrozenInstanceError):
        estimator.sigma = 1.0
