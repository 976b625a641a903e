"""Draws inside the level of stacked tasks: each task draws what it would by itself.

A loop over tasks seeds torch's global generators for each task. Under ``vmap`` torch can draw the same for all tasks,
or one stream for all of them together, but not that. So what draws is run once for each task, outside of the level,
with the generators where this task left them (``rng.TaskDraws``), and the results are stacked. A draw that is not
listed here raises, because the level is entered with ``randomness="error"``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from funcmeta import rng, tree
from funcmeta._batching import Level, innermost_level
from funcmeta._errors import CompileError, GraphError

Call = tuple[Sequence[Any], dict[str, Any]]
How = Callable[[Level, rng.TaskDraws, Callable[..., Any], Sequence[Any], dict[str, Any]], Any]


def apart(draw: Callable[..., Any], ordinary: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """What to call in place of a function of ``KNOWN``: itself (or ``ordinary``), for each task if there are some."""
    how, draws = KNOWN[draw]
    plain = ordinary or draw

    def run(*args: Any, **options: Any) -> Any:
        level = innermost_level()
        if level is None or not level.apart or not draws(args, options):
            return plain(*args, **options)
        found = rng.task_draws()
        name = getattr(draw, "__name__", str(draw))
        if found is None or options.get("generator") is not None or options.get("out") is not None:
            raise GraphError(
                f"{name} draws from a generator of its own, or into a given tensor, while stacked tasks run as one "
                f"batch, where one generator cannot draw for each task. Draw from torch's global generator, which "
                f"follows the seed, or pass strategy='loop'."
            )
        if get_proxy_mode() is not None:
            raise CompileError(
                f"{name} draws for each of the stacked tasks, which cannot be recorded. Pass strategy='loop', or the "
                f"problem as it was before compile."
            )
        return how(level, found, plain, args, options)

    return run


def _made(level: Level, found: rng.TaskDraws, draw: Callable[[int], Tensor]) -> Tensor:
    """Draws that depend on no other tensor, as the function over tasks sees them."""
    with temporarily_clear_interpreter_stack():
        drawn = torch.stack(found.each(level.tasks, draw))
    return level.lift(drawn)


def _new(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Functions that make a tensor of a given size."""
    return _made(level, found, lambda task: draw(*args, **options))


