"""Gradients that a step takes by itself, and by mistake as constants."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._batching import innermost_level
from funcmeta._errors import GraphError
from funcmeta._writes import WRITES, Look


class watched:
    """Whether gradients need a graph inside the block: yes (True), no matter (None), or no, whatever runs in it."""

    def __init__(self, on: bool | None) -> None:
        self._on = on

    def __enter__(self) -> None:
        """Begin, unless nothing is watched here."""
        self._token = _watching.set(False if _watching.get() is False else self._on)

    def __exit__(self, *error: object) -> None:
        """As before."""
        _watching.reset(self._token)


_watching: ContextVar[bool | None] = ContextVar("funcmeta_watching", default=None)


def _check(create_graph: bool | None) -> None:
    if _watching.get() and torch.is_grad_enabled() and not create_graph:
        raise GraphError(
            "A step took a gradient by torch.autograd.grad or backward() without create_graph=True: it would count as "
            "a constant, and the meta-gradient be of first order. Take it by funcmeta.value_and_grad, and detach what "
            "that returns if a constant is meant."
        )


def _check_tasks(name: str, tensors: Any) -> None:
    level = innermost_level()
    if level is not None and any(level.holds(each) for each in tree.tensors(tensors)):
        raise GraphError(
            f"{name} was used on a tensor of stacked tasks that run as one batch, which torch cannot do. Take the "
            f"gradient through funcmeta.value_and_grad or torch.func, or pass strategy='loop'."
        )


def _grad(*args: Any, **options: Any) -> Any:
    _check_tasks("torch.autograd.grad", args[1] if len(args) > 1 else options.get("inputs"))
    _check(options.get("create_graph"))
    return torch.autograd.grad(*args, **options)


def _backward(tensor: Tensor, *args: Any, **options: Any) -> Any:
    _check_tasks("Tensor.backward", tensor)
    _check(options.get("create_graph"))
    return tensor.backward(*args, **options)  # type: ignore[no-untyped-call]


hooks_noted: ContextVar[Any] = ContextVar("funcmeta_hooks", default=None)
"""An object to whose set ``hooks`` each hook is added that is registered on a tensor."""


def _note_hook(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    noted = hooks_noted.get()
    if noted is not None:
        hook = args[1] if len(args) > 1 else kwargs.get("hook")
        noted.hooks.add(getattr(hook, "__code__", type(hook)))


WATCHED: dict[Any, Callable[..., Any]] = {torch.autograd.grad: _grad, Tensor.backward: _backward}
"""What a mode has to call in place of torch's own functions, so that they are watched."""

LOOKS: dict[Any, Look] = {Tensor.register_hook: _note_hook, **WRITES}
"""What a mode has to do with the arguments before it calls a function of torch, or what stands in its place."""
