"""What the walk through a module meets besides containers: names, atoms, generators, tensors of an earlier graph."""

import copy
import itertools
import operator
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from funcmeta._errors import GraphError

ATOMS = (
    *(int, float, complex, str, bytes, type(None), type(Ellipsis), type, types.ModuleType, types.CodeType, torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What neither changes nor refers to anything."""


class Names(NamedTuple):
    """How to name what a container holds: as attributes of a path, as items of it, or only the path itself."""

    path: str
    keys: list[Any]
    kind: str
    slots: Mapping[str, int] = {}
    """Which of the keys hold registered tensors, by the places of these."""

    def changed(self, container: Any, values: Sequence[Any]) -> Iterator[tuple[str, int | None, Any]]:
        """What differs from the values that a container held; for a registered tensor its place, and what is there."""
        if self.kind == "whole":
            if len(container) != len(values) or not all(map(_same, container, values)):
                yield self.path, None, None
            return
        now, before = container.mapping, dict(zip(self.keys, values, strict=True))
        for key, value in before.items():
            if key not in now or not _same(now[key], value):
                yield self.named(key), self.slots.get(key), now.get(key)
        yield from [(self.named(key), None, None) for key in now if key not in before]

    def named(self, key: Any) -> str:
        """The way to one of the values."""
        return attribute(self.path, str(key)) if self.kind == "attribute" else f"{self.path}[{key!r:.40}]"


def _same(new: Any, old: Any) -> bool:
    return new is old or (type(new) is type(old) and isinstance(new, int | float | str | bytes) and new == old)


def attribute(path: str, name: str) -> str:
    """The path of an attribute."""
    return f"{path}.{name}" if path else name


class CellContents:
    """A closure cell as a container of one."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self._cell.cell_contents])


class Slots:
    """The ``__slots__`` of an object as a container."""

    def __init__(self, owner: Any, names: Sequence[str]) -> None:
        self._owner, self._names = owner, names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Any]:
        return iter([getattr(self._owner, name, None) for name in self._names])


def slots(kind: type) -> list[str]:
    """The names of a class's slots."""
    every = [(name, value) for each in kind.__mro__ for name, value in vars(each).items()]
    return [name for name, value in every if isinstance(value, types.MemberDescriptorType)]


def _iterator_state(iterator: Any) -> Any:
    return repr(iterator) if isinstance(iterator, itertools.count) else operator.length_hint(iterator, -1)


_ITERABLES: tuple[Any, ...] = ([], (), range(1), "", {}.items(), {}.keys(), set())

COPIED: dict[Any, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    np.ndarray: (np.ndarray.copy, lambda array: (array.shape, array.tobytes())),
    torch.Generator: (torch.Generator.clone_state, lambda each: each.get_state().numpy().tobytes()),
    random.Random: (copy.copy, random.Random.getstate),
    np.random.Generator: (copy.deepcopy, lambda each: str(each.bit_generator.state)),
    np.random.RandomState: (copy.deepcopy, lambda each: str(each.get_state())),
    bytearray: (bytearray, bytes),
    itertools.count: (copy.copy, _iterator_state),
    itertools.cycle: (copy.copy, _iterator_state),
    **{type(iter(each)): (copy.copy, _iterator_state) for each in _ITERABLES},
}
"""What has a state without attributes: how to copy it, and its state as something to compare."""


class Filled(BaseException):
    """A call puts something into a container that all copies share while it is empty."""


class _SharedDict(OrderedDict[Any, Any]):
    """An empty dict that stays empty."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise Filled

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise Filled

    def setdefault(self, key: Any, default: Any = None) -> Any:
        raise Filled


class _SharedSet(set[Any]):
    """An empty set that stays empty."""

    def add(self, value: Any) -> None:
        raise Filled

    def update(self, *values: Any) -> None:
        raise Filled


EMPTY = {
    name: _SharedSet() if isinstance(value, set) else _SharedDict()
    for name, value in vars(nn.Module()).items()
    if isinstance(value, dict | set)
}
"""Containers of every module that are nearly always empty: a dozen a module, which hardly any forward fills."""

KIND = {name: type(value) for name, value in vars(nn.Module()).items() if name in EMPTY}


def stale(path: str) -> Tensor:
    """What stands in the place of a tensor that belongs to an earlier graph, and raises when it is used."""

    def refuse(cls: type, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise GraphError(
            f"The module's forward reads '{path}', a tensor that was computed from its parameters before the training "
            f"began and would not follow them. Compute it in forward, or by torch.nn.utils.parametrize."
        )

    kind = type("Stale", (Tensor,), {"__torch_function__": classmethod(refuse)})
    return torch.empty(0, device="meta").as_subclass(kind)
