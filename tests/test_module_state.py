"""What modules keep, write to and refer to in other ways than by their registered names."""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcmeta as fm
from funcmeta import optim

LR = 0.2


def batch(seed: int, inputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, inputs, generator=generator).double(), torch.randn(6, 2, generator=generator).double()


def mse(meta: Any, predict: Any, pair: Any) -> Tensor:
    return F.mse_loss(predict(pair[0]), pair[1])


TASK = fm.Task(batch(1), batch(2))


def by_torch(net: nn.Module, steps: int = 3) -> tuple[list[float], float]:
    """Losses and meta-loss of the module itself, trained by torch.optim."""
    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=LR)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mse(None, net, TASK.support)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, mse(None, net, TASK.query).item()


def by_us(net: nn.Module, estimator: Any = None, **options: Any) -> tuple[list[float], float]:
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR))
    out = fm.unroll(
        problem, {"params": fm.init_params(net)}, TASK, steps=3, estimator=estimator or fm.Reverse(), **options
    )
    return out.info.losses.tolist(), out.loss.item()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


# ---- second ways to a tensor


class Held(Base):
    """Reads its buffer, a frozen parameter and a trained one through something else than their names."""

    def __init__(self, hold: Callable[[list[Any]], Callable[[], list[Tensor]]]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(0, 1, 4))
        self.frozen = nn.Parameter(torch.linspace(1, 2, 4), requires_grad=False)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 4))
        self.get = hold([self.mean, self.frozen, self.scale])

    def forward(self, x: Tensor) -> Tensor:
        mean, frozen, scale = self.get()
        hidden = self.a(x)
        with torch.no_grad():
            self.mean.mul_(0.7).add_(0.3 * hidden.mean(0))
        return self.b(torch.tanh((hidden - mean) * frozen * scale))


class Getter:
    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __call__(self) -> list[Tensor]:
        return self.tensors


def in_kwdefaults(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    def get(*, held: list[Tensor] = tensors) -> list[Tensor]:
        return held

    return get


HOLDERS: dict[str, Callable[[list[Any]], Callable[[], list[Tensor]]]] = {
    "closure": lambda tensors: lambda: tensors,
    "keyword default": in_kwdefaults,
    "partial over a tuple": lambda tensors: functools.partial(list, tuple(tensors)),
    "bound method of a list": lambda tensors: tensors.copy,
    "deque": lambda tensors: Getter(deque(tensors)),  # type: ignore[arg-type]
    "slots": Getter,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_second_way_to_a_tensor_leads_to_the_one_of_the_call(hold: Any) -> None:
    torch.manual_seed(0)
    net = Held(hold)
    for name in ("mean", "frozen", "scale"):
        getattr(net, name).data = getattr(net, name).data.double()  # in place, so that what holds them sees it
    net.a.double(), net.b.double()
    losses, judged = by_us(net)
    expected, last = by_torch(net)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert judged == pytest.approx(last, rel=1e-12)


def test_a_view_of_a_buffer_follows_it() -> None:
    class Halves(Base):
        def __init__(self) -> None:
            super().__init__()
            self.double()
            self.register_buffer("table", torch.ones(8, dtype=torch.float64))
            self.halves = self.table.chunk(2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            self.table.copy_(torch.cat([self.halves[1], hidden.detach().mean(0)]))
            return self.b(torch.tanh(hidden * self.halves[0]))

    net = Halves()
    assert by_us(net)[0] == pytest.approx(by_torch(net)[0], rel=1e-12)


def test_a_patched_forward_and_a_hook_that_close_over_the_module_train_it() -> None:
    net = Base().double()
    old = net.a.forward
    net.a.forward = lambda x: old(x) + net.b.weight.sum()  # type: ignore[method-assign]
    net.b.register_forward_hook(lambda module, inputs, out: out * net.a.bias.mean())
    ours = by_us(net)
    expected = by_torch(net)
    assert ours[0] == pytest.approx(expected[0], rel=1e-12)
    assert ours[1] == pytest.approx(expected[1], rel=1e-12)


def test_a_tensor_computed_from_a_parameter_before_is_refused_when_it_is_read() -> None:
    class Early(Base):
        def __init__(self) -> None:
            super().__init__()
            self.double()
            self.doubled = 2 * self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.a(x)), self.doubled)

    with pytest.raises(fm.GraphError, match=r"reads 'doubled', a tensor that was computed .* Compute it in forward"):
        by_us(Early())


def test_what_can_not_be_copied_is_shared() -> None:
    net = Base().double()
    net.lock, net.numbers, net.python = threading.Lock(), (each for each in range(3)), torch  # type: ignore[assignment]
    assert by_us(net)[0] == pytest.approx(by_torch(net)[0], rel=1e-12)


def test_old_weight_norm_trains_as_torch_trains_it() -> None:
    net = Base().double()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(net.a)
    assert by_us(net)[0] == pytest.approx(by_torch(net)[0], rel=1e-12)


def test_a_nested_script_module_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 2), Base())
    with pytest.warns(DeprecationWarning, match="deprecated"):
        net[1].b = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(fm.ArgumentError, match=r"'1.b' is a ScriptModule.*Use the module it was made from"):
        fm.functionalize(net)


# ---- what a call leaves behind


