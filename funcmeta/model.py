"""A module as a pure function of its parameters, its buffers and its inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcmeta import rng, tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._exact_layers import exact_layers
from funcmeta._gradient import constant, steering
from funcmeta._module_copies import Copies, written
from funcmeta._typing import Buffers, Params
from funcmeta._writes import guarded, storage


class FunctionalModel:
    """A module's computation without its tensors: out, buffers' = model(params, buffers, x).

    The model holds a recipe of the module, without its tensors. Each call runs on a copy made for it alone, so it
    begins from the module as it was given, in every thread; what the module keeps (counters, caches, lists of hooks)
    ends with the call. Where that would change the result of the next call, the call raises. Lists, closures, patched
    forwards and hooks that refer to the module or its tensors refer to those of the copy.

    - A weight that the module uses under several names is one entry of ``params`` and stays one weight.
    - Buffers (BatchNorm statistics, counters) are constants: copied in and returned, never written in place.
    - Frozen parameters are constants too, shared by all calls; one that the module writes to (a momentum encoder) is
      copied in and returned like a buffer. A write to a trainable parameter raises before it is made.
    - Dropout and other draws follow ``seed``: the same seed gives the same draws, and the global generator is put back.
    - A module that runs itself again in the backward pass (``torch.utils.checkpoint``) does so on the copy of its call.
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

    Source: this library; the signature is that of ``torch.func.functional_call``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._shapes = {name: tensor.shape for name, tensor in _trainable(module).items()}
        self._frozen = {name for name, tensor in module.named_parameters() if not tensor.requires_grad}
        self._buffer_names = frozenset(_constants(module))
        self._recurrent = any(isinstance(each, nn.RNNBase) for each in module.modules())
        self._copies = Copies(module, _trainable(module), _constants(module))

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        *args: Any,
        train: bool | None = None,
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
            GraphError: the module computes a buffer in such a way that it carries a derivative, writes to a trainable
                parameter or puts another in its place, keeps something outside of its buffers that changes the next
                call, or reads a tensor computed from its parameters before.
        """
        with torch._C.DisableTorchFunction():
            self._check(params, buffers)
        plainly = _plain_recurrence() if self._recurrent else nullcontext()
        with exact_layers(), plainly, nullcontext() if seed is None else rng.forked(seed):
            return self._copies.run(params, buffers, train, args, kwargs)

    @property
    def hooked(self) -> frozenset[str]:
        """The names of the parameters that have hooks (``Tensor.register_hook``) on their gradients."""
        return self._copies.hooked

    def apply_hooks(
        self, grads: Mapping[str, Any], params: Params, buffers: Buffers, *, train: bool | None = None
    ) -> Params:
        """The gradients after the parameters' hooks, in the order of registration, as ``backward()`` applies them.

        ``inner_problem`` does this; so should a step of your own that trains a module with such hooks. A hook that
        refers to the module sees these tensors. A gradient that is None stays so.

        Args:
            grads: gradients by the names of ``params``, or of some of them.
            params: every trainable tensor.
            buffers: every buffer and frozen parameter.
            train: as in a call.

        Returns:
            The gradients; constants where the estimator takes gradients as constants.
        """
        changed = self._copies.apply_hooks(grads, params, buffers, train)
        current = steering()
        return tree.detach(changed) if current is not None and current.rule is constant else changed

    def guarding(self, params: Params) -> guarded:
        """Inside this block a write to one of the parameters raises ``GraphError`` before it is made."""
        return guarded((params, written))

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


def functionalize(module: nn.Module) -> tuple[FunctionalModel, Params, Buffers]:
    """Split a module into a pure function, its trainable tensors and the other tensors it needs.

    Args:
        module: any ``torch.nn.Module`` whose shapes are known. It is neither changed nor kept.

    Returns:
        The model, its parameters (those that require grad; a tied weight once), and its buffers, among which the
        frozen parameters are. All tensors are detached copies.

    Raises:
        ArgumentError: not a module, a lazy module that has not seen data, a scripted module, one that cannot be
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


def _trainable(module: nn.Module) -> Params:
    return {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}


def _constants(module: nn.Module) -> Buffers:
    frozen = {name: tensor for name, tensor in module.named_parameters() if not tensor.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    """Recurrent layers without cuDNN and oneDNN, which lack derivatives or take many times longer for the second."""
    onednn = torch.backends.mkldnn
    # by their context managers, as torch.backends.disable_global_flags() forbids to set a flag
    kept = {name: getattr(onednn, name) for name in ("deterministic", "allow_tf32", "fp32_precision")}
    with onednn.flags(enabled=False, **kept), torch.backends.cudnn.flags(enabled=False):
        yield


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


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"module is a {type(module).__name__}, expected a torch.nn.Module. Wrap it in one.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError("module is a ScriptModule, which cannot run statelessly. Pass the module it was made from.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ArgumentError(f"'{name}' is not initialized yet (a lazy module). Run the module once on an input.")
    _check_apart(module)
    if not _trainable(module):
        raise ArgumentError(
            f"{type(module).__name__} has no parameter that requires grad, so nothing can be trained. "
            f"Call requires_grad_() on what should be trained."
        )


def _check_apart(module: nn.Module) -> None:
    """Raise when a parameter lies in the memory of another registered tensor: copies of the two would part."""
    spans: dict[int, list[tuple[int, int, str]]] = {}
    trainable = _trainable(module)
    for name, tensor in {**trainable, **_constants(module)}.items():
        if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
            continue
        first = tensor.data_ptr()
        last = first + sum((n - 1) * abs(by) for n, by in zip(tensor.shape, tensor.stride(), strict=True)) * (
            tensor.element_size()
        )
        known = spans.setdefault(storage(tensor), [])
        other = next((each for start, end, each in known if start <= last and first <= end), None)
        if other in trainable:
            raise ArgumentError(
                f"'{name}' lies in the memory of the parameter '{other}', which it would not follow in training. "
                f"Register one tensor under both names, or compute the other in forward."
            )
        known.append((first, last, name))
