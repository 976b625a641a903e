"""What many functions ask of their arguments."""

import math
from collections.abc import Callable, Collection
from os import fspath
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from funcmeta._errors import ArgumentError

_LARGEST = 2**63 - 1
"""The largest integer that torch takes."""


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether this is a number, of Python or NumPy, that torch can compute with."""
    if isinstance(value, int | np.integer):
        return not isinstance(value, bool) and -_LARGEST <= int(value) <= _LARGEST
    return isinstance(value, float | np.floating)


def check_count(name: str, value: Any, *, least: int = 1, or_none: bool = False, advice: str = "") -> Any:
    """The value itself when it is an integer of at least ``least`` (or None), else ``ArgumentError``."""
    if or_none and value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        wanted = kind + (" or None" if or_none else "")
        raise ArgumentError(f"{name} is {value!r}, expected {wanted}. {advice or f'Pass a larger {name}.'}")
    if value > _LARGEST:
        raise ArgumentError(
            f"{name} is at least 2**63, expected an integer that torch can count to. Pass a smaller one."
        )
    return value


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether it can be called and is no class, which would take the arguments for something else."""
    return callable(value) and not isinstance(value, type)


def check_flag(name: str, value: Any, *, or_none: bool = False) -> Any:
    """The value itself when it is True or False (or None), else ``ArgumentError``: any text would count as True."""
    if not isinstance(value, bool) and not (or_none and value is None):
        wanted = "True, False or None" if or_none else "True or False"
        raise ArgumentError(f"{name} is {value!r}, expected {wanted}. Pass one of them.")
    return value


def check_positive(name: str, value: Any) -> float:
    """The value itself when it is a positive finite number, else ``ArgumentError``."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} is {value!r}, expected a positive number. Pass e.g. {name}=0.1.")
    return value


def check_fraction(name: str, value: Any) -> float:
    """The value itself when it lies in [0, 1), else ``ArgumentError``."""
    if not is_number(value) or not 0 <= value < 1:
        raise ArgumentError(f"{name} is {value!r}, expected a number in [0, 1). Pass e.g. {name}=0.9.")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """The value itself when it is among the choices, else ``ArgumentError``."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}. Choose one.")
    return str(value)


def check_floating(dtype: Any) -> torch.dtype:
    """The dtype itself when it is a floating-point one, else ``ArgumentError``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype!r}, expected a floating-point dtype. Pass torch.float32, say.")
    return dtype


def check_path(path: Any) -> Path:
    """The path of a file, else ``ArgumentError``."""
    try:
        return Path(fspath(path))
    except TypeError as error:
        raise ArgumentError(f"path is {path!r}, expected the path of a file. Pass a str or a Path.") from error


def check_device(device: Any) -> torch.device:
    """The device when it names one, else ``ArgumentError``."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ArgumentError(f"device is {device!r}, expected a device of torch. Pass e.g. 'cpu' or 'cuda'.") from error
