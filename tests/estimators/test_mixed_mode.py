"""MixedMode: the meta-gradient of Reverse, without the graph of the inner gradients."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import funcmeta as fm
from funcmeta import optim
from funcmeta._live_bytes import LiveBytes
from funcmeta.testing import TOLERANCES

pytestmark = pytest.mark.filterwarnings("error::funcmeta.FallbackWarning")

STEPS = 3
RUNS = [
    ("single", fm.StoreAll()),
    ("single", fm.Segments(1)),
    ("single", fm.Segments(2)),
    ("single", fm.Revolve(2)),
    ("loop", fm.StoreAll()),
    ("vmap", fm.StoreAll()),
    ("vmap", fm.Segments(2)),
    ("vmap", fm.Revolve(2)),
]
runs = pytest.mark.parametrize(("strategy", "memory"), RUNS, ids=lambda each: str(each))


class Setting(NamedTuple):
    """A problem, what is learned, and two stacked tasks."""

    problem: fm.Problem
    meta: Any
    tasks: fm.Task


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def data() -> fm.Task:
    with fm.rng.forked(3):
        return fm.Task((numbers(2, 5, 3), numbers(2, 5, 2)), (numbers(2, 5, 3), numbers(2, 5, 2)))


def leaf(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def mlp(*middle: nn.Module) -> nn.Module:
    with fm.rng.forked(2):
        return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def of_module(net: nn.Module, loss: Any = mse, more: dict[str, Tensor] | None = None, **options: Any) -> Setting:
    meta = {"params": fm.init_params(net), "lr": leaf(0.3), **(more or {})}
    build = lambda meta: optim.sgd(meta["lr"], momentum=0.7)  # noqa: E731
    return Setting(fm.inner_problem(net, loss, optimizer=build, **options), meta, data())


def by_hand(step: Any, more: dict[str, Tensor] | None = None, judge: Any = None) -> Setting:
    """A hand-written step on two matrices, judged by a square loss."""
    meta = {"w": leaf(0.4, -0.9, 1.3), "lr": leaf(0.2), **(more or {})}

    def default(meta: Any, w: Any, query: Any, seed: int) -> Tensor:
        return (query[0] @ w).pow(2).mean() + (w**3).sum()

    return Setting(fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, judge or default), meta, data())


def descending(loss: Callable[[Any, Tensor, Any], Tensor], more: dict[str, Tensor] | None = None) -> Setting:
    """Gradient descent on loss(meta, w, batch) at rate meta["lr"]."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: loss(meta, w, batch))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    return by_hand(step, more)


def wavy(w: Tensor, batch: Any) -> Tensor:
    return torch.sin(batch[0] @ w).pow(2).mean() + (w**4).sum() / 9


# ---- what a step may be

SETTINGS: dict[str, Callable[[], Setting]] = {}


def setting(build: Callable[[], Setting]) -> Callable[[], Setting]:
    SETTINGS[build.__name__.replace("_", " ")] = build
    return build


@setting
def weights_of_a_learned_loss() -> Setting:
    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return (meta["weights"] * (predict(x) - y).square()).mean() + meta["decay"] * fm.tree.norm(predict.params) ** 2

    return of_module(mlp(), loss, {"weights": leaf(0.5, 1.5), "decay": leaf(0.1)}, meta_loss_fn=mse)


@setting
def a_derived_tensor_captured_with_its_source() -> Setting:
    """Were the source counted by the way of the derived tensor as well, it would count twice."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        derived = meta["a"].exp() * meta["a"]
        again = derived.sum() * w.detach().sum() + w.sum()
        value, slope = fm.value_and_grad(lambda u: wavy(u * meta["a"] + derived, batch) * (again + meta["b"]))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    return by_hand(step, {"a": leaf(0.7, 1.1, 0.2), "b": leaf(0.4)})


@setting
def the_argument_captured_as_well() -> Setting:
    """The gradient is partial: the same tensor seen from outside is a constant in it, but not in its derivative."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda u: wavy(u, batch) + (u * w.sin()).pow(2).sum())(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    return by_hand(step)


