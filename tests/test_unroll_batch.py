"""Many tasks at once: vmap, loop and auto give the same, and auto keeps in mind what was faster."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import MODELS
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta._batching import take
from funcmeta.testing import TOLERANCES

TASKS = 3
memories = pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def numbers() -> tuple[Tensor, Tensor]:
    return torch.randn(TASKS, 5, 3).double(), torch.randn(TASKS, 5, 2).double()


def setting(module: nn.Module | None = None, loss: Any = mse) -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    module = module or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = fm.inner_problem(module, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.5))
    meta = {"params": fm.init_params(module), "lr": torch.tensor(0.2).double().requires_grad_()}
    return problem, meta, fm.Task(numbers(), numbers())


def run(case: tuple[fm.Problem, Any, fm.Task], strategy: Any, **options: Any) -> tuple[fm.Unrolled, list[Tensor]]:
    out = fm.unroll_batch(*case, strategy=strategy, **({"steps": 3} | options))
    return out, list(torch.autograd.grad(out.loss, fm.tree.leaves(case[1])))


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCES.exact, atol=TOLERANCES.exact)


class Counted:
    """A problem whose step counts its calls, as a function of its own."""

    def __init__(self, problem: fm.Problem) -> None:
        self.calls = 0

        def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
            self.calls += 1
            return problem.step(meta, state, batch, seed)

        self.problem = problem._replace(step=step)


# ---- the same by every strategy


@memories
@pytest.mark.parametrize("name", ["conv batchnorm", "conv groupnorm", "lstm", "gru", "attention", "tied embedding"])
def test_vmap_and_loop_and_auto_agree(name: str, memory: Any) -> None:
    model = MODELS[name]
    tasks = fm.tasks.stack([fm.Task(model.batch(), model.batch()) for _ in range(TASKS)])
    problem, meta, _ = setting(model.build().double(), model.loss)
    (loop, slopes), *others = [run((problem, meta, tasks), each, memory=memory) for each in ("loop", "vmap", "auto")]
    assert max(float(leaf.abs().max()) for leaf in slopes) > 1e-3
    for out, other in others:
        close(other, slopes)
        close(out.loss, loop.loss)
        close(out.info.losses, loop.info.losses)
        close(out.state, loop.state)
        close(out.carry.state, loop.carry.state)
    assert loop.info.losses.shape == (3, TASKS)
    assert [loop.info.strategy, others[0][0].info.strategy] == ["loop", "vmap"]


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_the_loss_is_the_mean_over_tasks(strategy: Any) -> None:
    problem, meta, tasks = setting()
    out, slopes = run((problem, meta, tasks), strategy)
    singles = [fm.unroll(problem, meta, take(tasks, index), steps=3) for index in range(TASKS)]
    mean = torch.stack([each.loss for each in singles]).mean()
    close(out.loss, mean)
    close(slopes, list(torch.autograd.grad(mean, fm.tree.leaves(meta))))
    for index, each in enumerate(singles):
        close(out.info.losses[:, index], each.info.losses)
        close(take(out.state, index), each.state)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_shares_are_means_over_tasks(strategy: Any) -> None:
    module = nn.Linear(3, 2).double()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1), trajectory_loss=True)
    tasks = fm.Task(numbers(), None)
    out = fm.unroll_batch(problem, {"params": fm.init_params(module)}, tasks, steps=3, strategy=strategy)
    close(out.loss.detach(), out.info.losses.sum(0).mean())


def test_the_order_of_tasks_does_not_matter() -> None:
    problem, meta, tasks = setting()
    turned = fm.tree.map(lambda leaf: leaf.flip(0), tuple(tasks[:2]))
    close(run((problem, meta, tasks), "vmap")[1], run((problem, meta, fm.Task(*turned)), "vmap")[1])


@memories
def test_a_support_for_every_step(memory: Any) -> None:
    problem, meta, tasks = setting()
    batches = [numbers() for _ in range(3)]
    tasks = tasks._replace(support=lambda step: batches[step])
    (_, vmap), (_, loop) = (run((problem, meta, tasks), each, memory=memory) for each in ("vmap", "loop"))
    close(vmap, loop)
    state = problem.init(meta, take(tasks, 1), 0)
    for x, y in batches:
        state, _ = problem.step(meta, state, (x[1], y[1]), 0)
    close(take(run((problem, meta, tasks), "vmap")[0].state, 1).params, state.params)


@memories
@pytest.mark.parametrize("strategy", ["vmap", "loop", "auto"])
def test_a_batch_goes_on_where_another_stopped(strategy: Any, memory: Any) -> None:
    problem, meta, tasks = setting()
    batches = [numbers() for _ in range(5)]
    tasks = tasks._replace(support=lambda step: batches[step])
    options = {"strategy": strategy, "memory": memory}
    whole = fm.unroll_batch(problem, meta, tasks, steps=5, **options)
    first = fm.unroll_batch(problem, meta, tasks, steps=2, **options)
    second = fm.unroll_batch(problem, meta, tasks, steps=3, carry=first.carry, **options)
    close(second.loss, whole.loss)
    close(torch.cat([first.info.losses, second.info.losses]), whole.info.losses)
    assert second.carry.step == 5


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_no_steps(strategy: Any) -> None:
    problem, meta, tasks = setting()
    out = fm.unroll_batch(problem, meta, tasks, steps=0, strategy=strategy)
    assert out.info.losses.shape == (0, TASKS)
    close(out.loss, torch.stack([fm.unroll(problem, meta, take(tasks, i), steps=0).loss for i in range(TASKS)]).mean())


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_draws_follow_the_seed(strategy: Any) -> None:
    """Each task draws its own, under vmap and in a loop."""
    module = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    problem, meta, tasks = setting(module)
    tasks = fm.tree.map(lambda leaf: leaf[:1].expand(TASKS, *leaf.shape[1:]), tuple(tasks[:2]))
    runs = [run((problem, meta, fm.Task(*tasks)), strategy, seed=seed)[0].info.losses for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len(set(runs[0][0].tolist())) == TASKS


@pytest.mark.parametrize("strategy", ["vmap", "loop", "auto"])
def test_without_grad_mode(strategy: Any) -> None:
    problem, meta, tasks = setting()
    with torch.no_grad():
        out = fm.unroll_batch(problem, meta, tasks, steps=2, strategy=strategy)
    assert not any(leaf.requires_grad for leaf in [out.loss, *fm.tree.leaves(out.state)])
    close(out.loss, run((problem, meta, tasks), "loop", steps=2)[0].loss.detach())


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_further_output_is_stacked(strategy: Any) -> None:
    def step(meta: Any, w: Tensor, x: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: ((w - x) ** 2).sum())(w)
        return w - meta * slope, fm.StepInfo(loss, aux={"slope": slope, "name": "run"})

    problem = fm.Problem(lambda meta, task, seed: torch.zeros(2), step, lambda meta, w, x, seed: ((w - x) ** 2).sum())
    tasks = fm.Task(torch.randn(TASKS, 2), torch.randn(TASKS, 2))
    out = fm.unroll_batch(problem, torch.tensor(0.1, requires_grad=True), tasks, steps=2, strategy=strategy)
    assert [each["name"] for each in out.info.aux] == ["run", "run"]
    torch.testing.assert_close(out.info.aux[0]["slope"], -2 * tasks.support)


# ---- auto


@pytest.mark.parametrize("faster", ["vmap", "loop"])
def test_auto_measures_once_and_keeps_the_faster_in_mind(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, tasks = setting()
    counted, measured = Counted(problem), []

    def cost(strategy: str, *arguments: Any) -> Any:
        measured.append(strategy)
        return fm.unroll_batch.__globals__["_Cost"](1.0 if strategy == faster else 2.0, 0.0)

    monkeypatch.setitem(fm.unroll_batch.__globals__, "_measured", cost)
    for _ in range(3):
        out = fm.unroll_batch(counted.problem, meta, tasks, steps=2)
        assert out.info.strategy == faster
    assert measured == ["vmap", "loop"]
    fewer = fm.tree.map(lambda leaf: leaf[:2], tuple(tasks[:2]))
    fm.unroll_batch(counted.problem, meta, fm.Task(*fewer), steps=2)
    fm.unroll_batch(counted.problem, meta, tasks, steps=2, estimator=fm.FirstOrder())
    fm.unroll_batch(Counted(problem).problem, meta, tasks, steps=2)
    assert measured == ["vmap", "loop"] * 4


def test_auto_chooses_by_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, tasks = setting()
    counted, cost = Counted(problem), fm.unroll_batch.__globals__["_Cost"]
    costs = {"vmap": cost(3.0, 1.0), "loop": cost(1.0, 2.0)}
    monkeypatch.setitem(fm.unroll_batch.__globals__, "_measured", lambda strategy, *rest: costs[strategy])
    chosen = [fm.unroll_batch(counted.problem, meta, tasks, steps=steps).info.strategy for steps in (1, 2, 4, 5)]
    assert chosen == ["loop", "loop", "vmap", "vmap"]


def test_auto_costs_eight_steps_by_each_strategy() -> None:
    problem, meta, tasks = setting()
    counted = Counted(problem)
    first = fm.unroll_batch(counted.problem, meta, tasks, steps=4)
    own = 4 if first.info.strategy == "vmap" else 4 * TASKS
    assert counted.calls == 8 + 8 * TASKS + own
    assert first.info.strategy in ("vmap", "loop")
    again = fm.unroll_batch(counted.problem, meta, tasks, steps=4)
    assert again.info.strategy == first.info.strategy
    assert counted.calls == 8 + 8 * TASKS + 2 * own


class Branching(nn.Module):
    """Looks at numbers, which vmap can not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out if float(out.detach().sum()) > 0 else -out  # type: ignore[no-any-return]


