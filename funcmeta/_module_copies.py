"""Calls of a module, each on a copy made for it alone, and what a call may leave behind."""

import operator
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from funcmeta import rng
from funcmeta._errors import ArgumentError, GraphError
from funcmeta._exact_layers import exact_layers
from funcmeta._structure import Copy, Structure, distance, tensors_in
from funcmeta._structure_parts import EMPTY, KIND, Filled
from funcmeta._typing import Buffers, Params
from funcmeta._writes import guarded, unwrapped

_TRIES = 3
"""How often a module is run again from what it kept, to see whether that matters."""

_NOISE = 10.0
"""Two runs from the same beginning may differ (sums in another order); more than that comes from what was kept."""


class _Written(BaseException):
    """A call writes to a shared tensor; not an Exception, which a forward pass may catch."""


class Copies:
    """A module without its tensors, of which every call gets a copy.

    Args:
        module: the module; neither changed nor kept.
        trainable: its trainable tensors, by name.
        constants: its buffers and frozen parameters, by name.

    Raises:
        ArgumentError: it cannot be copied, or a parameter has a hook that belongs to ``backward()`` alone.
    """

    def __init__(self, module: nn.Module, trainable: Params, constants: Buffers) -> None:
        self._names, self._trained = [*trainable, *constants], len(trainable)
        self._frozen = {name for name, tensor in constants.items() if isinstance(tensor, nn.Parameter)}
        self._title = type(module).__name__
        for name, tensor in trainable.items():
            if tensor._post_accumulate_grad_hooks:
                raise ArgumentError(
                    f"The parameter '{name}' has a hook by register_post_accumulate_grad_hook, which runs where "
                    f"backward() fills .grad; inner gradients are returned instead. Use register_hook."
                )
        hooks = {name: list((tensor._backward_hooks or {}).values()) for name, tensor in trainable.items()}
        hooks = {name: each for name, each in hooks.items() if each}
        self.hooked = frozenset(hooks)
        """The parameters with hooks."""
        self._modes: dict[bool | None, _Mode] = {
            None: _Mode(module, hooks or None, {**trainable, **constants}, self._title)
        }
        self.module = self._modes[None].structure.captured  # by which the error for a captured tensor names it
        self._own: frozenset[str] = frozenset()  # shared tensors that calls write to, so that they get copies
        self._harmless: set[frozenset[str]] = set()  # attributes that change without an effect on the next call

    def run(self, params: Params, buffers: Buffers, train: bool | None, args: Any, kwargs: Any) -> tuple[Any, Buffers]:
        """The module's output, and its constants after the call."""
        mode = self._mode(train)
        copy, out = self._call(mode, params, buffers, args, kwargs)
        after, left = self._after(mode, copy, buffers)
        if left and left not in self._harmless and not _recorded(params):
            self._check_harmless(mode, left, params, buffers, args, kwargs)
        mode.let_go(copy)
        return out, after

    def apply_hooks(self, grads: Mapping[str, Any], params: Params, buffers: Buffers, train: bool | None) -> Params:
        """The gradients after the hooks on their parameters, in the order of registration."""
        mode = self._mode(train)
        copy = self._build(mode, params, buffers)
        changed = dict(grads)
        for name, hooks in mode.structure.extra(copy).items():
            grad = changed.get(name)
            if grad is None:  # torch runs no hook on a parameter that has no part in the loss
                continue
            for hook in hooks:
                result = hook(grad.clone())  # which it may write to, while another parameter's may be the same tensor
                grad = grad if result is None else result
            changed[name] = grad
        mode.let_go(copy)
        return changed

    def _mode(self, train: bool | None) -> "_Mode":
        mode = self._modes.get(train)
        if mode is None:
            assert train is not None
            mode = self._modes[train] = self._modes[None].other(train)
        return mode

    def _tensors(self, params: Params, buffers: Buffers) -> list[Tensor]:
        """What a copy gets: parameters, copies of buffers, frozen parameters as they are."""
        tensors = [params[name] for name in self._names[: self._trained]]
        for name in self._names[self._trained :]:
            own = name not in self._frozen or name in self._own
            tensors.append(buffers[name].detach().clone() if own else buffers[name].detach())
        return tensors

    def _build(self, mode: "_Mode", params: Params, buffers: Buffers) -> Copy:
        with torch._C.DisableTorchFunction():
            return mode.structure.build(self._tensors(params, buffers), self._own)

    def _call(self, mode: "_Mode", params: Params, buffers: Buffers, args: Any, kwargs: Any) -> tuple[Copy, Any]:
        """A copy that was run; from the beginning once more when it turns out to write to a shared tensor."""
        while True:
            shared = {name: buffers[name] for name in self._frozen if name not in self._own}
            shared.update((path, each) for path, each in mode.structure.kept.items() if path not in self._own)
            states = rng.states()
            copy = self._build(mode, params, buffers)
            try:
                with guarded((params, written), (shared, lambda name, _: _Written(name))):
                    return copy, mode.structure.root(copy)(*args, **kwargs)
            except _Written as error:
                self._own |= {str(error)}
            except Filled:
                mode.fill_containers()
            rng.restore(states)

    def _after(self, mode: "_Mode", copy: Copy, buffers: Buffers) -> tuple[Buffers, frozenset[str]]:
        """The constants after a call, and what else it left different."""
        after = dict(zip(self._names, copy.objects, strict=False))
        left = set()
        for change in mode.structure.changes(copy):
            if change.final:
                raise GraphError(
                    f"The module's forward advances '{change.path}', which cannot be put back for the next call. "
                    f"{_ADVICE}"
                )
            if change.place is None:
                left.add(change.path)
                continue
            name = self._names[change.place]
            if change.place < self._trained or not isinstance(change.value, Tensor):
                raise GraphError(
                    f"The module's forward puts another object in the place of the tensor '{name}', which the next "
                    f"step would not see. Let the inner optimizer make the change, or compute a new value in forward."
                )
            if change.place in mode.structure.second:
                raise GraphError(
                    f"The module's forward puts another tensor in the place of '{name}', which the module also holds "
                    f"as '{mode.structure.second[change.place]}'. Update it in place, or hold it once."
                )
            after[name] = change.value
        return {name: self._constant(name, after[name]) for name in buffers}, frozenset(left)

    def _check_harmless(
        self, mode: "_Mode", left: frozenset[str], params: Params, buffers: Buffers, args: Any, kwargs: Any
    ) -> None:
        """Raise unless a call that begins with what another left gives what that other gave."""
        states = rng.states()

        def again(copy: Copy | None) -> tuple[Copy, list[Tensor]]:
            rng.restore(states)
            if copy is None:
                copy, out = self._call(mode, params, buffers, args, kwargs)
            else:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    mode.structure.put_back(copy, self._tensors(params, buffers))
                with guarded((params, written)):
                    out = mode.structure.root(copy)(*args, **kwargs)
            constants, _ = self._after(mode, copy, buffers)
            return copy, tensors_in((out, constants))

        _, first = again(None)
        copy, second = again(None)
        noise = distance(first, second)
        for _ in range(_TRIES):
            copy, later = again(copy)
            if distance(second, later) > _NOISE * noise:
                raise GraphError(
                    f"The module keeps {', '.join(map(repr, sorted(left)[:5]))} from one call to the next, and gives "
                    f"another result then; each call begins from the module as it was given. {_ADVICE}"
                )
        rng.restore(states)
        self._harmless.add(left)

    def _constant(self, name: str, buffer: Tensor) -> Tensor:
        if buffer.requires_grad:
            raise GraphError(
                f"The buffer '{name}' came out of the module's forward with a derivative; buffers are constants of a "
                f"step. Update it from detached tensors, or carry it in the state of a Problem of your own."
            )
        return buffer


