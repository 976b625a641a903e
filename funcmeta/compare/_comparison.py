"""The result of a comparison: rows, a plain table, a dict, a picture."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from funcmeta.compare._rows import LeafRow, Row
from funcmeta.compare._table import notes, table


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured; ``str()`` is a table.

    Attributes:
        rows: one ``Row`` an estimator, at the full number of steps.
        leaves: a ``LeafRow`` for each estimator, leaf and number of inner steps up to the full number.
        reference: the name of the estimator that the others are held against.
        steps: inner steps.
        directions: random directions of the finite differences.
        fd_spread: relative change of these differences when their step shrinks: an ``fd_error`` below it says nothing.
        seed: seed of the run and of the directions.
        dtype: dtype of the leaves of ``meta`` that require grad.
        device: their device.

    Examples:
        >>> row = Row("second order", 0.5, 1.0, 1.0, 0.0, ("meta", 1.0), 1e-9, 0.01, 4096, 6)
        >>> Comparison((row,), (), "second order", 5, 3, 1e-9, 0, "float64", "cpu").to_dict()["rows"][0]["evaluations"]
        6

    Source: this library.
    """

    rows: tuple[Row, ...]
    leaves: tuple[LeafRow, ...]
    reference: str
    steps: int
    directions: int
    fd_spread: float
    seed: int
    dtype: str
    device: str

    def __str__(self) -> str:
        """The headline, and the rows as an aligned table of plain text with a column an estimator."""
        return "\n".join([self.headline, "", *table(self.rows), *notes(self.rows)])

    @property
    def headline(self) -> str:
        """What was compared, in two lines."""
        steps = "1 inner step" if self.steps == 1 else f"{self.steps} inner steps"
        directions = "1 random direction" if self.directions == 1 else f"{self.directions} random directions"
        return (
            f"Meta-gradients after {steps}, {self.dtype} on {self.device}, against '{self.reference}'.\n"
            f"Finite differences: {directions}, themselves uncertain by {self.fd_spread:.0e}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers; a number that is not finite becomes None."""
        content = asdict(self)
        content["rows"] = [row._asdict() for row in self.rows]
        content["leaves"] = [row._asdict() for row in self.leaves]
        return plain(content)  # type: ignore[no-any-return]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw cosine and norm ratio of the largest leaves over the inner steps, and the cost, into a file.

        Its format follows the suffix, such as ``.png`` or ``.svg``. Needs matplotlib, from the extra ``demo``.
        """
        from funcmeta.compare._plot import draw

        draw(self.rows, self.leaves, self.reference, path)


def plain(value: Any) -> Any:
    """The same as dicts, lists, strings and numbers for JSON, where a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
