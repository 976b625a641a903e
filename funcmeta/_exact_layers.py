"""Layers whose fused kernels torch differentiates wrongly, or cannot batch, in elementary operations.

On torch 2.13 these give wrong numbers without an error, in cases that meta-learning meets:

- batch, layer and instance normalization in the third derivative (pytorch issues 186256 and 175754), which a
  meta-gradient that is differentiated again contains; and in the second derivative under ``vmap`` when weight and bias
  are batched, as they are after one inner step of several tasks;
- weight normalization (``torch.nn.utils.parametrizations.weight_norm``) in the second derivative on a CPU.

Recurrent layers have no batching rule, but ``torch.func.vjp`` takes them apart into operations that have one. Group and
RMS normalization are right as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from funcmeta._draws import KNOWN, apart
from funcmeta._duals import Watch
from funcmeta._graph import inside_functorch
from funcmeta._task_reads import READS
from funcmeta._watch import LOOKS, WATCHED
from funcmeta._writes import Look, check_operator, check_write


class exact_layers:
    """Inside this block torch computes those layers by elementary operations, wherever the block is entered.

    It may be entered where modes are off: in a backward pass that began in a function which a mode handles, or in the
    library's own work.
    """

    def __enter__(self) -> None:
        """Begin, unless the block lies in another one and that one is in force."""
        self._modes = ExitStack()
        if torch._C._is_torch_function_all_disabled():
            self._modes.enter_context(torch._C._EnableTorchFunction())
        if not any(type(mode) is ExactLayers for mode in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            self._modes.enter_context(ExactLayers())

    def __exit__(self, *error: Any) -> None:
        """End what was begun."""
        self._modes.__exit__(*error)


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class ExactLayers(TorchFunctionMode):
    """The mode behind ``exact_layers``; one of them is enough. It is also the eye of ``_watch``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run: Callable[..., Any] = _EXACT.get(func, func)
        if kwargs and "out" in kwargs:
            check_write(kwargs["out"], f"{func.__name__} with out")
        if isinstance(func, _OPERATORS):
            check_operator(func, args, kwargs or {})
        return run(*args, **(kwargs or {}))


class DualLayers(TorchFunctionMode):
    """Inside this mode layers without a second derivative in forward mode are computed by elementary operations.

    ``trouble`` says why tangents do not give the derivative of a gradient there, if something was called that is known
    to change gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trouble, self._watch = "", Watch()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.trouble = self.trouble or self._watch.trouble(func)
        run: Callable[..., Any] = _DUAL.get(func, func)
        if torch.is_grad_enabled():
            return run(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):  # forward mode alone does not heed torch.no_grad
            return run(*args, **(kwargs or {}))


@contextmanager
def dual_layers() -> Iterator[DualLayers]:
    """Inside this block ``DualLayers`` is in force, once."""
    found = [each for each in _get_current_function_mode_stack() if type(each) is DualLayers]  # type: ignore[no-untyped-call]
    with nullcontext(found[0]) if found else DualLayers() as layers:
        yield layers


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    fits = eps > 0 and _fits(input, input.shape[1:2].numel(), weight, bias, running_mean, running_var)
    if input.dim() < 2 or _per_channel(input) == 1 or not fits:
        return _by_torch(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is not None:
        F.batch_norm(input.detach(), running_mean, running_var, training=True, momentum=momentum, eps=eps)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return _normalized(input, (0, *range(2, input.dim())), weight, bias, shape, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    fits = _fits(input, input.shape[1:2].numel(), weight, bias, running_mean, running_var)
    if input.dim() < 3 or input.shape[2:].numel() == 1 or not fits:
        arguments = input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        return _by_torch(F.instance_norm, *arguments)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, momentum=momentum, eps=eps)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return _normalized(input, tuple(range(2, input.dim())), weight, bias, shape, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    like = all(each is None or each.shape == shape for each in (weight, bias))
    if not shape or input.shape[-len(shape) :] != shape or not like or not _fits(input, math.prod(shape), weight, bias):
        return _by_torch(F.layer_norm, input, shape, weight, bias, eps)
    return _normalized(input, tuple(range(-len(shape), 0)), weight, bias, shape, eps)


def _per_channel(input: Tensor) -> int:
    """How many values of one task there are for each channel."""
    return input.shape[:1].numel() * input.shape[2:].numel()


def _fits(input: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor | None) -> bool:
    """Whether these have as many numbers as torch wants, in the dtype of the input: elementary operations broadcast."""
    short = input.dtype in (torch.float16, torch.bfloat16)
    return all(each is None or each.numel() == count for each in (weight, bias, *statistics)) and all(
        each is None or each.dtype is input.dtype or short for each in (weight, bias)
    )


def _by_torch(layer: Callable[..., Tensor], *args: Any) -> Tensor:
    """What torch makes of arguments that do not fit: mostly its own error.

    It is asked about plain tensors of the same shapes first: its batching rules check less.
    """
    layer(*[_plain(each) for each in args])
    return layer(*args)


def _plain(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, Tensor) else value


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _batchable(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The recurrent layer; inside ``torch.func`` in elementary operations."""

    def run(input: Tensor, *rest: Any) -> Any:
        if inside_functorch():
            return torch.func.vjp(lambda tensor: layer(tensor, *rest), input)[0]
        return layer(input, *rest)

    return run


