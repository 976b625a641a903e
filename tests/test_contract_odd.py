"""The contract on odd programs: every combination gives the number of a loop written by hand, or refuses by name.

Each case is a module or loss as people write them: hooks, tied padding rows, parameters that some steps do not use,
references that a module keeps to its own tensors, unrolls inside a loss. The reference is the same training written out
in formulas and differentiated by plain autograd.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm

STEPS, TASKS, RATE = 3, 2, 0.3

Params = dict[str, Tensor]


class Case(NamedTuple):
    """An odd program: how funcmeta gets it, and the same in formulas.

    Attributes:
        module: the network.
        loss: (meta, predict, batch) → loss, as given to ``inner_problem``.
        formula: (params, batch) → loss, by hand.
        batch: a batch of one task.
        refused: the ways that may raise one of our errors, and a part of its message; all others have to be right.
        support: from a batch to the support of a task.
        hook: what a hook makes of the gradients, by name.
        momentum: that of the inner SGD.
    """

    module: Callable[[], nn.Module]
    loss: Callable[[Any, Any, Any], Tensor]
    formula: Callable[[Params, Any], Tensor]
    batch: Callable[[], Any]
    refused: Mapping[str, str] = MappingProxyType({})
    support: Callable[[Any], Any] = lambda batch: batch
    hook: Callable[[str, Tensor], Tensor] = lambda name, grad: grad
    momentum: float = 0.0


def squared(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def numbers() -> Any:
    return torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


def words() -> Any:
    return torch.tensor([[0, 1, 2, 0], [3, 0, 4, 1]])[:, torch.randperm(4)], torch.randn(2, 5, dtype=torch.float64)


class TwoLayers(nn.Module):
    """The body of most cases."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def body(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, params["body.weight"], params["body.bias"]))


def head(params: Params, h: Tensor) -> Tensor:
    return F.linear(h, params["head.weight"], params["head.bias"])


def hooked(h: Tensor) -> Tensor:
    """The tensor itself, whose gradient is halved on the way back: the part that comes from saved results, too."""
    if h.requires_grad:
        h.register_hook(lambda grad: 0.5 * grad)
    return h


class TensorHook(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if h.requires_grad:
            h.register_hook(lambda grad: 0.5 * grad)
        return self.head(h)  # type: ignore[no-any-return]


class ModuleHook(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.act.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))  # type: ignore[no-any-return]


def halved_before(params: Params, x: Tensor) -> Tensor:
    z = F.linear(x, params["body.weight"], params["body.bias"])
    return torch.tanh(hooked(z.view_as(z)))


