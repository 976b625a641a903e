"""An exact estimator returns the exact meta-gradient or an error that names what is wrong and what to do."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim

WAYS = [("single", fm.StoreAll()), ("single", fm.Segments(2)), ("vmap", fm.StoreAll()), ("vmap", fm.Segments(2))]
ways = pytest.mark.parametrize(("strategy", "memory"), WAYS, ids=[f"{name} {memory}" for name, memory in WAYS])
memories = pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)

OUTSIDE = torch.tensor(2.0, requires_grad=True)
WEIGHTS = {"decay": torch.tensor(0.1, requires_grad=True)}


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data(strategy: str = "single") -> fm.Task:
    tasks = (2,) if strategy == "vmap" else ()
    return fm.Task(*[(torch.randn(*tasks, 5, 3), torch.randn(*tasks, 5, 2)) for _ in range(2)])


def new_meta(module: nn.Module, **more: float) -> dict[str, Any]:
    extra = {name: torch.tensor(value, requires_grad=True) for name, value in more.items()}
    return {"params": fm.init_params(module), **extra}


def run(problem: fm.Problem, meta: Any, strategy: str = "single", steps: int = 3, **options: Any) -> fm.Unrolled:
    if strategy == "vmap":
        return fm.unroll_batch(problem, meta, data("vmap"), steps=steps, strategy="vmap", **options)
    return fm.unroll(problem, meta, data(), steps=steps, **options)


def usual(loss: Any = mse, *, module: nn.Module | None = None, transform: Any = None, **options: Any) -> fm.Unrolled:
    """The usual problem, with a loss, a module or an optimizer of one's own."""
    module = module or net()
    problem = fm.inner_problem(module, loss, optimizer=transform or optim.sgd(0.1))
    return run(problem, new_meta(module), **options)


# ---- captured tensors


class Scaled(nn.Module):
    """Holds a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.scale = torch.tensor(2.0, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale  # type: ignore[no-any-return]


class Deep(nn.Sequential):
    """Such a module as a part of another."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), Scaled())


class Judge:
    """A loss as an object with a tensor of its own."""

    def __init__(self) -> None:
        self.weight = torch.tensor(2.0, requires_grad=True)

    def __call__(self, meta: Any, predict: Any, batch: Any) -> Tensor:
        return self.weight * mse(meta, predict, batch)

    def method(self, meta: Any, predict: Any, batch: Any) -> Tensor:
        return self.weight * mse(meta, predict, batch)


def in_the_loss(**options: Any) -> Any:
    local = torch.tensor(2.0, requires_grad=True)
    return usual(lambda meta, predict, batch: local * mse(meta, predict, batch), **options)


def a_global(**options: Any) -> Any:
    return usual(lambda meta, predict, batch: OUTSIDE * mse(meta, predict, batch), **options)


def in_a_dict(**options: Any) -> Any:
    return usual(lambda meta, predict, batch: WEIGHTS["decay"] * mse(meta, predict, batch), **options)


def in_a_list(**options: Any) -> Any:
    several = [torch.ones(()), torch.tensor(2.0, requires_grad=True)]
    return usual(lambda meta, predict, batch: several[1] * mse(meta, predict, batch), **options)


def in_a_default(**options: Any) -> Any:
    def loss(meta: Any, predict: Any, batch: Any, weight: Tensor = OUTSIDE) -> Tensor:
        return weight * mse(meta, predict, batch)

    return usual(loss, **options)


def in_the_optimizer(**options: Any) -> Any:
    rate = torch.tensor(0.1, requires_grad=True)
    return usual(transform=lambda meta: optim.sgd(rate), **options)


def in_a_fixed_optimizer(**options: Any) -> Any:
    return usual(transform=optim.sgd(torch.tensor(0.1, requires_grad=True)), **options)


def something_computed(**options: Any) -> Any:
    root = torch.tensor(2.0, requires_grad=True)
    computed = root.exp()
    return usual(lambda meta, predict, batch: computed * mse(meta, predict, batch), **options)


def the_outer_meta(**options: Any) -> Any:
    """The closure's meta in place of the argument."""
    module = net()
    outer = new_meta(module, lr=0.1)
    problem = fm.inner_problem(module, mse, optimizer=lambda meta: optim.sgd(outer["lr"]))
    return run(problem, outer, **options)


def another_module(**options: Any) -> Any:
    critic = nn.Linear(2, 1)
    return usual(lambda meta, predict, batch: critic(predict(batch[0])).square().mean(), **options)


