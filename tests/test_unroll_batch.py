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
from funcmeta._batching import stack, take
from funcmeta.tasks._task import unstack
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
    """Looks at numbers, which vmap cannot."""

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


# ---- vmap is right or refuses

BOTH = ("loop", "vmap")


def of(module: nn.Module, batch: Callable[[], Any], loss: Any = mse) -> tuple[fm.Problem, Any, fm.Task]:
    problem, meta, _ = setting(module, loss)
    return problem, meta, fm.tasks.stack([fm.Task(batch(), batch()) for _ in range(TASKS)])


class Scaled(nn.Module):
    """Scales a gradient on its way back, by a hook of the given kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.act, self.last = kind, nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)
        if kind == "full backward hook":
            self.act.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3.0,))
        if kind == "full backward pre-hook":
            self.act.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 3.0,))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        if self.kind == "tensor hook" and made.requires_grad:
            made.register_hook(lambda grad: 3.0 * grad)
        if self.kind == "unconditional hook":
            made.register_hook(lambda grad: 3.0 * grad)
        if self.kind == "node" and made.grad_fn is not None:
            made.grad_fn.register_prehook(lambda grads: tuple(3.0 * each for each in grads))
        if self.kind == "leaf" and not made.is_leaf:
            made = made + made.tanh()
        if self.kind == "branch" and made.requires_grad:
            made = 2.0 * made
        return self.last(self.act(made))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", ["tensor hook", "unconditional hook", "full backward hook", "full backward pre-hook", "node"]
)
def test_what_changes_gradients_on_their_way_is_refused_under_vmap(kind: str) -> None:
    case = setting(Scaled(kind))
    loop, slopes = run(case, "loop")
    plain = run(setting(Scaled("none")), "loop")[0]
    assert not torch.allclose(loop.info.losses[1], plain.info.losses[1])
    with pytest.raises(fm.GraphError, match=r"strategy='loop'"):
        run(case, "vmap")
    out, auto = run(case, "auto")
    assert out.info.strategy == "loop"
    close(auto, slopes)


@pytest.mark.parametrize("kind", ["branch", "leaf"])
def test_branches_on_the_graph_are_taken_alike(kind: str) -> None:
    case = setting(Scaled(kind))
    (loop, expected), (vmap, slopes) = (run(case, each) for each in BOTH)
    close(vmap.info.losses, loop.info.losses)
    close(slopes, expected)
    torch.manual_seed(0)
    meta = {"lr": torch.tensor(0.1).double(), "params": {name: p.detach() for name, p in case[1]["params"].items()}}
    one, other = (fm.unroll_batch(case[0], meta, case[2], steps=2, strategy=each).loss for each in BOTH)
    close(other, one)


class Words(nn.Module):
    """Sums of word vectors, in which the row for padding is no word; or is, for the head that shares it."""

    def __init__(self, padding: int, tied: bool) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(7, 4, padding_idx=padding), tied
        self.head = nn.Identity() if tied else nn.Linear(4, 7)
        self.double()
        with torch.no_grad():
            self.table.weight[padding] = 0.3  # a row that is not zero, as after loading others' weights

    def forward(self, words: Tensor) -> Tensor:
        made = self.table(words).sum(-2).sin()
        return made @ self.table.weight.T if self.tied else self.head(made)  # type: ignore[no-any-return]


def padded() -> tuple[Tensor, Tensor]:
    words = torch.randint(0, 7, (6, 5))
    words[:, 3:] = 5
    return words, torch.randn(6, 7).double()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [5, -2, 0])
def test_padded_rows_get_no_gradient_under_vmap(padding: int, tied: bool) -> None:
    case = of(Words(padding, tied), padded)
    (loop, expected), (vmap, slopes) = (run(case, each) for each in BOTH)
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vmap.state.params, loop.state.params, rtol=1e-12, atol=1e-12)
    if not tied:
        assert torch.equal(
            vmap.state.params["table.weight"][:, padding], torch.full((TASKS, 4), 0.3, dtype=torch.float64)
        )


def test_rows_scaled_by_their_frequency_are_refused_under_vmap() -> None:
    net = nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Linear(4, 7)).double()
    case = of(net, lambda: (torch.randint(0, 3, (6,)), torch.randn(6, 7).double()))
    with pytest.raises(fm.GraphError, match=r"scale_grad_by_freq .*strategy='loop'"):
        run(case, "vmap")
    assert run(case, "auto")[0].info.strategy == "loop"


def test_gradients_of_ones_own_are_refused_under_vmap() -> None:
    def by_input(how: str) -> Any:
        def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
            x = batch[0] + 0 * predict.params["0.bias"].sum()
            if how == "leaf":
                x = x.detach().requires_grad_()
            if how == "set":
                x = x.detach().clone()
                x.requires_grad = True
            if how == "backward":
                predict(x).sum().backward(create_graph=True, inputs=[x])
            (slope,) = torch.autograd.grad(predict(x).sum(), x, create_graph=True)
            return mse(meta, predict, batch) + slope.square().mean()

        return loss

    words = {"plain": "autograd.grad", "leaf": "requires_grad_", "set": "requires_grad =", "backward": "backward"}
    for how, name in words.items():
        problem, meta, tasks = setting(loss=by_input(how))
        with pytest.raises(fm.FuncmetaError) as caught:
            fm.unroll_batch(problem, meta, tasks, steps=2, strategy="vmap")
        if how == "plain":
            assert name in str(caught.value)
            assert "strategy='loop'" in str(caught.value)


class Wrong(torch.autograd.Function):
    """A square, whose batching rule is one of another function."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        weight = torch.ones(x.shape[in_dims[0]], dtype=x.dtype)
        weight[1:] = 1.01  # right for the first task alone
        return Wrong.apply(x) * weight.reshape(-1, *[1] * (x.dim() - 1)), in_dims[0]


