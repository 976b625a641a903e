"""Several tasks at once: one tree whose tensors have a leading task dimension.

``over_tasks`` is ``torch.func.vmap`` with the level kept at hand, from the same primitives. A gradient inside it can so
be taken where the task dimension is an ordinary one, by the gradient of the sum over tasks: the same numbers, without
a second level of ``torch.func``, for a third of the time on small models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    maybe_get_bdim,
    peek_interpreter_stack,
)
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from funcmeta import tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Tree


class Level:
    """One level of ``vmap`` over tasks."""

    def __init__(self, number: int, tasks: int) -> None:
        self._number, self.tasks = number, tasks

    def lift(self, tensor: Tensor) -> Tensor:
        """The tensor of one task, as the function sees it, from one with a leading task dimension."""
        return _add_batch_dim(tensor, 0, self._number)

    def lower(self, tensor: Tensor) -> Tensor:
        """The tensor of all tasks, with a leading task dimension, from what the function sees."""
        return _remove_batch_dim(tensor, self._number, self.tasks, 0)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Compute with tensors of all tasks inside the block."""
        with temporarily_pop_interpreter_stack():
            yield

    def put_back(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor as the function sees it, where ``like`` has its task dimension; ``like`` itself may have none."""
        where = maybe_get_bdim(like)
        return tensor if where < 0 else _add_batch_dim(tensor, where, self._number)

    @contextmanager
    def entered_again(self) -> Iterator[None]:
        """Compute per task inside the block, after the function has returned; what it captured is valid again."""
        number = _vmap_increment_nesting(self.tasks, "different")
        token = _level.set(self)
        try:
            if number != self._number:
                raise ArgumentError(
                    "MixedMode over stacked tasks can not run backward inside torch.func. Use Reverse()."
                )
            yield
        finally:
            _level.reset(token)
            _vmap_decrement_nesting()

    def is_alone(self) -> bool:
        """Whether no other transform of ``torch.func`` is active."""
        top = peek_interpreter_stack()
        return top is not None and bool(top.level() == self._number == 1)


_level: ContextVar[Level | None] = ContextVar("funcmeta_task_level", default=None)


def task_level() -> Level | None:
    """The level of the function that runs over tasks right now, unless more of ``torch.func`` is active."""
    level = _level.get()
    return level if level is not None and level.is_alone() else None


def over_tasks(fn: Callable[..., Tree], tasks: int, *, randomness: str = "different") -> Callable[..., Tree]:
    """``fn`` over every tensor of the arguments; what is not a tensor is the same for all tasks."""

    def mapped(*arguments: Tree) -> Tree:
        lazy_load_decompositions()
        level = Level(_vmap_increment_nesting(tasks, randomness), tasks)
        token = _level.set(level)
        try:
            results = fn(*tree.map(lambda leaf: level.lift(leaf) if isinstance(leaf, Tensor) else leaf, arguments))
            return tree.map(lambda leaf: level.lower(leaf) if isinstance(leaf, Tensor) else leaf, results)
        finally:
            _level.reset(token)
            _vmap_decrement_nesting()

    return mapped


def per_task(fn: Callable[..., Tree], tasks: int) -> Callable[..., Tree]:
    """A problem's function (meta, ..., seed) over stacked tasks, for which ``meta`` and the seed are the same.

    A function that knows how to do this by itself has a method ``over_tasks``.
    """
    if hasattr(fn, "over_tasks"):
        return fn.over_tasks(tasks)  # type: ignore[no-any-return]

    def mapped(meta: Tree, *rest: Any) -> Tree:
        *stacked, seed = rest
        return over_tasks(lambda *each: fn(meta, *each, seed), tasks)(*stacked)

    return mapped


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose tensors are those of ``trees``, stacked; other leaves are those of the first."""
    return tree.map(lambda *column: torch.stack(column) if isinstance(column[0], Tensor) else column[0], *trees)


def take(stacked: Tree, index: int | slice) -> Tree:
    """The tree of one task, or of some; a function of the step becomes the function that gives their batch."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index]
        return (lambda step: take(leaf(step), index)) if callable(leaf) else leaf

    return tree.map(part, stacked)


def count(stacked: Tree) -> int:
    """The number of tasks: the size of the leading dimension, which every tensor must share."""
    tensors = tree.tensors(stacked)
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tensors}
    if len(sizes) != 1 or sizes & {0, None}:
        named = [(name, leaf) for name, leaf in tree.named_leaves(stacked, "tasks") if isinstance(leaf, Tensor)]
        found = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in named[:6]) or "no tensors"
        raise StructureError(
            f"tasks have no common leading task dimension: {found}. Stack the tasks, as sample_batch(seed, tasks) does."
        )
    return int(tensors[0].shape[0])
