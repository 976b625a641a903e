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
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from funcmeta import tree
from funcmeta._errors import ArgumentError, GraphError, StructureError
from funcmeta._typing import Tree


class Level:
    """One level of ``vmap`` over tasks."""

    def __init__(self, number: int, tasks: int, *, outer: "Level | None" = None, apart: bool = False) -> None:
        self._number, self.tasks = number, tasks
        self.outer, self.apart = outer, apart
        """The level around this one, and whether each task has draws of its own, those of ``rng.task_draws``."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor has a task dimension that this level hides, and no other is hidden above it."""
        return is_batchedtensor(tensor) and maybe_get_level(tensor) == self._number

    def is_innermost(self) -> bool:
        """Whether no other transform of ``torch.func`` was entered after this one."""
        top = peek_interpreter_stack()
        return top is not None and bool(top.level() == self._number)

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
        number = _vmap_increment_nesting(self.tasks, "error" if self.apart else "different")
        token = _level.set(self)
        try:
            if number != self._number:
                raise ArgumentError(
                    "MixedMode over stacked tasks cannot run backward inside torch.func. Use Reverse()."
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


def innermost_level() -> Level | None:
    """The level of the function over tasks that was entered last, whatever else of ``torch.func`` is active."""
    return _level.get()


def beneath(tensor: Tensor) -> Tensor:
    """The tensor that the levels over tasks hide, which knows what is true of it outside of ``vmap``."""
    level = _level.get()
    while level is not None:
        if level.holds(tensor):
            tensor = get_unwrapped(tensor)
        level = level.outer
    return tensor


def over_tasks(
    fn: Callable[..., Tree], tasks: int, *, randomness: str = "different", apart: bool = False
) -> Callable[..., Tree]:
    """``fn`` over every tensor of the arguments; what is not a tensor is the same for all tasks.

    Tasks that are kept ``apart`` draw by ``_draws``, each for itself; what that does not know must not draw.
    """

    def mapped(*arguments: Tree) -> Tree:
        lazy_load_decompositions()
        number = _vmap_increment_nesting(tasks, "error" if apart else randomness)
        level = Level(number, tasks, outer=_level.get(), apart=apart)
        token = _level.set(level)

        def lifted(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return level.lift(leaf)
            if isinstance(leaf, Each):
                named = tree.named_leaves(arguments, "arguments")
                name = next((name for name, each in named if each is leaf), "A value")
                raise GraphError(
                    f"{name} differs between the tasks, {tuple(leaf)!r}, so that they cannot run as one batch. Keep it "
                    f"in a tensor, or pass strategy='loop' (particles: chunk=1)."
                )
            return leaf

        try:
            results = fn(*tree.map(lifted, arguments))
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
        return over_tasks(lambda *each: fn(meta, *each, seed), tasks, apart=True)(*stacked)

    return mapped


class Each(tuple[Any, ...]):
    """A value of Python, such as a number, for each of some stacked tasks: a leaf of the tree that they share."""

    def __repr__(self) -> str:
        """As it is made."""
        return f"Each({super().__repr__()})"


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose tensors are those of ``trees``, stacked; of other leaves it keeps each, unless all are equal."""
    return tree.map(_column, *trees)


def _column(*column: Any) -> Any:
    first = column[0]
    if not isinstance(first, Tensor):
        return joined(column)
    if all(_same_memory(first, other) for other in column[1:]):
        return first.expand(len(column), *first.shape)  # a frozen parameter is held once, and not once per task
    return torch.stack(column)


def joined(values: Sequence[Any]) -> Any:
    """The value that all tasks have, or each."""
    return values[0] if all(_equal(values[0], other) for other in values[1:]) else Each(values)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return (
        type(one) is type(other) is Tensor
        and not (one.requires_grad or other.requires_grad)
        and (one.layout, other.layout) == (torch.strided, torch.strided)
        and (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)
        and one.numel() > 0
        and not (is_functorch_wrapped_tensor(one) or is_functorch_wrapped_tensor(other))
        and one.data_ptr() == other.data_ptr()
    )


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, float | complex):
        return repr(one) == repr(other)  # 0.0 equals -0.0, and both are not the same
    try:
        return bool(one == other)
    except Exception:
        return False  # whatever cannot be compared is kept for each


def take(stacked: Tree, index: int | slice | list[int]) -> Tree:
    """The tree of one task, or of some; a function of the step becomes the function that gives their batch."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index]
        if isinstance(leaf, Each):
            if isinstance(index, int):
                return leaf[index]
            return joined(leaf[index] if isinstance(index, slice) else [leaf[each] for each in index])
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
