"""The gradient for every hyper-parameter equals central differences, and a detached one is found out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import CASES, MAIN, WHOLE, Case, gradients, loss, outer, run, start
from torch import Tensor

from funcmeta import optim
from funcmeta.optim import _adam, _hyper

STEPS = 8
"""Long enough for RAdam to begin to adapt in the middle."""

TIGHT = {"rtol": 1e-6, "atol": 1e-9}
PAIRS = [(name, hyper) for name, case in CASES.items() for hyper in case.hypers]


def central(function: Callable[[Tensor], Tensor], at: Tensor, size: float = 1e-5) -> Tensor:
    """The derivative of a scalar function of one number, from four values."""
    moved = [function(at.detach() + factor * size).detach() for factor in (-2, -1, 1, 2)]
    return (moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / (12 * size)


def derivative(function: Callable[[Tensor], Tensor], at: Tensor, **keywords: Any) -> Tensor:
    """The derivative by automatic differentiation; zero where nothing is attached."""
    at = at.detach().requires_grad_()
    value = function(at)
    if not value.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(value, at, allow_unused=True, materialize_grads=True, **keywords)[0]


def meta_loss(case: Case, hyper: str, form: Callable[[Tensor], Any], steps: int = STEPS) -> Callable[[Tensor], Tensor]:
    """The loss after training as a function of one number, of which the hyper-parameter is made."""
    return lambda number: outer(run(case.build(**{hyper: form(number)}), start(), steps))


def as_tree(number: Tensor, name: str) -> dict[str, Tensor]:
    """A tree like the parameters whose entries all depend on the number, each in another way."""
    entries = torch.linspace(0.9, 1.1, 4, dtype=number.dtype)
    factor = 0.9 if name == "clip by norm" else entries  # a tensor has one norm, whatever its entries
    tree = {"w": number * factor, "m": number * 0.95, "b": number.clone()}
    return {"w": tree["w"]} if name == "masked" else tree


FORMS: dict[str, Callable[[Tensor, str], Any]] = {
    "tensor": lambda number, name: number,
    "tree": as_tree,
    "callable": lambda number, name: lambda step: number * (1 - 0.02 * step),
}


TRIPLES = [
    (name, hyper, form)
    for name, hyper in PAIRS
    for form in FORMS
    if form == "tensor" or (name in MAIN and not (form == "tree" and name in WHOLE))
]


@pytest.mark.parametrize(("name", "hyper", "form"), TRIPLES)
def test_gradient_for_a_hyper_parameter(name: str, hyper: str, form: str) -> None:
    case, at = CASES[name], torch.tensor(CASES[name].hypers[hyper], dtype=torch.float64)
    function = meta_loss(case, hyper, lambda number: FORMS[form](number, name))
    expected, got = central(function, at), derivative(function, at)
    torch.testing.assert_close(got, expected, **TIGHT)
    if hyper in case.flat:
        assert got == 0
    else:
        assert abs(got) > 1e-5
        detached = meta_loss(case, hyper, lambda number: FORMS[form](number.detach(), name))
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(derivative(detached, at), expected, **TIGHT)


@pytest.mark.parametrize("name", CASES)
def test_gradient_for_the_initial_parameters(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(leaf.shape, generator=generator).double() for key, leaf in start().items()}

    def function(number: Tensor) -> Tensor:
        moved = {key: leaf + number * direction[key] for key, leaf in start().items()}
        return outer(run(CASES[name].build(), moved, STEPS))

    at = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(derivative(function, at), central(function, at), **TIGHT)


@pytest.mark.parametrize(("name", "hyper"), [(name, hyper) for name, hyper in PAIRS if name in MAIN])
def test_second_derivative(name: str, hyper: str) -> None:
    case, at = CASES[name], torch.tensor(CASES[name].hypers[hyper], dtype=torch.float64)
    function = meta_loss(case, hyper, lambda number: number, steps=3)

    def slope(number: Tensor) -> Tensor:
        number = number.detach().requires_grad_()
        return torch.autograd.grad(function(number), number)[0]

    tracked = at.clone().requires_grad_()
    first = torch.autograd.grad(function(tracked), tracked, create_graph=True)[0]
    got = (
        torch.autograd.grad(first, tracked, allow_unused=True, materialize_grads=True)[0]
        if first.requires_grad
        else at * 0
    )
    torch.testing.assert_close(got, central(slope, at), rtol=1e-6, atol=1e-8)


def detached_root(value: Tensor) -> Tensor:
    return _hyper.safe_sqrt(value).detach()


def half_detached_mean(old: Tensor, new: Tensor, keep: Any) -> Tensor:
    assert isinstance(keep, Tensor)
    return keep.detach() * old + (1 - keep) * new


def half_detached_average(old: Tensor, grad: Tensor, keep: Any) -> Tensor:
    assert isinstance(keep, Tensor)
    return keep.detach() * old + (1 - keep) * grad * grad


@pytest.mark.parametrize(
    ("target", "mutant", "name"),
    [
        ("safe_sqrt", detached_root, "beta2"),
        ("blend", half_detached_mean, "beta1"),
        ("blend_square", half_detached_average, "beta2"),
    ],
)
def test_a_half_detached_optimizer_is_found_out(
    target: str, mutant: Callable[..., Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = meta_loss(CASES["adam"], name, lambda number: number)
    at = torch.tensor(0.8, dtype=torch.float64)
    expected = central(function, at)
    torch.testing.assert_close(derivative(function, at), expected, **TIGHT)
    monkeypatch.setattr(_adam, target, mutant)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(derivative(function, at), expected, **TIGHT)


def test_the_dead_entry_has_a_zero_gradient() -> None:
    assert gradients(start(), 3)["w"][3] == 0


def test_an_ordinary_root_makes_the_meta_gradient_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adam, "safe_sqrt", torch.sqrt)
    function = meta_loss(CASES["adam"], "beta2", lambda number: number)
    assert derivative(function, torch.tensor(0.8, dtype=torch.float64)).isnan()


def test_safe_root_is_the_root() -> None:
    value = torch.tensor([0.0, 1e-300, 4.0, float("inf"), float("nan"), -1.0], dtype=torch.float64)
    torch.testing.assert_close(_hyper.safe_sqrt(value), value.sqrt(), rtol=0, atol=0, equal_nan=True)


def test_derivatives_of_the_safe_root_at_zero_are_those_of_the_absolute_value() -> None:
    x = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(_hyper.safe_sqrt(x * x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    third = torch.autograd.grad(second.sum(), x)[0]
    torch.testing.assert_close(first, torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close((second, third), (torch.zeros_like(x), torch.zeros_like(x)))


@pytest.mark.parametrize("build", [optim.clip_by_norm, optim.clip_by_global_norm])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 2.0])
def test_a_zero_gradient_passes_a_norm_clip_with_slope_one(build: Callable[..., Any], max_norm: float) -> None:
    grad = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    transform = build(torch.tensor(max_norm, dtype=torch.float64, requires_grad=True))
    updates, _ = transform.update(grad, transform.init(grad), grad)
    first = torch.autograd.grad(updates["w"].sum(), grad["w"], create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), grad["w"], allow_unused=True, materialize_grads=True)[0]
    assert first.tolist() == [1.0, 1.0, 1.0]
    assert second.tolist() == [0.0, 0.0, 0.0]


def test_ties_of_maxima_have_the_derivative_of_central_differences() -> None:
    beta2, grad = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

    def norm(number: Tensor) -> Tensor:
        transform = optim.adamax(0.1, betas=(0.9, number), eps=0.0)
        params = {"w": grad}
        state = transform.init(params)
        for value in (2.0, 1.0):
            _, state = transform.update({"w": grad * value}, state, params)
        return state.exp_inf["w"]

    assert norm(beta2) == 1.0
    size = 1e-6
    middle = (norm(beta2 + size) - norm(beta2 - size)) / (2 * size)
    torch.testing.assert_close(derivative(norm, beta2), middle)
    assert derivative(norm, beta2) == 1.0


@pytest.mark.parametrize("name", ["adam", "radam", "nadam", "rmsprop centered", "adagrad", "adadelta"])
def test_a_gradient_that_was_zero_and_comes_to_life(name: str) -> None:
    """The dead entry is woken at step 3: all derivatives stay right."""

    def function(number: Tensor) -> Tensor:
        case, params = CASES[name], start()
        transform = case.build(lr=number)
        state = transform.init(params)
        for step in range(6):
            found = gradients(params, step)
            if step >= 3:
                found = {**found, "w": found["w"] + torch.tensor([0, 0, 0, 1.0]) * params["w"].cos()}
            updates, state = transform.update(found, state, params)
            params = optim.apply_updates(params, updates)
        return outer(params)

    at = torch.tensor(0.05, dtype=torch.float64)
    torch.testing.assert_close(derivative(function, at), central(function, at), **TIGHT)


def test_the_loss_of_the_table_is_smooth() -> None:
    assert loss(start(), 0).isfinite()
