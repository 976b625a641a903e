"""The picture of an evaluation."""

import os
from collections.abc import Mapping, Sequence

from torch import Tensor

from funcmeta.compare._plot import COLORS, figure, save
from funcmeta.evaluation._rows import EvaluationRow, quartiles


def draw(rows: Sequence[EvaluationRow], curves: Mapping[tuple[str, str], Tensor], path: str | os.PathLike[str]) -> None:
    """A panel for each course: median losses as lines, quartiles as bands, on a logarithmic axis."""
    courses = list(dict.fromkeys(row.course for row in rows))
    picture = figure(4.6 * len(courses) + 1.6, 4.0)
    panels = picture.subplots(1, len(courses), squeeze=False)[0]
    names = list(dict.fromkeys(row.optimizer for row in rows))
    for panel, course in zip(panels, courses, strict=True):
        for name, color in zip(names, COLORS * len(names), strict=False):
            low, median, high = (each.tolist() for each in quartiles(curves[course, name]))
            panel.plot(median, color=color, label=name, linewidth=1.6)
            panel.fill_between(range(len(median)), low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_title(course, fontsize=11)
        panel.set_xlabel("steps")
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("loss")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    save(picture, path)
