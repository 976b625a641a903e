"""A module as a pure function: tied weights, buffers, modes, draws, and a module that is never written to."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_cases import Attention, ConvBatchNorm, Recurrent, Tied, next_word
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import TOLERANCES, check_meta_grad


class Counting(nn.Module):
    """Puts a new tensor in the place of a buffer, and writes into another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.5 * self.average + x.mean(0)
        self.calls += 1
        return (x * self.weight + self.average).sum(1, keepdim=True)


class Leaky(nn.Module):
    """Keeps in a buffer what it computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.mean(0) * self.weight
        return (x * self.weight).sum(1, keepdim=True)


SEEN: list[tuple[bool, ...]] = []


class Flags(nn.Module):
    """Notes which kernels torch would choose, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 1)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        SEEN.append(flags())
        if fail:
            raise ValueError("as asked")
        return self.layer(x)[0]  # type: ignore[no-any-return]


def flags() -> tuple[bool, ...]:
    return torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled


def snapshot(module: nn.Module) -> Any:
    """Everything of a module that a pure function must leave alone, and the objects themselves."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    numbers = {name: (tensor.detach().clone(), tensor.requires_grad, tensor.grad) for name, tensor in tensors.items()}
    modes = [each.training for each in module.modules()]
    return numbers, {name: id(tensor) for name, tensor in tensors.items()}, modes


def assert_untouched(module: nn.Module, before: Any) -> None:
    after = snapshot(module)
    assert after[1:] == before[1:]
    for name, (values, requires_grad, grad) in before[0].items():
        assert torch.equal(after[0][name][0], values), name
        assert after[0][name][1:] == (requires_grad, grad), name


def regression(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def numbers(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape[0], 2)


# ---- tied weights


def test_a_tied_weight_is_one_entry() -> None:
    _, params, buffers = fm.functionalize(Tied())
    tied = [name for name in params if name in ("embedding.weight", "decoder.weight")]
    assert tied == ["embedding.weight"]
    assert "decoder.weight" not in buffers
    assert list(fm.init_params(Tied())) == list(params)


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_a_tied_weight_stays_tied_over_inner_steps(memory: Any) -> None:
    """The decoder uses the embedding as it is after five steps."""
    net, words = Tied().double(), torch.randint(5, (3, 4))
    problem = fm.inner_problem(net, next_word, optimizer=optim.sgd(0.5, momentum=0.9))
    meta = {"params": fm.init_params(net)}
    state = fm.unroll(problem, meta, fm.Task(words, words), steps=5, memory=memory).state
    assert state.params.keys() == meta["params"].keys()
    moved = (state.params["embedding.weight"] - meta["params"]["embedding.weight"]).abs().max()
    assert moved > 0.05

    model, _, buffers = fm.functionalize(net)
    out, _ = model(state.params, buffers, words)
    trained = copy.deepcopy(net)
    trained.load_state_dict({**state.params, "decoder.weight": state.params["embedding.weight"]}, strict=True)
    assert trained.decoder.weight is trained.embedding.weight
    torch.testing.assert_close(out, trained(words), rtol=1e-12, atol=1e-12)


def test_training_a_tied_pair_is_that_of_torch_optim() -> None:
    """Gradients of both uses add up: the path is that of torch.optim on the module itself."""
    net, words = Tied().double(), torch.randint(5, (3, 4))
    problem = fm.inner_problem(net, next_word, optimizer=optim.sgd(0.5))
    state = fm.unroll(problem, {"params": fm.init_params(net)}, fm.Task(words, words), steps=4).state
    trained = copy.deepcopy(net)
    outer = torch.optim.SGD(trained.parameters(), lr=0.5)
    for _ in range(4):
        outer.zero_grad()
        F.cross_entropy(trained(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten()).backward()
        outer.step()
    for name, tensor in trained.named_parameters():
        torch.testing.assert_close(state.params[name], tensor, rtol=1e-10, atol=1e-12)


def test_a_tied_buffer_is_one_buffer() -> None:
    net = nn.Sequential(Counting(), Counting())
    net[1].register_buffer("average", net[0].average)
    model, params, buffers = fm.functionalize(net)
    assert [name for name in buffers if name.endswith("average")] == ["0.average"]
    net.double()
    assert model(params, buffers, torch.ones(3, 2))[1].keys() == buffers.keys()


# ---- buffers


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
def test_buffers_are_returned_and_advance_once_a_step(memory: Any) -> None:
    """Replay must not count twice."""
    net = ConvBatchNorm()
    before = snapshot(net)
    problem = fm.inner_problem(net, regression, optimizer=optim.sgd(0.1))
    batch = numbers(4, 1, 5, 5)
    out = fm.unroll(problem, {"params": fm.init_params(net)}, fm.Task(batch, batch), steps=3, memory=memory)
    out.loss.backward()
    assert out.state.buffers["1.num_batches_tracked"] == 3
    assert not torch.equal(out.state.buffers["1.running_mean"], net[1].running_mean)
    assert_untouched(net, before)


def test_statistics_are_those_of_torch() -> None:
    net, batch = ConvBatchNorm(), numbers(4, 1, 5, 5)
    model, params, buffers = fm.functionalize(net)
    for _ in range(3):
        _, buffers = model(params, buffers, batch[0])
        net(batch[0])
    for name, tensor in net.named_buffers():
        torch.testing.assert_close(buffers[name], tensor)


def test_buffers_that_forward_assigns_are_returned() -> None:
    net = Counting()
    before = snapshot(net)
    model, params, buffers = fm.functionalize(net)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    _, after = model(params, buffers, x)
    _, later = model(params, after, x)
    assert not any(tensor.requires_grad for tensor in after.values())
    assert after["average"].tolist() == [2.0, 3.0]
    assert later["average"].tolist() == [3.0, 4.5]
    assert (int(buffers["calls"]), int(after["calls"]), int(later["calls"])) == (0, 1, 2)
    assert_untouched(net, before)


def test_a_buffer_with_a_derivative_is_refused() -> None:
    problem = fm.inner_problem(Leaky(), regression, optimizer=optim.sgd(0.1))
    task = fm.Task((torch.ones(3, 2), torch.ones(3, 1)), (torch.ones(3, 2), torch.ones(3, 1)))
    with pytest.raises(fm.GraphError, match=r"The buffer 'last' .* with a derivative.*Update it from detached tensors"):
        fm.unroll(problem, {"params": fm.init_params(Leaky())}, task, steps=1)


# ---- the user's module


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder(), fm.Reptile()], ids=repr)
@pytest.mark.parametrize("strategy", ["single", "vmap", "loop"])
def test_nothing_is_written_into_the_module(estimator: Any, strategy: str) -> None:
    """Values, objects, modes, requires_grad and .grad of parameters and buffers are as before."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    net[3].eval()
    net[4].weight.grad = torch.ones(2, 4)
    before = snapshot(net)
    problem = fm.inner_problem(net, regression, optimizer=optim.adam(0.1), train=None)
    batch = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    meta = {"params": fm.init_params(net)}
    if strategy == "single":
        one = batch[0][0], batch[1][0]
        out = fm.unroll(problem, meta, fm.Task(one, one), steps=2, estimator=estimator)
    else:
        out = fm.unroll_batch(problem, meta, fm.Task(batch, batch), steps=2, estimator=estimator, strategy=strategy)
    out.loss.backward()
    assert_untouched(net, before)


