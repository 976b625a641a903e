"""The result of a horizon report: rows, a plain table, a dict, a picture."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from funcmeta.compare._comparison import plain
from funcmeta.compare._table import aligned, time_text
from funcmeta.horizon._row import HorizonRow


@dataclass(frozen=True)
class HorizonReport:
    """What ``horizon_report`` measured; ``str()`` is a table.

    Attributes:
        rows: a ``HorizonRow`` for each number of inner steps and each estimator.
        reference: what was taken as exact.
        repeats: seeds for each estimator that depends on the seed.
        seed: integer from which the seeds follow.
        dtype: dtype of the leaves of ``meta`` that require grad.
        device: their device.

    Examples:
        >>> row = HorizonRow(100, "truncated", 0.9, 0.0, 0.0, 0.4, 0.01, 2, 24.0)
        >>> print(HorizonReport((row,), "Reverse()", 20, 0, "float64", "cpu"))
        Meta-gradients over the number of inner steps, float64 on cpu, against Reverse().
        Bias and variance are relative to the exact gradient; up to 20 repeats.
        <BLANKLINE>
        steps  estimator       bias  variance  cosine     time
          100  truncated  0.900 ± 0         0  0.4000  10.0 ms

    Source: this library.
    """

    rows: tuple[HorizonRow, ...]
    reference: str
    repeats: int
    seed: int
    dtype: str
    device: str

    def __str__(self) -> str:
        """The headline, and a line for each number of steps and estimator, in plain text."""
        head = ("steps", "estimator", "bias", "variance", "cosine", "time")
        lines = [
            (
                str(row.horizon),
                row.name,
                f"{_digits(row.bias)} ± {row.bias_error:.2g}",
                _digits(row.variance),
                f"{row.cosine:.4f}",
                time_text(row.seconds),
            )
            for row in self.rows
        ]
        notes = {
            f"'{row.name}' gives no gradient to {', '.join(row.unreached)} after {row.horizon} steps: gradient 0."
            for row in self.rows
            if row.unreached
        }
        return "\n".join([self.headline, "", *aligned([head, *lines], left=1), *sorted(notes)])

    @property
    def headline(self) -> str:
        """What was measured, in two lines."""
        return (
            f"Meta-gradients over the number of inner steps, {self.dtype} on {self.device}, against {self.reference}.\n"
            f"Bias and variance are relative to the exact gradient; up to {self.repeats} repeats."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers; a number that is not finite becomes None."""
        return plain(asdict(self) | {"rows": [row._asdict() for row in self.rows]})  # type: ignore[no-any-return]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw bias, variance and time of each estimator over the inner steps into a file.

        Its format follows the suffix, such as ``.png`` or ``.svg``. Needs matplotlib, from the extra ``demo``.
        """
        from funcmeta.horizon._plot import draw

        draw(self.rows, path)


def _digits(value: float) -> str:
    return f"{value:#.3g}" if value else "0"
