"""The result of a comparison: rows, a plain table, a dict, a picture."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from funcmeta.compare._table import table


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
        """The rows as an aligned table of plain text."""
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers; a number that is not finite becomes None."""
        content = asdict(self)
        content["rows"] = [row._asdict() for row in self.rows]
        content["leaves"] = [row._asdict() for row in self.leaves]
        return _plain(content)  # type: ignore[no-any-return]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw cosine and norm ratio of the largest leaves over the inner steps, and the cost, into a file.

        Its format follows the suffix, such as ``.png`` or ``.svg``. Needs matplotlib, from the extra ``demo``.
        """
        from funcmeta.compare._plot import draw

        draw(self, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