CAPTURED: dict[str, tuple[Callable[..., Any], str]] = {
    "a closure of the loss": (in_the_loss, "`local`"),
    "a global": (a_global, "`OUTSIDE`"),
    "an entry of a dict": (in_a_dict, "`WEIGHTS['decay']`"),
    "an entry of a list": (in_a_list, "`several[1]`"),
    "a default": (in_a_default, "`default 0`"),
    "a callable object": (lambda **options: usual(Judge(), **options), "`weight`"),
    "a method": (lambda **options: usual(Judge().method, **options), "`weight`"),
    "a closure of the optimizer": (in_the_optimizer, "`rate`"),
    "a hyper-parameter": (in_a_fixed_optimizer, "`fixed['lr']` (float32[] on cpu)"),
    "a result": (something_computed, "`computed`"),
    "the outer meta": (the_outer_meta, "`outer['lr']`"),
    "another module": (another_module, "`critic."),
    "an attribute of the module": (
        lambda **options: usual(module=Deep(), **options),
        "`module['1.scale']` (float32[] on cpu)",
    ),
}


@ways
@pytest.mark.parametrize(("attempt", "name"), CAPTURED.values(), ids=CAPTURED)
def test_a_captured_tensor_is_named(attempt: Callable[..., Any], name: str, strategy: str, memory: Any) -> None:
    """At once, also where a policy replays; and the message says both what to do to learn it and to keep it."""
    advice = r".* requires grad and is used .* put it into `meta` .*pass \.detach\(\) of it"
    with pytest.raises(fm.CapturedTensorError, match=re.escape(name) + advice):
        attempt(strategy=strategy, memory=memory)


@ways
def test_a_captured_tensor_in_the_meta_loss(strategy: str, memory: Any) -> None:
    module, weight = net(), torch.tensor(2.0, requires_grad=True)

    def judge(meta: Any, predict: Any, batch: Any) -> Tensor:
        return weight * mse(meta, predict, batch)

    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1), meta_loss_fn=judge)
    with pytest.raises(fm.CapturedTensorError, match="`weight`"):
        run(problem, new_meta(module), strategy, memory=memory)


def test_a_captured_tensor_without_a_name_is_described() -> None:
    """It hides where Python cannot look into: the arguments of a partial function."""

    def weighted(weight: Tensor, meta: Any, predict: Any, batch: Any) -> Tensor:
        return weight * mse(meta, predict, batch)

    loss = functools.partial(weighted, torch.tensor(2.0, requires_grad=True))
    message = r"A tensor whose name could not be found \(float32\[\] on cpu\) requires grad"
    with pytest.raises(fm.CapturedTensorError, match=message):
        usual(loss)


def test_a_tensor_captured_in_a_later_step_only() -> None:
    """Under Segments the replay finds it."""
    local = torch.tensor(2.0, requires_grad=True)

    def step(meta: Any, w: Any, batch: Any, seed: int) -> Any:
        scale = local if int(w["count"]) == 2 else 1.0
        loss, slope = fm.value_and_grad(lambda w: scale * (w**2).sum())(w["w"])
        return {"w": w["w"] - 0.1 * slope, "count": w["count"] + 1}, fm.StepInfo(loss)

    problem = fm.Problem(
        lambda meta, task, seed: {"w": meta * 1, "count": torch.tensor(0)},
        step,
        lambda meta, w, query, seed: w["w"].sum(),
    )
    meta = torch.ones(2, requires_grad=True)
    with pytest.raises(fm.CapturedTensorError, match="`local`"):
        run(problem, meta)
    with pytest.raises(fm.CapturedTensorError, match="`local`"):
        run(problem, meta, memory=fm.Segments(2)).loss.backward()


@ways
def test_a_detached_capture_and_one_without_grad_are_constants(strategy: str, memory: Any) -> None:
    local = torch.tensor(2.0, requires_grad=True)
    loss = lambda meta, predict, batch: local.detach() * OUTSIDE.detach() * mse(meta, predict, batch)  # noqa: E731
    usual(loss, strategy=strategy, memory=memory).loss.backward()
    assert local.grad is None


def test_a_captured_tensor_is_no_matter_without_a_graph() -> None:
    with torch.no_grad():
        assert in_the_loss().loss.isfinite()


