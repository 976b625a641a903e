"""compile: the same numbers under every estimator, policy and strategy, compiled once; or an error that says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_cases import MODELS, build
from test_contract import assert_agree, gradient
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import _lowering, compiled, optim
from funcmeta.testing import TOLERANCES

X, Y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
TASK = fm.Task((X, Y), (X + 0.1, Y))
BOTH = pytest.mark.parametrize("backend", ["aten", "inductor"])


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def mlp(*middle: nn.Module) -> nn.Module:
    with fm.rng.forked(2):
        return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def usual(loss: Any = mse, *middle: nn.Module, **options: Any) -> tuple[fm.Problem, dict[str, Any]]:
    net = mlp(*middle)
    problem = fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.7), **options)
    return problem, {"params": fm.init_params(net), "lr": torch.tensor(0.2).double().requires_grad_()}


def aten(problem: fm.Problem, **options: Any) -> fm.Problem:
    return fm.compile(problem, backend="aten", **options)


def many(number: int, examples: int = 5) -> fm.Task:
    with fm.rng.forked(number):
        batch = torch.randn(number, examples, 3).double(), torch.randn(number, examples, 2).double()
    return fm.Task(batch, batch)


def meta_gradient(problem: fm.Problem, meta: Any, task: fm.Task = TASK, steps: int = 3, **options: Any) -> list[Tensor]:
    run = fm.unroll_batch if "strategy" in options else fm.unroll
    return list(torch.autograd.grad(run(problem, meta, task, steps=steps, **options).loss, fm.tree.leaves(meta)))


def close(got: Any, expected: Any, tolerance: float = TOLERANCES.memory) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_same(problem: fm.Problem, meta: Any, *task: Any, fast: fm.Problem | None = None, **options: Any) -> None:
    close(meta_gradient(fast or aten(problem), meta, *task, **options), meta_gradient(problem, meta, *task, **options))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled meanwhile."""
    made: list[Any] = []
    kernel = _lowering.Lowered.kernel
    monkeypatch.setattr(_lowering.Lowered, "kernel", lambda *args: made.append(args) or kernel(*args))
    return made


# ---- the same numbers

COMBINATIONS = [
    ("single", fm.Reverse(), fm.StoreAll()),
    ("single", fm.Reverse(), fm.Segments(2)),
    ("single", fm.FirstOrder(), fm.StoreAll()),
    ("single", fm.MixedMode(), fm.Revolve(2)),
    ("vmap", fm.Reverse(), fm.Revolve(2)),
    ("vmap", fm.FirstOrder(), fm.Segments(2)),
]


