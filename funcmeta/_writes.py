"""Writes to tensors that do not belong to the writer, seen before they happen.

The mode of ``_exact_layers`` sees every function of torch that a model or a loss calls. Those that write in place are
in ``WRITES``; they compare the memory that they are about to write with that of the tensors guarded right now.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

Refuse = Callable[[str, str], BaseException]
"""(name of the tensor, what writes) -> what to raise."""


class guarded:
    """Inside the block, what would write to one of some tensors raises instead.

    Args:
        *guards: tensors by name, with the error for a write to them; the first that holds a tensor's memory counts.
    """

    def __init__(self, *guards: tuple[Mapping[str, Tensor], Refuse]) -> None:
        self._guards = guards
        self._refused: BaseException | None = None
        self._memory: dict[int, tuple[str, Refuse]] | None = None

    def __enter__(self) -> None:
        """Begin; blocks inside of others replace them."""
        self._token = _guarded.set(self)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """As before; what was raised for a write comes out of the block even where something caught it."""
        _guarded.reset(self._token)
        if self._refused is not None and error is not self._refused:
            raise self._refused from error  # load_state_dict makes a RuntimeError of every Exception

    def check(self, target: Tensor, function: str) -> None:
        """Raise when the memory of a tensor is guarded."""
        if self._memory is None:  # most calls write to nothing, so that it is not asked for before
            self._memory = {}
            for tensors, refuse in self._guards:
                for name, tensor in tensors.items():
                    self._memory.setdefault(storage(tensor), (name, refuse))
        found = self._memory.get(storage(target))
        if found is not None:
            name, refuse = found
            self._refused = refuse(name, function)
            raise self._refused


_guarded: ContextVar[guarded | None] = ContextVar("funcmeta_guarded", default=None)


def storage(tensor: Tensor) -> int:
    """The memory that a tensor lies in, as a number that is the same for all its views and aliases."""
    tensor = unwrapped(tensor)
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor as it is without the transforms of ``torch.func`` around it."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def check_write(target: Any, function: str) -> None:
    """Raise when one of these tensors lies in guarded memory."""
    guard = _guarded.get()
    if guard is None:
        return
    with torch._C.DisableTorchFunction():
        for each in target if isinstance(target, list | tuple) else [target]:
            if isinstance(each, Tensor):
                guard.check(each, function)


Look = Callable[[Sequence[Any], Mapping[str, Any]], None]
"""What is done with the arguments of a function before it is called."""


def check_operator(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise when an operator of ``torch.ops`` would write to guarded memory, as its schema says."""
    overloads = (
        [operator] if isinstance(operator, torch._ops.OpOverload) else map(operator.__getattr__, operator.overloads())
    )
    for overload in overloads:
        for place, each in enumerate(overload._schema.arguments):
            if each.alias_info is not None and each.alias_info.is_write:
                check_write(args[place] if place < len(args) else kwargs.get(each.name), str(operator))


def _writing(name: str) -> Look:
    """The look at a function that writes to its first argument."""

    def look(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        check_write(args[0] if args else next(iter(kwargs.values()), None), name)

    return look


def _writing_when(function: Callable[..., Any], option: str, target: int = 0) -> Look:
    """The look at a function that writes to an argument when an option is given."""
    names = list(inspect.signature(function).parameters)
    place, keyword = names.index(option), names[target]

    def look(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = args[place] if len(args) > place else kwargs.get(option)
        if given is not None and given is not False:
            written = args[target] if len(args) > target else kwargs.get(keyword)
            check_write(written, f"{function.__name__} with {option}")

    return look


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_HARMLESS = ("requires_grad_", "rename_", "share_memory_")


def _found() -> Iterator[tuple[Any, Look]]:
    for space in (Tensor, torch, F, torch.nn.init):
        for name in dir(space):
            if name.endswith("_") and not name.endswith("__") and name not in _HARMLESS:
                function = getattr(space, name)
                if callable(function) and not isinstance(function, type):
                    yield function, _writing(name)
    for name in (*[f"__i{each}__" for each in _OPERATORS], "__setitem__"):
        yield getattr(Tensor, name), _writing(name)
    yield Tensor.data.__set__, _writing(".data =")  # type: ignore[attr-defined]
    for name in dir(F):
        function = getattr(F, name)
        if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters:
            yield function, _writing_when(function, "inplace")
    for function in (F.embedding, F.embedding_bag):
        yield function, _writing_when(function, "max_norm", target=1)


WRITES: dict[Any, Look] = dict(_found())
"""Functions of torch that write to an argument, each with what looks first."""