def test_a_wrong_batching_rule_is_found_by_comparing_with_the_loop() -> None:
    case = setting(loss=lambda meta, predict, batch: Wrong.apply(predict(batch[0]) - batch[1]).mean())
    with pytest.raises(fm.GraphError, match=r"one by one: the losses differs by .*Pass strategy='loop'"):
        run(case, "vmap")
    out, slopes = run(case, "auto")
    assert out.info.strategy == "loop"
    close(slopes, run(case, "loop")[1])


def test_the_comparison_is_made_once() -> None:
    problem, meta, tasks = setting()
    counted = Counted(problem)
    fm.unroll_batch(counted.problem, meta, tasks, steps=4, strategy="vmap")
    assert counted.calls == 4 + 2 * 2 + 2  # two steps of two tasks by themselves and together
    fm.unroll_batch(counted.problem, meta, tasks, steps=4, strategy="vmap", seed=3)
    assert counted.calls == 2 * 4 + 2 * 2 + 2
    fewer = fm.tree.map(lambda leaf: leaf[:, :2], tuple(tasks[:2]))
    fm.unroll_batch(counted.problem, meta, fm.Task(*fewer), steps=4, strategy="vmap")
    assert counted.calls == 3 * 4 + 2 * (2 * 2 + 2)


def test_numbers_that_are_rounding_alone_are_no_difference() -> None:
    """Adam gives a bias before a normalization, whose gradient is zero but for rounding, steps of any direction."""
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    problem = fm.inner_problem(net, mse, optimizer=lambda meta: optim.adam(meta["lr"]))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.01, requires_grad=True)}
    tasks = fm.Task(*[tuple([each.float() for each in numbers()]) for _ in range(2)])
    fm.unroll_batch(problem, meta, tasks, steps=3, strategy="vmap").loss.backward()


# ---- draws

DRAWING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout of channels": lambda x: nn.functional.dropout1d(x[None], 0.4)[0],
    "dropout in place": lambda x: nn.functional.dropout(x * 1.0, 0.3, True, True),
    "alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, True),
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "gumbel": lambda x: nn.functional.gumbel_softmax(x),
    "rand": lambda x: x + torch.rand(x.shape[0], 1, dtype=x.dtype),
    "randperm": lambda x: x[torch.randperm(x.shape[0])] * torch.arange(x.shape[0])[:, None],
    "randint": lambda x: x * torch.randint(1, 5, (x.shape[0], 1)),
    "normal": lambda x: torch.normal(x.detach(), 0.5) * x,
    "normal of numbers": lambda x: torch.normal(0.0, 1.0, (x.shape[1],)) * x,
    "filled": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "init": lambda x: x * nn.init.normal_(torch.empty_like(x)),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "bernoulli of a tensor": lambda x: x * torch.empty_like(x).bernoulli_(x.detach().sigmoid()),
    "poisson": lambda x: x * torch.poisson(x.detach().exp()),
    "multinomial": lambda x: x * torch.multinomial(x.detach().softmax(1), 1),
    "gamma": lambda x: x * torch._standard_gamma(x.detach().exp()),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3)[0],
    "twice": lambda x: nn.functional.dropout(x, 0.3) + torch.randn_like(x),
    "another seed": lambda x: drawn_by(x, 5),
}


