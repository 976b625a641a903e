"""The LSTM whose cell state are the parameters: by its formula, and by the derivative of all that it learns."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.algorithms import Algorithm, meta_lstm
from funcmeta.testing import MetaGradientMismatch

SINUSOIDS = fm.tasks.sinusoids(shots=5, dtype=torch.float64)


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def net() -> nn.Sequential:
    with fm.rng.forked(1):
        return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def build(**options: Any) -> Algorithm:
    with fm.rng.forked(2):
        return meta_lstm.build(net(), mse, **{"steps": 3, "hidden": 4, **options})


def awake(algorithm: Algorithm) -> Any:
    """Its meta, with gates that depend much on what they see, and let much of the gradient in."""
    meta, generator = algorithm.init(), fm.rng.generator(3)
    cell = {
        name: leaf.detach() + 0.3 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in meta["cell"].items()
    }
    cell["enter.bias"] = cell["enter.bias"] + 2.5
    cell["forget.bias"] = cell["forget.bias"] - 2
    return {"params": meta["params"], "cell": {name: leaf.requires_grad_() for name, leaf in cell.items()}}


def slopes(algorithm: Algorithm, meta: Any, tasks: fm.Task) -> list[Tensor]:
    return list(torch.autograd.grad(algorithm.loss(meta, tasks), fm.tree.leaves(meta)))


def assert_equal(one: list[Tensor], other: list[Tensor], rtol: float = 1e-12) -> None:
    scale = max(float(each.abs().max()) for each in other)
    for pair in zip(one, other, strict=True):
        torch.testing.assert_close(*pair, rtol=rtol, atol=rtol * scale)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def by_hand(meta: Any, task: fm.Task, steps: int, p: float = 10.0, *, constant: bool) -> Tensor:
    """The query loss after so many steps, tensor by tensor and coordinate by coordinate."""
    module, cell = net(), meta["cell"]

    def preprocessed(x: Tensor) -> list[Tensor]:
        if x.abs() >= math.exp(-p):
            return [x.abs().log() / p, x.sign()]
        return [torch.full_like(x, -1), math.exp(p) * x]

    def loss(params: Any, batch: Any) -> Tensor:
        return mse(None, lambda x: torch.func.functional_call(module, params, (x,)), batch)

    def one(param: Tensor, grad: Tensor, seen: Tensor, out: Tensor, kept: Tensor, f: Tensor, i: Tensor) -> Any:
        x = torch.stack([*preprocessed(grad), *preprocessed(seen)])
        gates = cell["first.gates.weight"] @ torch.cat([x, out]) + cell["first.gates.bias"]
        enter, forget, new, leave = gates.chunk(4)
        kept = sigmoid(forget) * kept + sigmoid(enter) * new.tanh()
        out = sigmoid(leave) * kept.tanh()
        f = sigmoid(cell["forget.weight"][0] @ torch.cat([out, param[None], f[None]]) + cell["forget.bias"][0])
        i = sigmoid(cell["enter.weight"][0] @ torch.cat([out, param[None], i[None]]) + cell["enter.bias"][0])
        return f * param - i * grad, (out, kept, f, i)

    params, zero = dict(meta["params"]), torch.zeros((), dtype=torch.float64)
    hidden = cell["first.gates.bias"].new_zeros(len(cell["first.gates.bias"]) // 4)
    memory = {name: [(hidden, hidden, zero, zero)] * leaf.numel() for name, leaf in params.items()}
    for _ in range(steps):
        value = loss(params, task.support)
        grads = dict(zip(params, torch.autograd.grad(value, list(params.values()), create_graph=True), strict=True))
        if constant:
            value, grads = value.detach(), fm.tree.detach(grads)
        for name, leaf in params.items():
            rows = zip(leaf.flatten(), grads[name].flatten(), memory[name], strict=True)
            moved, memory[name] = zip(*[one(param, grad, value, *own) for param, grad, own in rows], strict=True)
            params[name] = torch.stack(moved).view_as(leaf)
    return loss(params, task.query)


@pytest.mark.parametrize("estimator", [fm.FirstOrder(), fm.Reverse(), fm.MixedMode()], ids=repr)
def test_it_is_its_formula_for_each_coordinate(estimator: Any) -> None:
    """First order by default: what the LSTM sees, the loss included, is constant."""
    algorithm, task = build(estimator=estimator, strategy="loop"), SINUSOIDS.sample(fm.rng.fold(0, 0))
    meta = awake(algorithm)
    expected = by_hand(meta, task, 3, constant=estimator == fm.FirstOrder())
    tasks = SINUSOIDS.sample_batch(0, tasks=1)
    torch.testing.assert_close(algorithm.loss(meta, tasks), expected, rtol=1e-12, atol=0)
    by_coordinate = torch.autograd.grad(expected, fm.tree.leaves(meta))
    assert_equal(slopes(algorithm, meta, tasks), list(by_coordinate), rtol=1e-10)


def test_first_order_is_the_default() -> None:
    tasks = SINUSOIDS.sample_batch(0, tasks=2)
    plain, first, exact = (build(), build(estimator=fm.FirstOrder()), build(estimator=fm.Reverse()))
    meta = awake(plain)
    assert_equal(slopes(plain, meta, tasks), slopes(first, meta, tasks))
    assert not torch.allclose(slopes(plain, meta, tasks)[-1], slopes(exact, meta, tasks)[-1], rtol=1e-2)


def test_gates_that_stand_still_are_sgd() -> None:
    """Statistics, dropout and the count of steps included."""
    module, rate = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)).double(), 0.1
    meta = {"params": fm.init_params(module), "cell": fm.init_params(meta_lstm.Cell(hidden=4).double())}
    with torch.no_grad():
        for name, value in (("forget", 800.0), ("enter", math.log(rate / (1 - rate)))):
            meta["cell"][f"{name}.weight"].zero_()
            meta["cell"][f"{name}.bias"].fill_(value)
        state, expected = (
            fm.unroll(problem, meta, SINUSOIDS.sample(0), steps=5, seed=7).state
            for problem in (
                meta_lstm.problem(module, mse, meta_lstm.Cell(hidden=4).double()),
                fm.inner_problem(module, mse, optimizer=fm.optim.sgd(rate)),
            )
        )
    assert int(state.step) == int(expected.step) == 5
    for one, other in ((state.params, expected.params), (state.buffers, expected.buffers)):
        for name, leaf in one.items():
            torch.testing.assert_close(leaf, other[name], rtol=1e-12, atol=1e-15)


def test_before_training_it_forgets_little_and_enters_little() -> None:
    cell = build(hidden=20).init()["cell"]
    for name, low, high in (("forget", 4, 5), ("enter", -5, -4)):
        assert low <= cell[f"{name}.bias"].item() <= high
        assert cell[f"{name}.weight"].abs().max() <= 0.01
    assert sum(leaf.numel() for leaf in cell.values()) == 4 * 20 * (4 + 20 + 1) + 2 * (22 + 1)


def problem_of() -> tuple[fm.Problem, Any, fm.Task]:
    problem = meta_lstm.problem(net(), mse, meta_lstm.Cell(hidden=4).double())
    return problem, awake(build()), SINUSOIDS.sample(0)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode(), fm.ForwardMode()], ids=repr)
def test_the_meta_gradient_is_exact(estimator: Any) -> None:
    """For each tensor that is learned by itself, and for all together."""
    problem, meta, task = problem_of()
    check = fm.check_meta_grad(problem, meta, task, steps=3, estimator=estimator)
    assert not check.vacuous
    if estimator == fm.Reverse():
        for part in meta:
            for name, leaf in meta[part].items():
                alone = fm.tree.detach(meta)
                alone[part][name] = leaf
                fm.check_meta_grad(problem, alone, task, steps=3, allow_vacuous=True)


def state_cut(part: str) -> Callable[..., Any]:
    """Steps that see one part of the cell's state as a constant."""

    def cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
        memory = state.opt_state
        constant = fm.tree.detach(getattr(memory, part))
        return step(meta, state._replace(opt_state=memory._replace(**{part: constant})), batch, seed)

    return cut


