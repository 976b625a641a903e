"""ForwardMode: the meta-gradient of Reverse, in memory that does not grow with the number of steps."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_mixed_mode import SETTINGS, STEPS, by_hand, close, descending, first_task, gradient, leaf, loss_of, mlp, wavy
from torch import Tensor

import funcmeta as fm
from funcmeta import optim
from funcmeta._live_bytes import LiveBytes

X, Y = torch.randn(6, 3).double(), torch.randn(6, 2).double()


@pytest.mark.parametrize(
    ("chunk", "strategy"), [(None, "single"), (3, "single"), (1, "vmap"), (None, "vmap"), (None, "loop")]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_meta_gradient_is_that_of_reverse(name: str, chunk: int | None, strategy: str) -> None:
    case = SETTINGS[name]()
    if chunk is not None:
        case = case._replace(meta=few(case.meta))
    close(gradient(case, fm.ForwardMode(chunk), strategy), gradient(case, fm.Reverse(), strategy))


def few(meta: Any) -> Any:
    """The same, where only leaves of at most four numbers are learned."""
    small = [each for each in fm.tree.leaves(meta) if each.numel() <= 4]
    return fm.tree.map(lambda each: each if any(each is one for one in small) else each.detach(), meta)


def test_the_toy_problem() -> None:
    """One step on a x² from a = 1 at x = 2: a' = 1 - x², L = a' x² and dL/dx = 2 x a' - 2 x³ = -28."""

    def step(x: Tensor, a: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda a: a * x**2)(a)
        return a - slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda x, task, seed: torch.ones(()), step, lambda x, a, query, seed: a * x**2)
    x = torch.tensor(2.0, requires_grad=True)
    out = fm.unroll(problem, x, fm.Task(torch.ones(1), None), steps=1, estimator=fm.ForwardMode())
    out.loss.backward()
    assert float(x.grad) == -28.0  # type: ignore[arg-type]
    assert float(out.loss.detach()) == -12.0


def hypers(learned: Any = True, **options: Any) -> tuple[fm.Problem, dict[str, Tensor], fm.Task]:
    """A net trained from a fixed start, whose learning rate and momentum are learned."""
    problem = fm.inner_problem(
        mlp(),
        lambda meta, predict, batch: F.mse_loss(predict(batch[0]), batch[1]),
        optimizer=lambda meta: optim.sgd(meta["lr"], momentum=meta["momentum"]),
        **options,
    )
    return problem, {"lr": leaf(0.05), "momentum": leaf(0.6)}, fm.Task((X, Y), (X + 0.1, Y))


@pytest.mark.parametrize("chunk", [None, 2])
def test_frozen_weights_are_held_once_for_all_directions(chunk: int | None) -> None:
    """Eight directions through a frozen layer of 50,000 weights, of which no direction makes a copy."""
    torch.manual_seed(0)
    frozen = torch.nn.Linear(1000, 50).double().requires_grad_(False)
    net = torch.nn.Sequential(frozen, torch.nn.Tanh(), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 2)).double()
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: F.mse_loss(predict(batch[0]), batch[1]),
        optimizer=lambda meta: optim.sgd(meta["rates"], momentum=meta["momentum"]),
    )
    start = {name: each.detach() for name, each in fm.init_params(net).items()}
    batch = torch.randn(6, 1000).double(), Y

    def run(estimator: Any) -> tuple[int, list[Tensor], Any]:
        meta = {
            "params": start,
            "rates": {name: leaf(0.1) for name in start},
            "momentum": {name: leaf(0.5) for name in start},
        }
        gc.collect()
        with LiveBytes() as live:
            out = fm.unroll(problem, meta, fm.Task(batch, batch), steps=3, estimator=estimator)
            moving = [each for each in fm.tree.leaves(meta) if each.requires_grad]
            found = torch.autograd.grad(out.loss + out.state.params["3.weight"].square().sum(), moving)
        return live.peak, list(found), out.state.buffers

    peak, found, buffers = run(fm.ForwardMode(chunk))
    _, expected, by_reverse = run(fm.Reverse())
    close(found, expected)
    assert peak < 1000 * 50 * 8
    assert {name for name, each in buffers.items() if each.requires_grad} == {
        name for name, each in by_reverse.items() if each.requires_grad
    }


def test_many_steps_at_the_memory_of_few() -> None:
    def run(steps: int, estimator: Any) -> tuple[int, Any, Tensor]:
        case = hypers()
        gc.collect()
        with LiveBytes() as live:
            out = fm.unroll(*case, steps=steps, estimator=estimator)
            found = torch.autograd.grad(out.loss, fm.tree.leaves(case[1]))
        return live.peak, found, out.info.losses

    few, _, _ = run(4, fm.ForwardMode())
    many, got, losses = run(100, fm.ForwardMode())
    assert many - few < 100 * 3 * 8 + 1000  # the losses, stacked at the end
    whole = hypers()
    out = fm.unroll(*whole, steps=100)
    close(list(got), list(torch.autograd.grad(out.loss, fm.tree.leaves(whole[1]))), 1e-11)
    close(losses, out.info.losses)
    assert run(24, fm.Reverse())[0] - run(4, fm.Reverse())[0] > 20 * 3 * 8 + 1000


