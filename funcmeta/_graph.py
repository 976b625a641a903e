"""What an autograd graph depends on: the walk behind every guard of the library."""

import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from funcmeta import tree
from funcmeta._errors import CapturedTensorError, DetachedError

OPAQUE_EDGES = "opaque_edges"
"""Attribute of a node: how many of its first edges may lead nowhere, so that a walk must not follow them."""

_INNER = "_funcmeta_inner"
_COMPILED = "CompiledFunctionBackwardBackward"


class Reached(NamedTuple):
    """The nodes on the way down from some tensors, and the leaves at the end of it."""

    nodes: set[Node]
    leaves: list[Tensor]


def alias(tensor: Tensor) -> Tensor:
    """The same tensor behind a graph node of its own, so that a derivative by it is a partial one."""
    return tensor.view_as(tensor)


def inner_leaf(tensor: Tensor) -> Tensor:
    """A fresh leaf that the library makes for itself; a walk does not take it for a captured tensor."""
    leaf = tensor.detach().requires_grad_()
    setattr(leaf, _INNER, True)
    return leaf


def walk(roots: Iterable[Tensor], stop: Iterable[Tensor] = ()) -> Reached:
    """Follow the graph down from ``roots``, not beyond the tensors in ``stop``."""
    bounds = {tensor.grad_fn for tensor in stop}
    ends = {id(tensor) for tensor in stop}
    seen: set[Node] = set()
    leaves = []
    todo = [root.grad_fn for root in roots if root.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in bounds:
            continue
        edges = node.next_functions[getattr(node, OPAQUE_EDGES, 0) :]
        below = [each for each, _ in edges if each is not None]
        todo.extend(below)
        if not below:
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in ends and not hasattr(leaf, _INNER):
                leaves.append(leaf)
    return Reached(seen, leaves)


def check_declared(roots: Iterable[Tensor], declared: Iterable[Tensor], where: Any) -> Reached:
    """Walk down from ``roots`` and raise when the way does not end at ``declared``.

    Args:
        roots: results that carry a graph.
        declared: tensors that the results may depend on.
        where: the function that made the results; its closures are searched for the name of a captured tensor.

    Raises:
        CapturedTensorError: a tensor that requires grad was used without being declared.
        DetachedError: the graph passes through the derivative of a compiled function, which torch does not
            differentiate again.
    """
    reached = walk(roots, declared)
    if any(type(node).__name__ == _COMPILED for node in reached.nodes):
        raise DetachedError(
            "The inner loss is a function compiled by torch.compile; torch does not differentiate its gradient again, "
            "so the meta-gradient would be of first order. Compile nothing inside the loss, or use FirstOrder()."
        )
    for leaf in reached.leaves:
        name = _captured_name(where, leaf, reached.nodes) or "A tensor whose name could not be found"
        raise CapturedTensorError(
            f"{name} ({tree.describe(leaf)}) requires grad and is used by the inner training without coming through "
            f"the argument `meta`. To learn it, put it into `meta` and read it from the argument; to keep it constant, "
            f"pass .detach() of it."
        )
    return reached


def _captured_name(function: Any, leaf: Tensor, nodes: set[Node]) -> str | None:
    """The variable, seen from ``function`` or what it calls, that holds ``leaf`` or something computed from it."""
    for name, value in _variables(function, set()):
        tensors: dict[str, Any] = {"": value}
        if isinstance(value, nn.Module):
            tensors = {f".{key}": tensor for key, tensor in value.named_parameters()}
        elif isinstance(value, dict):
            tensors = {f"[{key!r}]": tensor for key, tensor in value.items()}
        elif isinstance(value, list | tuple):
            tensors = {f"[{index}]": tensor for index, tensor in enumerate(value)}
        for suffix, tensor in tensors.items():
            if isinstance(tensor, Tensor) and (tensor is leaf or tensor.grad_fn in nodes):
                return f"`{name}{suffix}`"
    return None


def _variables(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Closure variables, used globals, defaults and bound objects of a function, and of the functions among them."""
    if id(function) in seen:
        return
    seen.add(id(function))
    found: dict[str, Any] = {}
    if isinstance(function, types.MethodType):
        yield from _variables(function.__func__, seen)
        function = function.__self__
    if isinstance(function, types.FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            found[name] = cell.cell_contents
        names = function.__code__.co_names
        found.update({name: function.__globals__[name] for name in names if name in function.__globals__})
        found.update({f"default {index}": value for index, value in enumerate(function.__defaults__ or ())})
    elif isinstance(function, tuple) and hasattr(function, "_fields"):
        found = dict(zip(function._fields, function, strict=True))
    elif not isinstance(function, Tensor | nn.Module | type | types.ModuleType):
        found = dict(getattr(function, "__dict__", {}))
    yield from found.items()
    for value in found.values():
        if callable(value) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            yield from _variables(value, seen)


def inside_functorch() -> bool:
    """Whether this code runs inside ``torch.func`` (grad, vjp, jvp, vmap, ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None
