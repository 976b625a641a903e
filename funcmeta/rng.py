"""Randomness as integers: a seed for every (run, task, step), and no generator that a replay could forget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcmeta._errors import ArgumentError

_MASK = (1 << 64) - 1


def fold(seed: int, *numbers: int) -> int:
    """A new seed in [0, 2**63) from a seed and the numbers that name its use, such as a step index.

    The mixing is splitmix64 (Steele, Lea and Flood, 2014), so neighbouring numbers give unrelated seeds.

    Raises:
        ArgumentError: ``seed`` is no integer from 0 to 2**63 - 1, or one of the numbers is no integer.
    """
    state = _mix(check_seed(seed))
    for number in numbers:
        if not isinstance(number, int):
            raise ArgumentError(f"numbers are {numbers!r}, expected integers. Pass e.g. the index of a step.")
        state = _mix(state ^ (number & _MASK))
    return state >> 1


def _mix(state: int) -> int:
    state = state + 0x9E3779B97F4A7C15 & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def check_seed(seed: int) -> int:
    """The seed itself when it is an integer in [0, 2**63), else ``ArgumentError``."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ArgumentError(f"seed is {seed!r}, expected an integer from 0 to 2**63 - 1. Pass a non-negative int.")
    return seed


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device``, seeded with ``seed``."""
    return torch.Generator(device).manual_seed(check_seed(seed))


class forked:
    """Run a block with torch's global generators seeded with ``seed``; put their states back afterwards."""

    def __init__(self, seed: int) -> None:
        self._seed = check_seed(seed)

    def __enter__(self) -> None:
        """Seed the generators."""
        self._before = states()
        for each in _generators():
            each.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        """Put the states back."""
        _set(self._before)


class returned_to:
    """Run a block with torch's global generators in earlier ``states``; put their present ones back afterwards."""

    def __init__(self, earlier: list[Tensor]) -> None:
        self._earlier = earlier

    def __enter__(self) -> None:
        """Go back."""
        self._before = states()
        _set(self._earlier)

    def __exit__(self, *error: object) -> None:
        """Put the states back."""
        _set(self._before)


def states() -> list[Tensor]:
    """The states of torch's global generators."""
    return [each.get_state() for each in _generators()]


def restore(states: list[Tensor]) -> None:
    """Put torch's global generators into earlier ``states``."""
    _set(states)


def _set(states: list[Tensor]) -> None:
    for each, state in zip(_generators(), states, strict=False):
        each.set_state(state)


def _generators() -> Sequence[torch.Generator]:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [torch.default_generator, *torch.cuda.default_generators]
    return _CPU


_CPU = (torch.default_generator,)
