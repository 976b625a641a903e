"""The picture of a comparison."""

import math
import os
from collections.abc import Sequence
from typing import Any

from funcmeta._errors import MissingExtraError
from funcmeta._files import written
from funcmeta.compare._rows import LeafRow, Row
from funcmeta.compare._table import bytes_text, leaf_label, time_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""One an estimator, in order; the palette of Okabe and Ito, which the colour-blind can tell apart."""

MOST_LEAVES = 5
"""How many leaves get a line of their own: the largest ones."""

WIDE = 20.0
"""From this factor between the largest and the smallest norm ratio on, the axis is logarithmic."""

STYLES = ("-", "--", ":", "-.")
"""One an estimator in the panels by leaf."""


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches, that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'Drawing needs matplotlib, which the extra demo brings. Run pip install ".[demo]" in a checkout.'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def draw(rows: Sequence[Row], leaves: Sequence[LeafRow], reference: str, path: str | os.PathLike[str]) -> None:
    """Agreement by leaf above, cost below."""
    picture = figure(12, 7)
    grid = picture.add_gridspec(2, 2, height_ratios=(3, 1.3))
    draw_agreement([picture.add_subplot(cell) for cell in (grid[0, 0], grid[0, 1])], leaves, reference)
    draw_cost([picture.add_subplot(cell) for cell in (grid[1, 0], grid[1, 1])], rows)
    save(picture, path)


def save(picture: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the file is there whole or not at all."""
    kind = os.path.splitext(path)[1].removeprefix(".") or "png"
    with written(path) as file:
        picture.savefig(file, format=kind, dpi=100)


def draw_agreement(axes: Sequence[Any], leaves: Sequence[LeafRow], reference: str) -> None:
    """Cosine, and norm ratio, of the largest leaves and of all together over the inner steps."""
    others = [name for name in dict.fromkeys(row.name for row in leaves) if name != reference] or [reference]
    shades = _shades(leaves)
    for name, style in zip(others, STYLES * len(others), strict=False):
        for leaf, color in shades.items():
            points = [row for row in leaves if row.name == name and row.leaf == leaf]
            steps = [row.steps for row in points]
            look = {"color": color, "linestyle": style, "marker": "o", "markersize": 4}
            look |= {"linewidth": 3.0, "zorder": 3} if leaf == "meta" else {"linewidth": 1.5}
            label = (f"{name}: " if len(others) > 1 else "") + leaf_label(leaf)
            axes[0].plot(steps, [row.cosine for row in points], label=label, **look)
            axes[1].plot(steps, [row.norm_ratio for row in points], label=label, **look)
    whom = f"{others[0]} and" if len(others) == 1 else "each estimator and"
    for panel, title in zip(axes, ("Direction: cosine of", "Size: norm ratio of"), strict=True):
        panel.set_title(f"{title} {whom} {reference}", fontsize=11)
        panel.set_xlabel("inner steps differentiated")
        panel.set_xticks(sorted({row.steps for row in leaves}))
        panel.axhline(1.0, color="0.5", linewidth=1, zorder=1)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("cosine (1: same direction)")
    axes[1].set_ylabel("norm ratio (1: same size)")
    shown = [row for row in leaves if row.leaf in shades and row.name in others]
    ratios = [row.norm_ratio for row in shown if math.isfinite(row.norm_ratio)]
    if 0 < WIDE * min(ratios, default=0) < max(ratios, default=0):
        axes[1].set_yscale("log")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)


def draw_cost(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Time and memory of one meta-gradient, a bar an estimator."""
    names = [row.name for row in rows]
    colors = [COLORS[index % len(COLORS)] for index in range(len(names))]
    seconds = [row.seconds for row in rows]
    peaks = [float(row.peak_bytes) for row in rows]
    for panel, title, values, text in (
        (axes[0], "Time of one meta-gradient", seconds, time_text),
        (axes[1], "Memory it needs at its peak", peaks, bytes_text),
    ):
        bars = panel.barh(names, values, color=colors)
        panel.bar_label(bars, [text(value) for value in values], padding=4, fontsize=10)
        panel.set_title(title, fontsize=11)
        panel.set_xlim(0, 1.3 * (max(values) or 1.0))
        panel.set_xticks([])
        panel.invert_yaxis()
        panel.spines[["top", "right", "bottom"]].set_visible(False)


def _shades(rows: Sequence[LeafRow]) -> dict[str, Any]:
    """A colour for all of ``meta`` and, from the input of the model to its output, for each of the largest leaves."""
    from matplotlib import colormaps

    sizes = {row.leaf: row.elements for row in rows if row.leaf != "meta"}
    largest = sorted(sizes, key=lambda leaf: -sizes[leaf])[:MOST_LEAVES]
    shown = [leaf for leaf in sizes if leaf in largest]
    steps = max(1, len(shown) - 1)
    shades = {leaf: colormaps["viridis"](0.9 * index / steps) for index, leaf in enumerate(shown)}
    return {"meta": "black"} | shades
