"""What a recording and its kernels have to be: pure, the same for every seed, and equal to the function itself."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from funcmeta import rng
from funcmeta._errors import CompileError, FuncmetaError
from funcmeta._split import is_draw

Plain = Callable[[Sequence[Tensor], int], list[Tensor]]
"""The function itself, of tensors and a seed."""


def compare(
    got: Sequence[Tensor], expected: Sequence[Tensor], what: str, noise: Callable[[Sequence[Tensor]], list[float]]
) -> None:
    """Raise unless kernels gave what the function itself gives, but for rounding and what it makes of a kink.

    What the function makes of rounding is asked of ``noise`` when something is apart: an optimizer that divides by the
    size of a gradient turns one that is nothing but rounding, as of a bias before BatchNorm, into a whole step.
    """
    sizes = [_norm(each.nan_to_num(0.0, 0.0, 0.0)) if each.is_floating_point() else 0.0 for each in expected]
    moved: list[float] = []
    for index, (ours, theirs, size) in enumerate(zip(got, expected, sizes, strict=True)):
        apart, allowed = _apart(ours, theirs), 0.0
        if theirs.is_floating_point():
            allowed = torch.finfo(theirs.dtype).eps ** 0.3 * max(size, 1e-3 * max(sizes))
        if not apart <= allowed:  # NaN is neither
            moved = moved or noise(expected)
            allowed = max(allowed, 10 * moved[index])
        if not apart <= allowed:
            raise CompileError(
                f"The compiled {what} {index} is {apart:.1e} from what the function itself gives, which has norm "
                f"{size:.1e}. Most often the function depends on more than its arguments: a counter, an iterator, "
                f"draws with a generator of its own."
            )


def rounding(plain: Plain, tensors: Sequence[Tensor], seed: int, expected: Sequence[Tensor]) -> list[float]:
    """How far each result of a function moves with the last bits of its inputs; 0 when it moves without them, too."""
    if any(_apart(*pair) > 0 for pair in zip(plain(tensors, seed), expected, strict=True)):
        return [0.0] * len(expected)
    furthest = [0.0] * len(expected)
    for trial in range(3):
        with rng.forked(trial):
            near = [_nudged(each) for each in tensors]
        apart = map(_apart, plain(near, seed), expected)
        furthest = [max(pair) for pair in zip(furthest, apart, strict=True)]
    return furthest


def _nudged(tensor: Tensor) -> Tensor:
    """The tensor with other last bits."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.detach()
    return tensor * (1 + 8 * torch.finfo(tensor.dtype).eps * (torch.rand_like(tensor) - 0.5))


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The distance of two tensors; of integers, the number of places where they differ."""
    if not theirs.is_floating_point():
        return float((ours != theirs).sum())
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return _norm(torch.where(same, 0.0, ours - theirs))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def check_pure(graph: GraphModule) -> None:
    """Raise when what was recorded draws from a generator of its own, or writes into something."""
    for node in graph.graph.nodes:
        if is_draw(node) and node.kwargs.get("generator") is not None:
            raise CompileError(
                f"The function draws from a torch.Generator of its own ({node.target}), which every call would "
                f"advance. Draw without a generator: torch's global one is seeded for every step."
            )
        if node.target is torch.ops.aten.copy_.default:
            raise CompileError(
                "The function writes into a tensor that it was given or has captured. Let it return new tensors."
            )


def check_same(graph: GraphModule, other: GraphModule) -> None:
    """Raise when another seed gives another graph."""
    constants = [dict(each.named_buffers()) | vars(each) for each in (graph, other)]
    tensors = [[value for value in each.values() if isinstance(value, Tensor)] for each in constants]
    same = len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))
    if graph.code != other.code or not same:
        raise CompileError(
            "The function computes with its seed, so that every step would be compiled anew. Draw from torch's global "
            "generator, which is seeded for every step, or pass the numbers in the batch."
        )


class explained:
    """Turns what goes wrong while recording into a ``CompileError`` that names the line."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Explain the error, unless it is one of ours."""
        if not isinstance(error, Exception) or isinstance(error, FuncmetaError):
            return
        own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
        outside = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(own)]
        at = f" at '{outside[-1].line}' ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
        raise CompileError(
            f"The function could not be recorded{at}: {first_line(error)} What it does may not depend on the values "
            f"of tensors in Python (item(), if, loops over nonzero()): use torch.where and masks, or do not compile it."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, as a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