@pytest.mark.parametrize("trajectory", [False, True, lambda step: 0.5 + step])
def test_results_are_those_of_reverse(trajectory: Any) -> None:
    ours, theirs = (
        fm.unroll(*hypers(trajectory_loss=trajectory), steps=3, estimator=each, seed=4)
        for each in (fm.ForwardMode(1), fm.Reverse())
    )
    close(ours.loss.detach(), theirs.loss.detach())
    close(ours.info.losses, theirs.info.losses)
    close(ours.state, fm.tree.detach(theirs.state))
    close(ours.carry, theirs.carry)
    assert ours.state.params["0.weight"].requires_grad
    assert not ours.state.step.requires_grad
    assert not ours.carry.state.params["0.weight"].requires_grad


@pytest.mark.parametrize("memory", [fm.Segments(1), fm.Revolve(2)], ids=repr)
def test_policies_have_no_effect(memory: Any) -> None:
    ran = []

    def loss(meta: Any, w: Tensor, batch: Any) -> Tensor:
        ran.append(1)
        return wavy(w * meta["a"], batch)

    case = descending(loss, {"a": leaf(0.7)})
    got = gradient(case, fm.ForwardMode(), "single", memory)
    assert len(ran) == STEPS + 1
    close(got, gradient(case, fm.Reverse()))


@pytest.mark.parametrize(("chunk", "runs"), [(None, 1), (1, 5), (2, 3), (5, 1), (9, 1)])
def test_steps_are_taken_again_for_each_chunk(chunk: int | None, runs: int) -> None:
    ran = []

    def loss(meta: Any, w: Tensor, batch: Any) -> Tensor:
        ran.append(1)
        return wavy(w * meta["a"], batch)

    case = descending(loss, {"a": leaf(0.7)})
    close(gradient(case, fm.ForwardMode(chunk)), gradient(case, fm.Reverse()))
    assert len(ran) == (runs + 1) * STEPS + 1


def test_no_steps() -> None:
    problem, meta, task = hypers()
    meta["params"] = fm.init_params(mlp())
    got, expected = (
        torch.autograd.grad(
            fm.unroll(problem, meta, task, steps=0, estimator=each).loss, fm.tree.leaves(meta), materialize_grads=True
        )
        for each in (fm.ForwardMode(), fm.Reverse())
    )
    close(got, expected)


def test_a_state_with_more_than_floating_point_tensors() -> None:
    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {
            "w": meta["w"] * 1,
            "n": torch.tensor(0),
            "name": "run",
            "none": None,
            "count": 0,
            "on": torch.tensor(True),
        }

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: wavy(w, batch) * (1 + state["n"]) * state["on"])(state["w"])
        new = {"w": state["w"] - meta["lr"] * slope, "n": state["n"] + 1, "count": state["count"] + 1}
        return {**state, **new}, fm.StepInfo(loss, aux={"n": state["n"], "name": "aux", "w": state["w"]})

    base = by_hand(step)
    problem = fm.Problem(init, step, lambda meta, state, query, seed: wavy(state["w"], query) * state["count"])
    case = base._replace(problem=problem)
    for chunk in (None, 1):
        close(gradient(case, fm.ForwardMode(chunk)), gradient(case, fm.Reverse()))
    out = fm.unroll(problem, case.meta, first_task(case.tasks), steps=STEPS, estimator=fm.ForwardMode())
    state = out.state
    assert (state["name"], state["none"], state["count"], int(state["n"])) == ("run", None, STEPS, STEPS)
    assert [int(each["n"]) for each in out.info.aux] == [0, 1, 2]
    assert out.info.aux[1]["name"] == "aux"


def test_leaves_of_two_dtypes_and_integers_in_meta() -> None:
    case = descending(lambda meta, w, batch: wavy(w * meta["a"].double(), batch) * meta["n"], {"a": leaf(0.7)})
    case.meta.update(a=torch.tensor(0.7, requires_grad=True), n=torch.tensor(2))
    got, expected = gradient(case, fm.ForwardMode()), gradient(case, fm.Reverse())
    assert got["meta['a']"].dtype == torch.float32
    close(got["meta['w']"], expected["meta['w']"])
    torch.testing.assert_close(got["meta['a']"], expected["meta['a']"], rtol=1e-6, atol=1e-7)


