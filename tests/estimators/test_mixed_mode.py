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


def loss_of(case: Setting, estimator: Any, strategy: str = "single", memory: Any = None, **more: Any) -> Tensor:
    options = {"steps": STEPS, "estimator": estimator, "memory": memory or fm.StoreAll(), **more}
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


# ---- where forward over reverse does not go


class Cube(torch.autograd.Function):
    """x³ with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * by * x**2


class OnceCube(Cube):
    """The same, differentiable once only."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * by * x**2


def cubing(meta: Any, w: Tensor, batch: Any) -> Tensor:
    return wavy(Cube.apply(w * meta["a"]), batch)  # type: ignore[no-untyped-call]


def taking_gradients(meta: Any, w: Tensor, batch: Any) -> Tensor:
    slope = fm.value_and_grad(lambda u: wavy(u * meta["a"], batch))(w)[1]
    return wavy(w - 0.1 * slope, batch)


def taking_gradients_of_torch(meta: Any, w: Tensor, batch: Any) -> Tensor:
    (slope,) = torch.autograd.grad(wavy(w * meta["a"], batch), w, create_graph=True)
    return wavy(w - 0.1 * slope, batch)


def unrolling(meta: Any, w: Tensor, batch: Any) -> Tensor:
    """The loss after an inner training of its own."""
    inner = descending(lambda meta, u, batch: wavy(u * meta["a"], batch))
    own = {"w": w, "lr": meta["lr"], "a": meta["a"]}
    task = fm.Task((batch[0].detach(), batch[1]), (batch[0].detach(), batch[1]))
    return fm.unroll(inner.problem, own, task, steps=2).loss


def square_of(meta: Any, w: Tensor) -> Tensor:
    return torch.outer(w, meta["a"].sin()) + 2 * torch.eye(3, dtype=w.dtype)


FALLBACKS: dict[str, tuple[Callable[[Any, Tensor, Any], Tensor], str]] = {
    "a gradient in the loss": (taking_gradients, "the inner loss takes a gradient by itself"),
    "torch's gradient in the loss": (taking_gradients_of_torch, "the inner loss takes a gradient by itself"),
    "an unroll in the loss": (unrolling, "the inner loss takes a gradient by itself"),
    "an autograd.Function": (
        cubing,
        "the inner loss runs the autograd.Function Cube",
    ),
    "an operation without forward mode": (
        lambda meta, w, batch: F.soft_margin_loss(w * meta["a"], torch.ones_like(w)),
        "torch said: Trying to use forward AD with soft_margin_loss_backward",
    ),
    "grid sampling": (
        lambda meta, w, batch: torch.cos(
            F.grid_sample(
                torch.outer(w, w)[None, None], (w * meta["a"]).tanh().expand(1, 2, 2, 3)[..., :2], align_corners=True
            )
        ).sum(),
        "torch said: Trying to use forward AD with grid_sampler_2d",
    ),
    "det": (
        lambda meta, w, batch: torch.det(square_of(meta, w)).sin(),
        "torch differentiates the gradient of torch.linalg.det wrongly in forward mode",
    ),
    "logdet": (
        lambda meta, w, batch: torch.logdet(square_of(meta, w)) ** 2,
        "torch differentiates the gradient of torch.linalg.slogdet wrongly in forward mode",
    ),
    "solve": (
        lambda meta, w, batch: torch.linalg.solve(square_of(meta, w), w).sin().sum(),
        "torch differentiates the gradient of torch.linalg.solve wrongly in forward mode",
    ),
    "cumprod": (
        lambda meta, w, batch: (w * meta["a"]).cumprod(0).sin().sum(),
        "torch differentiates the gradient of torch.cumprod wrongly in forward mode",
    ),
    "scatter_reduce": (
        lambda meta, w, batch: (
            torch.ones(2, dtype=w.dtype)
            .scatter_reduce(0, torch.tensor([0, 1, 1]), w * meta["a"], reduce="prod")
            .sin()
            .sum()
        ),
        "torch differentiates the gradient of torch.scatter_reduce wrongly in forward mode",
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize(("loss", "why"), FALLBACKS.values(), ids=FALLBACKS)
def test_a_fallback_is_told_and_exact(loss: Any, why: str, strategy: str) -> None:
    if strategy == "vmap" and loss in (taking_gradients_of_torch, unrolling, cubing):
        pytest.skip("what this loss does, torch cannot do inside vmap")
    case = descending(loss, {"a": leaf(0.7, 1.1, 0.4)})
    for twice in (False, True):
        expected = gradient(case, fm.Reverse(), strategy, twice=twice)
        with pytest.warns(fm.FallbackWarning, match="MixedMode takes the derivative .* The result is as exact") as told:
            got = gradient(case, fm.MixedMode(), strategy, fm.StoreAll() if twice else fm.Segments(2), twice=twice)
        assert all(why in str(each.message) for each in told if each.category is fm.FallbackWarning)
        close(got, expected)


@pytest.mark.filterwarnings("default")
def test_a_step_without_an_inner_gradient_is_told() -> None:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        slope = torch.func.grad(wavy)(w, batch)
        return w - meta["lr"] * slope, fm.StepInfo(wavy(w, batch))

    case = by_hand(step)
    with pytest.warns(fm.FallbackWarning, match=r"nothing to do in step \d, which took no gradient .* as by Reverse"):
        got = gradient(case, fm.MixedMode())
    close(got, gradient(case, fm.Reverse()))


def test_a_loss_that_can_be_differentiated_once_is_refused() -> None:
    case = descending(lambda meta, w, batch: wavy(OnceCube.apply(w), batch))  # type: ignore[no-untyped-call]
    with pytest.raises(fm.DetachedError, match=r"OnceCube, an autograd\.Function whose backward is marked"):
        loss_of(case, fm.MixedMode())


def test_a_compiled_loss_is_refused() -> None:
    compiled = torch.compile(wavy, backend="aot_eager")
    case = descending(lambda meta, w, batch: compiled(w, batch))
    with pytest.raises(fm.DetachedError, match=r"compiled by torch\.compile"):
        loss_of(case, fm.MixedMode())


def test_a_detached_loss_is_refused() -> None:
    case = descending(lambda meta, w, batch: wavy(w.detach(), batch))
    with pytest.raises(fm.DetachedError, match="does not depend on the parameters"):
        loss_of(case, fm.MixedMode())


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
def test_a_captured_tensor_is_refused(strategy: str, memory: Any) -> None:
    outside = leaf(0.5, 0.2, 0.1)
    case = descending(lambda meta, w, batch: wavy(w * outside, batch))
    with pytest.raises(fm.CapturedTensorError, match="`outside`"):
        loss_of(case, fm.MixedMode(), strategy, memory)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode()], ids=repr)
