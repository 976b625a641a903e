"""The bookkeeping of a walk through what a module refers to: places, and tables of how to make what belongs there."""

import gc
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from funcmeta._structure_parts import ATOMS, Names
from funcmeta._writes import storage

Make = Callable[[list[Any]], Any]
Held = tuple[Any, list[Any]]


class Places:
    """What was found on the way: tables of how to make and fill the objects of a copy, each by its place.

    Objects that can change are made empty and filled last, so that they may refer to each other in circles; their
    places count from 0. What cannot change is made in between, children first; its places count down from -1.
    """

    def __init__(self, tensors: Mapping[str, Tensor], title: str, *, clone: bool, fill: bool) -> None:
        self._title, self._clone, self._named = title, clone, list(tensors.items())
        self._number = len(tensors)
        self._fill = fill
        self._index: dict[int, int | None] = {id(tensor): place for place, (_, tensor) in enumerate(self._named)}
        self._alive: list[Any] = []  # an id is good for as long as its object lives
        self._storages: dict[int, list[int]] = {}
        for place, (_, tensor) in enumerate(self._named):
            self._storages.setdefault(storage(tensor), []).append(place)
        self._weak: list[tuple[int, Any, Any, Callable[[Any], Any]]] = []
        self._pending: dict[int, int] = {}
        self.shells: list[Callable[[], Any]] = []
        self.made: list[tuple[int, Make]] = []
        self.fills: list[tuple[Names, Callable[[list[Any]], Held]]] = []
        self.kept: list[tuple[str, int, Tensor]] = []
        self.captured: dict[str, Tensor] = {}
        self.second: dict[int, str] = {}
        self.copied: list[tuple[str, int, Callable[[Any], Any], Any]] = []
        self.iterators: list[tuple[str, Callable[[], Any], Any]] = []
        self.registered: list[tuple[int, int, str]] = []
        self._next_made = -1

    def place(self, value: Any, path: str) -> int | None:
        """The place of an object, or None when a copy shares it."""
        if isinstance(value, ATOMS):
            return None
        key = id(value)
        if key in self._index:
            place = self._index[key]
            if place is not None and 0 <= place < self._number:
                self.second.setdefault(place, path)
            return place
        if key in self._pending:  # a circle leads through something that can change, so this one is built anew
            self._index[key] = place = self._reserve()
            return place
        self._alive.append(value)
        if type(value) in weakref.ProxyTypes:  # which say that they are of the type of what they refer to
            return self._weak_reference(value, value.__repr__.__self__, weakref.proxy)
        if type(value) is weakref.ref:
            return self._weak_reference(value, value(), weakref.ref)
        return self._visit(value, path)

    def _visit(self, value: Any, path: str) -> int | None:
        raise NotImplementedError

    def modules(self) -> list[int]:
        """The places of all modules."""
        return [self._index[id(each)] for each in self._alive if isinstance(each, nn.Module)]  # type: ignore[misc]

    def finish(self) -> None:
        """Decide about what could not be decided before everything was found."""
        self.made[:0] = [(place, self._reference(*rest)) for place, *rest in self._weak]
        self._weak.clear()
        self._alive.clear()

    def _weak_reference(self, reference: Any, target: Any, kind: Callable[[Any], Any]) -> int:
        place = self._index[id(reference)] = self._reserve()
        self._weak.append((place, reference, target, kind))
        return place

    def _reference(self, reference: Any, target: Any, kind: Callable[[Any], Any]) -> Make:
        place = self._index.get(id(target))
        if place is None or place < 0:
            return lambda objects: reference
        return lambda objects: kind(objects[place])

    # ---- places

    def _shell(self, value: Any, make: Callable[[], Any]) -> int:
        place = self._index[id(value)] = self._number + len(self.shells)
        self.shells.append(make)
        return place

    def _reserve(self) -> int:
        self._next_made -= 1
        return self._next_made + 1

    def _build(self, value: Any, children: Callable[[], list[int | None]], make: Make) -> int | None:
        """The place of something that cannot change: a new one if a child has one."""
        self._pending[id(value)] = 0
        moves = any(place is not None for place in children())
        del self._pending[id(value)]
        place = self._index.get(id(value))
        if place is None and moves:
            place = self._reserve()
        self._index[id(value)] = place
        if place is not None:
            self.made.append((place, make))
        return place

    def _items(self, values: Iterable[Any], paths: Iterable[str]) -> tuple[list[Any], list[tuple[int, int]]]:
        """Values as a copy shares them, with None where it does not, and the places that belong there."""
        static, moving = [], []
        for index, (value, path) in enumerate(zip(values, paths, strict=True)):
            place = self.place(value, path)
            static.append(value if place is None else None)
            if place is not None:
                moving.append((index, place))
        return static, moving

    def _fill_dict(
        self,
        names: Names,
        place: int,
        of: Callable[[Any], dict[Any, Any]],
        static: dict[Any, Any],
        moving: list[tuple[Any, int]],
    ) -> None:
        def fill(objects: list[Any]) -> Held:
            target = of(objects[place])
            target.update(static)
            for key, at in moving:
                target[key] = objects[at]
            view = target.values()
            return view, [*view]

        self.fills.append((names, fill))

    def _share(self, value: Any, path: str = "") -> None:
        self._index[id(value)] = None

    def _leads_back(self, value: Any) -> bool:
        """Whether an object refers to what is built anew for sure: a tensor of the names, or a module on the way."""
        goals = {key for key, place in self._index.items() if place is not None and 0 <= place < self._number}
        goals |= {id(each) for each in self._alive if isinstance(each, nn.Module)}
        todo, seen = [value], {id(value)}
        while todo and len(seen) < 10_000:
            for each in gc.get_referents(todo.pop()):
                if id(each) in goals:
                    return True
                if id(each) in seen or isinstance(each, (type, types.ModuleType, *ATOMS)):
                    continue
                seen.add(id(each))  # of a function what it closes over, as its globals lead everywhere
                todo += (each.__closure__ or ()) if isinstance(each, types.FunctionType) else [each]
        return False


def filled(static: list[Any], moving: list[tuple[int, int]], objects: list[Any]) -> list[Any]:
    values = static.copy()
    for index, place in moving:
        values[index] = objects[place]
    return values