def test_the_loss_can_be_scaled_and_added() -> None:
    case = hypers()
    out = fm.unroll(*case, steps=2, estimator=fm.ForwardMode())
    (3 * out.loss + 2 * case[1]["lr"]).backward()
    exact = torch.autograd.grad(fm.unroll(*case, steps=2).loss, case[1]["lr"])[0]
    close(case[1]["lr"].grad, 3 * exact + 2)


@pytest.mark.parametrize("why", ["no_grad", "no leaf"])
def test_without_anything_to_differentiate(why: str) -> None:
    problem, meta, task = hypers()
    if why == "no leaf":
        meta = fm.tree.detach(meta)
    with torch.set_grad_enabled(why == "no leaf"):
        out = fm.unroll(problem, meta, task, steps=3, estimator=fm.ForwardMode())
    assert not out.loss.requires_grad
    close(out.loss, fm.unroll(*hypers(), steps=3).loss.detach())


def test_without_grad_mode_no_tangent_is_computed() -> None:
    taken = []
    problem, meta, task = hypers()

    def step(*arguments: Any) -> Any:
        taken.append(1)
        return problem.step(*arguments)

    with torch.no_grad():
        fm.unroll(problem._replace(step=step), meta, task, steps=3, estimator=fm.ForwardMode(1))
    assert len(taken) == 3


def test_a_leaf_without_use_has_the_derivative_zero() -> None:
    problem, meta, task = hypers()
    meta["unused"] = leaf(1.0)
    out = fm.unroll(problem, meta, task, steps=2, estimator=fm.ForwardMode())
    assert float(torch.autograd.grad(out.loss, meta["unused"])[0]) == 0.0


def test_a_carry_goes_on() -> None:
    problem, meta, task = hypers()
    first = fm.unroll(problem, meta, task, steps=2, estimator=fm.ForwardMode())
    rest = [
        torch.autograd.grad(
            fm.unroll(problem, meta, task, steps=2, estimator=each, carry=first.carry).loss, fm.tree.leaves(meta)
        )
        for each in (fm.ForwardMode(), fm.Reverse())
    ]
    close(*rest)


# ---- refused


def test_a_carry_that_requires_grad() -> None:
    problem, meta, task = hypers()
    first = fm.unroll(problem, meta, task, steps=2)
    with pytest.raises(fm.ArgumentError, match=r"The initial state requires grad by itself.*out\.carry, which is det"):
        fm.unroll(problem, meta, task, steps=2, estimator=fm.ForwardMode(), carry=fm.Carry(first.state, 2))


def test_an_initial_point_of_its_own_that_requires_grad() -> None:
    outside = leaf(0.1, 0.2, 0.3)
    case = descending(lambda meta, w, batch: wavy(w, batch))
    problem = case.problem._replace(init=lambda meta, task, seed: outside * meta["w"])
    with pytest.raises(fm.ArgumentError, match="The initial state requires grad by itself"):
        loss_of(case._replace(problem=problem), fm.ForwardMode())


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_inside_torch_func(transform: str) -> None:
    problem, meta, task = hypers()
    inputs = fm.tree.map(lambda each: each.detach()[None] if transform == "vmap" else each.detach(), meta)
    with pytest.raises(fm.ArgumentError, match=r"cannot run inside it\. Use Reverse\(\)"):
        getattr(torch.func, transform)(
            lambda meta: fm.unroll(problem, meta, task, steps=1, estimator=fm.ForwardMode()).loss
        )(inputs)


def test_a_second_derivative() -> None:
    case = hypers()
    out = fm.unroll(*case, steps=2, estimator=fm.ForwardMode())
    with pytest.raises(fm.GraphError, match=r"create_graph=True, but this estimator's cannot .* Use Reverse\(\) or"):
        torch.autograd.grad(out.loss, case[1]["lr"], create_graph=True)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True, "all"])
def test_bad_chunks(chunk: Any) -> None:
    with pytest.raises(
        fm.ArgumentError, match=r"chunk is .*, expected a positive integer or None\. Pass e\.g\. chunk=8"
    ):
        fm.ForwardMode(chunk)


@pytest.mark.parametrize("where", ["loss", "step", "meta-loss"])
def test_a_captured_tensor(where: str) -> None:
    outside = leaf(0.5)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        scale = outside if where == "loss" else 1.0
        value, slope = fm.value_and_grad(lambda w: wavy(w * scale, batch))(w)
        return w - meta["lr"] * slope * (outside if where == "step" else 1.0), fm.StepInfo(value)

    case = by_hand(step, judge=lambda meta, w, query, seed: w.sum() * (outside if where == "meta-loss" else 1.0))
    with pytest.raises(fm.CapturedTensorError, match="`outside`"):
        loss_of(case, fm.ForwardMode())


def test_estimators_compare_and_print() -> None:
    assert fm.ForwardMode(2) == fm.ForwardMode(2) != fm.ForwardMode()
    assert repr(fm.ForwardMode(2)) == "ForwardMode(chunk=2)"
    assert repr(fm.MixedMode()) == "MixedMode()"