def begun_scaled(scale: Tensor) -> tuple[fm.Problem, nn.Module]:
    """A problem whose first state depends on a captured tensor."""
    module = net()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        state = problem.init(meta, task, seed)
        return state._replace(params={name: scale * tensor for name, tensor in state.params.items()})

    return problem._replace(init=init), module


@ways
@pytest.mark.parametrize("place", ["loss", "meta-loss", "init"])
@pytest.mark.parametrize("learned", [False, None], ids=["a meta without grad", "no meta"])
def test_a_captured_tensor_is_named_where_nothing_declared_requires_grad(
    learned: bool | None, place: str, strategy: str, memory: Any
) -> None:
    weight = torch.tensor(2.0, requires_grad=True)

    def weighted(meta: Any, predict: Any, batch: Any) -> Tensor:
        return weight * mse(meta, predict, batch)

    module = net()
    if place == "init":
        problem, module = begun_scaled(weight)
    else:
        losses = (weighted, mse) if place == "loss" else (mse, weighted)
        problem = fm.inner_problem(module, losses[0], optimizer=optim.sgd(0.1), meta_loss_fn=losses[1])
    meta = {} if learned is None else fm.tree.detach(new_meta(module))
    with pytest.raises(fm.CapturedTensorError, match=r"requires grad and is used .* put it into `meta`"):
        run(problem, meta, strategy, memory=memory)
    with torch.no_grad():
        assert run(problem, meta, strategy, memory=memory).loss.isfinite()


@pytest.mark.parametrize("estimator", [fm.MixedMode(), fm.ForwardMode(), fm.FirstOrder(), fm.Truncated(2)], ids=repr)
def test_every_estimator_looks_for_captured_tensors_where_nothing_declared_requires_grad(estimator: Any) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    module = net()
    problem = fm.inner_problem(module, lambda *each: weight * mse(*each), optimizer=optim.sgd(0.1))
    with pytest.raises(fm.CapturedTensorError, match="`weight`"):
        run(problem, {}, estimator=estimator)


def test_only_the_first_step_has_a_graph_where_nothing_declared_requires_grad() -> None:
    """And it comes out the same; a leaf that the step makes for itself was not captured."""
    modes = []

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        modes.append(torch.is_grad_enabled())
        with torch.enable_grad():
            own = w.detach().requires_grad_()
            loss = (own**2).sum()
            (slope,) = torch.autograd.grad(loss, own, create_graph=True)
        return w - 0.1 * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: torch.ones(2), step, lambda meta, w, query, seed: (w**2).sum())
    out = fm.unroll(problem, {}, fm.Task(torch.ones(1), None), steps=3)
    assert modes == [True, True, False, False]  # the first step a second time, because a leaf was met
    assert not out.loss.requires_grad
    assert not out.state.requires_grad
    with torch.no_grad():
        assert torch.equal(out.loss, fm.unroll(problem, {}, fm.Task(torch.ones(1), None), steps=3).loss)


# ---- graphs that are cut


@memories
@pytest.mark.parametrize("where", ["loss", "module"])
def test_a_compiled_loss_is_refused(where: str, memory: Any) -> None:
    """torch differentiates what torch.compile made once only, and says nothing where that gives first order."""
    torch._dynamo.reset()
    module = net()
    if where == "loss":
        error = torch.compile(lambda out, y: (out - y).square().mean(), backend="aot_eager")
        loss: Any = lambda meta, predict, batch: error(predict(batch[0]), batch[1])  # noqa: E731
    else:
        error = torch.compile(lambda x: torch.tanh(x) ** 2, backend="aot_eager")
        loss = lambda meta, predict, batch: error(predict(batch[0])).mean()  # noqa: E731
    problem, meta = fm.inner_problem(module, loss, optimizer=optim.sgd(0.1)), new_meta(module)
    with pytest.raises(fm.DetachedError, match=r"compiled by torch.compile.* of first order. Compile nothing in the"):
        run(problem, meta, memory=memory).loss.backward()


@memories
def test_first_order_allows_a_compiled_loss(memory: Any) -> None:
    torch._dynamo.reset()
    module, task = net(), data()
    error = torch.compile(lambda out, y: (out - y).square().mean(), backend="aot_eager")
    meta, slopes = new_meta(module), []
    for loss in (mse, lambda meta, predict, batch: error(predict(batch[0]), batch[1])):
        problem = fm.inner_problem(module, loss, optimizer=optim.sgd(0.1))
        out = fm.unroll(problem, meta, task, steps=3, estimator=fm.FirstOrder(), memory=memory)
        slopes.append(torch.autograd.grad(out.loss, fm.tree.leaves(meta)))
    torch.testing.assert_close(*slopes)


