"""The curves of a run as pictures inside of a page, which take their colours from it."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from funcmeta.compare._plot import figure
from funcmeta.training._evaluation import Evaluation, Mean
from funcmeta.training._folder import Record

POINTS = 300
"""How many points a curve has at most; of more steps the lowest and the highest of each stretch are drawn."""

SHARE = 50
"""The running median is that over one part of so many of the steps."""

EDGE = 1e100
"""What is larger, or as far below 0, is drawn here: matplotlib cannot draw what is near the largest float64."""

_COLORS = {name: f"#0000{number:02x}" for number, name in enumerate(("text", "line", "noise", "grid", "mark"), 1)}
"""Stand-ins for the page's colours, which no picture has otherwise."""

Array = NDArray[np.float64]


class Panel:
    """One picture with a pair of axes."""

    def __init__(self, name: str, label: str, across: str = "outer step") -> None:
        self.name, self.label = name, label
        with _style(name):
            self._figure = figure(5.2, 2.9)
            self.axes = self._figure.add_subplot()
            self.axes.grid(color=_COLORS["grid"], linewidth=0.8)
            self.axes.set_axisbelow(True)
            self.axes.spines[["top", "right"]].set_visible(False)
            self.axes.set_xlabel(across)
            self.axes.locator_params(axis="both", nbins=6)

    def svg(self) -> str:
        """The picture as an element of HTML: no file, no script, no request."""
        file = io.StringIO()
        with _style(self.name):
            empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self._figure.savefig(file, format="svg", transparent=True, metadata=empty)
        text = file.getvalue()
        text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
        text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
        for color, value in _COLORS.items():
            text = text.replace(value, f"var(--{color})")
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        return text.replace("<svg ", f'<svg role="img" aria-label="{self.label}" ', 1).strip()


def curve(name: str, label: str, steps: Sequence[int], values: Sequence[float | None], *, log: bool = False) -> Panel:
    """A noisy quantity over the steps, and its running median."""
    x, y = _known(steps, values)
    panel = Panel(name, label)
    if log and (y > 0).any():
        x, y = x[y > 0], y[y > 0]
        panel.axes.set_yscale("log")
    if len(x):
        noise = _COLORS["noise"] if len(x) > 2 else _COLORS["line"]
        panel.axes.plot(*_thinned(x, y), color=noise, linewidth=0.9, marker="o" if len(x) == 1 else None)
    if len(x) > 2:
        panel.axes.plot(*_median(x, y), color=_COLORS["line"], linewidth=1.8)
    return panel


def plain(name: str, label: str, steps: Sequence[int], values: Sequence[float | None]) -> Panel:
    """A quantity over the steps that has no noise, seen from 0."""
    x, y = _known(steps, values)
    panel = Panel(name, label)
    panel.axes.plot(*_thinned(x, y), color=_COLORS["line"], linewidth=1.8, marker="o" if len(x) == 1 else None)
    panel.axes.set_ylim(bottom=0)
    return panel


def means(name: str, label: str, steps: Sequence[int], found: Sequence[Mean], best: int | None) -> Panel:
    """Means with their intervals as a band, and a ring around the best."""
    x, value = np.asarray(steps, float), _drawable([each.value for each in found])
    margin = _drawable([each.margin for each in found])
    panel = Panel(name, label)
    panel.axes.fill_between(x, value - margin, value + margin, color=_COLORS["noise"], alpha=0.45, linewidth=0)
    small = {"marker": "o", "markersize": 3.5} if len(x) <= 60 else {}
    panel.axes.plot(x, value, color=_COLORS["line"], linewidth=1.8, **small)
    if best is not None:
        panel.axes.plot(x[best], value[best], "o", color=_COLORS["mark"], markersize=9, fillstyle="none", mew=1.8)
    return panel