@setting
def a_part_of_the_net() -> Setting:
    return of_module(mlp(), adapt=lambda name: name.startswith("2."))


@setting
def a_trajectory_loss() -> Setting:
    return of_module(mlp(), trajectory_loss=lambda step: 1 + 0.5 * step)


@setting
def predictions_used_after_the_gradient() -> Setting:
    """The auxiliary output carries a derivative by the parameters and by what the loss captured."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        def loss(u: Tensor) -> Any:
            predicted = batch[0] @ (u * meta["a"])
            return predicted.sin().pow(2).mean(), {"predicted": predicted, "name": "run", "n": torch.tensor(2)}

        (value, aux), slope = fm.value_and_grad(loss, has_aux=True)(w)
        residual = batch[0].mT @ aux["predicted"].tanh() / aux["n"]
        return w - meta["lr"] * slope - 0.1 * residual, fm.StepInfo(value, value * aux["predicted"].mean())

    return by_hand(step, {"a": leaf(0.7, 1.1, 0.2)})


@setting
def dropout_in_a_module() -> Setting:
    return of_module(mlp(nn.Dropout(0.4)))


@setting
def draws_in_a_loss_by_hand() -> Setting:
    """The generator goes on between two gradients of a step: each has draws of its own, the same in its replay."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        def noisy(u: Tensor) -> Tensor:
            return wavy(u + 0.3 * torch.rand_like(u), batch)

        value, slope = fm.value_and_grad(noisy)(w)
        _, ahead = fm.value_and_grad(noisy)(w - meta["lr"] * slope)
        return w - meta["lr"] * ahead * torch.rand_like(w), fm.StepInfo(value)

    return by_hand(step)


@setting
def batch_normalization() -> Setting:
    return of_module(mlp(nn.BatchNorm1d(4)))


@setting
def a_gradient_used_twice() -> Setting:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(wavy)(w, batch)
        return w - meta["lr"] * slope / (1 + slope.norm()), fm.StepInfo(value, (slope**2).sum() * value)

    return by_hand(step)


@setting
def two_gradients_in_a_step() -> Setting:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(wavy)(w, batch)
        _, ahead = fm.value_and_grad(lambda u: wavy(u, batch) + (u * slope).sum() ** 2)(w - meta["lr"] * slope)
        return w - meta["lr"] * ahead, fm.StepInfo(value)

    return by_hand(step)