def drawn_by(x: Tensor, seed: int) -> Tensor:
    with fm.rng.forked(seed):
        return x * torch.rand_like(x)


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode()], ids=repr)
def test_tasks_draw_the_same_by_every_strategy(name: str, estimator: Any) -> None:
    problem, meta, tasks = setting(
        loss=lambda meta, predict, batch: (DRAWING[name](predict(batch[0])) - batch[1]).square().mean()
    )
    (loop, expected), (vmap, slopes) = (
        run((problem, meta, tasks), each, seed=4, estimator=estimator, steps=2) for each in BOTH
    )
    close(vmap.info.losses, loop.info.losses)
    close(slopes, expected)
    other = run((problem, meta, tasks), "vmap", seed=5, steps=2)[0].info.losses
    assert name == "another seed" or not torch.allclose(other, vmap.info.losses)


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
def test_modules_draw_the_same_by_every_strategy(memory: Any) -> None:
    for net in (
        nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Linear(6, 2)),
        nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.TransformerEncoderLayer(3, 1, 4, dropout=0.3), nn.Flatten(), nn.Linear(3, 2)
        ),
    ):
        case = setting(net.double())
        (loop, expected), (vmap, slopes), (_, auto) = (
            run(case, each, seed=4, memory=memory, steps=2) for each in (*BOTH, "auto")
        )
        close(vmap.info.losses, loop.info.losses)
        close(slopes, expected)
        close(auto, expected)


def test_the_seed_of_a_function_knows_every_task() -> None:
    """A step that folds its seed draws what each task draws by itself."""

    def init(meta: Any, task: fm.Task, seed: int) -> Tensor:
        with fm.rng.forked(fm.rng.fold(seed, 3)):
            return torch.randn(2, dtype=torch.float64)

    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        with fm.rng.forked(fm.rng.fold(7, seed)):
            noise = torch.randn(2, dtype=torch.float64)
        loss, slope = fm.value_and_grad(lambda w: ((w - x - noise) ** 2).sum())(w)
        return w - meta * slope, fm.StepInfo(loss)

    problem = fm.Problem(init, step, lambda meta, w, x, seed: ((w - x) ** 2).sum())
    x, meta = torch.randn(TASKS, 2).double(), torch.tensor(0.1).double().requires_grad_()
    out = fm.unroll_batch(problem, meta, fm.Task(x, x), steps=2, strategy="vmap", seed=9)
    alone = [fm.unroll(problem, meta, fm.Task(x[i], x[i]), steps=2, seed=fm.rng.fold(9, i)) for i in range(TASKS)]
    close(out.state, torch.stack([each.state for each in alone]))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x, seed: torch.rand(2, generator=torch.Generator()), "rand draws from a generator of its own"),
        (lambda x, seed: torch.empty(2).normal_(), "normal_ draws into a tensor that has no values of its own"),
        (lambda x, seed: torch.rand(2, generator=fm.rng.generator(seed)), "rng.generator got the seed of stacked"),
        (lambda x, seed: torch.func.grad(lambda x: torch.bernoulli(x.sigmoid()).sum())(x), "draws inside torch.func"),
        (lambda x, seed: torch.tensor(float(seed % 7)), "do not give as one batch what they give one by one"),
    ],
    ids=["generator", "filled", "seeded generator", "inside torch.func", "number"],
)
def test_draws_that_cannot_be_kept_apart_are_refused(draw: Any, message: str) -> None:
    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        noise = draw(x, seed).sum()
        loss, slope = fm.value_and_grad(lambda w: (w - x.sum() - noise) ** 2)(w)
        return w - meta * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta * 1.0, step, lambda meta, w, x, seed: w)
    case = problem, torch.tensor(0.1, requires_grad=True), fm.Task(torch.ones(TASKS, 2), torch.ones(TASKS, 2))
    with pytest.raises(fm.GraphError, match=rf"(?s){message}.*strategy='loop'"):
        run(case, "vmap")
    assert run(case, "auto")[0].info.strategy == "loop"


def test_draws_of_stacked_tasks_cannot_be_compiled() -> None:
    problem, meta, tasks = setting(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)).double())
    fast = fm.compile(problem, backend="aten")
    with pytest.raises(fm.CompileError, match=r"dropout draws for each .* cannot be recorded\. Pass strategy='loop'"):
        run((fast, meta, tasks), "vmap")
    assert run((fast, meta, tasks), "auto", steps=2)[0].info.strategy == "loop"


# ---- what is not a tensor, or the same for all