def histogram(name: str, label: str, found: Evaluation, before: Mean) -> tuple[Panel, str]:
    """How often which score was met, the mean, and the mean of before; and what lies outside, in words."""
    panel = Panel(name, label, "score of a task")
    panel.axes.set_ylabel("tasks")
    known = _drawable(found.scores.tolist())
    known = known[np.isfinite(known)]
    lost = len(found.scores) - len(known)
    if len(known) == 0:
        return panel, f" {lost} not finite, not shown."
    low, high = _near(known)
    inside = known.clip(low, high)
    ends = _apart(inside.min(), inside.max())
    bins = int(np.clip(len(known) ** 0.5 * 1.5, 5, 40))
    panel.axes.hist(inside, bins=bins, range=ends, color=_COLORS["noise"], edgecolor=_COLORS["line"], linewidth=0.8)
    far = int((inside != known).sum())
    outside = f" {far} far out {'is' if far == 1 else 'are'} in an outermost bar." if far else ""
    outside += f" {lost} not finite, not shown." if lost else ""
    room = 3 * (ends[1] - ends[0])  # for a line beside the bars
    for what, value, style in (("The mean", found.mean.value, "-"), ("The mean at first", before.value, "--")):
        if not ends[0] - room <= value <= ends[1] + room:
            outside += f" {what}, {value:.4g}, lies outside."
            continue
        panel.axes.axvline(value, color=_COLORS["line" if style == "-" else "text"], linewidth=2, linestyle=style)
    return panel, outside


def mark_alarms(panel: Panel, records: Sequence[Record]) -> None:
    """A tick below the upper edge for each step that was left out."""
    steps = [record.step for record in records if record.alarm]
    if steps:
        x = np.unique(np.asarray(steps, float)[np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).astype(int)])
        where = panel.axes.get_xaxis_transform()
        panel.axes.plot(x, np.full(len(x), 0.97), "v", color=_COLORS["mark"], markersize=5, transform=where, mew=0)


def _known(steps: Sequence[int], values: Sequence[float | None]) -> tuple[Array, Array]:
    x, y = np.asarray(steps, float), _drawable(values)
    finite = np.isfinite(y)
    return x[finite], y[finite]


def _drawable(values: Sequence[float | None]) -> Array:
    """The values as far as they can be drawn; None becomes NaN, and what is infinite remains it."""
    y = np.array(values, float)
    return np.where(np.isinf(y), y, y.clip(-EDGE, EDGE))


def _near(known: Array) -> tuple[float, float]:
    """How far bars reach: five times the range of the quartiles beyond it, or ten times the median where that is 0."""
    low, median, high = np.quantile(known, (0.25, 0.5, 0.75))
    size = max(abs(low), abs(high))
    room = 5 * (high - low) if high - low > 1e-9 * size else 10 * max(1.0, abs(median))
    return float(low - room), float(high + room)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Both ends of a range, made wider where they are too close for bins between them."""
    size = max(abs(low), abs(high))
    room = 0.5 * max(1.0, size) if high - low <= 1e-9 * size else 0.0
    return low - room, high + room


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """The same curve at most twice ``POINTS`` long: of each stretch of steps its lowest and highest value."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    chosen = [sorted((part[y[part].argmin()], part[y[part].argmax()])) for part in parts]
    index = np.unique(np.concatenate(chosen))
    return x[index], y[index]


def _median(x: Array, y: Array) -> tuple[Array, Array]:
    """The running median at no more than ``POINTS`` places."""
    half = max(2, len(x) // SHARE // 2)
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int))
    return x[places], np.array([np.median(y[max(0, place - half) : place + half + 1]) for place in places])


def median_over(steps: int) -> int:
    """How many steps the running median of so many is over."""
    return 2 * max(2, steps // SHARE // 2) + 1


@contextmanager
def _style(name: str) -> Iterator[None]:
    from matplotlib import rc_context

    text = _COLORS["text"]
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options: Any = dict.fromkeys(colors, text) | {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}
    with rc_context(options):
        yield
