"""The walk through what a module refers to, which decides what a copy shares and what it builds anew."""

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funcmeta._errors import ArgumentError, GraphError
from funcmeta._structure_parts import COPIED, EMPTY, KIND, CellContents, Names, Slots, attribute, slots, stale
from funcmeta._structure_places import Held, Places, filled
from funcmeta._writes import storage

_SHARED = (
    *("torch._dynamo", "torch._inductor", "torch._functorch", "torch._subclasses", "torch.distributed", "torch.fx"),
    *("torch.export", "torch.jit", "torch.utils.data", "funcmeta", "threading", "logging", "multiprocessing"),
    *("weakref", "_weakrefset", "concurrent", "asyncio", "contextlib", "contextvars", "queue", "socket", "subprocess"),
    *("tempfile", "unittest"),
)
"""Packages whose objects are tools: of no use to a forward pass that wants its own tensors, or harmful when copied."""

_ARRAY_BYTES = 2**20
"""The largest array of NumPy that is copied for each call."""


class Walk(Places):
    """What to do with each kind of object: the modules, containers and functions that a module is made of."""

    def _visit(self, value: Any, path: str) -> int | None:
        for kind, visit in _VISITS:
            if isinstance(value, kind):
                return visit(self, value, path)
        return self._instance(value, path)

    # ---- what can change

    def _module(self, module: nn.Module, path: str) -> int:
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"'{path}' is a ScriptModule, which cannot run statelessly. Use the module it was made from."
            )
        place = self._shell(module, lambda: object.__new__(kind))
        static: dict[str, Any] = {}
        moving: list[tuple[Any, int]] = []
        for key, value in vars(module).items():
            if key == "_compiled_call_impl":  # by Module.compile(); it would run the module itself, not the copy
                continue
            static[key] = None
            if key == "forward" and kind.__module__ == "torch._dynamo.eval_frame":  # of torch.compile(module)
                value = vars(module)["_modules"]["_orig_mod"].__call__
                self._alive.append(value)
            if key in EMPTY and not value:
                if not self._fill:
                    static[key] = EMPTY[key]
                    continue
                value = KIND[key]()
                self._alive.append(value)
            if key in ("_parameters", "_buffers"):
                child: int | None = self._registry(value, path)
            elif key == "_modules":
                child = self._children(value, path)
            else:
                child = self.place(value, attribute(path, key))
            if child is None:
                static[key] = value
            else:
                moving.append((key, child))
        self._fill_dict(Names(path, list(static), "attribute"), place, vars, static, moving)
        return place

    def _registry(self, tensors: dict[str, Any], path: str) -> int:
        """The places of registered tensors are no second way to them."""
        place = self._shell(tensors, dict)
        static: dict[str, Any] = {}
        moving: list[tuple[Any, int]] = []
        slots: dict[str, int] = {}
        for key, value in tensors.items():
            static[key] = None
            if value is not None:
                slots[key] = self._index[id(value)]  # type: ignore[assignment]
                moving.append((key, slots[key]))
                self.registered.append((slots[key], place, key))
        self._fill_dict(Names(path, list(static), "attribute", slots), place, _itself, static, moving)
        return place

    def _children(self, modules: dict[str, Any], path: str) -> int | None:
        known = self._index.get(id(modules))
        return self._dict(modules, path, "attribute") if known is None else known

    def _dict(self, value: dict[Any, Any], path: str, kind_of_name: str = "item") -> int:
        kind, update = type(value), OrderedDict.update if isinstance(value, OrderedDict) else dict.update
        place = self._shell(value, lambda: kind.__new__(kind))
        if isinstance(value, defaultdict):
            factory, made = value.default_factory, self.place(value.default_factory, path)

            def set_factory(objects: list[Any]) -> Held:
                objects[place].default_factory = factory if made is None else objects[made]
                return (), []

            self.fills.append((Names(path, [], "whole"), set_factory))
        if hasattr(value, "__dict__"):
            self._attributes(vars(value), place, path)
        keys = list(value)
        key_places = [self.place(key, f"{path}[a key]") for key in keys]
        names = Names(path, keys, kind_of_name)
        static, moving = self._items(value.values(), map(names.named, keys))
        keys[:] = [key if at is None else None for key, at in zip(keys, key_places, strict=True)]
        if kind is dict and not any(each is not None for each in key_places):
            pairs = [(keys[index], at) for index, at in moving]
            self._fill_dict(names, place, _itself, dict(zip(keys, static, strict=True)), pairs)
            return place

        def fill(objects: list[Any]) -> Held:
            values = filled(static, moving, objects)
            own = [key if at is None else objects[at] for key, at in zip(keys, key_places, strict=True)]
            update(objects[place], zip(own, values, strict=True))
            return objects[place].values(), values

        self.fills.append((names, fill))
        return place

    def _list(self, value: Any, path: str) -> int:
        """A list, a deque or a set, or a kind of one."""
        kind: Any = type(value)
        extend: Callable[..., None] = set.update if isinstance(value, set) else list.extend
        if isinstance(value, deque):
            longest, extend = value.maxlen, deque.extend
            place = self._shell(value, lambda: deque(maxlen=longest))
        else:
            place = self._shell(value, lambda: kind.__new__(kind))
        if hasattr(value, "__dict__"):
            self._attributes(vars(value), place, path)
        static, moving = self._items(list(value), (f"{path}[{index}]" for index in range(len(value))))

        def fill(objects: list[Any]) -> Held:
            extend(objects[place], filled(static, moving, objects))
            return objects[place], [*objects[place]]

        self.fills.append((Names(path, [], "whole"), fill))
        return place

    def _cell(self, cell: types.CellType, path: str) -> int:
        place = self._shell(cell, types.CellType)
        try:
            value = cell.cell_contents
        except ValueError:  # nothing was assigned yet
            return place
        (static,), moving = self._items([value], [path])

        def fill(objects: list[Any]) -> Held:
            objects[place].cell_contents = objects[moving[0][1]] if moving else static
            return CellContents(objects[place]), [objects[place].cell_contents]

        self.fills.append((Names(path, [], "whole"), fill))
        return place

    def _instance(self, value: Any, path: str) -> int | None:
        kind = type(value)
        if _is_tool(kind.__module__) or not (hasattr(value, "__dict__") or slots(kind)):
            self._share(value)
            return None
        usual = all(getattr(kind, each) is getattr(object, each) for each in ("__reduce_ex__", "__reduce__"))
        usual = (usual or kind is types.SimpleNamespace) and not hasattr(kind, "__del__")
        if not usual and not self._leads_back(value):
            self._share(value)
            return None
        make = types.SimpleNamespace if kind is types.SimpleNamespace else functools.partial(object.__new__, kind)
        try:
            make()
        except TypeError as error:
            if not self._leads_back(value):
                self._share(value)
                return None
            raise ArgumentError(
                f"{self._title} cannot be copied: '{path}' is of type {kind.__name__}, which refers to the module and "
                f"cannot be built again. Keep it outside of the module."
            ) from error
        place = self._shell(value, make)
        if hasattr(value, "__dict__"):
            self._attributes(vars(value), place, path)
        names = [name for name in slots(kind) if hasattr(value, name)]
        static, moving = self._items([getattr(value, name) for name in names], [attribute(path, n) for n in names])
        if names:

            def fill(objects: list[Any]) -> Held:
                for name, each in zip(names, filled(static, moving, objects), strict=True):
                    object.__setattr__(objects[place], name, each)
                view = Slots(objects[place], names)
                return view, [*view]

            self.fills.append((Names(path, [], "whole"), fill))
        return place

    def _attributes(self, attributes: dict[str, Any], place: int, path: str) -> None:
        static, moving = self._items(attributes.values(), [attribute(path, key) for key in attributes])
        keys = list(attributes)
        pairs = [(keys[index], at) for index, at in moving]
        self._fill_dict(Names(path, keys, "attribute"), place, vars, dict(zip(keys, static, strict=True)), pairs)

    # ---- what cannot change

    def _tuple(self, value: Any, path: str) -> int | None:
        kind: Any = type(value)
        named = issubclass(kind, tuple) and bool(kind.__flags__ & 1 << 9)  # made by Python, perhaps with a __new__
        static: list[Any] = []
        moving: list[tuple[int, int]] = []

        def children() -> list[int | None]:
            static[:], moving[:] = self._items(list(value), (f"{path}[{index}]" for index in range(len(value))))
            return [at for _, at in moving]

        def make(objects: list[Any]) -> Any:
            values = filled(static, moving, objects)
            return tuple.__new__(kind, values) if named else kind(values)

        return self._build(value, children, make)

    def _function(self, function: types.FunctionType, path: str) -> int | None:
        if _is_tool(str(function.__globals__.get("__name__"))):
            self._share(function)
            return None
        code, scope, name = function.__code__, function.__globals__, function.__name__
        qualified, documented = function.__qualname__, function.__doc__
        cells = list(function.__closure__ or ())
        parts: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__ or None]
        static: list[Any] = []
        moving: list[tuple[int, int]] = []

        def children() -> list[int | None]:
            paths = [attribute(path, each) for each in code.co_freevars] + [path] * 3
            static[:], moving[:] = self._items([*cells, *parts], paths)
            return [at for _, at in moving]

        def make(objects: list[Any]) -> types.FunctionType:
            *own, defaults, keywords, attributes = filled(static, moving, objects)
            made = types.FunctionType(code, scope, name, defaults, tuple(own))
            made.__kwdefaults__, made.__qualname__, made.__doc__ = keywords, qualified, documented
            if attributes is not None:
                made.__dict__ = attributes
            return made

        return self._build(function, children, make)

    def _method(self, method: Any, path: str) -> int | None:
        """A method with the object that it is bound to."""
        function = getattr(method, "__func__", None)
        name = method.__name__
        if isinstance(method.__self__, types.ModuleType | type) or method.__self__ is None:
            self._share(method)
            return None
        parts, places = (method.__self__, function), list[int | None]()
        static: list[Any] = []

        def children() -> list[int | None]:
            places[:] = [self.place(each, path) for each in parts]
            return places

        def make(objects: list[Any]) -> Any:
            owner, own = (each if at is None else objects[at] for each, at in zip(static, places, strict=True))
            return getattr(owner, name) if own is None else types.MethodType(own, owner)

        place = self._build(method, children, make)
        static = [None if at is not None else each for each, at in zip(parts, places, strict=True)]
        return place

    def _partial(self, partial: functools.partial[Any], path: str) -> int | None:
        static: list[Any] = []
        moving: list[tuple[int, int]] = []

        def children() -> list[int | None]:
            paths = [path, f"{path}.args", f"{path}.keywords"]
            static[:], moving[:] = self._items([partial.func, partial.args, partial.keywords], paths)
            return [at for _, at in moving]

        def make(objects: list[Any]) -> functools.partial[Any]:
            function, arguments, keywords = filled(static, moving, objects)
            return functools.partial(function, *arguments, **keywords)

        return self._build(partial, children, make)

    # ---- tensors, and what has a state without attributes

    def _tensor(self, tensor: Tensor, path: str) -> int | None:
        for base in self._storages.get(storage(tensor), ()) if tensor.layout is torch.strided else ():
            if not tensor.requires_grad:
                return self._view(tensor, base, path)
        if tensor.requires_grad and tensor.is_leaf:  # a guard of the unroll finds it, if it is used
            self.captured[path] = tensor
            self._share(tensor)
            return None
        if tensor.requires_grad:
            placeholder = stale(path)
            return self._shell(tensor, lambda: placeholder)
        constant = tensor.detach().clone() if self._clone else tensor
        place = self._shell(tensor, lambda: constant)
        self.kept.append((path, place, constant))
        return place

    def _view(self, view: Tensor, base: int, path: str) -> int:
        """A second tensor on the memory of a registered one."""
        name, whole = self._named[base]
        size, stride, whole_stride = view.size(), view.stride(), whole.stride()
        offset = view.storage_offset() - whole.storage_offset()
        place = self._index[id(view)] = self._reserve()

        def make(objects: list[Any]) -> Tensor:
            given = objects[base].detach()
            if given.stride() != whole_stride or offset < 0:
                raise GraphError(
                    f"'{path}' is a view of '{name}', which now lies otherwise in memory. Take the view in forward."
                )
            return given.as_strided(size, stride, given.storage_offset() + offset)  # type: ignore[no-any-return]

        self.made.append((place, make))
        self.second.setdefault(base, path)
        return place

    def _stateful(self, value: Any, path: str) -> int | None:
        """An array or a generator of random numbers."""
        copy, state = next(pair for kind, pair in COPIED.items() if isinstance(value, kind))
        if isinstance(value, np.ndarray) and value.nbytes > _ARRAY_BYTES:
            self._share(value)
            return None
        first = copy(value)
        place = self._shell(value, lambda: copy(first))
        self.copied.append((path, place, state, state(first)))
        return place

    def _generator(self, value: Any, path: str) -> None:
        """What can be advanced, but not copied."""
        reference = weakref.ref(value)

        def state() -> Any:
            own = reference()
            frame = None if own is None else own.gi_frame
            return None if frame is None else (frame.f_lasti, {key: id(each) for key, each in frame.f_locals.items()})

        self.iterators.append((path, state, state()))
        self._share(value)


def _is_tool(module: str) -> bool:
    """Whether a module of Python belongs to a package whose objects are tools."""
    return f"{module}.".startswith(tuple([f"{each}." for each in _SHARED]))


def _itself(target: Any) -> Any:
    return target


_VISITS: tuple[tuple[Any, Callable[[Walk, Any, str], int | None]], ...] = (
    (nn.Module, Walk._module),
    (Tensor, Walk._tensor),
    (dict, Walk._dict),
    ((list, deque, set), Walk._list),
    ((tuple, frozenset), Walk._tuple),
    (types.FunctionType, Walk._function),
    ((types.MethodType, types.BuiltinMethodType, types.MethodWrapperType), Walk._method),
    (functools.partial, Walk._partial),
    (types.CellType, Walk._cell),
    (types.GeneratorType, Walk._generator),
    (tuple(COPIED), Walk._stateful),
)
