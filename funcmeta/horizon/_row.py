"""What was measured of one estimator at one number of inner steps."""

from typing import NamedTuple


class HorizonRow(NamedTuple):
    """One estimator at one number of inner steps, with errors e = g − r of its meta-gradient g against the exact r.

    Attributes:
        horizon: inner steps.
        name: the estimator's name.
        bias: ‖mean of e‖ / ‖r‖. An unbiased estimator comes out at about ``bias_error``, not at 0.
        bias_error: standard error of the mean of e, √(Σ var e / repeats) / ‖r‖.
        variance: Σ var e / ‖r‖² over all coordinates: that of one estimate.
        cosine: mean over the repeats of ⟨g, r⟩ / (‖g‖ ‖r‖).
        seconds: median wall time of forward and backward pass.
        repeats: how often it was run; 2 for an estimator whose error does not depend on the seed.
        exact_norm: ‖r‖, to see where meta-gradients explode or vanish.
        unreached: leaves of ``meta`` that the estimator gives no gradient: their g is 0.

    Examples:
        >>> HorizonRow(100, "truncated", 0.9, 0.0, 0.0, 0.4, 0.01, 2, 24.0).unreached
        ()

    Source: this library.
    """

    horizon: int
    name: str
    bias: float
    bias_error: float
    variance: float
    cosine: float
    seconds: float
    repeats: int
    exact_norm: float
    unreached: tuple[str, ...] = ()