def test_a_leaf_made_inside_the_loss_is_refused(estimator: Any) -> None:
    case = descending(lambda meta, w, batch: wavy(w * torch.ones(3, dtype=w.dtype, requires_grad=True), batch))
    with pytest.raises(fm.CapturedTensorError):
        loss_of(case, estimator)


def test_a_loss_that_depends_on_something_else_the_second_time() -> None:
    many = [leaf(0.5), leaf(0.7)]

    def loss(meta: Any, w: Tensor, batch: Any) -> Tensor:
        return wavy(w * meta["many"][len(ran) % 2], batch)

    case, ran = descending(loss), [0]
    case.meta["many"] = many
    task = first_task(case.tasks)
    total = fm.unroll(
        case.problem, case.meta, task, steps=2, estimator=fm.MixedMode(), carry=fm.Carry(case.meta["w"], 0)
    )
    ran.append(1)
    with pytest.raises(fm.ReplayError, match="depended on other tensors than the first time"):
        total.loss.backward()


# ---- cost


def counted(memory: Any, estimator: Any, strategy: str = "single") -> tuple[int, int]:
    """How often the user's loss runs: until the meta-loss, and in the backward pass."""
    ran = [0]

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        ran[0] += 1
        return mse(meta, predict, batch)

    case = of_module(mlp(), loss)
    if strategy != "single":
        loss_of(case, estimator, strategy, memory, steps=6)  # the first call compares with a loop
        ran[0] = 0
    total = loss_of(case, estimator, strategy, memory, steps=6)
    forward = ran[0]
    total.backward()
    return forward, ran[0] - forward


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize(
    ("memory", "backward"),
    [(fm.StoreAll(), 6), (fm.Segments(2), 10), (fm.Segments(1), 11), (fm.Revolve(3), None)],
    ids=str,
)
def test_each_step_is_evaluated_once_more(memory: Any, backward: int | None, strategy: str) -> None:
    """One evaluation for the derivative of each step, beyond those of the policy; the meta-loss once."""
    repeated = fm.plan(memory, 6).evaluations - 6
    assert backward in (None, 6 + repeated)
    assert counted(memory, fm.MixedMode(), strategy) == (7, 6 + repeated)
    assert counted(memory, fm.Reverse(), strategy) == (7, repeated)


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)),
        (64, 3),
    ),
    "lstm": (Recurrent, (16, 12, 3)),
}


