"""Any tree that a run is made of, as named tensors and JSON, and back, without executing anything."""

import inspect
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmeta._errors import ArgumentError, DataError

Tensors = dict[str, Tensor]

_MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda x: Counter(dict(x)),
}
_KINDS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}


def encode(value: Any, name: str = "") -> tuple[Any, Tensors]:
    """JSON with the structure and all numbers, and the tensors by the path that leads to each.

    Raises:
        ArgumentError: something in the tree cannot be written; the message has its path.
    """
    tensors: Tensors = {}
    return _encode(value, name, tensors), tensors


def decode(skeleton: Any, tensors: Tensors) -> Any:
    """The tree again. A NamedTuple is looked up among the modules that are already imported.

    Raises:
        DataError: the skeleton is not one, lacks a tensor, or names a class that is not there.
    """
    if skeleton is None or isinstance(skeleton, bool | int | float | str):
        return skeleton
    match skeleton:
        case {"tensor": str(name), "learned": bool(learned)} if name in tensors:
            return tensors[name].requires_grad_(learned)
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"list": list(entries)}:
            return [decode(each, tensors) for each in entries]
        case {"tuple": list(entries)}:
            return tuple([decode(each, tensors) for each in entries])
        case {"named": str(name), "values": list(entries)}:
            return _named_tuple(name, [decode(each, tensors) for each in entries])
        case {"mapping": "dict" | "ordered" | "counter" as kind, "pairs": list(pairs)}:
            return _MAPPINGS[kind]([(key, decode(each, tensors)) for key, each in pairs])
    raise DataError(f"{str(skeleton)[:200]} describes nothing that a run is made of. The file is damaged.")


def _encode(value: Any, path: str, tensors: Tensors) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ArgumentError(f"{path} is on the device 'meta', which has no data. Keep it on 'cpu' or 'cuda'.")
        if value.layout is not torch.strided:
            raise ArgumentError(
                f"{path} is {value.layout}, and only dense tensors are written. Pass {path}.to_dense()."
            )
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name, "learned": value.requires_grad}
    if kind in (list, tuple):
        entries = [_encode(each, _join(path, index), tensors) for index, each in enumerate(value)]
        return {kind.__name__: entries}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        name = f"{kind.__module__}:{kind.__qualname__}"
        if _found(name) is not kind:
            raise ArgumentError(
                f"{path} is a {kind.__qualname__}, which cannot be found by its name, so that it could not be read "
                f"again. Define the NamedTuple at the top of a module."
            )
        fields = zip(value._fields, value, strict=True)
        return {"named": name, "values": [_encode(each, _join(path, field), tensors) for field, each in fields]}
    if kind in _KINDS and all(type(key) in (str, int) for key in value):
        pairs = [[key, _encode(each, _join(path, key), tensors)] for key, each in value.items()]
        return {"mapping": _KINDS[kind], "pairs": pairs}
    raise ArgumentError(
        f"{path} is a {kind.__name__}, which cannot be written to a file. Keep tensors, numbers, strings, and dicts, "
        f"lists, tuples and NamedTuples of them."
    )


def _join(path: str, part: str | int) -> str:
    return f"{path}/{part}" if path else str(part)


def _named_tuple(name: str, values: list[Any]) -> Any:
    kind = _found(name)
    if kind is None or len(kind._fields) != len(values):
        raise DataError(
            f"The file needs the NamedTuple {name} with {len(values)} fields, and there is none among the imported "
            f"modules. Import the code that wrote it first, in the version that wrote it."
        )
    return kind(*values)


def _found(name: str) -> Any:
    """The NamedTuple of this name; None when no imported module has it."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)  # a module's own __getattr__ would be code that runs
    return found if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields") else None