def test_auto_takes_the_loop_where_vmap_can_not() -> None:
    case = setting(Branching())
    out, slopes = run(case, "auto")
    assert out.info.strategy == "loop"
    close(slopes, run(case, "loop")[1])
    with pytest.raises(RuntimeError, match="vmap"):
        run(case, "vmap")


def raising(error: Exception) -> Callable[..., Any]:
    def loss(*arguments: Any) -> Any:
        raise error

    return loss


def test_errors_of_both_ways_pass_through_auto() -> None:
    """Neither an error of ours nor one that the loop meets as well is taken for a limit of vmap."""
    with pytest.raises(RuntimeError, match="as asked"):
        run(setting(loss=raising(RuntimeError("as asked"))), "auto")
    with pytest.raises(fm.LossError, match="expected a 0-d tensor"):
        run(setting(loss=lambda *arguments: 1.0), "auto")
    problem, meta, tasks = setting()
    with pytest.raises(fm.UnreachedLeafError, match="unused"):
        run((problem, {**meta, "unused": torch.ones(1, requires_grad=True)}, tasks), "auto")


def test_auto_does_not_ask_one_step_for_every_leaf() -> None:
    """A leaf that only a later step uses is no error of the trial, which takes one."""

    def step(meta: Any, state: Any, x: Any, seed: int) -> Any:
        w, count = state
        loss, slope = fm.value_and_grad(lambda w: ((w - x) ** 2).sum())(w)
        return (w - meta["rates"][0] * slope - torch.where(count > 0, meta["late"], 0.0), count + 1), fm.StepInfo(loss)

    def late(meta: Any, state: Any, x: Any, seed: int) -> Any:
        (w, count), info = step({**meta, "late": meta["late"].detach()}, state, x, seed)
        return (w, count), info

    meta = {"rates": torch.tensor([0.1], requires_grad=True), "late": torch.tensor(0.5, requires_grad=True)}

    def choose(meta: Any, state: Any, x: Any, seed: int) -> Any:
        return (step if x.shape[-1] == 3 else late)(meta, state, x, seed)

    problem = fm.Problem(
        lambda meta, task, seed: (torch.zeros(1), torch.tensor(0)), choose, lambda meta, state, x, seed: state[0].sum()
    )
    tasks = fm.Task(lambda index: torch.randn(TASKS, 2 if index == 0 else 3), torch.randn(TASKS, 2))
    fm.unroll_batch(problem, meta, tasks, steps=2).loss.backward()
    assert meta["late"].grad is not None


