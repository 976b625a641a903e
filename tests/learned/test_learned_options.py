"""Each option of a learned optimizer makes its documented difference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import funcmeta as fm
from funcmeta import learned

PARAM, GRAD = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -0.7])


def made(make: Callable[[], fm.LearnedOptimizer]) -> fm.LearnedOptimizer:
    with fm.rng.forked(1):
        return make()


def update(optimizer: fm.LearnedOptimizer, param: Tensor = PARAM, start: Tensor = PARAM) -> Tensor:
    result: Tensor = optimizer(param, GRAD, optimizer.init_state(start))[0]
    return result.detach()


def weights(optimizer: fm.LearnedOptimizer) -> int:
    return sum(each.numel() for each in optimizer.parameters())


def test_linear_weighs_gradient_and_parameter() -> None:
    torch.testing.assert_close(update(learned.linear(gradient=-0.2, parameter=0.05)), -0.2 * GRAD + 0.05 * PARAM)


def test_gates_begin_where_they_are_told() -> None:
    start = torch.tensor([3.0, 3.0, -1.0])
    for hidden in (0, 4):
        change = update(made(lambda h=hidden: learned.gates(copy=0.8, update=0.3, flush=0.1, hidden=h)), start=start)  # type: ignore[misc]
        torch.testing.assert_close(PARAM + change, 0.8 * PARAM - 0.3 * GRAD + 0.1 * start)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda size: learned.gates(hidden=size), lambda h: 3 + 4 * h + h + 3 * h),
        (lambda size: learned.mlp(hidden=size, layers=1), lambda h: 39 * h + h + 2 * h + 2),
        (lambda size: learned.mlp(hidden=5, layers=size), lambda n: 39 * 5 + 5 + (n - 1) * 30 + 12),
    ],
)
def test_sizes_are_those_that_were_given(
    make: Callable[[int], fm.LearnedOptimizer], expected: Callable[[int], int]
) -> None:
    for size in (2, 3):
        assert weights(make(size)) == expected(size)


@pytest.mark.parametrize(
    "make",
    [
        lambda size: learned.rnnprop(hidden=size, layers=1),
        lambda size: learned.rnnprop(hidden=3, layers=size),
        lambda size: learned.lstm(hidden=size, layers=1),
        lambda size: learned.lstm(hidden=3, layers=size),
        lambda size: learned.hierarchical(coordinate=size),
        lambda size: learned.hierarchical(tensor=size),
    ],
)
def test_more_units_or_layers_have_more_weights(make: Callable[[int], fm.LearnedOptimizer]) -> None:
    sizes = [weights(make(size)) for size in (1, 2, 3)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: learned.hierarchical(scale=scale),
        lambda scale: learned.rnnprop(scale=scale),
        lambda scale: learned.lstm(scale=scale),
        lambda scale: learned.mlp(step_scale=scale),
    ],
)
def test_updates_are_proportional_to_the_scale(make: Callable[[float], fm.LearnedOptimizer]) -> None:
    small, large = (update(made(lambda s=scale: make(s))) for scale in (0.01, 0.03))  # type: ignore[misc]
    assert small.any()
    torch.testing.assert_close(large, 3 * small)


def test_the_mlp_scales_its_exponent() -> None:
    """u = −step_scale · d · exp(exp_scale · s): log|u| is linear in exp_scale."""
    logs = [update(made(lambda s=scale: learned.mlp(exp_scale=s))).abs().log() for scale in (0.1, 0.2, 0.4)]  # type: ignore[misc]
    torch.testing.assert_close(logs[2] - logs[1], 2 * (logs[1] - logs[0]), rtol=1e-3, atol=1e-6)
    assert (logs[1] - logs[0]).abs().max() > 1e-4