class Masked(TwoLayers):
    """A pruned layer, whose mask is a hook on its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body.weight.register_hook(lambda grad: grad * MASK)


MASK = torch.tensor([[1.0, 0.0, 1.0]] * 4, dtype=torch.float64)


class TwoHeads(TwoLayers):
    """A head for even steps, and one for odd steps and the query; none uses the third."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.third = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, odd: int = 1) -> Tensor:
        return (self.other if odd else self.head)(torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def by_turns(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y, *odd = batch
    return F.mse_loss(predict(x, *odd), y)


def two_heads(params: Params, batch: Any) -> Tensor:
    x, y, *odd = batch
    name = "other" if odd in ([], [1]) else "head"
    return F.mse_loss(F.linear(body(params, x), params[f"{name}.weight"], params[f"{name}.bias"]), y)


class PadTied(nn.Module):
    """Words with a padding row, and a decoder that shares their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight[0] = 0.7

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embedding(ids)).mean(1) @ self.embedding.weight.T


def pad_tied(params: Params, batch: Any) -> Tensor:
    weight = params["embedding.weight"]
    vectors = torch.tanh(F.embedding(batch[0], weight, padding_idx=0))
    return F.mse_loss(vectors.mean(1) @ weight.T, batch[1])


class Referring(TwoLayers):
    """Keeps its weights a second time in a list, and a function that closes over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((4,), 0.3, dtype=torch.float64))
        self.weights = [self.body.weight, self.head.weight]
        self.act = lambda z: torch.tanh(z + self.shift)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weights
        return self.act(x @ first.T + self.body.bias) @ second.T + self.head.bias  # type: ignore[no-any-return]


def referring(params: Params, batch: Any) -> Tensor:
    h = torch.tanh(batch[0] @ params["body.weight"].T + params["body.bias"] + 0.3)
    return F.mse_loss(head(params, h), batch[1])


class Caching(TwoLayers):
    """Fills a table when it first runs, and keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4, dtype=x.dtype).sin()
        h = torch.tanh(self.body(x) + self.table)
        self.seen.append(h)
        return self.head(self.seen[-1])  # type: ignore[no-any-return]


def caching(params: Params, batch: Any) -> Tensor:
    table = torch.arange(4, dtype=torch.float64).sin()
    h = torch.tanh(F.linear(batch[0], params["body.weight"], params["body.bias"]) + table)
    return F.mse_loss(head(params, h), batch[1])


def nested_training(a: Tensor, target: Tensor) -> Tensor:
    """A number after two steps of a training of its own, whose curvature is a."""
    p = torch.zeros((), dtype=torch.float64)
    for _ in range(2):
        p = p - 0.2 * (2 * (p - target) + 0.4 * a * p**3)
    return p


def nested_step(meta: Any, p: Tensor, target: Tensor, seed: int) -> Any:
    loss, slope = fm.value_and_grad(lambda p: (p - target) ** 2 + 0.1 * meta["a"] * p**4)(p)
    return p - 0.2 * slope, fm.StepInfo(loss)


NESTED = fm.Problem(
    lambda meta, task, seed: torch.zeros((), dtype=torch.float64), nested_step, lambda meta, p, query, seed: p
)


def nested(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    a = predict.params["head.bias"].square().sum()
    inside = fm.unroll(NESTED, {"a": a}, fm.Task(y.mean(), y.mean()), steps=2).loss
    return F.mse_loss(predict(x), y) + inside**2


def nested_formula(params: Params, batch: Any) -> Tensor:
    inside = nested_training(params["head.bias"].square().sum(), batch[1].mean())
    return F.mse_loss(head(params, body(params, batch[0])), batch[1]) + inside**2


VMAP = "strategy='loop'"
CASES = {
    "tensor hook": Case(
        TensorHook,
        squared,
        lambda params, batch: F.mse_loss(head(params, hooked(body(params, batch[0]))), batch[1]),
        numbers,
        {"vmap": VMAP, "compile": ""},
    ),
    "module hook": Case(
        ModuleHook,
        squared,
        lambda params, batch: F.mse_loss(head(params, halved_before(params, batch[0])), batch[1]),
        numbers,
        {"vmap": VMAP, "compile": ""},
    ),
    "parameter hook": Case(
        Masked,
        squared,
        lambda params, batch: F.mse_loss(head(params, body(params, batch[0])), batch[1]),
        numbers,
        hook=lambda name, grad: grad * MASK if name == "body.weight" else grad,
    ),
    "tied padding row": Case(PadTied, squared, pad_tied, words),
    "second references": Case(Referring, squared, referring, numbers),
    "cache": Case(Caching, squared, caching, numbers),
    "nested unroll": Case(TwoLayers, nested, nested_formula, numbers, {"vmap": VMAP, "compile": ""}),
    "two heads": Case(
        TwoHeads,
        by_turns,
        two_heads,
        numbers,
        support=lambda batch: lambda step: (*batch, step % 2),
        momentum=0.9,
    ),
}
ESTIMATORS: dict[str, Any] = {
    "reverse": fm.Reverse(),
    "mixed mode": fm.MixedMode(),
    "forward mode": fm.ForwardMode(),
    "one window": fm.Truncated(STEPS),
}
MEMORIES: dict[str, Any] = {"store all": fm.StoreAll(), "segments": fm.Segments(1), "revolve": fm.Revolve(1)}
WAYS = ("single", "loop", "vmap", "auto", "compile")


@cache
def parts(name: str) -> tuple[nn.Module, list[fm.Task]]:
    """The module, and tasks whose support is a batch."""
    with fm.rng.forked(7):
        module = CASES[name].module().double()
        return module, [fm.Task(CASES[name].batch(), CASES[name].batch()) for _ in range(TASKS)]


def fresh(name: str) -> dict[str, Any]:
    """Initial parameters and a rate; what no step uses is a constant."""
    lr = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    params = fm.init_params(parts(name)[0])
    return {"params": {key: leaf.requires_grad_("third" not in key) for key, leaf in params.items()}, "lr": lr}


def learned(meta: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad]


@cache
def by_hand(name: str, tasks: int) -> tuple[float, list[Tensor]]:
    """Mean loss and meta-gradient of the training in formulas; what has no gradient stays as it is."""
    meta, case = fresh(name), CASES[name]
    losses = []
    for task in parts(name)[1][:tasks]:
        params = {key: leaf if leaf.requires_grad else leaf.requires_grad_() for key, leaf in meta["params"].items()}
        speed: Params = {}
        for index in range(STEPS):
            support = case.support(task.support)
            loss = case.formula(params, support(index) if callable(support) else support)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
            for key, grad in zip(params, grads, strict=True):
                if grad is not None:
                    speed[key] = case.momentum * speed[key] if key in speed else torch.zeros_like(grad)
                    speed[key] = speed[key] + case.hook(key, grad)
                    params[key] = params[key] - meta["lr"] * speed[key]
        losses.append(case.formula(params, task.query))
    loss = torch.stack(losses).mean()
    return loss.item(), list(torch.autograd.grad(loss, learned(fresh_like(meta))))


def fresh_like(meta: dict[str, Any]) -> dict[str, Any]:
    """The leaves that a meta-gradient is taken for: all but the head that nothing uses."""
    return {"params": {key: leaf for key, leaf in meta["params"].items() if "third" not in key}, "lr": meta["lr"]}


def by_funcmeta(
    name: str, way: str, estimator: Any, memory: Any, loss: Any = None, module: nn.Module | None = None
) -> tuple[float, list[Tensor]]:
    """Loss and meta-gradient of a case; or of another loss or module."""
    case, (own, tasks) = CASES[name], parts(name)
    problem = fm.inner_problem(
        module or own, loss or case.loss, optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=case.momentum)
    )
    meta = fresh(name)
    before = [leaf.detach().clone() for leaf in fm.tree.leaves(meta)]
    if way == "compile":
        problem = fm.compile(problem, backend="aten")
    task = tasks[0] if way in ("single", "compile") else fm.tasks.stack(tasks)
    task = task._replace(support=case.support(task.support))
    options: dict[str, Any] = {"steps": STEPS, "estimator": estimator, "memory": memory}
    if way in ("single", "compile"):
        out = fm.unroll(problem, meta, task, **options)
    else:
        out = fm.unroll_batch(problem, meta, task, strategy=way, **options)  # type: ignore[arg-type]
    grads = list(torch.autograd.grad(out.loss, learned(meta)))
    assert all(map(torch.equal, before, fm.tree.leaves(meta))), "meta was written into"
    return out.loss.item(), grads


def result_or_refusal(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except fm.FuncmetaError as error:
        return error


def combinations() -> Iterator[Any]:
    for case in CASES:
        for way in WAYS:
            for estimator in ESTIMATORS:
                for memory in MEMORIES:
                    yield pytest.param(case, way, estimator, memory, id=f"{case}-{way}-{estimator}-{memory}")


@pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")
@pytest.mark.parametrize(("case", "way", "estimator", "memory"), list(combinations()))
def test_odd_programs_are_right_or_refused(case: str, way: str, estimator: str, memory: str) -> None:
    loss, grads = by_hand(case, 1 if way in ("single", "compile") else TASKS)
    found = result_or_refusal(lambda: by_funcmeta(case, way, ESTIMATORS[estimator], MEMORIES[memory]))
    if isinstance(found, fm.FuncmetaError):
        assert way in CASES[case].refused, f"refused: {found}"
        assert CASES[case].refused[way] in str(found)
        return
    found_loss, slopes = found
    assert found_loss == pytest.approx(loss, rel=1e-10)
    scale = max(float(grad.abs().max()) for grad in grads)
    for got, expected in zip(slopes, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * scale)


class Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward((out - target) * 2 / out.numel())
        return F.mse_loss(out, target)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ctx.saved_tensors[0] * cotangent, None


def fused(meta: Any, predict: Any, batch: Any) -> Tensor:
    return Fused.apply(predict(batch[0]), batch[1])  # type: ignore[no-untyped-call, no-any-return]


class Counting(TwoLayers):
    """Scales by how often it was called, which torch.optim would train on with."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class Clamping(TwoLayers):
    """Writes into its own weight, behind autograd's back."""

    def forward(self, x: Tensor) -> Tensor:
        self.body.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


REFUSED: dict[str, dict[str, Any]] = {
    "Fused": {"loss": fused},
    "calls": {"module": Counting},
    "body.weight": {"module": Clamping},
}


@pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name: str, way: str, estimator: str, memory: str) -> None:
    odd = {key: value() if key == "module" else value for key, value in REFUSED[name].items()}
    odd = {key: value.double() if key == "module" else value for key, value in odd.items()}
    with pytest.raises(fm.FuncmetaError, match=name):
        by_funcmeta("cache", way, ESTIMATORS[estimator], MEMORIES[memory], **odd)


