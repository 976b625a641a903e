"""The result of an evaluation: rows, a plain table, a dict, a picture."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcmeta.compare._comparison import plain
from funcmeta.compare._table import aligned
from funcmeta.evaluation._rows import EvaluationRow, quartiles


@dataclass(frozen=True)
class OptimizerEvaluation:
    """What ``evaluate_optimizers`` measured; ``str()`` is a table.

    Attributes:
        rows: an ``EvaluationRow`` for each course and optimizer.
        curves: by (course, optimizer), the losses before each step and after the last, [steps + 1, tasks].
        seed: integer from which tasks and starts follow.

    Examples:
        >>> row = EvaluationRow("quadratics", "Adam", 0.1, 0.5, 0.4, 0.6, 0)
        >>> print(OptimizerEvaluation((row,), {}, 0))
        Losses at the end of held-out trainings: median and quartiles.
        <BLANKLINE>
        course      optimizer  rate  median  lower  upper  diverged
        quadratics       Adam   0.1     0.5    0.4    0.6         0

    Source: this library.
    """

    rows: tuple[EvaluationRow, ...]
    curves: Mapping[tuple[str, str], Tensor]
    seed: int

    def __str__(self) -> str:
        """A line for each course and optimizer, in plain text."""
        head = ("course", "optimizer", "rate", "median", "lower", "upper", "diverged")
        lines = [
            (
                *(row.course, row.optimizer, "-" if row.rate is None else f"{row.rate:.3g}"),
                *(f"{value:.4g}" for value in (row.median, row.low, row.high)),
                str(row.diverged),
            )
            for row in self.rows
        ]
        notes = [
            f"The rate of '{row.optimizer}' on '{row.course}' is the last of those tried: a better one may lie outside."
            for row in self.rows
            if row.at_edge
        ]
        title = "Losses at the end of held-out trainings: median and quartiles."
        return "\n".join([title, "", *aligned([head, *lines]), *notes])

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the quartiles of every curve; a number that is not finite becomes None."""
        curves = [
            {"course": course, "optimizer": name, "quartiles": [each.tolist() for each in quartiles(losses)]}
            for (course, name), losses in self.curves.items()
        ]
        return plain({"rows": [row._asdict() for row in self.rows], "curves": curves, "seed": self.seed})  # type: ignore[no-any-return]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the median loss over the steps of every course, with quartiles as bands, into a file.

        Its format follows the suffix, such as ``.png`` or ``.svg``. Needs matplotlib, from the extra ``demo``.
        """
        from funcmeta.evaluation._plot import draw

        draw(self.rows, self.curves, path)