class Keeping(Base):
    """Keeps something from call to call, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.last, self.seen = kind, 0, torch.zeros(4), []  # type: ignore[var-annotated]
        self.draws = torch.Generator().manual_seed(0)
        self.tick = itertools.count(1)
        self.numbers = (float(each) for each in range(1, 100))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.kind == "calls":
            self.calls += 1
            hidden = hidden * self.calls
        elif self.kind == "last":
            self.last, hidden = hidden.detach().mean(0), hidden + self.last.to(hidden)
        elif self.kind == "late":
            hidden = hidden if self.late is None else hidden + self.late
            self.late = hidden.detach().mean(0)
        elif self.kind == "seen":
            self.seen.append(hidden.detach().mean())
            hidden = hidden * len(self.seen)
        elif self.kind == "draws":
            hidden = hidden * torch.rand((), generator=self.draws)
        elif self.kind == "tick":
            hidden = hidden * next(self.tick)
        elif self.kind == "numbers":
            hidden = hidden * next(self.numbers)
        elif self.kind == "cache":
            self.seen = [torch.arange(4.0)] if not self.seen else self.seen
            hidden = hidden * self.seen[0].to(hidden)
        return self.b(torch.tanh(hidden))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["calls", "last", "late", "seen", "draws", "tick"])
def test_state_outside_of_buffers_that_matters_is_refused_by_name(kind: str) -> None:
    with pytest.raises(fm.GraphError, match=rf"The module keeps '{kind}' .* Make it a buffer"):
        by_us(Keeping(kind).double())


def test_an_iterator_that_can_not_be_put_back_is_refused() -> None:
    with pytest.raises(fm.GraphError, match=r"advances 'numbers', which cannot be put back"):
        by_us(Keeping("numbers").double())


def test_a_cache_without_an_effect_is_made_anew_by_every_call() -> None:
    net = Keeping("cache").double()
    first, second = by_us(net), by_us(net)
    assert first == second
    assert net.seen == []
    assert first[0] == pytest.approx(by_torch(net)[0], rel=1e-12)


def test_a_buffer_that_is_also_held_elsewhere_is_not_replaced() -> None:
    class Twice(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.all = {"mean": self.mean}

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.a(x).detach().mean(0)
            return super().forward(x) + self.all["mean"].sum()

    model, params, buffers = fm.functionalize(Twice())
    with pytest.raises(fm.GraphError, match=r"in the place of 'mean', which the module also holds as 'all\['mean'\]'"):
        model(params, buffers, torch.ones(2, 3))


def test_nothing_of_a_call_is_held_afterwards() -> None:
    import weakref

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(3, 3)
            self.layers = nn.ModuleList([layer, layer])
            self.layers[0].again = lambda x: layer(x)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0].again(x))  # type: ignore[no-any-return, operator, union-attr]

    model, params, buffers = fm.functionalize(Shared())
    leaves = {name: tensor.requires_grad_() * 1 for name, tensor in params.items()}
    nodes = [weakref.ref(leaf) for leaf in leaves.values()]
    model(leaves, buffers, torch.ones(1, 3))
    del leaves
    assert [node() for node in nodes] == [None, None]


def test_a_method_that_runs_again_in_the_backward_pass() -> None:
    class Again(Base):
        def hidden(self, x: Tensor) -> Tensor:
            return checkpoint(lambda each: torch.tanh(self.norm(self.a(each))), x, use_reentrant=False)  # type: ignore[no-any-return]

        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.norm, self.twice = nn.LayerNorm(4), twice

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.hidden(x) if self.twice else torch.tanh(self.norm(self.a(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, plain = Again(True).double(), Again(False).double()
    plain.load_state_dict(net.state_dict())
    grads = []
    for each in (net, plain):
        meta = {"params": fm.init_params(each)}
        out = fm.unroll(fm.inner_problem(each, mse, optimizer=optim.sgd(LR)), meta, TASK, steps=2)
        grads.append(torch.autograd.grad(out.loss, list(meta["params"].values())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-13)


def test_threads_do_not_see_each_other() -> None:
    algorithm = fm.maml.build(
        nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).double(), mse, steps=4, lr=LR
    )
    meta = algorithm.init()
    tasks = [fm.Task(batch(seed), batch(seed + 50)) for seed in range(16)]

    def score(task: fm.Task) -> float:
        with torch.no_grad():
            return mse(None, algorithm.adapt(meta, task), task.query).item()

    alone = [score(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(score, tasks)) == alone


def test_a_view_of_a_buffer_that_lies_otherwise_in_memory_is_refused() -> None:
    net = Base()
    net.register_buffer("table", torch.ones(2, 3))
    net.row = net.table[0]  # type: ignore[index]
    model, params, _ = fm.functionalize(net)
    with pytest.raises(fm.GraphError, match=r"'row' is a view of 'table', .* Take the view in forward"):
        model(params, {"table": torch.ones(3, 2).T}, torch.ones(2, 3))


def test_what_is_nested_too_deeply_is_refused() -> None:
    net = Base()
    net.chain = []  # type: ignore[assignment]
    for _ in range(5000):
        net.chain = [net.chain]  # type: ignore[assignment, list-item]
    with pytest.raises(fm.ArgumentError, match=r"Base cannot be copied: .* nested too deeply. Let it hold less"):
        fm.functionalize(net)


def test_a_hook_that_forward_registers_is_state() -> None:
    class Registering(Base):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.b.register_forward_hook(lambda module, inputs, out: 2 * out)
            return out

    with pytest.raises(fm.GraphError, match=r"The module keeps 'b\._forward_hooks"):
        by_us(Registering().double())


def test_the_module_is_not_held() -> None:
    import gc
    import weakref

    net = Base()
    net.again = net.forward  # type: ignore[assignment]
    net.pair = (net.a, {net.b: 1})  # type: ignore[assignment]
    watch = weakref.ref(net.a)
    model, params, buffers = fm.functionalize(net)
    del net
    gc.collect()
    assert watch() is None
    model(params, buffers, torch.ones(1, 3))
