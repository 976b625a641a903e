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

_RETIRED = "_funcmeta_retired"
_COMPILED = "CompiledFunctionBackward"
_FROM_CPP = "CppFunction"
_MADE_BY_FUNCTORCH = "torch._functorch.autograd_function"
_ONCE = "once_differentiable.<locals>.wrapper"


class Reached(NamedTuple):
    """The nodes on the way down from some tensors, and the leaves at the end of it."""

    nodes: set[Node]
    leaves: list[Tensor]


def alias(tensor: Tensor) -> Tensor:
    """The same tensor behind a graph node of its own, so that a derivative by it is a partial one."""
    return tensor.view_as(tensor)


def inner_leaf(tensor: Tensor) -> Tensor:
    """A fresh leaf that the library makes for itself, to take one gradient by it."""
    return tensor.detach().requires_grad_()


def retire(leaves: Iterable[Tensor]) -> None:
    """From now on a walk does not end at these leaves: their gradient was taken, no other will be asked for."""
    for leaf in leaves:
        setattr(leaf, _RETIRED, True)


def walk(roots: Iterable[Tensor], stop: Iterable[Tensor] = (), *, everywhere: bool = False) -> Reached:
    """Follow the graph down from ``roots``, not beyond ``stop``; with ``everywhere`` along opaque edges too."""
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
        edges = node.next_functions[0 if everywhere else getattr(node, OPAQUE_EDGES, 0) :]
        below = [each for each, _ in edges if each is not None]
        todo.extend(below)
        if not below:
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in ends and not hasattr(leaf, _RETIRED):
                leaves.append(leaf)
    return Reached(seen, leaves)


def coarsest(roots: Iterable[Tensor]) -> float:
    """The largest eps of the dtypes in which some tensors were computed, whatever theirs is: a cast hides it."""
    nodes = walk(roots, everywhere=True).nodes
    dtypes = {each.dtype for node in nodes for each in getattr(node, "_input_metadata", ())}
    return max([torch.finfo(each).eps for each in dtypes if each.is_floating_point], default=0.0)


def check_differentiable_again(loss: Tensor, inputs: Iterable[Tensor]) -> list[Node]:
    """Raise ``DetachedError`` when torch would drop the derivative of the gradient of ``loss`` without an error.

    Returns:
        The nodes whose backward pass is not torch's own, and not the library's: they may drop some of it as well.
    """
    foreign = []
    for node in walk([loss], inputs).nodes:
        kind = type(node).__name__
        if kind == _COMPILED:
            raise DetachedError(
                "The inner loss runs a function compiled by torch.compile, whose gradient torch does not differentiate "
                "again: the meta-gradient would be of first order. Compile nothing in the loss, or use FirstOrder()."
            )
        made_by = getattr(node, "_forward_cls", None)
        if kind == _FROM_CPP or (made_by is not None and not made_by.__module__.startswith("funcmeta.")):
            foreign.append(node)
        function = _differentiable_once(made_by)
        if function is not None:
            raise DetachedError(
                f"The inner loss runs {function.__name__}, an autograd.Function whose backward is marked "
                f"once_differentiable: the meta-gradient would be of first order. Give it a differentiable backward, "
                f"or use FirstOrder()."
            )
    return foreign


def reaches(node: Node, inputs: Iterable[Tensor]) -> bool:
    """Whether a way leads down from a node to one of these leaves or results of ``alias``."""
    ends = {torch.autograd.graph.get_gradient_edge(each).node for each in inputs}
    seen, todo = {node}, [node]
    while todo:
        below = {each for each, _ in todo.pop().next_functions if each is not None} - seen
        if below & ends:
            return True
        seen |= below
        todo.extend(below)
    return False


def original_function(function: Any) -> Any:
    """The autograd.Function that its author wrote; under ``torch.func`` torch makes another of it at each call."""
    if function.__module__ != _MADE_BY_FUNCTORCH:
        return function
    cells = [cell.cell_contents for cell in function.backward.__closure__ or ()]
    behind = [each for each in cells if isinstance(each, type) and issubclass(each, torch.autograd.Function)]
    return next((each for each in behind if each is not function), function)


def _differentiable_once(function: Any) -> Any:
    """The autograd.Function whose backward is marked so."""
    if function is None:
        return None
    function = original_function(function)
    code = getattr(function.backward, "__code__", None)
    return function if code is not None and code.co_qualname == _ONCE else None


def check_declared(roots: Iterable[Tensor], declared: Iterable[Tensor], where: Any) -> Reached:
    """Walk down from ``roots`` and raise when the way does not end at ``declared``.

    Args:
        roots: results that carry a graph.
        declared: tensors that the results may depend on.
        where: the function that made the results; its closures are searched for the name of a captured tensor.

    Raises:
        CapturedTensorError: a tensor that requires grad was used without being declared.
    """
    reached = walk(roots, declared)
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
            tensors = {
                f".{path}.{key}".replace("..", "."): tensor
                for path, module in value.named_modules()
                for key, tensor in {**module._parameters, **vars(module)}.items()
            }
        elif isinstance(value, dict):
            tensors = {f"[{key!r}]": tensor for key, tensor in value.items()}
        elif isinstance(value, list | tuple):
            tensors = {f"[{index}]": tensor for index, tensor in enumerate(value)}
        for suffix, tensor in tensors.items():
            if isinstance(tensor, Tensor) and (tensor is leaf or tensor.grad_fn in nodes):
                return f"`{name}{suffix}`"
    return None


def _variables(value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Closure variables, used globals, defaults and attributes of a function or object, and of those among them."""
    if id(value) in seen or isinstance(value, Tensor | nn.Module | type | types.ModuleType | types.BuiltinFunctionType):
        return
    seen.add(id(value))
    found: dict[str, Any] = {}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        found = {name: cell.cell_contents for name, cell in cells}
        names = _global_names(value.__code__)
        found.update({name: value.__globals__[name] for name in names if name in value.__globals__})
        found.update({f"default {index}": default for index, default in enumerate(value.__defaults__ or ())})
    elif isinstance(value, types.MethodType):
        found = {"method": value.__func__, "self": value.__self__}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        found = dict(zip(value._fields, value, strict=True))
    else:
        found = dict(getattr(value, "__dict__", {}))
    yield from found.items()
    for each in found.values():
        yield from _variables(each, seen)


def _global_names(code: types.CodeType) -> set[str]:
    """The global names that a function and the functions defined inside it may read."""
    nested = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*[_global_names(each) for each in nested])


def inside_functorch() -> bool:
    """Whether this code runs inside ``torch.func`` (grad, vjp, jvp, vmap, ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None
