"""The picture of a horizon report."""

import os
from collections.abc import Sequence

from funcmeta.compare._plot import COLORS, figure, save
from funcmeta.horizon._row import HorizonRow

PANELS = (
    ("bias", "Bias: mean error, relative"),
    ("variance", "Variance of one estimate, relative"),
    ("seconds", "Seconds of one estimate"),
)


def draw(rows: Sequence[HorizonRow], path: str | os.PathLike[str]) -> None:
    """A panel each for bias, with its standard error as a band, variance and time; logarithmic axes."""
    picture = figure(13, 4.2)
    panels = picture.subplots(1, len(PANELS))
    for name, color in zip(dict.fromkeys(row.name for row in rows), COLORS * len(rows), strict=False):
        own = sorted([row for row in rows if row.name == name], key=lambda row: row.horizon)
        for panel, (measure, _) in zip(panels, PANELS, strict=True):
            points = [(row.horizon, getattr(row, measure)) for row in own if getattr(row, measure) > 0]
            panel.plot(*zip(*points, strict=True) if points else ([], []), "o-", markersize=4, color=color, label=name)
        noisy = [row for row in own if row.bias_error]
        low, high = ([max(row.bias + sign * row.bias_error, 1e-12) for row in noisy] for sign in (-1, 1))
        panels[0].fill_between([row.horizon for row in noisy], low, high, color=color, alpha=0.2, linewidth=0)
    for panel, (_, title) in zip(panels, PANELS, strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("inner steps")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
    panels[0].axhline(1.0, color="0.5", linewidth=1, zorder=1)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    save(picture, path)
