"""A comparison in words and numbers, for a terminal of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funcmeta.compare._comparison import Comparison, Row

HEADERS = (
    *("estimator", "loss", "cosine", "norm ratio", "rel. error", "worst leaf", "its cosine"),
    *("fd error", "time", "memory", "evaluations"),
)
"""The columns of the table."""

LEFT = frozenset({"estimator", "worst leaf"})
"""The columns that are words."""


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, one text a column."""
    leaf, cosine = row.worst_leaf
    return (
        row.name,
        _fixed(row.loss),
        _fixed(row.cosine),
        _fixed(row.norm_ratio),
        _fixed(row.relative_error),
        leaf.removeprefix("meta") or leaf or "-",
        _fixed(cosine),
        f"{row.fd_error:.1e}" if math.isfinite(row.fd_error) else "-",
        time_text(row.seconds),
        bytes_text(row.peak_bytes),
        str(row.evaluations),
    )


def headline(comparison: Comparison) -> str:
    """What was compared, in two lines."""
    steps = "1 inner step" if comparison.steps == 1 else f"{comparison.steps} inner steps"
    return (
        f"Meta-gradients after {steps}, {comparison.dtype} on {comparison.device}, against '{comparison.reference}'.\n"
        f"fd: central differences along {comparison.directions} random direction"
        f"{'s' if comparison.directions > 1 else ''}, uncertain by {comparison.fd_spread:.0e}."
    )


def notes(comparison: Comparison) -> list[str]:
    """What has to be said beside the numbers: the leaves that an estimator does not reach."""
    return [
        f"'{row.name}' gives no gradient to {', '.join(row.unreached)}: constant for it, gradient 0."
        for row in comparison.rows
        if row.unreached
    ]


def table(comparison: Comparison) -> str:
    """The headline, the aligned columns and the notes."""
    lines = [HEADERS, *[cells(row) for row in comparison.rows]]
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    return "\n".join([headline(comparison), "", *[_aligned(line, widths) for line in lines], *notes(comparison)])


def time_text(seconds: float) -> str:
    """A duration with its unit, to three digits."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def bytes_text(count: float) -> str:
    """A number of bytes with its unit (powers of 1000), to three digits."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, scale = next((each for each in units if value >= each[1]), units[-1])
    number = value / scale
    return f"{number:.{0 if number >= 100 or scale == value == 0 else 1 if number >= 10 else 2}f} {unit}"


def _fixed(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _aligned(texts: Sequence[str], widths: Sequence[int]) -> str:
    columns = zip(HEADERS, texts, widths, strict=True)
    return "  ".join(text.ljust(width) if head in LEFT else text.rjust(width) for head, text, width in columns).rstrip()