@memories
def test_under_vmap_a_compiled_loss_is_exact(memory: Any) -> None:
    """Inside torch.func, dynamo leaves the loss to torch.func.grad: nothing is cut, so nothing is refused."""
    torch._dynamo.reset()
    module, tasks = net(), data("vmap")
    error = torch.compile(lambda out, y: (out - y).square().mean(), backend="aot_eager")
    meta, slopes = new_meta(module), []
    for loss in (mse, lambda meta, predict, batch: error(predict(batch[0]), batch[1])):
        problem = fm.inner_problem(module, loss, optimizer=optim.sgd(0.5))
        out = fm.unroll_batch(problem, meta, tasks, steps=3, strategy="vmap", memory=memory)
        slopes.append(torch.autograd.grad(out.loss, fm.tree.leaves(meta)))
    torch.testing.assert_close(*slopes)


class Once(torch.autograd.Function):
    """A square whose backward torch does not differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * by


@memories
def test_a_function_that_is_differentiable_once_is_refused(memory: Any) -> None:
    """Where the parameters reach the loss by another way too, torch itself is silent."""

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return Once.apply(predict(batch[0])).mean()  # type: ignore[no-any-return]

    message = (
        r"Once, an autograd.Function whose backward is marked once_differentiable.*Give it a differentiable backward"
    )
    with pytest.raises(fm.DetachedError, match=message):
        usual(loss, memory=memory).loss.backward()
    assert usual(loss, memory=memory, estimator=fm.FirstOrder()).loss.requires_grad


@ways
def test_a_detached_inner_loss(strategy: str, memory: Any) -> None:
    message = (
        r"The inner loss does not depend on the parameters.*Compute it from the parameters that the function receives"
    )
    with pytest.raises(fm.DetachedError, match=message):
        usual(lambda meta, predict, batch: mse(meta, predict, batch).detach(), strategy=strategy, memory=memory)


@ways
def test_a_detached_meta_loss(strategy: str, memory: Any) -> None:
    module = net()
    for detached in (lambda *each: mse(*each).detach(), torch.no_grad()(mse), lambda *each: torch.zeros(())):
        problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1), meta_loss_fn=detached)
        with pytest.raises(fm.DetachedError, match=r"The meta-loss does not depend on meta.*from the arguments"):
            run(problem, new_meta(module), strategy, memory=memory)


# ---- leaves without a gradient


def unused(strategy: str, memory: Any, **options: Any) -> fm.Unrolled:
    module = net()
    problem = fm.inner_problem(module, mse, optimizer=lambda meta: optim.sgd(meta["lr"]))
    return run(problem, new_meta(module, lr=0.1, temperature=1.0, other=2.0), strategy, memory=memory, **options)


@pytest.mark.parametrize("strategy", ["single", "vmap"])
def test_a_leaf_without_a_gradient_is_named_at_once(strategy: str) -> None:
    message = r"No gradient reaches meta\['temperature'\], meta\['other'\], which requires grad.*take it out of `meta`"
    with pytest.raises(fm.UnreachedLeafError, match=message) as caught:
        unused(strategy, fm.StoreAll())
    assert caught.value.leaves == ("meta['temperature']", "meta['other']")


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("strategy", ["single", "vmap"])
def test_a_leaf_without_a_gradient_is_named_in_the_backward_pass_of_segments(strategy: str, length: int) -> None:
    loss = unused(strategy, fm.Segments(length)).loss
    with pytest.raises(fm.UnreachedLeafError, match=r"No gradient reaches meta\['temperature'\], meta\['other'\]"):
        loss.backward()


@pytest.mark.parametrize("length", [1, 2])
def test_segments_that_reach_no_leaf_at_all(length: int) -> None:
    """The state is attached, but nothing in it depends on meta."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w**2).sum())(w)
        return w - 0.1 * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: torch.ones(2), step, lambda meta, w, query, seed: w.sum())
    meta = {"unused": torch.ones(2, requires_grad=True)}
    with pytest.raises(fm.DetachedError, match="does not depend on meta"):
        run(problem, meta)
    with pytest.raises(fm.UnreachedLeafError, match=r"meta\['unused'\]"):
        run(problem, meta, memory=fm.Segments(length)).loss.backward()