def compare_with_eager(
    fast: Any, model: str, optimizer: str, combinations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for strategy, estimator, memory in combinations:
        expected = gradient(model, optimizer, 3, strategy, estimator=estimator)
        with monkeypatch.context() as context:
            context.setattr("test_contract.build", lambda *case: fast)
            got = gradient(model, optimizer, 3, strategy, estimator=estimator, memory=memory)
        assert_agree(got, expected, TOLERANCES.memory)


@pytest.mark.parametrize("model", ["mlp", "conv batchnorm", "conv groupnorm", "lstm"])
def test_the_meta_gradient_is_the_eager_one(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models with the most operations take long to record, and are among the slow tests."""
    optimizer = "adam" if model == "mlp" else "sgd momentum"
    problem, meta, tasks = build(model, optimizer)
    some = {"mlp": COMBINATIONS, "conv batchnorm": COMBINATIONS[3:5]}.get(model, COMBINATIONS[1:2])
    compare_with_eager((aten(problem), meta, tasks), model, optimizer, some, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("model", MODELS)
@BOTH
def test_all_of_them(backend: Any, model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, tasks = build(model, optimizer)
    fast = fm.compile(problem, backend=backend), meta, tasks
    compare_with_eager(fast, model, optimizer, COMBINATIONS, monkeypatch)


@pytest.mark.parametrize("strategy", ["single", "loop", "vmap"])
def test_forward_mode_runs_the_plain_functions(strategy: str, kernels: list[Any]) -> None:
    problem, meta = usual()
    options = {} if strategy == "single" else {"strategy": strategy}
    tasks = TASK if strategy == "single" else many(2)
    got = meta_gradient(aten(problem), meta, tasks, estimator=fm.ForwardMode(), **options)
    close(got, meta_gradient(problem, meta, tasks, **options))


def test_inductor_gives_the_same_numbers() -> None:
    """Dropout, a learned rate and segments in one."""
    problem, meta = usual(mse, nn.Dropout(0.4))
    fast = fm.compile(problem)
    for seed in (3, 4):
        assert_same(problem, meta, fast=fast, memory=fm.Segments(2), seed=seed)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers_for_stacked_tasks() -> None:
    problem, meta = usual()
    assert_same(problem, meta, many(3), fast=fm.compile(problem), strategy="vmap", memory=fm.Revolve(2))


@pytest.mark.slow
def test_sizes_that_vary_with_inductor(kernels: list[Any]) -> None:
    problem, meta = usual()
    fast = fm.compile(problem)
    for examples in (5, 7, 9, 11):
        task = fm.Task(*[tuple(leaf[0] for leaf in part) for part in many(1, examples)[:2]])
        assert_same(problem, meta, task, fast=fast)
    assert len({id(lowered) for lowered, *_ in kernels}) == 4


def test_results_are_those_of_the_problem() -> None:
    problem, meta = usual(mse, nn.BatchNorm1d(4), trajectory_loss=True)
    ours, theirs = (fm.unroll(each, meta, TASK, steps=3) for each in (aten(problem), problem))
    close(ours.loss, theirs.loss)
    close(fm.tree.detach(ours.state), fm.tree.detach(theirs.state))
    close(ours.info.losses, theirs.info.losses)
    with torch.no_grad():
        plain = fm.unroll(aten(problem), meta, TASK, steps=3)
    assert not plain.loss.requires_grad
    close(plain.loss, theirs.loss.detach())


def test_dropout_follows_the_seed() -> None:
    problem, meta = usual(mse, nn.Dropout(0.5))
    fast = aten(problem)
    before = torch.get_rng_state()
    one, again, other = (meta_gradient(fast, meta, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    close(one, again, 0.0)
    assert float((one[0] - other[0]).abs().max()) > 1e-3
    close(one, meta_gradient(problem, meta, seed=1))
    close(other, meta_gradient(problem, meta, seed=2))


def test_autocast() -> None:
    with fm.rng.forked(2):
        net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(0.5))
    meta, batch = {"params": fm.init_params(net)}, (X.float(), Y.float())
    fast, task, found = aten(problem), fm.Task(batch, batch), []
    for each in (problem, fast):
        plain = meta_gradient(each, meta, task)
        with torch.autocast("cpu", torch.bfloat16):
            loss = fm.unroll(each, meta, task, steps=3).loss
        found.append((plain, list(torch.autograd.grad(loss, fm.tree.leaves(meta)))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert float((found[0][0][0] - found[0][1][0]).abs().max()) > 1e-5


def test_inputs_that_are_not_contiguous() -> None:
    problem, meta = usual()
    transposed = fm.Task((X.mT.contiguous().mT, Y.mT.contiguous().mT), (X.expand(5, 3), Y[:1].expand(5, 2)))
    assert_same(problem, meta, transposed)
    meta["params"] = {
        name: leaf.detach().repeat_interleave(2, 0)[::2].requires_grad_() for name, leaf in meta["params"].items()
    }
    assert_same(problem, meta, transposed)


def test_a_state_that_holds_a_tensor_twice_and_passes_meta_on() -> None:
    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {"w": meta["w"], "twice": meta["w"], "lr": meta["lr"], "n": torch.tensor(0), "name": "run"}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w * state["twice"] * batch).sin().pow(2).sum())(state["w"])
        new = state["w"] - state["lr"] * slope
        return {**state, "w": new, "twice": new, "lr": meta["lr"], "n": state["n"] + 1}, fm.StepInfo(loss, loss, new)

    problem = fm.Problem(init, step, lambda meta, state, query, seed: (state["w"] * state["twice"]).sum() * state["lr"])
    meta = {"w": torch.tensor([0.4, -0.9, 1.3]), "lr": torch.tensor(0.2)}
    meta = {name: leaf.double().requires_grad_() for name, leaf in meta.items()}
    task = fm.Task(torch.ones(3).double(), None)
    for memory in (fm.StoreAll(), fm.Segments(1)):
        assert_same(problem, meta, task, memory=memory)
    state = fm.unroll(aten(problem), meta, task, steps=2).state
    assert (state["name"], int(state["n"])) == ("run", 2)
    close(state["w"], state["twice"])


def test_a_batch_that_differs_from_step_to_step() -> None:
    problem, meta = usual()
    assert_same(problem, meta, fm.Task(lambda step: (X * (step + 1), Y), (X, Y)), memory=fm.Segments(2))


def test_a_part_of_meta_that_is_frozen() -> None:
    problem, meta = usual()
    frozen = {**meta, "lr": meta["lr"].detach()}
    fast, loss = aten(problem), lambda each: fm.unroll(each, frozen, TASK, steps=3).loss
    params = list(meta["params"].values())
    close(torch.autograd.grad(loss(fast), params), torch.autograd.grad(loss(problem), params))
    assert_same(problem, meta, fast=fast)


# ---- compiled once


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_the_number_of_steps_compiles_nothing(memory: Any, kernels: list[Any]) -> None:
    """Step and meta-loss, each with its derivative."""
    problem, meta = usual()
    fast = aten(problem)
    meta_gradient(fast, meta, steps=4, memory=memory)
    made = len(kernels)
    assert made <= 5  # forward and backward of both, and a step without a graph
    meta_gradient(fast, meta, steps=30, memory=memory)
    assert len(kernels) == made


def test_another_estimator_or_number_of_tasks_compiles_anew(kernels: list[Any]) -> None:
    problem, meta = usual()
    fast = aten(problem)
    for _ in range(2):
        for estimator in (fm.Reverse(), fm.FirstOrder()):
            assert_same(problem, meta, fast=fast, estimator=estimator)
    made = len(kernels)
    assert 4 < made <= 8
    for number in (2, 3):
        assert_same(problem, meta, many(number), fast=fast, strategy="vmap")
        assert len(kernels) > made
        made = len(kernels)
    assert_same(problem, meta, many(2), fast=fast, strategy="vmap")
    assert len(kernels) == made


@pytest.mark.parametrize(("dynamic", "variants"), [(True, 2), (False, 4)])
def test_batches_of_several_sizes(dynamic: bool, variants: int, kernels: list[Any]) -> None:
    problem, meta = usual()
    fast = aten(problem, dynamic=dynamic)
    for examples in (5, 7, 9, 4):
        task = fm.Task(
            (torch.linspace(-1, 1, 3 * examples).reshape(-1, 3).double(), X[:1, :2].expand(examples, 2)), (X, Y)
        )
        assert_same(problem, meta, task, fast=fast)
    assert len({id(lowered) for lowered, *_ in kernels}) == variants + 1


# ---- refused


def by_hand(step: Any, judge: Any = None) -> tuple[fm.Problem, Any]:
    meta = {"w": torch.ones(3).double().requires_grad_()}
    judge = judge or (lambda meta, w, query, seed: (w**2).sum())
    return fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, judge), meta


def descending(loss: Callable[..., Tensor]) -> tuple[fm.Problem, Any]:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: loss(w, batch, seed))(w)
        return w - 0.1 * slope, fm.StepInfo(value)

    return by_hand(step)


def wavy(w: Tensor, batch: Any) -> Tensor:
    return (batch[0] @ w).sin().pow(2).mean()


def test_a_second_derivative() -> None:
    problem, meta = usual()
    loss = fm.unroll(aten(problem), meta, TASK, steps=2).loss
    with pytest.raises(fm.GraphError, match=r"create_graph=True, but it cannot be .* as it was before compile\."):
        torch.autograd.grad(loss, fm.tree.leaves(meta), create_graph=True)


def test_a_captured_tensor() -> None:
    outside = torch.tensor(2.0).double().requires_grad_()
    problem, meta = descending(lambda w, batch, seed: wavy(w * outside, batch))
    with pytest.raises(fm.CapturedTensorError, match="`outside`"):
        meta_gradient(aten(problem), meta)


def test_a_leaf_without_use() -> None:
    problem, meta = usual()
    meta["unused"] = torch.tensor(1.0).double().requires_grad_()
    for memory in (fm.StoreAll(), fm.Segments(1)):
        with pytest.raises(fm.UnreachedLeafError, match=r"meta\['unused'\]"):
            fm.unroll(aten(problem), meta, TASK, steps=2, memory=memory).loss.backward()


def test_first_order_without_an_inner_gradient() -> None:
    problem, meta = by_hand(lambda meta, w, batch, seed: (w * 0.9, fm.StepInfo(wavy(w, batch))))
    with pytest.raises(fm.GraphError, match=r"the step took none through funcmeta\.value_and_grad"):
        meta_gradient(aten(problem), meta, estimator=fm.FirstOrder())


def item(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) * w.sum().item()


def branching(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) if w.sum() > 0 else wavy(-w, batch)


GENERATOR = torch.Generator().manual_seed(0)
COUNTER = iter(range(1, 10**6))


def own_generator(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w * torch.bernoulli(torch.full_like(w, 0.5), generator=GENERATOR), batch)


def counting(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) * torch.tensor(float(next(COUNTER)))


def counting_in_python(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) * next(COUNTER)


def writing(w: Tensor, batch: Any, seed: int) -> Tensor:
    batch[0].mul_(1.5)
    return wavy(w, batch)


def using_the_seed(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) * (seed % 7)


def using_the_seed_in_a_tensor(w: Tensor, batch: Any, seed: int) -> Tensor:
    return wavy(w, batch) * torch.tensor(float(seed % 7)).double()


REFUSED: list[tuple[Any, str]] = [
    (item, r"could not be recorded at 'return wavy\(w, batch\) \* w\.sum\(\)\.item\(\)' .*test_compiled\.py, line \d+"),
    (branching, r"could not be recorded at 'return wavy.* if w\.sum\(\) > 0 else .*test_compiled\.py, line \d+"),
    (own_generator, r"draws from a torch\.Generator of its own"),
    (counting, "computes with its seed|from what the function itself gives"),
    (counting_in_python, "computes with its seed|from what the function itself gives"),
    (writing, r"writes into a tensor that it was given or has captured\. Let it return new tensors"),
    (using_the_seed, "computes with its seed, so that every step would be compiled anew. Draw from"),
    (using_the_seed_in_a_tensor, "computes with its seed, so that every step would be compiled anew. Draw from"),
]


@pytest.mark.parametrize(("loss", "message"), REFUSED, ids=[each.__name__ for each, _ in REFUSED])
def test_what_can_not_be_compiled(loss: Any, message: str) -> None:
    problem, meta = descending(loss)
    with pytest.raises(fm.CompileError, match=message):
        meta_gradient(aten(problem), meta, fm.Task((X.clone(), Y), (X, Y)))


def test_a_counter_outside_that_shows_late_is_seen_in_the_first_comparison() -> None:
    """Every call adds to it: four make the recording, and the function itself is compared with it after that."""
    calls = [0]

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: wavy(w, batch))(w)
        calls[0] += 1
        return w - 0.1 * slope * (1 if calls[0] <= 4 else 2), fm.StepInfo(value)

    problem, meta = by_hand(step)
    with pytest.raises(fm.CompileError, match=r"from what the function itself gives.*more than its arguments"):
        meta_gradient(aten(problem), meta)


def test_a_number_in_the_state_that_changes() -> None:
    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {"w": meta["w"] * 1, "count": 0}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: wavy(w, batch) * (1 + state["count"]))(state["w"])
        return {"w": state["w"] - 0.01 * slope, "count": state["count"] + 1}, fm.StepInfo(value)

    _, meta = by_hand(step)
    problem = fm.Problem(init, step, lambda meta, state, query, seed: (state["w"] ** 2).sum())
    assert_same(problem, meta, steps=5)
    with pytest.raises(fm.CompileError, match=rf"more than {compiled.MOST} comb.*count.* = \d+.*Keep .* in tensors"):
        meta_gradient(aten(problem), meta, steps=compiled.MOST + 5)


class Unhashable:
    """A setting that cannot be told from another."""

    __hash__ = None  # type: ignore[assignment]


def test_an_argument_that_can_not_be_hashed() -> None:
    problem, meta = descending(lambda w, batch, seed: wavy(w, batch[0]))
    with pytest.raises(
        fm.CompileError, match=r"An argument is .*Unhashable.*, which cannot be hashed.*Make it a tensor"
    ):
        meta_gradient(aten(problem), meta, fm.Task(lambda step: ((X, Y), Unhashable()), (X, Y)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fm.compile(mse), "problem is a function, expected a Problem. Pass what inner_problem makes."),
        (lambda: fm.compile(usual()[0], backend="cuda"), "backend is 'cuda', expected 'inductor' or 'aten'. Pass one"),
        (lambda: fm.compile(usual()[0], speed=3), "'speed' is no setting of the backend 'inductor'. Pass names of"),
        (lambda: aten(usual()[0], max_autotune=True), "'max_autotune' is no setting of the backend 'aten'. Pass names"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError) as caught:
        call()
    assert message in str(caught.value)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(_lowering, "compile_fx_inner", broken)
    problem, meta = usual()
    with pytest.raises(
        fm.CompileError, match=r"No working C\+\+ compiler found\. It needs .* Install it, or pass backend='aten'"
    ):
        meta_gradient(fm.compile(problem), meta)


# ---- with the rest of the library


def test_compare() -> None:
    problem, meta = usual()
    rows = fm.compare(aten(problem), meta, TASK, steps=3).rows
    eager = fm.compare(problem, meta, TASK, steps=3).rows
    assert [each.name for each in rows] == ["second order", "first order"]
    for ours, theirs in zip(rows, eager, strict=True):
        assert abs(ours.loss - theirs.loss) < 1e-12
        assert abs(ours.cosine - theirs.cosine) < 1e-9


def test_check_meta_grad() -> None:
    problem, meta = usual(lambda meta, predict, batch: F.huber_loss(predict(batch[0]), batch[1], delta=10.0))
    figures = fm.testing.check_meta_grad(aten(problem), meta, TASK, steps=3, memory=fm.Segments(2))
    assert figures.worst.error < TOLERANCES.fixed
    assert not figures.vacuous


def test_the_strategy_is_chosen_by_measurement() -> None:
    problem, meta = usual()
    fast = aten(problem)
    out = fm.unroll_batch(fast, meta, many(3), steps=3, strategy="auto")
    assert out.info.strategy in ("vmap", "loop")
    got = torch.autograd.grad(out.loss, fm.tree.leaves(meta))
    close(list(got), meta_gradient(problem, meta, many(3), strategy="loop"))


def test_inside_torch_func_it_is_the_plain_problem() -> None:
    problem, meta = usual()
    fast, at = aten(problem), fm.tree.detach(meta)
    ours, theirs = (
        torch.func.grad(lambda meta, each=each: fm.unroll(each, meta, TASK, steps=2).loss)(at)
        for each in (fast, problem)
    )
    close(ours, theirs)


def test_a_leaf_that_only_the_reported_loss_depends_on_is_unreached() -> None:
    def weighted(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return (meta["weights"] * (predict(x) - y).square()).mean()

    problem = fm.inner_problem(mlp(), weighted, optimizer=optim.sgd(0.1), meta_loss_fn=mse)
    meta = {"params": fm.init_params(mlp()), "weights": torch.ones(2).double().requires_grad_()}
    for each in (problem, aten(problem)):
        with pytest.raises(fm.UnreachedLeafError, match="weights"):
            fm.unroll(each, meta, TASK, steps=2, estimator=fm.FirstOrder())


def test_what_failed_once_fails_for_the_same_reason_again() -> None:
    calls = [0]

    def step(meta: Any, state: Tensor, batch: Any, seed: int) -> Any:
        """Pure in the two calls that record it, and after that no more."""
        calls[0] += 1
        loss, slope = fm.value_and_grad(lambda a: (a * batch * max(calls[0], 2)).sin().sum())(state)
        return state - meta * slope, fm.StepInfo(loss)

    problem = fm.compile(
        fm.Problem(lambda meta, task, seed: torch.ones(9), step, lambda meta, a, x, seed: a * x), backend="aten"
    )
    ones = torch.ones(9, dtype=torch.float64)
    arguments = torch.tensor(1.0), ones, ones, 0
    for _ in range(2):
        with pytest.raises(fm.CompileError, match="depends on more than its arguments"):
            problem.step(*arguments)