def test_what_is_known_dies_with_the_problem() -> None:
    known = fm.unroll_batch.__globals__["_known"]
    problem, meta, tasks = setting()
    fm.unroll_batch(problem, meta, tasks, steps=1)
    assert problem.step in known
    before = len(known)
    del problem
    gc.collect()
    assert len(known) < before


# ---- refused


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (fm.Task((torch.ones(3, 2), torch.ones(2, 2)), None), r"tasks\[0\]\[0\] \[3, 2\], tasks\[0\]\[1\] \[2, 2\]"),
        (fm.Task(torch.ones(()), None), r"no common leading task dimension: tasks\[0\] \[\]"),
        (fm.Task(torch.ones(0, 2), None), r"tasks\[0\] \[0, 2\]"),
        (fm.Task(lambda step: None, None), "no common leading task dimension: no tensors. Stack the tasks"),
        (fm.Task(lambda step: torch.ones(3), torch.ones(4)), r"tasks\[0\] \[3\], tasks\[1\] \[4\]"),
    ],
    ids=["two sizes", "no dimension", "no tasks", "no tensors", "function and query"],
)
def test_tasks_without_a_common_dimension(tasks: fm.Task, message: str) -> None:
    problem, meta, _ = setting()
    with pytest.raises(fm.StructureError, match=message):
        fm.unroll_batch(problem, meta, tasks, steps=1)


