"""A module as a pure function of its parameters, its buffers and its inputs."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcmeta import rng, tree
from funcmeta._errors import ArgumentError, GraphError, StructureError
from funcmeta._exact_layers import exact_layers
from funcmeta._typing import Buffers, Params


class FunctionalModel:
    """A module's computation without its tensors: out, buffers' = model(params, buffers, x).

    The model holds a copy of the module's structure whose tensors have no storage, so neither a call nor a training
    run can write into the module it was made from. Each call goes through ``torch.func.functional_call``.

    - A weight that the module uses under several names is one entry of ``params`` and stays one weight.
    - Buffers (BatchNorm statistics, counters) are constants: copied in and returned, never written in place.
    - Dropout and other draws follow ``seed``: the same seed gives the same draws, and the global generator is put back.
    - A module whose forward names ``checkpoint`` (``torch.utils.checkpoint``) runs as a copy that keeps its tensors,
      because it is run again in the backward pass.
    - Attention runs through PyTorch's MATH backend, and recurrent layers without cuDNN and oneDNN: the other backends
      lack derivatives, or take many times longer for the second. Batch, layer, instance and weight normalization are
      computed by elementary operations, because torch's fused kernels are wrong under ``vmap`` and in third, that of
      weight normalization in second derivatives.

    Args:
        module: the module to take the structure of, as ``functionalize`` does.

    Examples:
        >>> net = torch.nn.Linear(3, 2)
        >>> model, params, buffers = functionalize(net)
        >>> out, buffers = model(params, buffers, torch.ones(4, 3))
        >>> out.shape
        torch.Size([4, 2])

    Source: ``torch.func.functional_call`` (PyTorch documentation).
    """

    def __init__(self, module: nn.Module) -> None:
        self._shapes = {name: tensor.shape for name, tensor in _trainable(module).items()}
        self._frozen = {name for name, tensor in module.named_parameters() if not tensor.requires_grad}
        self._buffer_names = _constants(module).keys()
        self._aliases = tied_names(module)
        self._skeleton = _skeleton(module)
        self._modes = [each.training for each in self._skeleton.modules()]
        self._mode: bool | None = None
        self._recomputes = any(_mentions_checkpoint(each) for each in module.modules())
        self._recurrent = any(isinstance(each, nn.RNNBase) for each in module.modules())

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        *args: Any,
        train: bool | None = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Buffers]:
        """Run the module on some tensors.

        Args:
            params: every trainable tensor, by its ``named_parameters`` name.
            buffers: every buffer and every frozen parameter, by name.
            *args: the module's inputs.
            train: train mode (True), eval mode (False), or each submodule in the mode it was in (None).
            seed: seed of the draws; None draws from torch's global generator.
            **kwargs: further inputs of the module.

        Returns:
            What the module returns, and the buffers after the call.

        Raises:
            StructureError: names or shapes differ from the module's.
            GraphError: the module computes a buffer in such a way that it carries a derivative.
        """
        self._set_mode(train)
        with torch._C.DisableTorchFunction():
            self._check(params, buffers)
            tensors = dict(params)
            for name, tensor in buffers.items():
                tensors[name] = tensor.detach() if name in self._frozen else tensor.detach().clone()
        tensors.update({alias: tensors[name] for alias, name in self._aliases.items()})
        plainly = _plain_recurrence() if self._recurrent else nullcontext()
        with exact_layers(), plainly, nullcontext() if seed is None else rng.forked(seed):
            if self._recomputes:
                module = self._filled(tensors)
                out = module(*args, **kwargs)
                tensors.update({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
            else:
                out = torch.func.functional_call(self._skeleton, tensors, args, kwargs, tie_weights=False)
        return out, {name: self._constant(name, tensors[name]) for name in buffers}

    def _filled(self, tensors: dict[str, Tensor]) -> nn.Module:
        """A copy of the structure that holds these tensors for good, as a module that is run again later needs it."""
        hollow = {**dict(self._skeleton.named_parameters()), **dict(self._skeleton.named_buffers())}
        module = copy.deepcopy(self._skeleton, {id(tensor): tensors[name] for name, tensor in hollow.items()})
        for each in module.modules():
            _with_exact_layers(each)
        return module

    def _check(self, params: Params, buffers: Buffers) -> None:
        for what, got, expected in (
            ("params", params, self._shapes.keys()),
            ("buffers", buffers, self._buffer_names),
        ):
            if not isinstance(got, Mapping | nn.ParameterDict):
                raise StructureError(
                    f"{what} is a {type(got).__name__}, expected a dict of tensors by name. Pass what "
                    f"functionalize(module) returned."
                )
            for name, tensor in got.items():
                if not isinstance(tensor, Tensor):
                    raise StructureError(f"{what}['{name}'] is {tree.describe(tensor)}, expected a tensor. Pass one.")
            if got.keys() != expected:
                raise StructureError(
                    f"{what} lacks {sorted(expected - got.keys())} and has unexpected {sorted(got.keys() - expected)}; "
                    f"expected the names that functionalize(module) returned. Pass all of them and no others."
                )
        for name, tensor in params.items():
            if tensor.shape != self._shapes[name]:
                raise StructureError(
                    f"params['{name}'] has shape {list(tensor.shape)}, expected {list(self._shapes[name])}. "
                    f"Start from init_params(module)."
                )

    def _constant(self, name: str, buffer: Tensor) -> Tensor:
        if buffer.requires_grad:
            raise GraphError(
                f"The buffer '{name}' came out of the module's forward with a derivative; buffers are constants of a "
                f"step. Update it from detached tensors, or carry it in the state of a Problem of your own."
            )
        return buffer

    def _set_mode(self, train: bool | None) -> None:
        if train is None:
            for each, mode in zip(self._skeleton.modules(), self._modes, strict=True):
                each.training = mode
        elif train is not self._mode:
            self._skeleton.train(train)
        self._mode = train


def functionalize(module: nn.Module) -> tuple[FunctionalModel, Params, Buffers]:
    """Split a module into a pure function, its trainable tensors and the other tensors it needs.

    Args:
        module: any ``torch.nn.Module`` whose shapes are known. It is neither changed nor kept.

    Returns:
        The model, its parameters (those that require grad; a tied weight once), and its buffers, among which the
        frozen parameters are. All tensors are detached copies.

    Raises:
        ArgumentError: not a module, a lazy module that has not seen data, a scripted module, one that can not be
            copied, or one without a parameter that requires grad.

    Examples:
        >>> model, params, buffers = functionalize(torch.nn.BatchNorm1d(3))
        >>> sorted(params), sorted(buffers)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])

    Source: ``torch.func.functional_call`` (PyTorch documentation).
    """
    _check_module(module)
    model = FunctionalModel(module)
    params = {name: tensor.detach().clone() for name, tensor in _trainable(module).items()}
    buffers = {name: tensor.detach().clone() for name, tensor in _constants(module).items()}
    return model, params, buffers


def init_params(module: nn.Module) -> Params:
    """Copies of a module's parameters as fresh leaves that require grad: the usual ``meta["params"]``.

    Args:
        module: any ``torch.nn.Module`` whose shapes are known. It is not changed.

    Returns:
        One leaf a trainable parameter, by its ``named_parameters`` name; a tied weight appears once. Frozen parameters
        (``requires_grad=False``) are constants of the model and not among them.

    Raises:
        ArgumentError: as ``functionalize``.

    Examples:
        >>> params = init_params(torch.nn.Linear(3, 2))
        >>> {name: leaf.is_leaf and leaf.requires_grad for name, leaf in params.items()}
        {'weight': True, 'bias': True}

    Source: this library.
    """
    _check_module(module)
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in _trainable(module).items()}


def _with_exact_layers(module: nn.Module) -> None:
    """Let a module compute with exact layers whenever it is called."""
    entered: list[exact_layers] = []

    def enter(*_: Any) -> None:
        entered.append(exact_layers())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _mentions_checkpoint(module: nn.Module) -> bool:
    """Whether a module's forward names ``checkpoint``: what runs again in a backward pass."""
    code = getattr(type(module).forward, "__code__", None)
    named = code is not None and any("checkpoint" in name for name in (*code.co_names, *code.co_freevars))
    held = [value for name, value in vars(module).items() if "checkpoint" in name]
    return named or any(value is True or callable(value) for value in held)


