"""An unroll inside of another: in init, the inner loss, the update, the share, aux or the meta-loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import funcmeta as fm

pytestmark = pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")

PLACES = ("init", "loss", "update", "share", "meta-loss")
POLICIES = [fm.StoreAll(), fm.Segments(1), fm.Revolve(2)]
TARGET = torch.tensor([0.8, -0.4], dtype=torch.float64)
TASK = fm.Task(TARGET, TARGET)


def lower_step(meta: Any, p: Tensor, target: Tensor, seed: int) -> Any:
    loss, slope = fm.value_and_grad(lambda p: (meta["a"] * (p - target) ** 2).sum() + (p**4).sum() / 7)(p)
    return p - 0.15 * slope, fm.StepInfo(loss)


LOWER = fm.Problem(lambda meta, task, seed: 0.3 * meta["a"] + torch.zeros_like(TARGET), lower_step, None)
LOWER = LOWER._replace(meta_loss=lambda meta, p, query, seed: (p**2).sum() * meta["a"])


def by_unroll(memory: Any = None, estimator: Any = None) -> Callable[[Tensor], Tensor]:
    options = {"memory": memory or fm.StoreAll(), "estimator": estimator or fm.Reverse()}
    return lambda a: fm.unroll(LOWER, {"a": a}, TASK, steps=4, **options).loss  # type: ignore[arg-type]


def by_hand(a: Tensor) -> Tensor:
    """The same loop with torch alone, its gradient written out."""
    p = 0.3 * a + torch.zeros_like(TARGET)
    for _ in range(4):
        p = p - 0.15 * (2 * a * (p - TARGET) + 4 * p**3 / 7)
    return (p**2).sum() * a


def upper(place: str, lower: Callable[[Tensor], Tensor]) -> fm.Problem:
    def at(where: str, a: Tensor) -> Tensor | float:
        return lower(a) if where == place else 0.0

    def step(meta: Any, a: Tensor, target: Tensor, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda a: at("loss", a) + (a - meta["c"]) ** 2 + 0.2 * a**3)(a)
        a = a - meta["rate"] * slope + 0.1 * at("update", a * meta["c"])
        share = at("share", a) if place == "share" else None
        return a, fm.StepInfo(loss, share)  # type: ignore[arg-type]

    return fm.Problem(
        lambda meta, task, seed: meta["c"] * 1 + at("init", meta["c"]),
        step,
        lambda meta, a, query, seed: at("meta-loss", a) + meta["c"] * a**2,
    )


def total(problem: fm.Problem, c: Tensor, rate: Tensor, **options: Any) -> Tensor:
    return fm.unroll(problem, {"c": c, "rate": rate}, TASK, steps=2, **options).loss


def slopes(problem: fm.Problem, **options: Any) -> Tensor:
    c, rate = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (0.7, 0.2))
    return torch.stack(torch.autograd.grad(total(problem, c, rate, **options), (c, rate)))


def differences(problem: fm.Problem, h: float = 1e-5) -> Tensor:
    found = []
    for way in torch.eye(2, dtype=torch.float64):
        ends = [total(problem, *(torch.tensor([0.7, 0.2]).double() + sign * h * way)) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(found)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode(), fm.ForwardMode(), fm.Truncated(2)], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_exact_estimators_equal_finite_differences_of_the_loop_by_hand(place: str, estimator: Any) -> None:
    truth = differences(upper(place, by_hand))
    exact = slopes(upper(place, by_hand))
    torch.testing.assert_close(exact, truth, rtol=1e-6, atol=1e-8)
    for inner in POLICIES:
        problem = upper(place, by_unroll(inner))
        for outer in POLICIES[:2]:
            got = slopes(problem, estimator=estimator, memory=outer)
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    got = slopes(upper(place, by_unroll(estimator=fm.MixedMode())), estimator=estimator)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", PLACES)
def test_first_order_takes_the_inner_unroll_as_its_own_estimator_says(place: str) -> None:
    """A gradient inside of the loss is part of its value; an unroll elsewhere is differentiated by its estimator."""
    expected = slopes(upper(place, by_hand), estimator=fm.FirstOrder())
    for inner in POLICIES:
        got = slopes(upper(place, by_unroll(inner)), estimator=fm.FirstOrder())
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    apart = slopes(upper(place, by_unroll(estimator=fm.FirstOrder())), estimator=fm.FirstOrder())
    assert float((apart - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("estimator", ["ES", "PES"])
@pytest.mark.parametrize("place", PLACES)
def test_particles_train_what_the_loop_by_hand_trains(place: str, estimator: str, chunk: int | None) -> None:
    make = fm.EvolutionStrategies(0.01, 3, chunk) if estimator == "ES" else fm.PersistentES(0.01, 3, 1, chunk)
    got, expected = (slopes(upper(place, lower), estimator=make) for lower in (by_unroll(), by_hand))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("place", PLACES)
def test_particles_and_a_policy_that_replays(place: str) -> None:
    problem = upper(place, by_unroll(fm.Segments(1)))
    expected = slopes(upper(place, by_hand), estimator=fm.EvolutionStrategies(0.01, 3))
    one_by_one = slopes(problem, estimator=fm.EvolutionStrategies(0.01, 3, chunk=1))
    torch.testing.assert_close(one_by_one, expected, rtol=1e-7, atol=1e-8)
    if place == "loss":
        with pytest.raises(fm.ArgumentError, match=r"an unroll inside of a step or a loss too.*chunk=1, takes one"):
            slopes(problem, estimator=fm.EvolutionStrategies(0.01, 3))
    else:
        at_once = slopes(problem, estimator=fm.EvolutionStrategies(0.01, 3))
        torch.testing.assert_close(at_once, expected, rtol=1e-7, atol=1e-8)


def test_an_estimator_that_is_differentiated_once_inside_of_a_loss() -> None:
    problem = upper("loss", by_unroll(estimator=fm.ForwardMode()))
    with pytest.raises(fm.GraphError, match=r"so too for an unroll inside of an inner loss"):
        slopes(problem)


# ---- torch's own forward mode


@pytest.mark.parametrize("place", PLACES)
def test_the_tangent_of_torch_func_jvp(place: str) -> None:
    problem, one = upper(place, by_unroll()), torch.ones((), dtype=torch.float64)
    exact, point = slopes(upper(place, by_hand)), (0.7 * one, 0.2 * one)
    _, tangent = torch.func.jvp(lambda c, rate: total(problem, c, rate), point, (one, 2 * one))
    torch.testing.assert_close(tangent, exact[0] + 2 * exact[1], rtol=1e-10, atol=1e-10)


def test_torch_func_jvp_of_a_loss_that_forward_mode_gets_wrong() -> None:
    def step(rate: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: torch.cumprod(w, 0).sin().sum())(w)
        return w - rate * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda rate, task, seed: TARGET, step, lambda rate, w, query, seed: (w**2).sum())
    rate = torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(fm.GraphError, match=r"because torch differentiates .* torch\.cumprod .* torch\.func\.vjp in"):
        torch.func.jvp(lambda rate: fm.unroll(problem, rate, TASK, steps=2).loss, (rate,), (rate,))


@pytest.mark.parametrize("run", [by_unroll(), fm.value_and_grad(lambda a: (a**2).sum())], ids=["meta", "parameters"])
def test_a_dual_level_is_refused(run: Callable[[Tensor], Any]) -> None:
    one = torch.ones((), dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(0.7 * one, one)  # type: ignore[no-untyped-call]
        with pytest.raises(fm.GraphError, match=r"carries a tangent of torch\.autograd\.forward_ad.* torch\.func\.jvp"):
            run(dual)