@memories
def test_a_leaf_that_only_one_step_uses_is_reached(memory: Any) -> None:
    """No false alarm: the third of five steps reads it."""

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        w, count = state
        scale = meta["late"] if int(count) == 2 else 1.0
        loss, slope = fm.value_and_grad(lambda w: scale * (w**2).sum())(w)
        return (w - 0.1 * slope, count + 1), fm.StepInfo(loss)

    problem = fm.Problem(
        lambda meta, task, seed: (meta["w"] * 1, torch.tensor(0)), step, lambda meta, state, query, seed: state[0].sum()
    )
    meta = {"w": torch.ones(2, requires_grad=True), "late": torch.tensor(2.0, requires_grad=True)}
    run(problem, meta, steps=5, memory=memory).loss.backward()
    assert meta["late"].grad is not None


@pytest.mark.parametrize("strategy", ["single", "vmap"])
def test_leaves_that_do_not_ask_for_a_gradient_may_be_unused(strategy: str) -> None:
    module = net()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    run(problem, {**new_meta(module), "note": torch.zeros(3)}, strategy).loss.backward()


# ---- losses


LOSSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "per example": (
        lambda out: out.square().mean(1),
        r"has shape \[5\], expected \[\]. Reduce it by mean\(\) or sum\(\)",
    ),
    "one entry": (lambda out: out.square().mean().reshape(1), r"has shape \[1\], expected \[\]"),
    "integers": (lambda out: out.sum().long(), "is torch.int64, expected a floating-point tensor. Convert it before"),
    "complex": (lambda out: out.sum().to(torch.complex64), "is torch.complex64, expected a floating-point tensor"),
    "a pair": (lambda out: (out.sum(), 0), "is a tuple, expected a 0-d tensor. Return the loss itself"),
    "nothing": (lambda out: None, "is a NoneType, expected a 0-d tensor. Return the loss itself"),
}


@ways
@pytest.mark.parametrize(("bad", "message"), LOSSES.values(), ids=LOSSES)
def test_losses_that_are_none(bad: Callable[[Tensor], Any], message: str, strategy: str, memory: Any) -> None:
    with pytest.raises(fm.LossError, match="The inner loss " + message):
        usual(lambda meta, predict, batch: bad(predict(batch[0])), strategy=strategy, memory=memory)


@pytest.mark.parametrize(("bad", "message"), LOSSES.values(), ids=LOSSES)
def test_meta_losses_that_are_none(bad: Callable[[Tensor], Any], message: str) -> None:
    module = net()
    judge = lambda meta, predict, batch: bad(predict(batch[0]))  # noqa: E731
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1), meta_loss_fn=judge)
    with pytest.raises(fm.LossError, match="The meta-loss " + message):
        run(problem, new_meta(module))


def test_a_share_that_is_no_loss() -> None:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w**2).sum())(w)
        return w - 0.1 * slope, fm.StepInfo(loss, meta_loss=w)

    problem = fm.Problem(lambda meta, task, seed: meta * 1, step, None)
    with pytest.raises(fm.LossError, match=r"The meta-loss share of step 0 has shape \[2\], expected \[\]"):
        run(problem, torch.ones(2, requires_grad=True))


@memories
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(value: float, memory: Any) -> None:
    module, (support, query, _) = net(), data()
    task = fm.Task(lambda step: (support[0], support[1] + (value if step == 3 else 0.0)), query)
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    with pytest.raises(fm.NonFiniteError, match=rf"The inner loss of step 3 is {value}. Lower the inner learning rate"):
        fm.unroll(problem, new_meta(module), task, steps=5, memory=memory)
    first = fm.unroll(problem, new_meta(module), task, steps=2)
    with pytest.raises(fm.NonFiniteError, match="The inner loss of step 3 is"):
        fm.unroll(problem, new_meta(module), task, steps=2, carry=first.carry)


@memories
def test_a_loss_that_is_not_finite_names_the_task(memory: Any) -> None:
    module, task = net(), data("vmap")
    task.support[1][1] = float("inf")
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    with pytest.raises(fm.NonFiniteError, match="The inner loss of step 0, task 1 is inf"):
        fm.unroll_batch(problem, new_meta(module), task, steps=2, strategy="vmap", memory=memory)


def test_a_loss_that_is_not_finite_is_told_without_grad_too() -> None:
    with torch.no_grad(), pytest.raises(fm.NonFiniteError, match="step 0 is nan"):
        usual(lambda meta, predict, batch: mse(meta, predict, batch) * float("nan"))