def noisy_start(meta: Any, task: fm.Task, seed: int) -> Any:
    assert task.spec == SPECS or task.spec in SPECS
    return meta["w"] * 1.0


SPECS = (("first", 1), ("second", 2))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_tasks_need_no_tensors_of_their_own_and_keep_their_specs(strategy: Any) -> None:
    """Batches from a function of the step, no query, specs of text: the state alone has a task dimension."""

    def step(meta: Any, w: Tensor, batch: Tensor, seed: int) -> Any:
        loss, gradient = fm.value_and_grad(lambda w: ((w - batch) ** 2).sum())(w)
        return w - 0.1 * gradient, fm.StepInfo(loss, loss)

    problem = fm.Problem(noisy_start, step, None)
    meta = {"w": torch.tensor(1.0, dtype=torch.float64, requires_grad=True)}
    batches = torch.tensor([2.0, 5.0], dtype=torch.float64)
    tasks = fm.Task(lambda index: batches + index, None, SPECS)
    loss = fm.unroll_batch(problem, meta, tasks, steps=2, strategy=strategy).loss
    shares = [(1 - b) ** 2 + (0.8 + 0.2 * b - (b + 1)) ** 2 for b in (2.0, 5.0)]
    assert loss.item() == pytest.approx(sum(shares) / 2)


def test_one_task_is_not_taken_for_many() -> None:
    problem, meta, _ = setting()
    task = fm.tasks.sinusoids(shots=10, queries=10).sample(seed=0)
    with pytest.raises(fm.StructureError, match=r"a tuple of 2, but(?s:.)* 10: this looks like one task"):
        fm.unroll_batch(problem, meta, task, steps=1)


def test_arguments_are_checked_before_anything_runs() -> None:
    problem, meta, tasks = setting()
    with pytest.raises(fm.ArgumentError, match="carry is a Tensor, expected a Carry"):
        fm.unroll_batch(problem, meta, tasks, steps=1, carry=torch.tensor(3.0))  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="steps is -1"):
        fm.unroll_batch(problem, meta, tasks, steps=-1)
    assert fm.unroll_batch(problem, meta, tasks, steps=0).info.strategy == "vmap"


def test_auto_takes_no_step_that_is_not_asked_for() -> None:
    problem, meta, tasks = setting()
    once = fm.Task(lambda index: [tasks.support][index], tasks.query)
    assert fm.unroll_batch(problem, meta, once, steps=1).info.strategy in ("vmap", "loop")


def test_what_vmap_can_not_run_is_named() -> None:
    problem = fm.inner_problem(
        nn.Linear(2, 1),
        lambda meta, predict, batch: predict(batch).square().mean() * (1.0 if batch.sum().item() > 0 else 2.0),
        optimizer=lambda meta: fm.optim.sgd(meta),
    )
    x, rate = torch.ones(3, 4, 2), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(fm.GraphError, match=r"cannot run as one batch: vmap: .* Pass strategy='loop'"):
        fm.unroll_batch(problem, rate, fm.Task(x, x), steps=1, strategy="vmap")
    fm.unroll_batch(problem, rate, fm.Task(x, x), steps=1, strategy="loop").loss.backward()