def test_inspect_leaves_the_module_alone() -> None:
    net = ConvBatchNorm()
    before = snapshot(net)
    fm.inspect(net, torch.randn(4, 1, 5, 5))
    assert_untouched(net, before)


def test_later_changes_of_the_module_do_not_reach_the_model() -> None:
    net = nn.Linear(2, 1)
    model, params, buffers = fm.functionalize(net)
    expected = net(torch.ones(1, 2))
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(model(params, buffers, torch.ones(1, 2))[0], expected)


def test_init_params_are_fresh_leaves() -> None:
    net = nn.Linear(2, 1)
    params = fm.init_params(net)
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.grad is None for leaf in params.values())
    assert params["weight"].data_ptr() != net.weight.data_ptr()
    assert params["weight"].data_ptr() != fm.init_params(net)["weight"].data_ptr()


# ---- modes, frozen parameters, draws


def test_modes() -> None:
    """train, eval, or each layer as it was; a call does not depend on the call before."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    net[1].eval()
    model, params, buffers = fm.functionalize(net)
    x = torch.randn(8, 2)

    def run(train: bool | None) -> tuple[bool, bool]:
        """Whether statistics advanced, and whether entries were dropped."""
        out, after = model(params, buffers, x, train=train, seed=0)
        return not torch.equal(after["1.running_mean"], buffers["1.running_mean"]), bool((out == 0).any())

    assert run(True) == (True, True)
    assert run(False) == (False, False)
    assert run(None) == (False, True)
    assert run(True) == (True, True)
    assert run(None) == (False, True)


def test_inner_problem_takes_a_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    x = torch.randn(8, 2)
    outs = []
    for train in (False, True):
        problem = fm.inner_problem(net, regression, optimizer=optim.sgd(0.1), train=train)
        task = fm.Task((x, x), (x, x))
        outs.append([fm.unroll(problem, {}, task, steps=2, seed=seed).loss.item() for seed in (0, 1)])
    assert outs[0][0] == outs[0][1]
    assert outs[1][0] != outs[1][1]


def test_frozen_parameters_are_constants() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    model, params, buffers = fm.functionalize(net)
    assert sorted(params) == ["2.bias", "2.weight"]
    assert sorted(buffers) == ["0.bias", "0.weight"]
    batch = numbers(4, 2)
    problem = fm.inner_problem(net, regression, optimizer=optim.sgd(0.1))
    state = fm.unroll(problem, {"params": fm.init_params(net)}, fm.Task(batch, batch), steps=2).state
    assert torch.equal(state.buffers["0.weight"], net[0].weight)
    torch.testing.assert_close(model(params, buffers, batch[0])[0], net(batch[0]))


def test_dropout_follows_the_seed_and_the_global_generator_is_put_back() -> None:
    model, params, buffers = fm.functionalize(nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5)))
    before = torch.get_rng_state()
    outs = [model(params, buffers, torch.ones(1, 2), seed=seed)[0] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_without_a_seed_draws_come_from_the_global_generator() -> None:
    net = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5))
    model, params, buffers = fm.functionalize(net)
    torch.manual_seed(5)
    ours = model(params, buffers, torch.ones(1, 2))[0]
    torch.manual_seed(5)
    assert torch.equal(ours, net(torch.ones(1, 2)))


# ---- layers


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Recurrent(nn.LSTM), (3, 4, 2)),
        (lambda: Recurrent(nn.GRU), (3, 4, 2)),
        (lambda: Recurrent(nn.RNN), (3, 4, 2)),
        (ConvBatchNorm, (4, 1, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
        (Attention, (3, 3, 4)),
    ],
    ids=["lstm", "gru", "rnn", "batch norm", "layer norm", "attention"],
)
def test_layers_compute_what_the_module_does_and_differentiate_twice(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    net = build().double()
    x, y = torch.randn(shape).double(), torch.randn(shape[0], 2).double()
    model, params, buffers = fm.functionalize(net)
    torch.testing.assert_close(model(params, buffers, x)[0], net(x), rtol=1e-12, atol=1e-12)
    problem = fm.inner_problem(net, regression, optimizer=optim.sgd(0.3))
    check = check_meta_grad(problem, {"params": fm.init_params(net)}, fm.Task((x, y), (x + 0.1, y)), steps=2)
    assert check.worst.error < TOLERANCES.fixed


def test_parametrized_weight_norm_is_learned() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    before = snapshot(net)
    problem = fm.inner_problem(net, regression, optimizer=optim.sgd(0.3))
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    meta = {"params": fm.init_params(net)}
    assert "0.parametrizations.weight.original0" in meta["params"]
    check_meta_grad(problem, meta, fm.Task((x, y), (x + 0.1, y)), steps=2)
    model, params, buffers = fm.functionalize(net)
    torch.testing.assert_close(model(params, buffers, x)[0], net(x), rtol=1e-12, atol=1e-12)
    assert_untouched(net, before)


def test_keyword_inputs_reach_forward() -> None:
    model, params, buffers = fm.functionalize(nn.Bilinear(2, 2, 1))
    x = torch.ones(3, 2)
    assert torch.equal(model(params, buffers, input1=x, input2=x)[0], model(params, buffers, x, x)[0])


# ---- backend flags


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
def test_backend_flags_hold_for_the_call_only(fail: bool) -> None:
    """Inside, recurrent layers take neither cuDNN nor oneDNN."""
    net = Flags()
    model, params, buffers = fm.functionalize(net)
    SEEN.clear()
    # The context manager: to assign a flag is an error once torch.testing._internal was imported.
    with torch.backends.mkldnn.flags(enabled=True, allow_tf32=False):
        before = flags()
        if fail:
            with pytest.raises(ValueError, match="as asked"):
                model(params, buffers, torch.ones(1, 1, 2), fail=True)
        else:
            model(params, buffers, torch.ones(1, 1, 2))
        assert SEEN == [(False, False)]
        assert flags() == before


def test_flags_that_the_user_set_are_put_back() -> None:
    model, params, buffers = fm.functionalize(Flags())
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False), torch.backends.cudnn.flags(enabled=False):
        before = flags()
        model(params, buffers, torch.ones(1, 1, 2))
        assert flags() == before


# ---- refused modules


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        return torch.jit.script(nn.Linear(2, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (scripted, "module is a ScriptModule, which cannot run statelessly. Pass the module it was made from."),
        (lambda: nn.LazyLinear(2), "'weight' is not initialized yet (a lazy module). Run the module once"),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.LazyBatchNorm1d()), "'1.weight' is not initialized yet"),
        (lambda: nn.ReLU(), "ReLU has no parameter that requires grad, so nothing can be trained. Call requires_grad_"),
        (lambda: torch.ones(2), "module is a Tensor, expected a torch.nn.Module. Wrap it in one."),
    ],
    ids=["scripted", "lazy", "lazy buffer", "no parameters", "a tensor"],
)
def test_refused_modules(build: Callable[[], Any], message: str) -> None:
    module = build()
    for use in (fm.functionalize, lambda each: fm.inner_problem(each, regression, optimizer=optim.sgd(0.1))):
        with pytest.raises(fm.ArgumentError, match=re.escape(message)):
            use(module)


def test_init_params_refuses_what_functionalize_refuses() -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a torch\.nn\.Module"):
        fm.init_params(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="lazy module"):
        fm.init_params(nn.LazyLinear(2))