def _like(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Functions that make a tensor of the size of another."""
    (like, *rest), options = _input(args, options)
    shape, dtype, device = like.shape, like.dtype, like.device
    return _made(level, found, lambda task: draw(torch.empty(shape, dtype=dtype, device=device), *rest, **options))


def _filling(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Functions that fill a tensor."""
    (filled, *rest), options = _input(args, options)
    if not level.holds(filled):
        raise GraphError(
            f"{getattr(draw, '__name__', draw)} draws into a tensor that has no values of its own for each of the "
            f"stacked tasks. Draw by torch.rand, torch.randn or their kin, or pass strategy='loop'."
        )
    with torch.no_grad():
        return filled.copy_(_like(level, found, draw, (filled, *rest), options))


def _masking(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Dropout, which multiplies by what it draws."""
    input, p, inplace = _dropout(args, options)
    shape, dtype, device = input.shape, input.dtype, input.device
    noise = _made(level, found, lambda task: draw(torch.ones(shape, dtype=dtype, device=device), p, True))
    return input.mul_(noise) if inplace else input * noise


def _slicing(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Functions whose draws depend on tensors: run on each task's own."""
    if not level.is_innermost():
        raise GraphError(
            f"{getattr(draw, '__name__', draw)} draws inside torch.func, which was entered while stacked tasks ran as "
            f"one batch. Pass strategy='loop'."
        )
    leaves, spec = tree.flatten((tuple(args), options))
    held = [isinstance(leaf, Tensor) and level.holds(leaf) for leaf in leaves]
    lowered = [level.lower(leaf) if own else leaf for leaf, own in zip(leaves, held, strict=True)]

    def one(task: int) -> Any:
        own, named = tree.unflatten(
            [leaf[task] if batched else leaf for leaf, batched in zip(lowered, held, strict=True)], spec
        )
        return draw(*own, **named)

    with level.left():
        drawn = found.each(level.tasks, one)
        stacked = tree.map(lambda *column: torch.stack(column) if isinstance(column[0], Tensor) else column[0], *drawn)
    return tree.map(lambda leaf: level.lift(leaf) if isinstance(leaf, Tensor) else leaf, stacked)


def _bernoulli_(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Filled with zeros and ones, of a probability that is a number or a tensor."""
    (filled, *rest), options = _input(args, options)
    if not any(isinstance(each, Tensor) for each in (*rest, *options.values())):
        return _filling(level, found, draw, args, options)
    return filled.copy_(_slicing(level, found, lambda into, *by, **p: draw(into.clone(), *by, **p), args, options))


def _normal(
    level: Level, found: rng.TaskDraws, draw: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Normal numbers, whose mean and deviation are numbers or tensors."""
    tensors = any(isinstance(each, Tensor) for each in (*args, *options.values()))
    return (_slicing if tensors else _new)(level, found, draw, args, options)


def _input(args: Sequence[Any], options: dict[str, Any]) -> Call:
    """The arguments with the tensor in front, whichever way it was passed."""
    named = [name for name in ("input", "tensor", "self") if name in options]
    rest = {name: value for name, value in options.items() if name not in named}
    return (args or tuple([options[name] for name in named])), rest


def _dropout(args: Sequence[Any], options: dict[str, Any]) -> tuple[Tensor, float, bool]:
    """Input, rate, and whether it is written to."""
    (input, *rest), options = _input(args, options)
    p = rest[0] if rest else options.get("p", 0.5)
    return input, p, bool(rest[2] if len(rest) > 2 else options.get("inplace", False))


def _always(args: Sequence[Any], options: dict[str, Any]) -> bool:
    return True


def _training(place: int) -> Callable[[Sequence[Any], dict[str, Any]], bool]:
    """Whether a function draws that has a flag for it, at this place or by name."""

    def draws(args: Sequence[Any], options: dict[str, Any]) -> bool:
        named = options.get("training", options.get("train"))
        return bool(args[place] if len(args) > place else named)

    return draws


def _in_training(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether a dropout draws: it is in training unless it says otherwise."""
    (_, *rest), options = _input(args, options)
    p = rest[0] if rest else options.get("p", 0.5)
    training = rest[1] if len(rest) > 1 else options.get("training", options.get("train", True))
    return bool(training and p > 0)


def _in_attention(args: Sequence[Any], options: dict[str, Any]) -> bool:
    return bool((args[4] if len(args) > 4 else options.get("dropout_p", 0.0)) > 0)


def _in_heads(args: Sequence[Any], options: dict[str, Any]) -> bool:
    p = args[10] if len(args) > 10 else options.get("dropout_p", 0.0)
    return p > 0 and bool(args[13] if len(args) > 13 else options.get("training", True))


def _between_layers(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether a recurrent layer draws; a packed sequence has its sizes as a further argument."""
    place = 5 if isinstance(args[3], bool) else 6
    return len(args) > place + 1 and args[place] > 0 and bool(args[place + 1])


KNOWN: dict[Any, tuple[How, Callable[[Sequence[Any], dict[str, Any]], bool]]] = {
    **dict.fromkeys((torch.rand, torch.randn, torch.randint, torch.randperm), (_new, _always)),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), (_like, _always)),
    **dict.fromkeys(
        (
            *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_),
            *(Tensor.log_normal_, Tensor.random_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),
        ),
        (_filling, _always),
    ),
    Tensor.bernoulli_: (_bernoulli_, _always),
    torch.normal: (_normal, _always),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout),
        (_masking, _in_training),
    ),
    **dict.fromkeys(
        (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
        (_slicing, _in_training),
    ),
    torch.native_dropout: (_slicing, _in_training),
    **dict.fromkeys(
        (
            *(torch.bernoulli, Tensor.bernoulli, torch.multinomial, Tensor.multinomial, torch.poisson, torch.binomial),
            *(torch._standard_gamma, torch._sample_dirichlet, F.gumbel_softmax),
            *(F.fractional_max_pool2d_with_indices, F._fractional_max_pool2d),  # type: ignore[attr-defined]
            *(F.fractional_max_pool3d_with_indices, F._fractional_max_pool3d),  # type: ignore[attr-defined]
        ),
        (_slicing, _always),
    ),
    **{draw: (_slicing, _training(3)) for draw in (F.rrelu, torch.rrelu)},
    F.scaled_dot_product_attention: (_slicing, _in_attention),
    F.multi_head_attention_forward: (_slicing, _in_heads),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (_slicing, _between_layers)),
}
"""What draws: how to draw it for each task, and whether a call with these arguments draws at all."""