def counting(problem_loss: Callable[[Any], float]) -> fm.Problem:
    def step(rate: Tensor, state: Any, x: Tensor, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda a: (a - x) ** 2)(state["a"])
        worst = max(state["worst"], problem_loss(loss))
        return {"a": state["a"] - rate * slope, "worst": worst}, fm.StepInfo(loss, None, {"worst": worst})

    def judge(rate: Tensor, state: Any, x: Tensor, seed: int) -> Tensor:
        return (state["a"] - x) ** 2 * state["worst"]

    return fm.Problem(lambda meta, task, seed: {"a": torch.zeros(()).double(), "worst": -1.0}, step, judge)


def test_a_loop_keeps_the_python_numbers_of_each_task() -> None:
    problem, x = counting(lambda loss: float(loss.detach())), torch.tensor([2.0, -1.0, 4.0]).double()
    rate, tasks = torch.tensor(0.2).double().requires_grad_(), fm.Task(x, x)
    alone = [fm.unroll(problem, rate, fm.Task(each, each), steps=1) for each in x]
    half = fm.unroll_batch(problem, rate, tasks, steps=1, strategy="loop")
    assert list(half.state["worst"]) == [each.state["worst"] for each in alone] == [4.0, 1.0, 16.0]
    assert half.info.aux[0]["worst"] == tuple(each.info.aux[0]["worst"] for each in alone)
    rest = fm.unroll_batch(problem, rate, tasks, steps=1, strategy="auto", carry=half.carry)
    assert rest.info.strategy == "loop"
    whole = torch.stack([fm.unroll(problem, rate, fm.Task(each, each), steps=2).loss for each in x]).mean()
    close(rest.loss.detach(), whole.detach())
    with pytest.raises(fm.GraphError, match=r"'worst'\] differs between the tasks, \(4\.0, 16\.0\).*strategy='loop'"):
        fm.unroll_batch(counting(lambda loss: 0.0), rate, tasks, steps=1, strategy="vmap", carry=half.carry)


def test_a_python_number_that_all_tasks_share_stays_one() -> None:
    x = torch.tensor([2.0, -1.0]).double()
    rate = torch.tensor(0.2).double().requires_grad_()
    for strategy in BOTH:
        out = fm.unroll_batch(counting(lambda loss: 3.0), rate, fm.Task(x, x), steps=1, strategy=strategy)  # type: ignore[arg-type]
        assert out.state["worst"] == 3.0
    assert repr(stack([{"n": 0.0}, {"n": -0.0}])) == "{'n': Each((0.0, -0.0))}"


def test_stacked_tasks_keep_their_python_numbers() -> None:
    tasks = fm.tasks.stack([fm.Task((torch.ones(2), n), None) for n in (3, 5)])
    assert [unstack(tasks, index).support[1] for index in (0, 1)] == [3, 5]


@pytest.mark.parametrize("strategy", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("read", [lambda task: task.spec, lambda task: task[2], lambda task: [*task][2]])
def test_init_sees_the_spec_of_its_own_task(strategy: Any, read: Any) -> None:
    problem = fm.Problem(
        lambda meta, task, seed: meta * float(read(task)["scale"]),
        lambda meta, w, x, seed: (w * meta, fm.StepInfo(w)),
        lambda meta, w, x, seed: w * x,
    )
    meta, x = torch.tensor(2.0, requires_grad=True), torch.ones(2)
    tasks = fm.Task(x, x, ({"scale": 3}, {"scale": 5}))
    assert fm.unroll_batch(problem, meta, tasks, steps=1, strategy=strategy).loss.item() == 16.0
    alike = tasks._replace(spec=({"scale": 3}, {"scale": 3}))
    assert fm.unroll_batch(problem, meta, alike, steps=1, strategy=strategy).loss.item() == 12.0


def test_frozen_parameters_are_held_once() -> None:
    net = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 2)).double()
    net[0].requires_grad_(False)
    out = run(setting(net), "loop")[0]
    for state in (out.state, out.carry.state):
        frozen = state.buffers["0.weight"]
        assert frozen.shape == (TASKS, 40, 3)
        assert frozen.untyped_storage().nbytes() == 40 * 3 * 8


# ---- what auto remembers


def test_auto_remembers_by_every_function() -> None:
    problem, meta, tasks = setting()
    fm.unroll_batch(problem, meta, tasks, steps=2, strategy="vmap")

    def judge(meta: Any, state: Any, query: Any, seed: int) -> Tensor:
        loss = problem.meta_loss(meta, state, query, seed)  # type: ignore[misc]
        return loss * (2.0 if loss.item() > 0 else 1.0)

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        assert task.support[0].sum().item() < 1e9
        return problem.init(meta, task, seed)

    for other in (problem._replace(meta_loss=judge), problem._replace(init=init)):
        assert fm.unroll_batch(other, meta, tasks, steps=2).info.strategy == "loop"


