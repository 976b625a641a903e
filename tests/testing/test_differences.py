"""Finite differences: exact on polynomials, of the order they claim, and careful with what they are given."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmeta as fm
from funcmeta.testing import finite_difference
from funcmeta.testing._differences import Derivative, Probe, default_step, probes


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


TREE = {"a": double(1.0, -2.0), "b": [double(0.5)]}
DIRECTION = {"a": double(0.3, 1.0), "b": [double(-2.0)]}


def function(tree: Any) -> Tensor:
    return (tree["a"].exp() * tree["b"][0].cos()).sum()


def truth() -> float:
    a, b = TREE["a"], TREE["b"][0]
    return float((a.exp() * DIRECTION["a"] * b.cos() - a.exp() * b.sin() * DIRECTION["b"][0]).sum())


@pytest.mark.parametrize(("order", "tolerance"), [(2, 1e-9), (4, 1e-11), (6, 1e-12)])
def test_the_derivative_of_a_known_function(order: int, tolerance: float) -> None:
    got = finite_difference(function, TREE, DIRECTION, order=order)
    assert got.shape == ()
    assert not got.requires_grad
    assert float(got) == pytest.approx(truth(), rel=tolerance)


@pytest.mark.parametrize("order", [2, 4, 6])
def test_the_error_falls_with_the_claimed_order(order: int) -> None:
    errors = [
        abs(float(finite_difference(function, TREE, DIRECTION, eps=eps, order=order)) - truth()) for eps in (0.2, 0.1)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [2, 4, 6])
def test_polynomials_below_the_order_are_differentiated_exactly(order: int) -> None:
    at = double(0.7)
    got = finite_difference(lambda x: (x**order).sum(), at, torch.ones_like(at), eps=0.25, order=order)
    assert float(got) == pytest.approx(order * 0.7 ** (order - 1), rel=1e-13)


def test_the_caller_keeps_the_tensors_and_no_graph_grows() -> None:
    leaf = double(1.0, 2.0).requires_grad_()
    before, version = leaf.detach().clone(), leaf._version

    def watched(x: Tensor) -> Tensor:
        assert not x.requires_grad
        x.mul_(1.0)
        return (x**2).sum()

    finite_difference(watched, leaf, torch.ones_like(leaf))
    assert torch.equal(leaf.detach(), before)
    assert leaf._version == version
    assert leaf.grad is None


def test_a_number_is_a_value_too() -> None:
    assert float(finite_difference(lambda x: float(x**3), double(2.0)[0], double(1.0)[0])) == pytest.approx(12.0)


def test_float32_and_zeros_have_sensible_steps() -> None:
    at = torch.zeros(3)
    assert float(finite_difference(lambda x: x.sin().sum(), at, torch.ones(3), order=4)) == pytest.approx(3, rel=1e-5)
    assert default_step(at, torch.ones(3), 2) == pytest.approx(torch.finfo(torch.float32).eps ** (1 / 3))


def test_the_step_follows_the_leaves_that_move() -> None:
    tree = {"small": double(2e-3), "large": double(1e6), "empty": double()}
    direction = {"small": double(1.0), "large": double(0.0), "empty": double()}
    assert default_step(tree, direction, 2) == pytest.approx(2e-3 * 2.0 ** (-52 / 3))
    assert default_step(tree, {key: leaf * 0 for key, leaf in direction.items()}, 2) == 1.0


@pytest.mark.parametrize("size", [1e-8, 5e-324])
def test_a_tiny_leaf_moves_far_enough_to_be_seen(size: float) -> None:
    probe = first_probe(lambda some: some["w"].sum().exp(), {"w": double(size)}, {"w": double(1.0)})
    assert probe.judge({"w": double(1.0)}, 1e-6).error < 1e-6
    assert probe.judge({"w": double(1.0 + 1e-5)}, 1e-6).error > 1e-6
    assert float(finite_difference(torch.exp, double(size)[0], double(1.0)[0])) == pytest.approx(1, rel=1e-7)


def test_a_zero_direction_gives_zero() -> None:
    assert float(finite_difference(function, TREE, fm.tree.map(torch.zeros_like, TREE))) == 0.0


@pytest.mark.parametrize("order", [0, 3, "2", None])
def test_a_bad_order(order: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=re.escape(f"order is {order!r}, expected one of [2, 4, 6]")):
        finite_difference(function, TREE, DIRECTION, order=order)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_a_bad_step(eps: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"eps is .*, expected a positive number\. Leave it out"):
        finite_difference(function, TREE, DIRECTION, eps=eps)


@pytest.mark.parametrize("leaf", [torch.arange(3), torch.tensor([True]), torch.ones(2, dtype=torch.complex64), 1.5])
def test_a_leaf_that_can_not_move(leaf: Any) -> None:
    with pytest.raises(fm.StructureError, match=r"tree\['n'\] is .*, expected a floating-point tensor\. Keep what"):
        finite_difference(lambda tree: tree["x"].sum(), {"x": double(1.0), "n": leaf}, {"x": double(1.0), "n": leaf})


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"a": double(1.0, 1.0)}, r"direction has other keys than expected: missing direction\['b'\]\[0\]"),
        ({"a": double(1.0), "b": [double(1.0)]}, r"direction\['a'\] is float64\[1\] on cpu, expected float64\[2\]"),
        ({"a": torch.ones(2), "b": [double(1.0)]}, r"float32\[2\] on cpu, expected float64\[2\].*torch\.randn_like"),
    ],
)
def test_a_direction_that_does_not_fit(direction: Any, message: str) -> None:
    with pytest.raises(fm.StructureError, match=message):
        finite_difference(function, TREE, direction)


@pytest.mark.parametrize("value", [double(1.0, 2.0), torch.tensor(1), "loss", 1 + 2j])
def test_a_function_that_returns_no_number(value: Any) -> None:
    with pytest.raises(fm.LossError, match=r"fn returned .*, expected a 0-d floating-point tensor\. Reduce it by sum"):
        finite_difference(lambda tree: value, TREE, DIRECTION)


def first_probe(function: Any, at: Any, gradient: Any, seed: int = 0) -> Probe:
    return probes(function, at, gradient, value=1.0, directions=1, order=4, seed=seed, tolerance=1e-6)[0]


def test_probes_move_all_leaves_and_each_in_proportion_to_its_size() -> None:
    leaves = {"big": double(1e3, -1e3), "small": double(1e-2), "empty": double(), "zero": double(0.0)}
    moves: list[set[str]] = []

    def value(some: Any) -> Tensor:
        moves.append(set(some))
        return sum((leaf**2).sum() for leaf in {**leaves, **some}.values())  # type: ignore[return-value]

    gradient = {name: 2 * leaf for name, leaf in leaves.items()}
    found = probes(value, leaves, gradient, value=1.0, directions=2, order=2, seed=0, tolerance=1e-6)
    assert [probe.leaf for probe in found] == [name for name in ("all leaves", "big", "small", "zero") for _ in "ab"]
    assert set(map(frozenset, moves)) == {frozenset(probe.direction) for probe in found}
    for probe in found:
        for name, direction in probe.direction.items():
            size = float(leaves[name].abs().max()) or 1.0
            assert 1e-3 < float(direction.abs().max()) / size < 5


def test_directions_follow_from_the_seed() -> None:
    leaves = {"w": double(1.0, 2.0)}

    def direction(seed: int) -> Tensor:
        return first_probe(lambda some: some["w"].sum(), leaves, {"w": double(1.0, 1.0)}, seed=seed).direction["w"]

    assert torch.equal(direction(3), direction(3))
    assert not torch.equal(direction(3), direction(4))


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.0 + 1e-5, False)])
def test_shorter_steps_are_tried_where_the_function_bends_much(factor: float, agrees: bool) -> None:
    at, rate = {"w": double(1.0)}, 300.0
    gradient = {"w": factor * rate * (rate * at["w"]).cos()}
    probe = first_probe(lambda some: (rate * some["w"]).sin().sum(), at, gradient)
    assert (probe.judge(gradient, 1e-6).error <= 1e-6) is agrees
    plain = finite_difference(lambda w: (rate * w).sin().sum(), at["w"], probe.direction["w"], order=4)
    assert (float(plain) == probe.expected) is not agrees


def test_a_shorter_step_that_rounding_drowns_is_no_excuse() -> None:
    gradient = {"w": double(1.1e-6)}
    probe = first_probe(lambda some: 1 + 1e-6 * some["w"].sum(), {"w": double(1.0)}, gradient)
    assert probe.judge(gradient, 1e-6).error > 1e-6


@pytest.mark.parametrize(("gradient", "error"), [(2.0, 0.0), (2.5, 0.2), (1.0, 0.5), (-2.0, 2.0), (math.nan, math.nan)])
def test_the_error_is_relative_to_the_larger_derivative(gradient: float, error: float) -> None:
    probe = Probe("w", {"w": double(1.0)}, 2.0, 1e-12)
    assert probe.judge({"w": double(gradient)}, 1e-6).error == pytest.approx(error, nan_ok=True)


def test_what_rounding_hides_counts_as_zero() -> None:
    probe = Probe("w", {"w": double(1.0)}, 0.0, 1e-12)
    assert probe.judge({"w": double(1e-13)}, 1e-6).error < 1e-6
    assert probe.judge({"w": double(1e-11)}, 1e-6).error > 1e-6
    assert Probe("w", {"w": double(1.0)}, 0.0, 0.0).judge({"w": double(0.0)}, 1e-6).error == 0.0


def test_a_derivative_prints_its_figures() -> None:
    text = "meta['lr']: computed 1.5, finite difference 1, relative error 3.3e-01"
    assert str(Derivative("meta['lr']", 1.5, 1.0, 1 / 3)) == text