# ---- states that change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a new key": (lambda state: {**state, "extra": state["w"]}, r"unexpected state\['extra'\]. Step 0 changed it"),
    "a lost key": (lambda state: {"w": state["w"]}, r"missing state\['n'\]"),
    "another kind": (lambda state: list(state.values()), r"missing state\['w'\], state\['n'\]"),
    "another dtype": (
        lambda state: {**state, "w": state["w"].double()},
        r"state\['w'\] is float64\[2\].*Step 0 changed it",
    ),
    "another shape": (
        lambda state: {**state, "w": state["w"][:1]},
        r"state\['w'\] is float32\[1\].*, expected float32\[2\]",
    ),
    "no tensor any more": (lambda state: {**state, "n": 3}, r"state\['n'\] is 3 \(int\), expected int64\[\] on cpu"),
}


@memories
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_state_that_changes(change: Callable[[dict[str, Any]], Any], message: str, memory: Any) -> None:
    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w**2).sum())(state["w"])
        return change({"w": state["w"] - 0.1 * slope, "n": state["n"] + 1}), fm.StepInfo(loss)

    def init(meta: Any, task: Any, seed: int) -> Any:
        return {"w": meta * 1, "n": torch.tensor(0)}

    problem = fm.Problem(init, step, lambda meta, state, query, seed: state["w"].sum())
    with pytest.raises(fm.StructureError, match=message):
        run(problem, torch.ones(2, requires_grad=True), memory=memory)


# ---- defects of the field


def test_second_order_is_not_first_order_in_disguise() -> None:
    """A released defect: second order that is first order when something cuts the graph, without a word."""
    module, task = net().double(), fm.tree.map(torch.Tensor.double, data()[:2])
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.5))
    meta = new_meta(module)
    exact, first = (
        torch.autograd.grad(
            fm.unroll(problem, meta, fm.Task(*task), steps=3, estimator=each).loss, fm.tree.leaves(meta)
        )
        for each in (fm.Reverse(), fm.FirstOrder())
    )
    assert float(fm.tree.norm([a - b for a, b in zip(exact, first, strict=True)])) > 1e-2 * float(fm.tree.norm(first))


@ways
def test_first_order_has_a_gradient_for_the_initial_parameters(strategy: str, memory: Any) -> None:
    """A released defect: None for the initial parameters."""
    module = net()
    meta = new_meta(module)
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    run(problem, meta, strategy, memory=memory, estimator=fm.FirstOrder()).loss.backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in meta["params"].values())


def test_nan_is_not_repaired() -> None:
    """A released defect: NaN replaced by zeros in silence. Here a finite loss with a NaN slope stays visible."""
    meta = torch.zeros(1, requires_grad=True)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: w.abs().sqrt().sum())(w)
        return w - slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, w, query, seed: w.sum())
    with pytest.raises(fm.NonFiniteError, match="The meta-loss is nan"):
        run(problem, meta, steps=1)


def test_states_have_no_mutable_defaults() -> None:
    """A released defect: runs that share a state through a default argument."""
    module, task = net(), data()
    problem = fm.inner_problem(module, mse, optimizer=optim.adam(0.1))
    first = fm.unroll(problem, {}, task, steps=2)
    kept = fm.tree.map(torch.clone, first.state)
    second = fm.unroll(problem, {}, task, steps=2)
    for a, b, c in zip(*map(fm.tree.leaves, (first.state, second.state, kept)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class OnceMapped(torch.autograd.Function):
    """A sine that vmap can run, with a backward pass that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_a_function_differentiable_once_is_refused_in_a_batch_too(strategy: Any) -> None:
    net = torch.nn.Linear(2, 2)

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return OnceMapped.apply(predict(batch)).sum()

    problem = fm.inner_problem(net, loss, optimizer=fm.optim.sgd(0.1))
    tasks = fm.Task(torch.randn(3, 4, 2), torch.randn(3, 4, 2))
    with pytest.raises(fm.DetachedError, match=r"runs OnceMapped, an autograd\.Function whose backward is marked"):
        fm.unroll_batch(problem, {"params": fm.init_params(net)}, tasks, steps=1, strategy=strategy)


def test_meta_without_a_way_to_the_loss_under_first_order_is_told_so() -> None:
    net = torch.nn.Linear(2, 1)

    def weighted(meta: Any, predict: Any, batch: Any) -> Tensor:
        return (meta["w"] * predict(batch).square().squeeze(-1)).sum()

    def plain(meta: Any, predict: Any, batch: Any) -> Tensor:
        return predict(batch).sum()

    problem = fm.inner_problem(net, weighted, meta_loss_fn=plain, optimizer=fm.optim.sgd(0.1))
    meta = {"w": torch.ones(4, requires_grad=True)}
    task = fm.Task(torch.randn(4, 2), torch.randn(4, 2))
    with pytest.raises(
        fm.DetachedError, match=r"Under FirstOrder a way through the inner gradient(?s:.)*meta\['params'\]"
    ):
        fm.unroll(problem, meta, task, steps=1, estimator=fm.FirstOrder())


def taking(gradient_of: Callable[[Tensor], Tensor]) -> tuple[fm.Problem, dict[str, Tensor], fm.Task]:
    """A step that takes its gradient in its own way."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        return w - 0.5 * gradient_of(w), fm.StepInfo((w.sin() ** 2).sum())

    problem = fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, w, query, seed: (w**2).sum())
    meta = {"w": torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)}
    return problem, meta, fm.Task(torch.ones(1), None)


