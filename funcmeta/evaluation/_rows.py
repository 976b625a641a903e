"""What was measured of one optimizer on one course."""

import math
from typing import NamedTuple

from torch import Tensor


class EvaluationRow(NamedTuple):
    """How far one optimizer got on one course.

    Attributes:
        course: the course's name.
        optimizer: the optimizer's name.
        rate: the learning rate that was tuned; None where there is none.
        median: of the losses at the end, over the held-out tasks.
        low: their lower quartile.
        high: their upper quartile.
        diverged: number of tasks whose loss became NaN or infinite; they count as infinite.
        at_edge: whether the rate is the smallest or the largest of those tried, so that a better one may lie outside.

    Examples:
        >>> EvaluationRow("quadratics", "Adam", 0.1, 0.5, 0.4, 0.6, 0).median
        0.5

    Source: this library.
    """

    course: str
    optimizer: str
    rate: float | None
    median: float
    low: float
    high: float
    diverged: int
    at_edge: bool = False


def quartiles(losses: Tensor) -> list[Tensor]:
    """The lower quartile, the median and the upper quartile over tasks, each the lower of two losses, [steps + 1]."""
    ordered = losses.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).sort(dim=-1).values
    last = losses.shape[-1] - 1
    return [ordered[..., int(part * last)] for part in (0.25, 0.5, 0.75)]
