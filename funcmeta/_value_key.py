"""A key for a Python value that tells apart whatever a function could tell apart."""

import struct
import types
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcmeta.tree import Hole

_PLAIN = frozenset({int, bool, str, bytes, type(None), Hole, torch.dtype, torch.device, torch.layout})
"""Types whose values differ where ``==`` or the type says so."""

_NAMED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
"""What is told apart by which one it is, whatever it holds."""


def value_key(value: Any, *, own: bool = True) -> Hashable:
    """Equal for values that no function can tell apart: ``==`` alone merges 1, True and 1.0, and 0.0 and -0.0.

    Numbers count to the bit, so that NaN equals itself. An object counts with its attributes, as they are now.

    Args:
        value: anything.
        own: whether two objects of which the class defines no ``==`` differ even if their attributes do not.

    Returns:
        Something hashable.
    """
    return _key(value, own, ())


def _key(value: Any, own: bool, above: tuple[int, ...]) -> Hashable:
    kind: Any = type(value)
    if kind in _PLAIN:
        return kind, value
    if id(value) in above:
        return "above", above.index(id(value))
    above = *above, id(value)

    def keys(values: Iterable[Any]) -> Iterator[Hashable]:
        return (_key(each, own, above) for each in values)

    if isinstance(value, Tensor):  # inside something that torch does not open
        return kind, _Same(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray | np.generic):
        content = value.tobytes() if value.dtype.kind != "O" else tuple(keys(value.reshape(-1).tolist()))
        return kind, str(value.dtype), value.shape, content
    if isinstance(value, _NAMED):
        return kind, _Same(value)
    parts: list[Hashable] = [kind]
    attributes = _attributes(value)
    if isinstance(value, float | complex):
        parts.append(struct.pack("dd", complex(value).real, complex(value).imag))
    elif isinstance(value, list | tuple):
        parts.extend(keys(value))
    elif isinstance(value, dict):
        parts.extend(keys(each for pair in value.items() for each in pair))
    elif isinstance(value, set | frozenset):
        parts.append(frozenset(keys(value)))
    elif kind.__eq__ is object.__eq__ or not _is_hashable(value):
        parts.append(_Same(value) if own or not attributes else None)
    elif not is_dataclass(value):
        text = None if kind.__repr__ is object.__repr__ else repr(value)
        parts += [value, text]  # Decimal("1.0") equals Decimal("1.00"), but does not look like it
    return (*parts, *keys(each for pair in attributes.items() for each in pair))


class _Same:
    """Equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds by name, whether in a dict or in slots."""
    listed = [each.__dict__.get("__slots__", ()) for each in type(value).__mro__]
    names = [name for each in listed for name in ((each,) if isinstance(each, str) else each)]
    slots = {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def shared(tensors: Sequence[Tensor]) -> Sequence[int]:
    """The first place of each tensor, where two places have one: a function may ask whether arguments are the same."""
    first: dict[int, int] = {}
    places = [first.setdefault(id(each), place) for place, each in enumerate(tensors)]
    return places if len(first) < len(places) else ()
