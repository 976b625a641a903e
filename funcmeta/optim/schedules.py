"""Schedules: hyper-parameters as functions of the step.

Each function here returns a callable that takes the step, a 0-d tensor (or an int) counting from 0, and returns a 0-d
tensor in double precision. Levels and rates may be tensors, and are differentiable then.
"""

from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import check_count, check_positive, is_number
from funcmeta._errors import ArgumentError
from funcmeta._typing import Schedule

__all__ = ["constant", "cosine_decay", "exponential_decay", "linear", "warmup"]


def constant(value: float | Tensor) -> Schedule:
    """The same value at each step.

    h(t) = value; of use where a schedule is asked for, as in `warmup(constant(0.1), 100)`.

    Args:
        value: a number or a 0-d tensor.

    Returns:
        A callable of the step.

    Raises:
        ArgumentError: ``value`` is neither a number nor a floating-point tensor.

    Examples:
        >>> fm.optim.schedules.constant(0.5)(torch.tensor(7))
        tensor(0.5000, dtype=torch.float64)

    Source: this library.
    """
    _check_levels(value=value)
    return lambda step: value * torch.ones_like(_time(step))


def linear(start: float | Tensor, end: float | Tensor, steps: int) -> Schedule:
    """From one value to another in a straight line, and constant from there.

    h(t) = start + (end - start) · min(t / steps, 1).

    Args:
        start: value at step 0, a number or a 0-d tensor.
        end: value from step `steps` on, a number or a 0-d tensor.
        steps: length of the line in optimizer steps, at least 1.

    Returns:
        A callable of the step.

    Raises:
        ArgumentError: ``start`` or ``end`` is no number or tensor, or ``steps`` is below 1.

    Examples:
        >>> schedule = fm.optim.schedules.linear(1.0, 0.0, 4)
        >>> schedule(torch.tensor(1)), schedule(torch.tensor(9))
        (tensor(0.7500, dtype=torch.float64), tensor(0., dtype=torch.float64))

    Source: torch.optim.lr_scheduler.LinearLR.
    """
    _check_levels(start=start, end=end)
    _check_steps(steps)
    return lambda step: start + (end - start) * _fraction(step, steps)


def exponential_decay(start: float | Tensor, rate: float | Tensor, steps: int = 1) -> Schedule:
    """Multiplied by a rate every so many steps, smoothly.

    h(t) = start · rate^(t / steps).

    Args:
        start: value at step 0, a number or a 0-d tensor.
        rate: factor per `steps` steps, above 0, a number or a 0-d tensor.
        steps: how many optimizer steps the rate is for, at least 1.

    Returns:
        A callable of the step.

    Raises:
        ArgumentError: ``start`` or ``rate`` is no number or tensor, a number ``rate`` is not positive, or ``steps`` is
            below 1.

    Examples:
        >>> fm.optim.schedules.exponential_decay(1.0, 0.5)(torch.tensor(2))
        tensor(0.2500, dtype=torch.float64)

    Source: torch.optim.lr_scheduler.ExponentialLR, which has steps = 1.
    """
    _check_levels(start=start, rate=rate)
    if not isinstance(rate, Tensor):
        check_positive("rate", rate)
    _check_steps(steps)
    return lambda step: start * rate ** (_time(step) / steps)


def cosine_decay(start: float | Tensor, steps: int, end: float | Tensor = 0.0) -> Schedule:
    """From one value to another along half a cosine, and constant from there.

    h(t) = end + ½(start - end)(1 + cos(π · min(t / steps, 1))).

    Args:
        start: value at step 0, a number or a 0-d tensor.
        steps: length of the half wave in optimizer steps, at least 1.
        end: value from step `steps` on, a number or a 0-d tensor.

    Returns:
        A callable of the step.

    Raises:
        ArgumentError: ``start`` or ``end`` is no number or tensor, or ``steps`` is below 1.

    Examples:
        >>> fm.optim.schedules.cosine_decay(1.0, 10)(torch.tensor(5))
        tensor(0.5000, dtype=torch.float64)

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, one period; CosineAnnealingLR in torch.optim.
    """
    _check_levels(start=start, end=end)
    _check_steps(steps)
    return lambda step: end + (start - end) * (0.5 * (1 + torch.cos(torch.pi * _fraction(step, steps))))


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Another schedule, reached in a straight line from zero.

    h(t) = schedule(0) · (t + 1) / (steps + 1) for t < steps, then schedule(t - steps).

    Args:
        schedule: what follows, a callable of the step.
        steps: length of the rise in optimizer steps, at least 1; none of these has the value 0.

    Returns:
        A callable of the step.

    Raises:
        ArgumentError: ``schedule`` cannot be called, or ``steps`` is below 1.

    Examples:
        >>> schedule = fm.optim.schedules.warmup(fm.optim.schedules.exponential_decay(1.0, 0.5), 3)
        >>> [schedule(torch.tensor(step)).item() for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 0.5, 0.25]

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 2.2.
    """
    if not callable(schedule) or isinstance(schedule, type):
        raise ArgumentError(
            f"schedule is {schedule!r}, expected a callable of the step. Pass another schedule, e.g. constant(0.1)."
        )
    _check_steps(steps)

    def warmed(step: Tensor) -> Tensor:
        time = _time(step)
        value = schedule((time - steps).clamp(min=0))
        if not isinstance(value, Tensor) and not is_number(value):
            raise ArgumentError(f"schedule(step) is {tree.describe(value)}, expected a number or a tensor. Return one.")
        return value * ((time + 1) / (steps + 1)).clamp(max=1)

    return warmed


def _time(step: Tensor | int) -> Tensor:
    """The step in double precision, so that a long schedule loses nothing."""
    if not is_number(step) and not isinstance(step, Tensor):
        raise ArgumentError(f"step is {tree.describe(step)}, expected a number or a tensor. Pass the step's index.")
    return torch.as_tensor(step).double()


def _fraction(step: Tensor | int, steps: int) -> Tensor:
    """Which part of the way is done, from 0 to 1."""
    return (_time(step) / steps).clamp(max=1)


def _check_levels(**levels: Any) -> None:
    for name, level in levels.items():
        if isinstance(level, Tensor):
            good = level.dtype.is_floating_point and level.ndim == 0
        else:
            good = is_number(level)
        if not good:
            raise ArgumentError(
                f"{name} is {tree.describe(level)}, expected a number or a 0-d floating-point tensor. Pass e.g. "
                f"{name}=0.1."
            )


def _check_steps(steps: int) -> None:
    check_count("steps", steps, advice="Pass the number of optimizer steps.")
