"""What the samplers ask of their arguments."""

from collections.abc import Collection
from typing import Any

import torch

from funcmeta._errors import ArgumentError


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """The value itself when it is an integer of at least ``least``, else ``ArgumentError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} is {value!r}, expected an integer of at least {least}. Pass a larger {name}.")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """The value itself when it is among the choices, else ``ArgumentError``."""
    if value not in choices:
        raise ArgumentError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}. Choose one.")
    return str(value)


def check_floating(dtype: Any) -> torch.dtype:
    """The dtype itself when it is a floating-point one, else ``ArgumentError``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {dtype!r}, expected a floating-point dtype. Pass torch.float32, say.")
    return dtype
