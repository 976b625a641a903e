"""A comparison in words and numbers, for a terminal of any kind."""

import math
from collections.abc import Sequence

from funcmeta.compare._rows import Row

MEASURES = (
    *("loss", "cosine", "norm ratio", "relative error", "worst leaf", "its cosine"),
    *("finite differences", "time", "memory", "evaluations"),
)
"""The lines of the table; its columns are the estimators."""


def figures(row: Row) -> tuple[str, ...]:
    """The column of an estimator, one text a measure."""
    leaf, cosine = row.worst_leaf
    return (
        _fixed(row.loss),
        _fixed(row.cosine),
        _fixed(row.norm_ratio),
        _fixed(row.relative_error),
        leaf_label(leaf) or "-",
        _fixed(cosine),
        f"{row.fd_error:.1e}" if math.isfinite(row.fd_error) else "-",
        time_text(row.seconds),
        bytes_text(row.peak_bytes),
        str(row.evaluations),
    )


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    names, columns = zip(*[(row.name, figures(row)) for row in rows], strict=True)
    return [("", *names), *zip(MEASURES, *columns, strict=True)]


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be said beside the numbers: the leaves that an estimator does not reach."""
    return [
        f"'{row.name}' gives no gradient to {', '.join(row.unreached)}: constant for it, gradient 0."
        for row in rows
        if row.unreached
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """The lines with their columns aligned."""
    return aligned(lines(rows))


def aligned(texts: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Lines of columns as wide as their widest text; the column ``left`` is flush left, the others right."""
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    columns = [
        [f"{text:{'<' if index == left else '>'}{width}}" for text in column]
        for index, (width, column) in enumerate(zip(widths, zip(*texts, strict=True), strict=True))
    ]
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def leaf_label(leaf: str) -> str:
    """The last key of the expression that reaches a leaf: ``meta['params']['0.weight']`` is 0.weight."""
    return "all of meta" if leaf == "meta" else leaf.removesuffix("]").rsplit("[", 1)[-1].strip("'\"")


def time_text(seconds: float) -> str:
    """A duration with its unit, to three digits."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def bytes_text(count: float) -> str:
    """A number of bytes with its unit (powers of 1000), to three digits."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))) if count >= 1000 else f"{count:.0f} B"


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    unit, scale = next((each for each in units if value >= each[1]), units[-1])
    number = value / scale
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"


def _fixed(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
