"""What was found out about a problem, for as long as its functions live."""

from collections.abc import MutableMapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from funcmeta.problem import Problem

LATEST = 8
"""How many problems are remembered whose functions take no weak reference."""

_held: list[tuple[Problem, dict[Any, Any]]] = []


def remembered(known: MutableMapping[Any, Any], problem: Problem) -> dict[Any, Any]:
    """What is known of a problem's three functions together, to be added to; it goes when one of them does."""
    methods = []
    here: Any = known
    functions: list[Any] = [problem.step, problem.init, problem.meta_loss]
    for fn in functions:
        if isinstance(fn, MethodType):  # made anew whenever it is looked up, unlike its object
            methods.append(fn.__func__)
        owner = fn.__self__ if isinstance(fn, MethodType) else _absent if fn is None else fn
        try:
            here = here.setdefault(owner, WeakKeyDictionary())
        except TypeError:  # no weak reference to it, or no hash
            return _of_the_latest(problem)
    return here.setdefault(_absent, {}).setdefault(tuple(methods), {})  # type: ignore[no-any-return]


def _of_the_latest(problem: Problem) -> dict[Any, Any]:
    for other, found in _held:
        if all(_same(*pair) for pair in zip(problem, other, strict=True)):
            return found
    _held.append((problem, {}))
    del _held[:-LATEST]
    return _held[-1][1]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


def _absent() -> None:
    """Stands for a function that is None."""