def _normalized(
    input: Tensor,
    over: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
) -> Tensor:
    """(input − mean) / √(variance + eps) · weight + bias, with the statistics taken over some dimensions."""
    if input.dtype in (torch.float16, torch.bfloat16):  # sums of squares need more room than these have
        weight, bias = (None if each is None else each.float() for each in (weight, bias))
        return _normalized(input.float(), over, weight, bias, shape, eps).to(input.dtype)
    count = math.prod(input.shape[dim] for dim in over)  # torch.var_mean takes six times as long on a CPU,
    centered = input - input.sum(over, keepdim=True) / count  # and the derivative of a mean writes out its quotient
    scale = torch.rsqrt(centered.square().sum(over, keepdim=True) / count + eps)
    if weight is not None:
        scale = scale * weight.reshape(shape)
    return centered * scale if bias is None else torch.addcmul(bias.reshape(shape), centered, scale)


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if training and (input.dim() < 2 or _per_channel(input) == 1):  # only torch.nn.functional refuses that
        return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if use_input_stats and (input.dim() < 3 or input.shape[2:].numel() == 1):
        rest = weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
        return torch.instance_norm(input, *rest)
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _differentiable_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Attention through the only backend that has all derivatives."""

    def run(*args: Any, **options: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **options)

    return run


def _in_logical_order(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with draws that fall on the same entries however the tensor lies, which ``vmap`` may change."""

    def drawn(input: Tensor, *args: Any, **options: Any) -> Tensor:
        return draw(input.contiguous(), *args, **options)

    return drawn


def _dropped(dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for dropout, which may have to write to its input."""

    def dropped(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if input.is_contiguous():
            return dropout(input, p, training, inplace)
        out = dropout(input.contiguous(), p, training)
        return input.copy_(out) if inplace else out

    return dropped


def _looked_at(look: Look, run: Callable[..., Any]) -> Callable[..., Any]:
    """The function after a look at its arguments."""

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        look(args, kwargs)
        return run(*args, **kwargs)

    return looked_at


_DRAWS = (
    *(F.gumbel_softmax, torch.bernoulli, Tensor.bernoulli),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
)

_EXACT: dict[Any, Callable[..., Any]] = {
    **READS,
    **{draw: _in_logical_order(draw) for draw in _DRAWS},
    **{dropout: _dropped(dropout) for dropout in (F.dropout, F.alpha_dropout)},
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    torch.batch_norm: _native_batch_norm,
    torch.instance_norm: _native_instance_norm,
    torch.layer_norm: _native_layer_norm,
    torch._weight_norm: _weight_norm,
    **{layer: _batchable(layer) for layer in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **{
        attention: _differentiable_attention(attention)
        for attention in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
    },
}
_EXACT.update(WATCHED)
_EXACT.update({draw: apart(draw, _EXACT.get(draw)) for draw in KNOWN})
_EXACT.update({func: _looked_at(look, _EXACT.get(func, func)) for func, look in LOOKS.items()})


def _mse_loss(input: Tensor, target: Tensor, *old: Any, **options: Any) -> Tensor:
    unusual = old or any(value is not None for name, value in options.items() if name != "reduction")
    if unusual or options.get("reduction", "mean") not in _REDUCTIONS:
        return F.mse_loss(input, target, *old, **options)
    _let_torch_compare(input, target)
    return _reduced((input - target) ** 2, options.get("reduction", "mean"))


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    if weight is not None or reduction not in _REDUCTIONS or not delta > 0:
        return F.huber_loss(input, target, reduction, delta, weight)  # type: ignore[call-arg]
    _let_torch_compare(input, target)
    distance = (input - target).abs()
    near = distance.clamp(max=delta)
    return _reduced(near * (distance - 0.5 * near), reduction)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    divides = input.dim() > 1 and num_groups > 0 and input.shape[1] % num_groups == 0
    one = divides and _per_channel(input) * input.shape[1] == num_groups
    if not divides or one or input.numel() == 0 or not _fits(input, input.shape[1:2].numel(), weight, bias):
        return _by_torch(F.group_norm, input, num_groups, weight, bias, eps)
    grouped = input.reshape(input.shape[0], num_groups, -1)
    normal = _normalized(grouped, (2,), None, None, (), eps).reshape(input.shape)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    scaled = normal if weight is None else normal * weight.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)


_REDUCTIONS = ("mean", "sum", "none")


def _let_torch_compare(input: Tensor, target: Tensor) -> None:
    """Warn or raise as torch does where the two differ in size."""
    if input.shape != target.shape:
        F.mse_loss(_plain(input), _plain(target))


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.mean()


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.silu(input, inplace=True) if inplace else input * input.sigmoid()


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    return F.mish(input, inplace=True) if inplace else input * F.softplus(input).tanh()


_DUAL: dict[Any, Callable[..., Any]] = {
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.group_norm: _group_norm,
    F.silu: _silu,
    F.mish: _mish,
}