def peak(net: str, estimator: Any, memory: Any, steps: int) -> int:
    build, shape = NETS[net]
    with fm.rng.forked(2):
        module = build().double()
        batch = numbers(*shape), numbers(shape[0], 2)
    case = of_module(module)._replace(tasks=fm.Task(batch, batch))
    gc.collect()
    with LiveBytes() as live:
        out = fm.unroll(case.problem, case.meta, case.tasks, steps=steps, estimator=estimator, memory=memory)
        torch.autograd.grad(out.loss, fm.tree.leaves(case.meta))
    return int(live.peak)


@pytest.mark.parametrize("net", NETS)
def test_it_keeps_less_than_reverse(net: str) -> None:
    """A further step costs its parameters and optimizer state, not its graphs."""

    def growth(estimator: Any, memory: Any) -> float:
        return (peak(net, estimator, memory, 12) - peak(net, estimator, memory, 4)) / 8

    assert growth(fm.MixedMode(), fm.StoreAll()) < 0.5 * growth(fm.Reverse(), fm.StoreAll())
    assert peak(net, fm.MixedMode(), fm.StoreAll(), 12) < 0.5 * peak(net, fm.Reverse(), fm.StoreAll(), 12)


# ---- around the backward pass


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_backward_twice(memory: Any, strategy: str) -> None:
    case = SETTINGS["dropout in a module"]()
    loss, leaves = loss_of(case, fm.MixedMode(), strategy, memory), fm.tree.leaves(case.meta)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    close(torch.autograd.grad(loss, leaves), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_a_part_of_the_leaves() -> None:
    case = SETTINGS["weights of a learned loss"]()
    whole = gradient(case, fm.Reverse())
    for name, each in fm.tree.named_leaves(case.meta, "meta"):
        (slope,) = torch.autograd.grad(loss_of(case, fm.MixedMode()), each)
        close(slope, whole[name])


@pytest.mark.parametrize("fail_at", [1, STEPS + 2], ids=["forward", "backward"])
@pytest.mark.parametrize("strategy", ["single", "vmap"])
def test_it_works_again_after_an_exception(strategy: str, fail_at: int) -> None:
    ran = iter(range(1000))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        if next(ran) == fail_at:
            raise KeyboardInterrupt("in the middle")
        return mse(meta, predict, batch)

    case, before = of_module(mlp(nn.Dropout(0.4)), loss), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        gradient(case, fm.MixedMode(), strategy)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch._C._functorch.peek_interpreter_stack() is None
    close(gradient(case, fm.MixedMode(), strategy), gradient(case, fm.Reverse(), strategy))


def test_an_exception_in_the_backward_pass_leaves_the_loss_usable() -> None:
    fail = [False]

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        if fail[0]:
            raise KeyboardInterrupt("in the middle")
        return mse(meta, predict, batch)

    case = of_module(mlp(), loss)
    total, leaves = loss_of(case, fm.MixedMode()), fm.tree.leaves(case.meta)
    fail[0] = True
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(total, leaves, retain_graph=True)
    fail[0] = False
    close(list(torch.autograd.grad(total, leaves)), list(gradient(case, fm.Reverse()).values()))


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_the_second_evaluation_casts_as_the_first(memory: Any, strategy: str) -> None:
    """The loss is computed under autocast, its backward pass runs outside."""
    seen = []

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        seen.append(predict(batch[0]).dtype)
        return mse(meta, predict, batch)

    with fm.rng.forked(2):
        net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    problem = fm.inner_problem(net, loss, optimizer=optim.sgd(0.5))
    tasks = fm.tree.map(lambda leaf: leaf.float(), data()[:2])
    case, slopes = Setting(problem, {"params": fm.init_params(net)}, fm.Task(*tasks)), []
    for estimator in (fm.MixedMode(), fm.Reverse()):
        with torch.autocast("cpu", torch.bfloat16):
            if strategy != "single":  # the first call compares with a loop, which casts
                before = len(seen)
                loss_of(case, estimator, strategy, memory)
                del seen[before:]
            total = loss_of(case, estimator, strategy, memory)
        slopes.append(list(torch.autograd.grad(total, fm.tree.leaves(case.meta))))
    assert len(seen) > 3 * STEPS
    assert set(seen) == {torch.bfloat16 if strategy == "single" else torch.float32}  # torch casts nothing in vmap
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(*slopes, strict=True)) < 0.1


