"""Where forward over reverse may go: every operation of torch's own table, run both ways."""

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import funcmeta as fm
from funcmeta._duals import GOOD, WRONG, obstacle
from funcmeta._exact_layers import DualLayers, exact_layers
from funcmeta._graph import walk

PARTS = 6
REFUSED = ("forward AD", "ZeroTensor", "is not implemented", "must be implemented", "not supported", "ill-defined")


def table() -> list[Any]:
    """The operations with a derivative in double precision."""
    if "expecttest" not in sys.modules:  # which torch's table imports and does not use
        stub = types.ModuleType("expecttest")
        stub.TestCase = type("TestCase", (), {})  # type: ignore[attr-defined]
        stub.assert_expected_inline = None  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_utils

        common_utils.extract_test_fn = lambda: None  # which reads the whole stack, a thousand times
        from torch.testing._internal.common_methods_invocations import op_db
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)  # which that import forbids to all other tests
    return [op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes]


class Sample(NamedTuple):
    """An operation with its arguments, as a loss of those tensors that require grad."""

    op: Any
    arguments: Any
    moving: list[int]

    def point(self) -> list[Tensor]:
        flat = fm.tree.leaves(self.arguments)
        return [flat[place].detach().clone(memory_format=torch.preserve_format) for place in self.moving]

    def loss(self, tensors: list[Tensor]) -> Tensor:
        flat, spec = fm.tree.flatten(self.arguments)
        for place, tensor in zip(self.moving, tensors, strict=True):
            flat[place] = tensor * 1.0
        first, args, kwargs = fm.tree.unflatten(flat, spec)
        with fm.rng.forked(0):
            out = self.op.gradcheck_wrapper(self.op.get_op(), first, *args, **kwargs)
        parts = [
            torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in fm.tree.tensors(out)
        ]
        total = torch.zeros((), dtype=torch.float64)
        for each in parts:
            if each.dtype is torch.float64 and each.requires_grad and each.layout is torch.strided:
                weights = drawn(each, 7).abs() + 0.5
                total = total + ((each * weights).sin() + 0.1 * each * weights * each).sum()
        return total


def drawn(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=fm.rng.generator(seed), dtype=like.dtype)


class Scalar(NamedTuple):
    """An operation with a number of Python in front, or behind, of which torch's table has none."""

    name: str
    run: Callable[[Tensor], Tensor]

    def get_op(self) -> Callable[[Tensor], Tensor]:
        return self.run

    def gradcheck_wrapper(self, op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return op(x)


SCALARS = [
    Scalar("1 - x", lambda x: 1 - x),
    Scalar("2 ** x", lambda x: 2**x),
    Scalar("x % 2", lambda x: x % 2),
]


def samples(part: int, most: int, largest: int = 300) -> Iterator[Sample]:
    for scalar in SCALARS[part::PARTS]:
        yield Sample(scalar, (torch.tensor([0.3, -0.7, 2.5], dtype=torch.float64), (), {}), [0])
    for op in table()[part::PARTS]:
        if op.name.startswith(("_segment", "sparse", "to_sparse", "bfloat16", "half", "float")):
            continue
        try:
            made = list(zip(range(most), op.sample_inputs("cpu", torch.float64, requires_grad=True), strict=False))
        except RuntimeError:
            continue
        for _, sample in made:
            arguments = sample.input, sample.args, sample.kwargs
            moving = [
                place
                for place, leaf in enumerate(fm.tree.leaves(arguments))
                if isinstance(leaf, Tensor) and leaf.dtype is torch.float64 and leaf.requires_grad
            ]
            flat = fm.tree.leaves(arguments)
            if moving and sum(flat[place].numel() for place in moving) < largest:  # a large one says no more
                yield Sample(op, arguments, moving)


def kinds(sample: Sample) -> set[Any]:
    """The nodes of the graph of the loss, or none where it has no finite value."""
    try:
        with exact_layers(), DualLayers():
            loss = sample.loss([each.requires_grad_() for each in sample.point()])
    except RuntimeError:  # a sample of another layout in memory, or an empty one
        return set()
    return walk([loss]).nodes if bool(loss.isfinite()) else set()


def by_reverse(sample: Sample, along: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [each.requires_grad_() for each in sample.point()]
    slopes = torch.autograd.grad(sample.loss(leaves), leaves, create_graph=True, materialize_grads=True)
    rate = fm.tree.dot(list(slopes), along)
    if not rate.requires_grad:
        return list(slopes), [torch.zeros_like(each) for each in leaves]
    return list(slopes), list(torch.autograd.grad(rate, leaves, materialize_grads=True))


def by_forward(sample: Sample, along: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [each.requires_grad_() for each in sample.point()]
    with forward_ad.dual_level():
        loss = sample.loss([forward_ad.make_dual(*pair) for pair in zip(leaves, along, strict=True)])  # type: ignore[no-untyped-call]
        slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
        rate, *found = [forward_ad.unpack_dual(each).tangent for each in (loss, *slopes)]  # type: ignore[no-untyped-call]
    zero = [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves, strict=True)]
    return torch.zeros(()) if rate is None else rate.detach(), zero


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_known_to_be_good_is_right_or_an_error(part: int) -> None:
    """The tangent of the gradient is right, or the loss's own tangent tells, or torch raises."""
    compared, wrong = 0, []
    for sample in samples(part, most=2):
        nodes = kinds(sample)
        if not nodes or obstacle(nodes):
            continue
        along = [drawn(each, 3) for each in sample.point()]
        try:
            with exact_layers(), DualLayers():
                slopes, expected = by_reverse(sample, along)
                rate, got = by_forward(sample, along)
        except (NotImplementedError, RuntimeError) as error:
            if not any(word in str(error) for word in REFUSED):
                raise
            continue
        g, v, a, b = vector(slopes), vector(along), vector(expected), vector(got)
        if not bool((a.isfinite() & g.isfinite()).all()):
            continue
        told = abs(float(rate) - float(g @ v)) > 1e-8 * float(g.norm() * v.norm())
        error = float((a - b).norm()) / (float(a.norm()) + 1e-6 * float(1 + g.norm()))
        compared += 1
        if error > 1e-6 and not told:
            wrong.append((sample.op.name, error, sorted({type(node).__name__ for node in nodes})))
    assert not wrong
    assert compared > 100


@pytest.mark.filterwarnings("ignore")
def test_all_of_the_list_is_met_in_the_table() -> None:
    """What the list holds was seen there, so it cannot grow by hand without a sample."""
    assert not GOOD & WRONG.keys()
    missing = set(GOOD)
    for most, largest in ((1, 300), (14, 100_000)):  # few and small ones meet nearly all
        for sample in chain.from_iterable(samples(part, most, largest) for part in range(PARTS)):
            missing -= {type(node).__name__ for node in kinds(sample)}
            if not missing:
                return
    assert not missing