def best_so_far(meta: Any, state: Any, batch: Any, seed: int) -> Any:
    """A step whose state keeps the smallest loss as a number of Python."""
    loss, slope = fm.value_and_grad(lambda a: (a - batch) ** 2)(state["a"])
    return {"a": state["a"] - meta["lr"] * slope, "best": min(state["best"], float(loss))}, fm.StepInfo(loss)


NUMBER = fm.Problem(
    lambda meta, task, seed: {"a": meta["a"], "best": 100.0},
    best_so_far,
    lambda meta, state, batch, seed: (state["a"] - batch) ** 2 * state["best"],
)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_python_in_a_state_are_each_task_s_own(way: str, estimator: str, memory: str) -> None:
    targets = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def meta() -> dict[str, Tensor]:
        return {name: torch.tensor(value).double().requires_grad_() for name, value in (("a", 0.0), ("lr", 0.1))}

    expected, hand = [], meta()
    for target in targets[: 1 if way in ("single", "compile") else 2]:
        a, best = hand["a"], 100.0
        for _ in range(STEPS):
            best = min(best, float((a - target) ** 2))
            a = a - hand["lr"] * 2 * (a - target)
        expected.append((a - target) ** 2 * best)
    slopes = torch.autograd.grad(torch.stack(expected).mean(), list(hand.values()))
    options: dict[str, Any] = {"steps": STEPS, "estimator": ESTIMATORS[estimator], "memory": MEMORIES[memory]}
    own = meta()

    def run() -> Any:
        if way in ("single", "compile"):
            problem = fm.compile(NUMBER, backend="aten") if way == "compile" else NUMBER
            out = fm.unroll(problem, own, fm.Task(targets[0], targets[0]), **options)
        else:
            out = fm.unroll_batch(NUMBER, own, fm.Task(targets, targets), strategy=way, **options)  # type: ignore[arg-type]
        return torch.autograd.grad(out.loss, list(own.values()))

    found = result_or_refusal(run)
    if isinstance(found, fm.FuncmetaError):  # numbers cannot be read where several tasks run at once, or recorded
        assert way in ("vmap", "compile") or estimator == "forward mode", str(found)
        return
    torch.testing.assert_close(found, slopes, rtol=1e-9, atol=1e-12)