def test_without_grad_mode_nothing_is_kept() -> None:
    case = SETTINGS["dropout in a module"]()
    with torch.no_grad():
        out = loss_of(case, fm.MixedMode())
    assert not out.requires_grad
    close(out, loss_of(case, fm.Reverse()).detach())


def test_inside_torch_func_it_is_reverse() -> None:
    case = SETTINGS["weights of a learned loss"]()

    def loss(meta: Any) -> Tensor:
        return loss_of(case._replace(meta=meta), fm.MixedMode())

    got = torch.func.grad(loss)(fm.tree.detach(case.meta))
    close(dict(fm.tree.named_leaves(got, "meta")), gradient(case, fm.Reverse()))


def test_a_carry_that_is_differentiated() -> None:
    case = SETTINGS["weights of a learned loss"]()
    task, leaves = first_task(case.tasks), fm.tree.leaves(case.meta)
    first = fm.unroll(case.problem, case.meta, task, steps=1, estimator=fm.MixedMode())
    carry = fm.Carry(first.state, 1)
    rest = fm.unroll(case.problem, case.meta, task, steps=STEPS - 1, carry=carry, estimator=fm.MixedMode())
    close(list(torch.autograd.grad(rest.loss, leaves)), list(gradient(case, fm.Reverse()).values()))


# ---- what is not a derivative, and what does not come out the same twice


def softly(meta: Any, predict: Any, batch: Any) -> Tensor:
    """A loss with a target that is computed under no_grad, and so a constant."""
    x, y = batch
    with torch.no_grad():
        target = predict(x).softmax(-1)
    return (predict(x) - y).square().mean() - (target * predict(x).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("estimator", [fm.MixedMode(), fm.ForwardMode()], ids=repr)
def test_no_grad_is_heeded(estimator: Any) -> None:
    """Forward mode alone would carry tangents through it."""
    with fm.rng.forked(4):
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    problem = fm.inner_problem(net, softly, optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=0.5))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.2).double().requires_grad_()}
    got, expected = (
        torch.autograd.grad(
            fm.unroll(problem, meta, fm.Task(batch, batch), steps=3, estimator=each).loss, fm.tree.leaves(meta)
        )
        for each in (estimator, fm.Reverse())
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_loss_that_comes_out_otherwise_in_the_backward_pass() -> None:
    """The variable of the loop has its last value there."""

    def step(meta: Any, w: Tensor, batch: Tensor, seed: int) -> Any:
        for row in batch:
            value, slope = fm.value_and_grad(lambda w: (torch.sin(w * row) ** 2).sum())(w)  # noqa: B023
            w = w - meta["lr"] * slope
        return w, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, lambda meta, w, query, seed: (w**3).sum())
    meta = {"w": torch.tensor([0.3, 0.8]).double().requires_grad_(), "lr": torch.tensor(0.1).double().requires_grad_()}
    task = fm.Task(torch.tensor([[1.0, 2.0], [0.5, 1.5]]).double(), None)
    loss = fm.unroll(problem, meta, task, steps=2, estimator=fm.MixedMode()).loss
    with pytest.raises(
        fm.ReplayError, match=r"evaluated again in the backward pass and came out as .* no loop variables"
    ):
        loss.backward()


def test_a_fallback_draws_what_reverse_draws() -> None:
    """The evaluation that found the reason to fall back has drawn already."""

    def step(meta: Any, w: Tensor, batch: Tensor, seed: int) -> Any:
        def loss(w: Tensor) -> Tensor:
            kept = torch.linalg.det(w.outer(w) + 2 * torch.eye(2).double())
            return (kept * torch.sin(w * batch) ** 2 * torch.rand(2).double()).sum()

        value, slope = fm.value_and_grad(loss)(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, lambda meta, w, query, seed: (w**3).sum())
    meta = {"w": torch.tensor([0.3, 0.8]).double().requires_grad_(), "lr": torch.tensor(0.1).double().requires_grad_()}
    task = fm.Task(torch.tensor([1.0, 2.0]).double(), None)
    with pytest.warns(fm.FallbackWarning, match="wrongly in forward mode"):
        got = fm.unroll(problem, meta, task, steps=3, estimator=fm.MixedMode())
    expected = fm.unroll(problem, meta, task, steps=3)
    assert torch.equal(got.info.losses, expected.info.losses)
    assert torch.equal(got.loss, expected.loss)