_ADVICE = (
    "Make it a buffer, which is handed from step to step (self.register_buffer(name, tensor) in __init__; a number as "
    "a 0-d tensor), or pass it with the batch."
)


def written(name: str, function: str) -> GraphError:
    """The error for a write to a trainable parameter."""
    return GraphError(
        f"The parameter '{name}' would be written in place (by {function}), and with it the tensor in meta or in the "
        f"state of an earlier step. Compute the other value as a new tensor (torch.nn.utils.parametrize does so for a "
        f"module's weight), or let the inner optimizer make the change."
    )


def switched(name: str, function: str) -> ArgumentError:
    """The error for a change of mode that computes."""
    return ArgumentError(
        f"The module's train() or eval() writes to '{name}' (by {function}), as layers do that merge weights. Put the "
        f"module into the mode yourself and leave train and query_train at None."
    )


class _Mode:
    """The recipe for one mode, and how a copy of it goes away."""

    def __init__(
        self, module: nn.Module, hooks: Any, tensors: Mapping[str, Tensor], title: str, **options: bool
    ) -> None:
        hollow = options.get("again", False)
        self._hollow = {name: tensor if hollow else _hollow(tensor) for name, tensor in tensors.items()}
        self._title = title
        self._set(Structure(module, hooks, tensors, title, **options))

    def _set(self, structure: Structure) -> None:
        self.structure = structure
        copy, self._first = structure.build([*self._hollow.values()]), len(self._hollow)
        self._held = [sys.getrefcount(each) for each in copy.objects[self._first :]]
        modules = [weakref.ref(each) for each in structure.modules(copy)]
        del copy
        self._circular = any(each() is not None for each in modules)

    def other(self, train: bool) -> "_Mode":
        """The recipe after ``.train(train)``, which may do more than to set flags."""
        copy = self.structure.build([*self._hollow.values()])
        with exact_layers(), guarded((self._hollow, switched)):
            module = self.structure.root(copy).train(train)
        return _Mode(module, self.structure.extra(copy), self._hollow, self._title, again=True)

    def fill_containers(self) -> None:
        """From now on give every module containers of its own, where it had none in common with the others."""
        copy = self.structure.build([*self._hollow.values()])
        module, hooks = self.structure.root(copy), self.structure.extra(copy)
        self._set(Structure(module, hooks, self._hollow, self._title, again=True, fill=True))

    def let_go(self, copy: Copy) -> None:
        """Free the copy, unless something else holds a part of it: a function that is to run again in backward."""
        if self._circular:
            held = [sys.getrefcount(each) for each in copy.objects[self._first :]]
            if not any(map(operator.gt, held, self._held)):
                self.structure.clear(copy)  # what refers to itself would stay until Python looks for circles
                return
        modules = [weakref.ref(each) for each in self.structure.modules(copy)]
        copy.objects.clear()
        copy.held.clear()
        if torch.is_grad_enabled():
            for each in modules:
                module = each()
                if module is not None:
                    _with_exact_layers(module)


def _with_exact_layers(module: nn.Module) -> None:
    """Let a module compute with exact layers whenever it is called."""
    own = vars(module)
    own.update((name, KIND[name]()) for name, shared in EMPTY.items() if own.get(name) is shared)
    entered: list[exact_layers] = []

    def enter(*_: Any) -> None:
        entered.append(exact_layers())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(leave, always_call=True)


def _recorded(params: Params) -> bool:
    """Whether a compiler listens, so that there are no numbers to compare; it runs the plain function too."""
    return get_proxy_mode() is not None or any(isinstance(unwrapped(each), FakeTensor) for each in params.values())


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
