"""What is known of one estimator: a row in all, and a row a leaf."""

from typing import NamedTuple


class Row(NamedTuple):
    """One estimator against the reference.

    Attributes:
        name: the estimator's name.
        loss: the loss that the estimator returned.
        cosine: ⟨g, r⟩ / (‖g‖ ‖r‖) of its meta-gradient g with the reference's r, over all leaves of ``meta`` together;
            0 when only one of them is zero, NaN when both are.
        norm_ratio: ‖g‖ / ‖r‖.
        relative_error: ‖g − r‖ / ‖r‖.
        worst_leaf: the leaf with the lowest cosine, and that cosine; ``("", nan)`` when no leaf has one.
        fd_error: ‖g·v − D‖ / ‖D‖ over random directions v, with D the central differences of the problem's meta-loss.
        seconds: median wall time of forward and backward pass.
        peak_bytes: most bytes alive in forward and backward pass, above those before.
        evaluations: how often the problem's step and its meta-loss were run, replays included.
        unreached: leaves that the estimator gives no gradient, which count as constants for it: their gradient is 0.

    Examples:
        >>> row = Row("first order", 0.5, 0.9, 1.1, 0.4, ("meta", 0.9), 0.4, 0.01, 4096, 6)
        >>> row.unreached
        ()

    Source: this library.
    """

    name: str
    loss: float
    cosine: float
    norm_ratio: float
    relative_error: float
    worst_leaf: tuple[str, float]
    fd_error: float
    seconds: float
    peak_bytes: int
    evaluations: int
    unreached: tuple[str, ...] = ()


class LeafRow(NamedTuple):
    """One leaf of ``meta`` under one estimator after so many inner steps, against the reference.

    Attributes:
        name: the estimator's name.
        leaf: the leaf as an expression, such as ``meta['params']['0.weight']``; ``meta`` is all of it together.
        elements: coordinates of the leaf.
        steps: inner steps that were differentiated.
        cosine: as in ``Row``, of this leaf alone.
        norm_ratio: as in ``Row``, of this leaf alone.

    Examples:
        >>> LeafRow("first order", "meta['lr']", 1, 5, 1.0, 0.8).steps
        5

    Source: this library.
    """

    name: str
    leaf: str
    elements: int
    steps: int
    cosine: float
    norm_ratio: float