def loss_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    original = meta_lstm.log_sign
    try:
        meta_lstm.log_sign = lambda x, p: original(x if x.dim() else x.detach(), p)  # type: ignore[attr-defined]
        return step(meta, state, batch, seed)
    finally:
        meta_lstm.log_sign = original  # type: ignore[attr-defined]


def gradient_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    original = meta_lstm.log_sign
    try:
        meta_lstm.log_sign = lambda x, p: original(x.detach() if x.dim() else x, p)  # type: ignore[attr-defined]
        return step(meta, state, batch, seed)
    finally:
        meta_lstm.log_sign = original  # type: ignore[attr-defined]


MUTANTS = {part: state_cut(part) for part in ("hidden", "forget", "enter")} | {
    "loss": loss_cut,
    "gradient": gradient_cut,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_meta_gradient_is_found(mutant: str) -> None:
    """The differences run on the mutant too, but without a graph what it cuts is not seen."""
    problem, meta, task = problem_of()

    def step(*arguments: Any) -> Any:
        return MUTANTS[mutant](problem.step, *arguments)

    with pytest.raises(MetaGradientMismatch):
        fm.check_meta_grad(problem._replace(step=step), meta, task, steps=3)


@pytest.mark.parametrize("estimator", [fm.FirstOrder(), fm.Reverse(), fm.MixedMode()], ids=repr)
def test_tasks_at_once_are_tasks_one_by_one(estimator: Any) -> None:
    tasks = SINUSOIDS.sample_batch(0, tasks=3)
    one, other = (build(estimator=estimator, strategy=strategy) for strategy in ("vmap", "loop"))
    meta = awake(one)
    assert_equal(slopes(one, meta, tasks), slopes(other, meta, tasks), rtol=1e-10)


@pytest.mark.parametrize("memory", [fm.Segments(2), fm.Revolve(2), fm.Segments(1)], ids=repr)
@pytest.mark.parametrize("estimator", [fm.FirstOrder(), fm.Reverse()], ids=repr)
def test_replayed_steps_give_the_same(estimator: Any, memory: Any) -> None:
    tasks = SINUSOIDS.sample_batch(0, tasks=2)
    plain, replayed = (build(estimator=estimator, memory=each, steps=5) for each in (fm.StoreAll(), memory))
    meta = awake(plain)
    assert_equal(slopes(replayed, meta, tasks), slopes(plain, meta, tasks))


@pytest.mark.parametrize("estimator", [fm.FirstOrder(), fm.Reverse()], ids=repr)
def test_compiled_steps_give_the_same(estimator: Any) -> None:
    problem, meta, task = problem_of()
    compiled, plain = (
        torch.autograd.grad(fm.unroll(each, meta, task, steps=3, estimator=estimator).loss, fm.tree.leaves(meta))
        for each in (fm.compile(problem, backend="aten"), problem)
    )
    assert_equal(list(compiled), list(plain))


def test_any_number_of_tensors_and_shapes_shares_the_cell() -> None:
    """Another network, with BatchNorm, a scalar and a tied weight, under the same weights."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
            self.last.bias = self.first.bias
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.last(self.norm(self.first(x)).tanh()).sum(-1, keepdim=True)

    module = Tied().double()
    algorithm = meta_lstm.build(module, mse, steps=3, hidden=4)
    meta, task = {**algorithm.init(), "cell": awake(build())["cell"]}, SINUSOIDS.sample(0)
    predict, calm = algorithm.adapt(meta, task), algorithm.adapt(meta, task, evaluate=True)
    assert list(predict.params) == [name for name, _ in module.named_parameters()]
    assert int(predict.buffers["norm.num_batches_tracked"]) == 3
    assert int(module.norm.num_batches_tracked) == 0
    x = task.query[0]
    assert torch.equal(calm(x[:2]), calm(x)[:2])
    assert not torch.equal(predict(x[:2]), predict(x)[:2])


def test_init_gives_fresh_leaves() -> None:
    algorithm = build()
    first, second = algorithm.init(), algorithm.init()
    for a, b in zip(fm.tree.leaves(first), fm.tree.leaves(second), strict=True):
        assert a.is_leaf
        assert a.requires_grad
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert a.dtype == torch.float64


def test_gates_of_another_precision() -> None:
    """The gates are computed in that of their weights, the parameters keep theirs."""
    single = meta_lstm.problem(net(), mse, meta_lstm.Cell(hidden=4))
    double, meta, task = problem_of()
    cell = {name: leaf.detach().float() for name, leaf in meta["cell"].items()}
    state = fm.unroll(single, {**meta, "cell": cell}, task, steps=3).state
    expected = fm.unroll(double, meta, task, steps=3).state
    assert state.opt_state.forget.dtype == torch.float32
    for name, leaf in state.params.items():
        assert leaf.dtype == torch.float64
        torch.testing.assert_close(leaf, expected.params[name], rtol=1e-4, atol=1e-4)


def test_it_learns_to_recognize_characters() -> None:
    """A short meta-training: more characters of unseen scripts are recognized than before it."""

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return F.cross_entropy(predict(batch[0]), batch[1])

    with fm.rng.forked(0):
        module = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.ReLU(), nn.Linear(16, 5))
        algorithm = meta_lstm.build(module, loss, steps=3, hidden=8, strategy="vmap")
    train, unseen = (fm.tasks.glyphs(queries=5, size=14, split=split) for split in ("train", "test"))

    def accuracy(meta: Any) -> float:
        right = [
            (algorithm.adapt(meta, task)(task.query[0]).argmax(-1) == task.query[1]).float().mean()
            for task in map(unseen.sample, range(40))
        ]
        return torch.stack(right).mean().item()

    meta = algorithm.init()
    outer = torch.optim.Adam(fm.tree.leaves(meta), lr=1e-2)
    before = accuracy(meta)
    for seed in range(60):
        outer.zero_grad()
        algorithm.loss(meta, train.sample_batch(seed, tasks=4)).backward()
        outer.step()
    assert accuracy(meta) > before + 0.1


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(fm.ArgumentError, match=r"steps is 0, expected a positive integer. Pass e.g. steps=5"):
        build(steps=0)
    with pytest.raises(fm.ArgumentError, match=r"hidden is 0, expected a positive integer. Pass a larger hidden"):
        build(hidden=0)
    with pytest.raises(fm.ArgumentError, match=r"p is -1, expected a positive number. Pass e.g. p=0.1"):
        build(p=-1)
    algorithm = build()
    meta = {**algorithm.init(), "cell": build(hidden=5).init()["cell"]}
    with pytest.raises(fm.StructureError, match=r"meta\['cell'\].*Pass what init\(\) returned"):
        algorithm.adapt(meta, SINUSOIDS.sample(0))