class Slotted:
    """A step that takes no weak reference."""

    __slots__ = ("calls", "problem")

    def __init__(self, problem: fm.Problem) -> None:
        self.problem, self.calls = problem, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.problem.step(*arguments)

    def method(self, *arguments: Any) -> Any:
        return self(*arguments)


@pytest.mark.parametrize("bound", [False, True])
def test_auto_takes_a_step_without_weak_references(bound: bool) -> None:
    problem, meta, tasks = setting()
    step = Slotted(problem)
    calls = []
    for _ in range(2):
        case = problem._replace(step=step.method if bound else step)
        fm.unroll_batch(case, meta, tasks, steps=2)
        calls.append(step.calls)
    assert calls[1] - calls[0] <= 2 * TASKS < calls[0]


class Shared:
    """Problems whose functions are methods of one class."""

    def __init__(self, look: bool) -> None:
        self.look, self.problem = look, setting()[0]

    def step(self, *arguments: Any) -> Any:
        state, info = self.problem.step(*arguments)
        return state, info._replace(aux=info.loss.item() if self.look else None)


def test_auto_remembers_by_the_object_of_a_method() -> None:
    _, meta, tasks = setting()
    for look in (True, False):
        shared = Shared(look)
        run_of = shared.problem._replace(step=shared.step)
        fm.unroll_batch(run_of, meta, tasks, steps=2, strategy="loop" if look else "vmap")
        assert look is (fm.unroll_batch(run_of, meta, tasks, steps=2).info.strategy == "loop") or not look


def test_auto_takes_the_loop_for_particles() -> None:
    """Each task has its own perturbations in a loop, and all have the same under vmap: other numbers."""
    case = setting()
    for estimator in (fm.EvolutionStrategies(0.1, 2), fm.PersistentES(0.1, 2, 2)):
        assert run(case, "auto", estimator=estimator)[0].info.strategy == "loop"


# ---- an unroll inside of an unroll


def nested(estimator: Any, where: str) -> fm.Problem:
    def deep(meta: Any, p: Tensor, batch: Tensor, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda p: (meta["w"] * p - batch).square() + 0.2 * p**4)(p)
        return p - 0.1 * slope, fm.StepInfo(loss)

    within = fm.Problem(lambda meta, task, seed: meta["w"] * 0.5, deep, lambda meta, p, query, seed: (p - query) ** 2)

    def inner(w: Tensor, x: Tensor) -> Tensor:
        return fm.unroll(within, {"w": w}, fm.Task(x, x), steps=2, estimator=estimator).loss

    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        extra = inner if where == "loss" else lambda w, x: 0.0
        loss, slope = fm.value_and_grad(lambda w: extra(w, x) + (w - meta) ** 2 * x)(w)
        w = w - 0.1 * slope + (0.1 * inner(w, x) if where == "step" else 0.0)
        return w, fm.StepInfo(loss, inner(w, x) if where == "share" else None)

    return fm.Problem(
        lambda meta, task, seed: inner(meta, task.query) if where == "init" else torch.zeros(()).double(),
        step,
        lambda meta, w, x, seed: inner(w, x) if where == "meta-loss" else w**2,
    )


@pytest.mark.parametrize("where", ["init", "loss", "step", "share", "meta-loss"])
@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
def test_an_unroll_inside_of_another(estimator: Any, where: str) -> None:
    x, meta = torch.tensor([1.0, 2.0, -0.5]).double(), torch.tensor(0.7).double().requires_grad_()
    case = nested(estimator, where), meta, fm.Task(x, x)
    (loop, (expected,)), (vmap, (slope,)) = (run(case, each) for each in BOTH)
    close(vmap.loss, loop.loss)
    close(slope, expected)
    if isinstance(estimator, fm.Reverse):
        with torch.no_grad():
            up, down = (run_loss(case, meta + h) for h in (1e-5, -1e-5))
        assert float(slope) == pytest.approx((up - down) / 2e-5, rel=1e-6)


def run_loss(case: Any, meta: Tensor) -> float:
    return fm.unroll_batch(case[0], meta, case[2], steps=3, strategy="vmap").loss.item()


def test_a_nested_unroll_that_vmap_can_not_run_is_refused() -> None:
    x, meta = torch.tensor([1.0, 2.0]).double(), torch.tensor(0.7).double().requires_grad_()
    case = nested(fm.ForwardMode(), "meta-loss"), meta, fm.Task(x, x)
    with pytest.raises(fm.GraphError, match=r"ForwardMode .* Pass strategy='loop'"):
        run(case, "vmap")