@setting
def only_the_value_is_used() -> Setting:
    """No cotangent comes to the gradient."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, _ = fm.value_and_grad(lambda u: wavy(u * meta["a"], batch))(w)
        return w * (1 - meta["lr"] * value), fm.StepInfo(value)

    return by_hand(step, {"a": leaf(0.7, 1.1, 0.2)})


@setting
def a_parameter_that_the_loss_does_not_use() -> Setting:
    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return wavy(predict.params["0.weight"][0], batch)

    return of_module(mlp(), loss, meta_loss_fn=mse)


@setting
def a_tree_that_is_not_flat() -> Setting:
    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {"a": [meta["w"] * 1, (meta["w"].sin(), {"b": meta["w"].sum()})]}

    def loss(p: Any, batch: Any) -> Tensor:
        first, (second, rest) = p["a"]
        return wavy(first * rest["b"], batch) + wavy(second, batch)

    def step(meta: Any, p: Any, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(loss)(p, batch)
        return fm.tree.map(lambda old, by: old - meta["lr"] * by, p, slope), fm.StepInfo(value)

    base = by_hand(step)
    problem = fm.Problem(init, step, lambda meta, p, query, seed: loss(p, query))
    return Setting(problem, base.meta, base.tasks)


@setting
def parameters_that_are_not_contiguous() -> Setting:
    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return meta["w"].expand(4, 3).mT, meta["m"].mT

    def loss(p: Any, batch: Any) -> Tensor:
        wide, square = p
        return (batch[0] @ square @ wide).sin().pow(2).mean()

    def step(meta: Any, p: Any, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(loss)(p, batch)
        return tuple(old - meta["lr"] * by.mT.contiguous().mT for old, by in zip(p, slope, strict=True)), fm.StepInfo(
            value
        )

    base = by_hand(step, {"m": torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()})
    problem = fm.Problem(init, step, lambda meta, p, query, seed: loss(p, query))
    return Setting(problem, base.meta, base.tasks)


@setting
def tensors_written_in_place_inside_the_loss() -> Setting:
    def loss(meta: Any, w: Tensor, batch: Any) -> Tensor:
        filled = torch.zeros_like(w)
        filled[1:] = w[1:] ** 2 * meta["a"]
        filled.add_(w.sin())
        return wavy(filled, batch)

    return descending(loss, {"a": leaf(0.5)})


@setting
def a_frozen_initial_point() -> Setting:
    made = weights_of_a_learned_loss()
    return made._replace(meta={**made.meta, "params": fm.tree.detach(made.meta["params"])})


@setting
def a_kinked_net() -> Setting:
    with fm.rng.forked(2):
        return of_module(nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).double())


@setting
def a_swish_net() -> Setting:
    return of_module(mlp(nn.SiLU(), nn.Linear(4, 4).double(), nn.Mish()))


def first_task(tasks: fm.Task) -> fm.Task:
    return fm.Task(*fm.tree.map(lambda leaf: leaf[0], tasks[:2]))


def loss_of(case: Setting, estimator: Any, strategy: str = "single", memory: Any = fm.StoreAll(), **more: Any) -> Tensor:  # noqa: B008
    options = {"steps": STEPS, "estimator": estimator, "memory": memory, **more}
    if strategy == "single":
        return fm.unroll(case.problem, case.meta, first_task(case.tasks), **options).loss
    return fm.unroll_batch(case.problem, case.meta, case.tasks, strategy=strategy, **options).loss  # type: ignore[arg-type]


def gradient(case: Setting, estimator: Any, *run: Any, twice: bool = False, **more: Any) -> dict[str, Tensor]:
    """The meta-gradient, or the gradient of its square, by name."""
    leaves = {name: each for name, each in fm.tree.named_leaves(case.meta, "meta") if each.requires_grad}
    wanted = list(leaves.values())
    first = list(torch.autograd.grad(loss_of(case, estimator, *run, **more), wanted, create_graph=twice))
    found = list(torch.autograd.grad(fm.tree.dot(first, first), wanted)) if twice else first
    return dict(zip(leaves, found, strict=True))


def close(got: Any, expected: Any, tolerance: float = TOLERANCES.memory) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@runs
@pytest.mark.parametrize("name", SETTINGS)
def test_the_meta_gradient_is_that_of_reverse(name: str, strategy: str, memory: Any) -> None:
    case = SETTINGS[name]()
    close(gradient(case, fm.MixedMode(), strategy, memory), gradient(case, fm.Reverse(), strategy))


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_not_that_of_first_order(name: str, strategy: str) -> None:
    """Otherwise a derivative that is lost would not show."""
    case = SETTINGS[name]()
    exact = gradient(case, fm.Reverse(), strategy)
    try:
        constant = gradient(case, fm.FirstOrder(), strategy)
    except fm.UnreachedLeafError:
        return
    apart = max(float((constant[key] - exact[key]).abs().max()) for key in exact)
    assert apart > 1e-5 or name == "only the value is used"


@pytest.mark.parametrize(("strategy", "memory"), [RUNS[0], RUNS[2], RUNS[5]], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_second_derivative_is_that_of_reverse(name: str, strategy: str, memory: Any) -> None:
    case = SETTINGS[name]()
    got = gradient(case, fm.MixedMode(), strategy, memory, twice=True)
    close(got, gradient(case, fm.Reverse(), strategy, twice=True))


@pytest.mark.parametrize("name", ["weights of a learned loss", "predictions used after the gradient", "a swish net"])
def test_it_equals_finite_differences(name: str) -> None:
    problem, meta, tasks = SETTINGS[name]()
    figures = fm.testing.check_meta_grad(problem, meta, first_task(tasks), steps=STEPS, estimator=fm.MixedMode())
    assert not figures.vacuous
