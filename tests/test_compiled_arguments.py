"""compile: other sizes and other Python values get the numbers of the plain problem, or an error of ours."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import _lowering, compiled, optim
from funcmeta.testing import TOLERANCES, LiveBytes

SIZES = (4, 6, 9, 1, 6)


def problem_of(loss: Callable[[Tensor, Any], Tensor], judge: Callable[[Tensor, Any], Tensor] | None = None) -> Any:
    """Descent on a loss of (w, batch) at a learned rate, judged by another."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: loss(w, batch))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    judge = judge or (lambda w, query: (w**3).sum())
    return fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, lambda meta, w, query, seed: judge(w, query))


def meta_of() -> dict[str, Tensor]:
    with fm.rng.forked(0):
        w = torch.randn(3, 4).double()
    return {"w": w.requires_grad_(), "lr": torch.tensor(0.05).double().requires_grad_()}


def rows(number: int, width: int = 3) -> Tensor:
    with fm.rng.forked(number):
        return torch.randn(number, width).double()


def outcome(problem: fm.Problem, meta: Any, task: fm.Task, **options: Any) -> list[Tensor]:
    """The loss and the meta-gradient."""
    out = fm.unroll(problem, meta, task, steps=2, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, fm.tree.leaves(meta))]


def assert_same(fast: fm.Problem, problem: fm.Problem, meta: Any, task: fm.Task, **options: Any) -> None:
    got, expected = (outcome(each, meta, task, **options) for each in (fast, problem))
    torch.testing.assert_close(got, expected, rtol=TOLERANCES.memory, atol=TOLERANCES.memory)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recordings that are made meanwhile."""
    made: list[Any] = []
    kernel = _lowering.Lowered.kernel
    monkeypatch.setattr(_lowering.Lowered, "kernel", lambda self, *rest: made.append(self) or kernel(self, *rest))
    return made


# ---- sizes


def weighted(w: Tensor, x: Tensor) -> Tensor:
    return ((x @ w).sin().mean(1) * torch.tensor([1.0 / (1 + i) for i in range(len(x))]).double()).sum()


def pairs(w: Tensor, x: Tensor) -> Tensor:
    outputs = [row @ w for row in x]
    return sum(((a - b).sin() ** 2).sum() for a, b in itertools.pairwise(outputs)) + outputs[0].sum()


def power(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).sin().pow(2).sum() * float(x.shape[0]) ** -0.5


def branching(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).sin().mean() if x.shape[0] > 5 else (x @ w).cos().mean()


def divisible(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).reshape(2, -1).sin().prod(0).sum() if x.shape[0] % 2 == 0 else (x @ w).sin().sum()


def positions(w: Tensor, x: Tensor) -> Tensor:
    return ((x @ w).sin() * torch.arange(x.numel() // 3).double()[:, None]).sum()


def masked(w: Tensor, x: Tensor) -> Tensor:
    return ((x @ w) @ (x @ w).mT).tril().sin().mean()


def padded(w: Tensor, x: Tensor) -> Tensor:
    return (F.pad(x, (0, 0, 0, 12 - x.shape[0])) @ w).sin().view(3, -1).prod(0).add((x @ w).cos().sum()).sum()


def flattened(w: Tensor, x: Tensor) -> Tensor:
    return F.softmax(nn.Flatten(0)(x @ w), 0).square().sum()


SPECIALISING = [weighted, pairs, power, branching, divisible, positions, masked, padded, flattened]


@pytest.mark.parametrize("loss", SPECIALISING, ids=lambda loss: loss.__name__)
def test_a_size_that_python_reads(loss: Any) -> None:
    """Every size gets its own number, also those that were met before."""
    problem, meta = problem_of(loss), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in SIZES:
        assert_same(fast, problem, meta, fm.Task(rows(number), rows(2)))


@pytest.mark.parametrize("loss", [weighted, branching], ids=lambda loss: loss.__name__)
def test_a_condition_that_torch_does_not_know_shows_in_the_comparison(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients are right in the very call that finds it, too."""
    monkeypatch.setattr(_lowering.Lowered, "_guarded", lambda self, tensors: True)
    problem, meta = problem_of(loss, loss), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in (4, 6, 9, 9, 6):
        assert_same(fast, problem, meta, fm.Task(rows(number), rows(number + 1)), memory=fm.Segments(1))