def constant(w: Tensor) -> Tensor:
    with torch.enable_grad():
        w = w if w.requires_grad else w.clone().requires_grad_()
        return torch.autograd.grad((w.sin() ** 2).sum(), w)[0]


def accumulated(w: Tensor) -> Tensor:
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        (w.sin() ** 2).sum().backward()
    assert w.grad is not None
    return w.grad


def with_graph(w: Tensor) -> Tensor:
    with torch.enable_grad():
        w = w if w.requires_grad else w.clone().requires_grad_()
        return torch.autograd.grad((w.sin() ** 2).sum(), w, create_graph=True)[0]


def by_pulling_back(w: Tensor) -> Tensor:
    value, pull_back = torch.func.vjp(lambda w: (w.sin() ** 2).sum(), w)[:2]
    return pull_back(torch.ones_like(value))[0]  # type: ignore[no-any-return]


@memories
@pytest.mark.parametrize("gradient_of", [constant, accumulated])
def test_a_gradient_taken_without_a_graph_is_refused(gradient_of: Any, memory: Any) -> None:
    problem, meta, task = taking(gradient_of)
    with pytest.raises(fm.GraphError, match=r"without create_graph=True(?s:.)*Take it by funcmeta\.value_and_grad"):
        fm.unroll(problem, meta, task, steps=2, memory=memory)
    with torch.no_grad():
        fm.unroll(problem, meta, task, steps=2, memory=memory)  # no meta-gradient is wanted, so nothing is lost


@memories
@pytest.mark.parametrize("gradient_of", [with_graph, by_pulling_back])
def test_a_gradient_of_ones_own_that_carries_its_graph_is_exact(gradient_of: Any, memory: Any) -> None:
    assert fm.check_meta_grad(*taking(gradient_of), steps=3, memory=memory, allow_vacuous=True).worst.error < 1e-6


def test_reptile_differentiates_nothing_and_takes_constant_gradients() -> None:
    def step(meta: Any, state: fm.InnerState, batch: Any, seed: int) -> Any:
        w = state.params["w"]
        return state._replace(params={"w": w - 0.5 * constant(w)}), fm.StepInfo((w**2).sum())

    problem = fm.Problem(
        lambda meta, task, seed: fm.InnerState(meta, {}, (), torch.tensor(0)),
        step,
        lambda meta, state, query, seed: None,
    )
    meta = {"w": torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)}
    fm.unroll(problem, meta, fm.Task(torch.ones(1), None), steps=1, estimator=fm.Reptile()).loss.backward()
    torch.testing.assert_close(meta["w"].grad, 0.5 * torch.sin(2 * meta["w"].detach()))


def test_a_function_whose_backward_closes_over_a_class_is_no_riddle() -> None:
    class Helper:
        slope = staticmethod(torch.cos)

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * Helper.slope(ctx.saved_tensors[0])

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, gradient = fm.value_and_grad(lambda w: Sine.apply(w).square().sum())(w)
        return w - 0.5 * gradient, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta, step, lambda meta, w, query, seed: (w**2).sum())
    meta = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    assert fm.check_meta_grad(problem, meta, fm.Task(torch.ones(1), None), steps=2).worst.error < 1e-6
