"""What all fuzzing shares: drawn cases under a time limit, arguments that must not change, and broken values.

A case ends well in two ways: a call is refused by an error of the library with a message, or its result is right. Each
call is made by ``attempt``, which also asks that arguments, random state and modes are as before.
"""

import copy
import math
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import funcmeta as fm

OUTCOMES = ("cases", "refused", "right")
COUNTS: Counter[str] = Counter()
SECONDS = 60
"""A case that takes longer hangs; most take milliseconds."""

Draw = Callable[..., Any]


class Hang(AssertionError):
    """A case ran into the time limit."""


WITHIN = ("must match the size of tensor", "not implemented for", "SparseCPU", "dense-sparse")
"""Words of what torch says about a user's own computation, which passes as it is."""


class OwnError(Exception):
    """A function of the test, which stands for one of the user, has no use for what it was given."""


def own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's function, whose errors in Python are the user's; those of torch it leaves to the library."""

    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
            raise OwnError(str(error)) from error
        except RuntimeError as error:
            if not any(words in str(error) for words in WITHIN):
                raise
            raise OwnError(str(error)) from error

    return called


class Refused:
    """What stands for the result of a call that an error of the library has refused."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def fuzz(*, cost: int = 1) -> Callable[[Callable[[Draw], None]], Callable[..., None]]:
    """A test of drawn cases: 7,500 / cost of them under the profile nightly, and 10 / cost, at least 4, under ci."""
    most = settings().max_examples
    number = max(4, (most // 20 if most <= 200 else most * 3 // 2) // cost)

    def decorate(test: Callable[[Draw], None]) -> Callable[..., None]:
        def run(data: Any) -> None:
            COUNTS["cases"] += 1
            with limited(SECONDS):
                test(data.draw)

        run.__name__, run.__qualname__, run.__doc__ = test.__name__, test.__qualname__, test.__doc__
        run.__module__ = test.__module__
        phases = [Phase.reuse, Phase.generate, Phase.shrink]
        return settings(max_examples=number, phases=phases, report_multiple_bugs=False)(given(st.data())(run))

    return decorate


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise ``Hang`` inside the block when the time is up."""

    def stop(*_: Any) -> None:
        raise Hang(f"the case ran for over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], Any], *arguments: Any) -> Any:
    """The result of a call, or ``Refused``; any other exception passes, and fails the test."""
    before, world = [snapshot(each) for each in arguments], surroundings()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call()
        COUNTS["right"] += 1  # or the assertions that follow fail
    except fm.FuncmetaError as error:
        COUNTS["refused"] += 1
        result = Refused(error)
    except OwnError as error:
        result = Refused(error)
    if isinstance(result, Refused) and isinstance(result.error, fm.FuncmetaError):
        assert len(str(result.error)) > 20, f"the message {str(result.error)!r} says too little"
    assert all(same(old, snapshot(each)) for old, each in zip(before, arguments, strict=True)), "an argument changed"
    assert same(world, surroundings()), "a mode or a generator was left changed"
    return result


def surroundings() -> list[Any]:
    """What a call must leave as it was."""
    modes = [torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mkldnn.enabled]
    return [*modes, np.random.get_state()[1].tolist()[:9], torch.get_rng_state()]  # type: ignore[index, union-attr]


def snapshot(value: Any) -> Any:
    """A value as it is now, all the way down."""
    if isinstance(value, Tensor) and is_lazy(value):
        return id(value)
    if isinstance(value, Tensor):
        facts = (id(value), value.dtype, value.shape, value.device, value.requires_grad, value._version, value.layout)
        grad = None if not value.is_leaf or value.grad is None else value.grad.clone()
        stride = value.stride() if value.layout is torch.strided else None
        return (*facts, stride, grad, value.detach().to_dense().clone())
    if isinstance(value, nn.Module):
        modes = [each.training for each in value.modules()]
        named = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
        return (type(value), modes, [(name, snapshot(each)) for name, each in named])
    if isinstance(value, dict):
        return (type(value), [(key, snapshot(each)) for key, each in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [snapshot(each) for each in value])
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, int | float | str | bytes | type(None)) else id(value)


def same(left: Any, right: Any) -> bool:
    """Whether two snapshots agree, NaN with NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.is_meta or bool(torch.equal(left.nan_to_num(7), right.nan_to_num(7)))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right or (left != left and right != right))


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Leaf by leaf the same dtype and shape, and values within the tolerance of the largest finite one expected.

    Where one is not finite, neither is the other.
    """
    for mine, other in zip(fm.tree.leaves(got), fm.tree.leaves(expected), strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        mine, other = mine.detach().double(), other.detach().double()
        finite = other.isfinite()
        assert torch.equal(mine.isfinite(), finite)
        size = max(1.0, float(other[finite].abs().max()) if bool(finite.any()) else 0.0)
        torch.testing.assert_close(mine[finite], other[finite], rtol=0, atol=tolerance * size)


JUNK: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1.5,
        math.nan,
        math.inf,
        10**6,
        2**70,
        10**400,
        1j,
        "x",
        "",
        b"",
        (),
        [],
        {},
        set(),
        [None],
        {"x": "y"},
    ),
    *(object, object(), np.ones(2), np.float64(0.5), torch.float32, nn.Linear, fm.optim.sgd, range(3)),
    *(torch.tensor(1), torch.tensor(True), torch.zeros(0), torch.ones(2, device="meta"), torch.tensor(math.nan)),
    *(torch.tensor(1j), torch.ones(2).to_sparse()),
]
"""What nobody means to pass, with some values that are wrong in most places only."""

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (2, 3), (1, 1), (0, 2), (2, 1, 2)]
FLOATS = [torch.float32, torch.float64]
ODD = [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]
LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded", "flipped")


def junk() -> Any:
    """A broken value."""
    return st.sampled_from(JUNK).map(lambda value: value if callable(value) else copy.copy(value))


def seeds() -> Any:
    return st.integers(0, 10_000)


def tensor(
    draw: Draw,
    shapes: Any = SHAPES,
    dtypes: Any = FLOATS,
    *,
    odds: int = 0,
    special: bool = False,
    grad: bool | None = False,
) -> Tensor:
    """A tensor; one of so many has an odd dtype or is on the ``meta`` device, and a special one may be NaN or huge."""
    shape = draw(st.sampled_from(list(shapes)))
    odd = draw(st.sampled_from(["dtype", "device", *[""] * (2 * odds)])) if odds else ""
    dtype = draw(st.sampled_from(ODD)) if odd == "dtype" else draw(st.sampled_from(list(dtypes)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    value = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
    if special and value.numel() and value.is_floating_point():
        kind = draw(st.sampled_from(["", "", "", "nan", "inf", "-inf", "zero", "huge", "tiny"]))
        if kind:
            numbers = {"zero": 0.0, "huge": 1e30, "tiny": 1e-30}
            value.reshape(-1)[: 1 + value.numel() // 2] = numbers.get(kind, math.nan) if kind != "inf" else math.inf
    value = laid_out(value, draw(st.sampled_from(LAYOUTS)))
    if odd == "device":
        value = value.to("meta")
    learned = draw(st.booleans()) if grad is None else grad
    return value.requires_grad_() if learned and (value.is_floating_point() or value.is_complex()) else value


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The values in another place in memory; an expanded tensor has the first of them everywhere."""
    if layout == "transposed" and value.dim() >= 2:
        return value.mT.contiguous().mT
    if layout == "strided" and value.dim():
        return torch.stack([value, value + 1 if value.dtype != torch.bool else value], dim=-1)[..., 0]
    if layout == "expanded" and value.dim() and value.shape[0]:
        return value[:1].clone().expand(value.shape)
    if layout == "flipped" and value.dim():
        return value.flip(0)
    return value


def contiguous(value: Any) -> Any:
    """The same tree with tensors of their own memory."""
    return fm.tree.map(
        lambda leaf: (
            leaf.detach().clone(memory_format=torch.contiguous_format).requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
        ),
        value,
    )


def tree_of(draw: Draw, leaf: Callable[[], Any]) -> Any:
    """A tree of leaves: empty ones, nested ones, and usual ones."""
    shape = draw(st.sampled_from(["dict", "dict", "dict", "one", "nested", "list", "empty", "tuple"]))
    if shape == "dict":
        return {f"p{index}": leaf() for index in range(draw(st.integers(1, 3)))}
    if shape == "nested":
        return {"a": [leaf(), (leaf(),)], "b": {}, "c": {"d": leaf()}}
    return {"one": leaf, "list": lambda: [leaf(), leaf()], "tuple": lambda: (leaf(),), "empty": dict}[shape]()


def either(draw: Draw, valid: Any, broken: Any, odds: int = 4) -> Any:
    """Now and then a broken value (one of so many) instead of the valid one; both may be strategies or values."""
    chosen = broken if draw(st.integers(0, odds - 1)) == odds - 1 else valid
    return draw(chosen) if isinstance(chosen, st.SearchStrategy) else chosen
