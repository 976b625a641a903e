"""How closely two ways to one number have to agree."""

from typing import NamedTuple


class Tolerances(NamedTuple):
    """Relative deviations that a correct computation stays below; the constant ``TOLERANCES`` holds the defaults.

    Attributes:
        fixed: float64, an exact estimator against finite differences, smooth losses, chosen cases.
        drawn: the same on cases that Hypothesis draws.
        exact: float64, exact estimators, or strategies, against each other.
        memory: float64, memory policies against ``StoreAll``, derivatives of the meta-gradient included.
        single: float32, exact estimators against each other.

    Examples:
        >>> fm.testing.TOLERANCES.fixed
        1e-06

    Source: this library.
    """

    fixed: float = 1e-6
    drawn: float = 1e-5
    exact: float = 1e-10
    memory: float = 1e-12
    single: float = 1e-4


TOLERANCES = Tolerances()
