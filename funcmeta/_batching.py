"""Several tasks at once: one tree whose tensors have a leading task dimension."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import StructureError
from funcmeta._typing import Tree


def over_tasks(fn: Callable[..., Tree], tasks: int) -> Callable[..., Tree]:
    """``torch.func.vmap`` over every tensor of the arguments; what is not a tensor is the same for all tasks."""
    each = torch.arange(tasks)  # so that there is something to map over when no argument is a tensor

    def mapped(*arguments: Tree) -> Tree:
        leaves, spec = tree.flatten(arguments)
        where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        made: list[Any] = []

        def one(_: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            mine = list(leaves)
            for index, tensor in zip(where, tensors, strict=True):
                mine[index] = tensor
            results, made_spec = tree.flatten(fn(*tree.unflatten(mine, spec)))
            made[:] = [results, made_spec]
            return tuple(leaf for leaf in results if isinstance(leaf, Tensor))

        batched = iter(torch.func.vmap(one, randomness="different")(each, *[leaves[index] for index in where]))
        results, made_spec = made
        return tree.unflatten([next(batched) if isinstance(leaf, Tensor) else leaf for leaf in results], made_spec)

    return mapped


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose tensors are those of ``trees``, stacked; other leaves are those of the first."""
    return tree.map(lambda *column: torch.stack(column) if isinstance(column[0], Tensor) else column[0], *trees)


def take(stacked: Tree, index: int) -> Tree:
    """The tree of one task; a function of the step becomes the function that gives this task's batch."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index]
        return (lambda step: take(leaf(step), index)) if callable(leaf) else leaf

    return tree.map(part, stacked)


def count(stacked: Tree) -> int:
    """The number of tasks: the size of the leading dimension, which every tensor must share."""
    named = [(name, leaf) for name, leaf in tree.named_leaves(stacked, "tasks") if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if leaf.dim() else None for _, leaf in named}
    if len(sizes) != 1 or sizes & {0, None}:
        found = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in named[:6]) or "no tensors"
        raise StructureError(
            f"tasks have no common leading task dimension: {found}. Stack the tasks, as sample_batch(seed, tasks) does."
        )
    return int(named[0][1].shape[0])
