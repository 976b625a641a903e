"""Randomness as integers: a seed for every (run, task, step), and no generator that a replay could forget."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from funcmeta._errors import ArgumentError, GraphError

_MASK = (1 << 64) - 1


class Seed(int):
    """The seed of stacked tasks that run at once: an integer, and behind it the seed that each task has by itself.

    ``fold`` and ``forked`` keep the tasks apart. As a plain number, ``int(seed)``, it is the same for all tasks.
    """

    _found: Callable[[], tuple[int, ...]]

    @classmethod
    def of(cls, value: int, each: Callable[[], tuple[int, ...]]) -> "Seed":
        """The seed with this value; ``each`` gives those of the tasks, and is called when one of them draws."""
        seed = cls(value)
        seed._found = each
        return seed

    @property
    def each(self) -> tuple[int, ...]:
        """The seed of each task."""
        return self._found()


def fold(seed: int, *numbers: int) -> int:
    """A new seed in [0, 2**63) from a seed and the numbers that name its use, such as a step index.

    The mixing is splitmix64 (Steele, Lea and Flood, 2014), so neighbouring numbers give unrelated seeds. From a
    ``Seed`` of stacked tasks comes another, in which each task's own seed is folded.

    Raises:
        ArgumentError: ``seed`` is no integer from 0 to 2**63 - 1, or one of the numbers is no integer.
    """
    value = _folded(seed, numbers)
    if type(seed) is Seed or Seed in map(type, numbers):
        return Seed.of(value, lambda: _folded_each(seed, numbers))
    return value


def _folded_each(*arguments: Any) -> tuple[int, ...]:
    """``fold`` for each task."""
    seed, numbers = arguments
    columns = [each.each if type(each) is Seed else None for each in (seed, *numbers)]
    tasks = max(len(column) for column in columns if column is not None)
    rows = zip(
        *[[each] * tasks if own is None else own for each, own in zip((seed, *numbers), columns, strict=True)],
        strict=True,
    )
    return tuple([_folded(first, rest) for first, *rest in rows])


def _folded(seed: int, numbers: Sequence[int]) -> int:
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
    """A fresh generator on ``device``, seeded with ``seed``.

    Raises:
        ArgumentError: ``seed`` is no integer from 0 to 2**63 - 1.
        GraphError: it is the seed of stacked tasks that run at once, for which one generator cannot draw.
    """
    if type(seed) is Seed:
        raise GraphError(
            "rng.generator got the seed of stacked tasks that run as one batch, where one generator cannot draw for "
            "each task. Draw without a generator: torch's global one follows the seed. Or pass strategy='loop'."
        )
    return torch.Generator(device).manual_seed(check_seed(seed))


class TaskDraws:
    """How far each of some stacked tasks has drawn since its seed."""

    def __init__(self, seed: int, reached: list[list[Tensor]] | None = None) -> None:
        self._seed, self._reached = seed, reached

    def copy(self) -> "TaskDraws":
        """The same, for draws that are to be made again."""
        return TaskDraws(self._seed, self._reached)

    def go_back(self, earlier: "TaskDraws") -> None:
        """Stand where a copy stands that was made before."""
        self._reached = earlier._reached

    def each(self, tasks: int, draw: Callable[[int], Any]) -> list[Any]:
        """The draw of each task, for which torch's global generators stand where they would if it ran by itself."""
        seeds = self._seed.each if isinstance(self._seed, Seed) else (self._seed,) * tasks
        before, drawn, reached = _states(), [], []
        try:
            for task in range(tasks):
                if self._reached is None:
                    _seed(seeds[task])
                else:
                    _set(self._reached[task])
                drawn.append(draw(task))
                reached.append(_states())
        finally:
            _set(before)
        self._reached = reached
        return drawn


_task_draws: ContextVar[TaskDraws | None] = ContextVar("funcmeta_task_draws", default=None)


def task_draws() -> TaskDraws | None:
    """The draws of stacked tasks that run here, by the innermost ``forked``."""
    return _task_draws.get()


class forked:
    """Run a block with torch's global generators seeded with ``seed``; put their states back afterwards."""

    def __init__(self, seed: int) -> None:
        self._seed = check_seed(seed)

    def __enter__(self) -> None:
        """Seed the generators."""
        self._before = _states()
        self._token = _task_draws.set(TaskDraws(self._seed))
        _seed(self._seed)

    def __exit__(self, *error: object) -> None:
        """Put the states back."""
        _task_draws.reset(self._token)
        _set(self._before)


class States(list[Tensor]):
    """Where draws stand: the states of torch's global generators, and those of stacked tasks."""

    tasks: TaskDraws | None = None


class returned_to:
    """Run a block with draws that stand where they stood earlier; put them back to the present afterwards."""

    def __init__(self, earlier: States) -> None:
        self._earlier = earlier

    def __enter__(self) -> None:
        """Go back."""
        self._before = _states()
        self._token = _task_draws.set(self._earlier.tasks and self._earlier.tasks.copy())
        _set(self._earlier)

    def __exit__(self, *error: object) -> None:
        """Put the states back."""
        _task_draws.reset(self._token)
        _set(self._before)


def states() -> States:
    """Where draws stand now."""
    now, tasks = States(_states()), _task_draws.get()
    now.tasks = tasks and tasks.copy()
    return now


def _states() -> list[Tensor]:
    return [each.get_state() for each in _generators()]


def restore(earlier: States) -> None:
    """Let draws go on from where they stood earlier, in the same block."""
    _set(earlier)
    tasks = _task_draws.get()
    if tasks is not None and earlier.tasks is not None:
        tasks.go_back(earlier.tasks)


def _seed(seed: int) -> None:
    for each in _generators():
        each.manual_seed(seed)


def _set(states: list[Tensor]) -> None:
    for each, state in zip(_generators(), states, strict=False):
        each.set_state(state)


def _generators() -> Sequence[torch.Generator]:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [torch.default_generator, *torch.cuda.default_generators]
    return _CPU


_CPU = (torch.default_generator,)