def _trainable(module: nn.Module) -> Params:
    return {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}


def _constants(module: nn.Module) -> Buffers:
    frozen = {name: tensor for name, tensor in module.named_parameters() if not tensor.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    """Recurrent layers without cuDNN and oneDNN, which lack derivatives or take many times longer for the second."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every further name of a tied tensor, with the name it appears under."""
    first: dict[int, str] = {}
    aliases = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            first.setdefault(id(tensor), name)
    return aliases


def _skeleton(module: nn.Module) -> nn.Module:
    """The module's structure, tied where it was tied, with tensors that have no storage."""
    named = {**_trainable(module), **_constants(module)}
    memo: dict[int, Any] = {id(tensor): _hollow(tensor) for tensor in named.values()}
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise ArgumentError(
            f"{type(module).__name__} can not be copied: {error}. Register what it computes from its parameters with "
            f"torch.nn.utils.parametrize, or compute it in forward."
        ) from error


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"module is a {type(module).__name__}, expected a torch.nn.Module. Wrap it in one.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            "module is a ScriptModule, which can not run statelessly. Pass the module it was made from."
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ArgumentError(f"'{name}' is not initialized yet (a lazy module). Run the module once on an input.")
    if not _trainable(module):
        raise ArgumentError(
            f"{type(module).__name__} has no parameter that requires grad, so nothing can be trained. "
            f"Call requires_grad_() on what shall be."
        )