class CountedInTheDerivative(torch.autograd.Function):
    """The identity, with a gradient divided by the number of rows."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return cotangent / len(cotangent)


@pytest.mark.parametrize("known", [True, False])
def test_a_size_that_only_the_derivative_reads(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(_lowering.Lowered, "_guarded", lambda self, tensors: True)

    def judge(w: Tensor, x: Tensor) -> Tensor:
        return CountedInTheDerivative.apply(x @ w).sin().sum()  # type: ignore[no-any-return]

    problem, meta = problem_of(lambda w, x: (x @ w).sin().mean(), judge), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in (4, 6, 9, 9):
        with torch.no_grad():  # the recording without a derivative comes first
            fm.unroll(fast, meta, fm.Task(rows(2), rows(number)), steps=1)
        assert_same(fast, problem, meta, fm.Task(rows(2), rows(number)))


def test_an_operation_that_does_not_take_variable_sizes(recorded: list[Any]) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        if isinstance(x.shape[0], torch.SymInt):
            raise TypeError("expected a number")
        return (x @ w).sin().mean()

    problem, meta = problem_of(loss), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in (4, 6, 9, 6):
        assert_same(fast, problem, meta, fm.Task(rows(number), rows(2)))
    assert not any(each.dynamic for each in recorded)


def test_a_conv_net_that_flattens_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 3, 3, padding=1), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).tanh().reshape(len(x), -1))  # type: ignore[no-any-return]

    with fm.rng.forked(1):
        net = Net().double()
    problem = fm.inner_problem(
        net, lambda meta, predict, batch: predict(batch).square().mean(), optimizer=lambda m: optim.sgd(m["lr"])
    )
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.1).double().requires_grad_()}
    fast = fm.compile(problem, backend="aten")
    for number in (4, 5, 7, 2):
        assert_same(fast, problem, meta, fm.Task(rows(number, 10).reshape(-1, 2, 5), rows(3, 10).reshape(-1, 2, 5)))


def test_two_sizes_that_vary_apart_from_each_other(recorded: list[Any]) -> None:
    """The number of rows is read, the number of columns is not: one recording serves all widths."""
    problem = problem_of(lambda w, x: (x.mT @ x).sin().mean() * w.square().sum() / len(x))
    meta, fast = meta_of(), fm.compile(problem, backend="aten")
    for shape in ((4, 2), (4, 3), (4, 5), (5, 2), (5, 6)):
        assert_same(fast, problem, meta, fm.Task(rows(*shape), rows(2)))
    steps = {id(each) for each in recorded}
    assert len(steps) <= 5  # of the step: (4, 2), 4 x any, (5, 2), 5 x any; and the meta-loss


def test_a_size_in_what_is_reported() -> None:
    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: (x @ w).sin().mean())(w)
        return w - meta["lr"] * slope, fm.StepInfo(value, aux={"rows": x.shape[0], "shape": str(x.shape)})

    problem, meta = problem_of(weighted)._replace(step=step), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in SIZES:
        task = fm.Task(rows(number), rows(2))
        assert_same(fast, problem, meta, task)
        aux = fm.unroll(fast, meta, task, steps=1).info.aux[0]
        assert aux == {"rows": number, "shape": f"torch.Size([{number}, 3])"}
        assert type(aux["rows"]) is int


def test_more_sizes_than_a_recording_each_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST", 3)
    problem, meta = problem_of(power), meta_of()
    fast, patient = (fm.compile(problem, backend="aten", dynamic=dynamic) for dynamic in (True, False))
    for number in (4, 6, 9):
        assert_same(fast, problem, meta, fm.Task(rows(number), rows(2)))
        assert_same(patient, problem, meta, fm.Task(rows(number), rows(2)))
    task = fm.Task(rows(40), rows(2))
    with pytest.raises(
        fm.CompileError,
        match=r"more than 3 combinations of sizes, the last one with .*\[2\] = \[40, 3\]\. .*pad to a few",
    ):
        outcome(fast, meta, task)
    assert_same(patient, problem, meta, task)


def test_a_new_size_is_compared_once_and_recorded_never(recorded: list[Any]) -> None:
    calls: list[int] = []

    def loss(w: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return (x @ w).sin().mean()

    problem, meta = problem_of(loss), meta_of()
    fast = fm.compile(problem, backend="aten")
    for number in (4, 6):
        outcome(fast, meta, fm.Task(rows(number), rows(2)))
    made = len(recorded)
    for number in (7, 11, 13):
        task, before = fm.Task(rows(number), rows(2)), len(calls)
        outcome(fast, meta, task)
        assert len(calls) == before + 2, "the step, and its derivative"
        outcome(fast, meta, task)
        assert len(calls) == before + 2
    assert len(recorded) == made


@pytest.mark.slow
@pytest.mark.parametrize("loss", [weighted, divisible, flattened], ids=lambda loss: loss.__name__)
def test_a_size_that_python_reads_with_inductor(loss: Any) -> None:
    problem, meta = problem_of(loss, loss), meta_of()
    fast = fm.compile(problem)
    for number in (4, 6, 9, 3):
        assert_same(fast, problem, meta, fm.Task(rows(number), rows(number + 1)))


# ---- Python values


def signed(w: Tensor, batch: Any) -> Tensor:
    return (batch["x"] @ w).sin().mean() * math.copysign(1.0, batch["value"])


def by_type(w: Tensor, batch: Any) -> Tensor:
    return (batch["x"] @ w).sin().mean() * len(type(batch["value"]).__name__)


def by_key(w: Tensor, batch: Any) -> Tensor:
    return (batch["x"] @ w).sin().mean() * len(type(next(iter(batch["value"]))).__name__)


def by_field(w: Tensor, batch: Any) -> Tensor:
    return (batch["x"] @ w).sin().mean() * (2.0 + math.copysign(1.0, batch["value"].scale))


@dataclass(frozen=True)
class Setting:
    """A value among the arguments, compared by its fields."""

    scale: float


MERGED = [
    (signed, 0.0, -0.0),
    (signed, float("nan"), -float("nan")),
    (by_type, 1, True),
    (by_type, 1.0, 1),
    (by_key, {1: None}, {True: None}),
    (by_key, frozenset({1}), frozenset({1.0})),
    (by_field, Setting(0.0), Setting(-0.0)),
]


@pytest.mark.parametrize(("loss", "one", "other"), MERGED, ids=lambda each: getattr(each, "__name__", repr(each)))
def test_values_that_are_equal_and_not_the_same(loss: Any, one: Any, other: Any) -> None:
    problem, meta = problem_of(loss), meta_of()
    fast = fm.compile(problem, backend="aten")
    found = []
    for value in (one, other, one):
        task = fm.Task(lambda step, value=value: {"x": rows(4), "value": value}, rows(2))
        assert_same(fast, problem, meta, task)
        found.append(outcome(fast, meta, task)[0])
    assert found[0] == found[2] != found[1]


def test_an_object_that_changes() -> None:
    class Temperature:
        def __init__(self) -> None:
            self.now = 1.0

    setting = Temperature()
    problem, meta = problem_of(lambda w, batch: (batch[0] @ w / batch[1].now).sin().mean()), meta_of()
    fast = fm.compile(problem, backend="aten")
    for setting.now in (1.0, 2.0, 0.5):
        assert_same(fast, problem, meta, fm.Task(lambda step: (rows(4), setting), rows(2)))


def test_nan_is_compiled_for_once(recorded: list[Any]) -> None:
    problem, meta = problem_of(lambda w, batch: (batch[0] @ w).sin().mean()), meta_of()
    fast = fm.compile(problem, backend="aten")
    for _ in range(3):
        assert_same(fast, problem, meta, fm.Task(lambda step: (rows(4), float("nan")), rows(2)))
    assert len({id(each) for each in recorded}) == 2  # step and meta-loss


def reporting(
    report: Callable[[int], Any] = lambda seed: None, more: Callable[[int], Any] = lambda seed: None
) -> fm.Problem:
    """A problem that tells something made from the seed, in its report and in its state."""

    def step(meta: Any, state: Any, x: Tensor, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: (x @ w).sin().mean())(state["w"])
        new = {"w": state["w"] - meta["lr"] * slope, "kept": [more(seed)]}
        return new, fm.StepInfo(value, aux={"told": report(seed)})

    return fm.Problem(
        lambda meta, task, seed: {"w": meta["w"] * 1, "kept": [more(0)]},
        step,
        lambda meta, state, query, seed: (state["w"] ** 3).sum(),
    )


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (reporting(lambda seed: seed), r"info\.aux\['told'\] is \d+ in one call of the function and \d+ in another\."),
        (reporting(lambda seed: (seed >> 30) / 7), r"info\.aux\['told'\] is .* Return a tensor that is computed from"),
        (reporting(lambda seed: f"run {seed}"), r"info\.aux\['told'\] is 'run \d+' in one call"),
        (reporting(more=lambda seed: seed % 1000), r"state\['kept'\]\[0\] is \d+ in one call .* and \d+ in another"),
        (reporting(lambda seed: [0] * (seed % 2)), "trees of different structures in two calls"),
        (reporting(lambda seed: None if seed % 2 else torch.ones(())), r"info\.aux\['told'\] is .*a tensor"),
    ],
)
def test_a_value_made_from_the_seed_in_what_is_returned(problem: fm.Problem, message: str) -> None:
    task, meta = fm.Task(rows(4), rows(2)), meta_of()
    for options in ({}, {"memory": fm.Segments(1)}):
        with pytest.raises(fm.CompileError, match=message):
            fm.unroll(fm.compile(problem, backend="aten"), meta, task, steps=2, **options)


def test_a_value_that_does_not_depend_on_the_seed_is_returned() -> None:
    problem, meta = reporting(lambda seed: {"name": "a", "at": float("nan"), "by": Setting(0.5), 1: None}), meta_of()
    fast = fm.compile(problem, backend="aten")
    assert_same(fast, problem, meta, fm.Task(rows(4), rows(2)))
    told = fm.unroll(fast, meta, fm.Task(rows(4), rows(2)), steps=2).info.aux[1]["told"]
    assert (told["name"], told["by"], told[1]) == ("a", Setting(0.5), None)


def test_the_upper_part_of_the_seed() -> None:
    """The two seeds of the recording differ in one bit, which this function does not read."""

    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: (x @ w).sin().mean() * (1 + (seed >> 20) % 1000))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    problem, meta = problem_of(weighted)._replace(step=step), meta_of()
    with pytest.raises(fm.CompileError, match="from what the function itself gives"):
        outcome(fm.compile(problem, backend="aten"), meta, fm.Task(rows(4), rows(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_with_a_tensor_of_probabilities(dtype: torch.dtype) -> None:
    chance = torch.linspace(0.1, 0.9, 4, dtype=dtype).expand(5, 4)
    problem, meta = problem_of(lambda w, x: ((x @ w).sin() * torch.bernoulli(chance)).mean()), meta_of()
    assert_same(fm.compile(problem, backend="aten"), problem, meta, fm.Task(rows(5), rows(2)))


@pytest.mark.parametrize("dynamic", ["no", 1, None])
def test_dynamic_is_a_flag(dynamic: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=rf"dynamic is {dynamic!r}, expected True or False\. Pass one of them"):
        fm.compile(problem_of(weighted), backend="aten", dynamic=dynamic)


# ---- bytes


def test_bytes_of_kernels_are_counted() -> None:
    """As those of single operations. Kernels may differentiate what was counted in the forward pass, and vice versa."""
    with fm.rng.forked(3):
        net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
        batch = torch.randn(16, 6), torch.randn(16, 1)
    plain = fm.inner_problem(
        net,
        lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.9),
    )
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.01, requires_grad=True)}
    task, leaves = fm.Task(batch, batch), fm.tree.leaves(meta)
    expected = torch.autograd.grad(fm.unroll(plain, meta, task, steps=20).loss, leaves)
    kept, plans, most = [], [], []
    for backend in ("aten", "inductor"):
        problem = fm.compile(plain, backend=backend)  # type: ignore[arg-type]
        for _ in range(2):  # with the first calls, and without
            with LiveBytes() as live:
                loss = fm.unroll(problem, meta, task, steps=20).loss
            kept.append(live.live)
            torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)
            loss = fm.unroll(problem, meta, task, steps=20).loss
            with LiveBytes() as live:
                torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)
            most.append(live.peak)
        plans.append(fm.unroll(problem, meta, task, steps=60, memory=fm.budget(120_000)).info.memory)
    assert len(set(kept)) == 1
    assert kept[0] > 20 * sum(leaf.nbytes for leaf in leaves)
    assert len(set(most)) == 1
    assert most[0] > 0
    assert plans[0].memory == plans[1].memory
    assert plans[0].estimate.peak_bytes == plans[1].estimate.peak_bytes <= 120_000


# ---- rounding


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.Softmax(0)], ids=lambda layer: type(layer).__name__)
def test_a_step_that_is_made_of_rounding(layer: nn.Module) -> None:
    """The layer cancels the bias, whose gradient is rounding alone, of which RMSprop makes a whole step."""
    with fm.rng.forked(4):
        net = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 2)).double()
        batch = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        optimizer=lambda meta: optim.rmsprop(meta["lr"]),
    )
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.01).double().requires_grad_()}
    task, fast = fm.Task(batch, batch), fm.compile(problem, backend="aten")
    got, expected = (fm.unroll(each, meta, task, steps=3).loss for each in (fast, problem))
    torch.testing.assert_close(got, expected, rtol=TOLERANCES.exact, atol=0.0)
    slopes = [torch.autograd.grad(each, meta["lr"])[0] for each in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=0.0)


def test_a_kernel_that_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _lowering.Lowered.run
    monkeypatch.setattr(_lowering.Lowered, "run", lambda *args: [each * math.nan for each in run(*args)])
    problem, meta = problem_of(lambda w, x: (x @ w).sin().mean()), meta_of()
    with pytest.raises(fm.CompileError, match="is nan from what the function itself gives"):
        outcome(fm.compile(problem, backend="aten"), meta, fm.Task(rows(4), rows(2)))


def test_whether_two_arguments_are_one_tensor_is_told_apart() -> None:
    """A function may ask for it; a kernel for one answer is not taken for the other."""

    def loss(w: Tensor, batch: Any) -> Tensor:
        return (w * batch["x"]).square().sum() * (3.0 if batch["z"] is batch["x"] else 1.0)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: loss(w, batch))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    problem = fm.Problem(lambda m, t, s: torch.ones(3), step, lambda m, w, q, s: w.sum())
    fast = fm.compile(problem, backend="aten")
    meta, x = {"lr": torch.tensor(0.1, requires_grad=True)}, torch.ones(3)
    apart, one = ({"x": x, "z": each} for each in (torch.ones(3), x))
    for batch in (apart, one):
        got, expected = (fm.unroll(each, meta, fm.Task(batch, x), steps=1).loss for each in (fast, problem))
        torch.testing.assert_close(got, expected)
