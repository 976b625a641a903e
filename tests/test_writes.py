"""Writes of a module or a loss to tensors that are not its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_module_state import LR, TASK, Base, by_torch, by_us, mse
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim


class Writing(Base):
    def __init__(self, write: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.a)
        return super().forward(x)


def assign(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data / 2


def fill(layer: nn.Linear) -> None:
    layer.weight[0] = 0.0


def divide(layer: nn.Linear) -> None:
    weight = layer.weight
    weight /= 2


WRITES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "data": (lambda layer: layer.weight.data.clamp_(-0.1, 0.1), "clamp_"),
    "a view": (lambda layer: layer.weight.view(-1)[:2].zero_(), "zero_"),
    "assigned data": (assign, r"\.data ="),
    "an item": (fill, "__setitem__"),
    "an operator": (divide, "div_|__itruediv__"),
    "out": (lambda layer: torch.clamp(layer.weight, -1, 1, out=layer.weight), "clamp with out"),
    "many": (lambda layer: torch._foreach_mul_([layer.bias, layer.weight], 0.5), "_foreach_mul_"),
    "init": (lambda layer: nn.init.zeros_(layer.weight), "zero"),
    "in-place function": (lambda layer: F.relu(layer.weight, inplace=True), "relu with inplace"),
    "loaded": (lambda layer: layer.load_state_dict({n: t * 0 for n, t in layer.state_dict().items()}), "copy_"),
}


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.Reptile(), fm.FirstOrder()], ids=repr)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_parameter_is_refused_before_it_is_made(write: str, estimator: Any) -> None:
    function, named = WRITES[write]
    net = Writing(function).double()
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    meta = {"params": fm.init_params(net)}
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR))
    with pytest.raises(fm.GraphError, match=rf"The parameter 'a\.(weight|bias)' would be written .*\(by ({named})"):
        fm.unroll(problem, meta, TASK, steps=2, estimator=estimator)
    for name, tensor in before.items():
        assert torch.equal(meta["params"][name], tensor)
        assert torch.equal(net.get_parameter(name), tensor)


def test_renormalized_embeddings_are_refused() -> None:
    net = nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=0.1), nn.Linear(3, 2))
    words = torch.tensor([[0, 1], [2, 3]])
    task = fm.Task((words, torch.ones(2, 2)), (words, torch.ones(2, 2)))
    meta = {"params": fm.init_params(net)}
    with torch.no_grad(), pytest.raises(fm.GraphError, match=r"'0.weight' .* embedding_bag with max_norm"):
        fm.unroll(fm.inner_problem(net, mse, optimizer=optim.sgd(LR)), meta, task, steps=1)
    assert torch.equal(meta["params"]["0.weight"], net[0].weight)


def test_a_loss_that_writes_to_the_parameters_is_refused() -> None:
    def loss(meta: Any, predict: Any, pair: Any) -> Tensor:
        with torch.no_grad():
            predict.params["b.bias"].clamp_(min=0.5)
        return mse(meta, predict, pair)

    net = Base().double()
    with pytest.raises(fm.GraphError, match=r"The parameter 'b.bias' would be written in place \(by clamp_\)"):
        fm.unroll(fm.inner_problem(net, loss, optimizer=optim.sgd(LR)), {}, TASK, steps=1)


def test_another_parameter_in_its_place_is_refused() -> None:
    def replace(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(layer.weight * 0.5)

    with pytest.raises(fm.GraphError, match=r"puts another object in the place of the tensor 'a.weight'"):
        by_us(Writing(replace).double())


def test_writes_to_activations_and_inputs_of_the_module_go_on_working() -> None:
    class Inside(Base):
        def forward(self, x: Tensor) -> Tensor:
            hidden = (self.a(x) + 0.1).mul_(2.0)
            hidden[:, 0] = 1.0
            return self.b(F.relu(hidden, inplace=True))  # type: ignore[no-any-return]

    net = Inside().double()
    assert by_us(net)[0] == pytest.approx(by_torch(net)[0], rel=1e-12)


class Teacher(Base):
    """A frozen average of the weights, moved in forward."""

    def __init__(self, move: str) -> None:
        super().__init__()
        self.teacher = nn.Linear(3, 4).requires_grad_(False)
        self.untouched = nn.Linear(4, 2).requires_grad_(False)
        self.plain = torch.ones(4, dtype=torch.float64)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, average in zip(self.a.parameters(), self.teacher.parameters(), strict=True):
                if self.move == "data":
                    average.data = 0.8 * average.data + 0.2 * own.data
                elif self.move == "lerp":
                    average.lerp_(own, 0.2)
                else:
                    torch._foreach_lerp_([average], [own], 0.2)
        return self.b(torch.tanh(self.a(x) * self.teacher(x) * self.plain)) + self.untouched(self.a(x))


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
@pytest.mark.parametrize("move", ["data", "lerp", "foreach"])
def test_frozen_parameters_that_forward_moves_are_carried_from_step_to_step(move: str, memory: Any) -> None:
    net = Teacher(move).double()
    before = net.teacher.weight.clone()
    first, second = by_us(net, memory=memory), by_us(net, memory=memory)
    assert first == second
    assert torch.equal(net.teacher.weight, before)
    expected = by_torch(net)
    assert first[0] == pytest.approx(expected[0], rel=1e-12)
    assert first[1] == pytest.approx(expected[1], rel=1e-12)


def test_frozen_parameters_that_nothing_writes_to_are_held_once() -> None:
    net = Teacher("lerp").double()
    model, params, buffers = fm.functionalize(net)
    _, after = model(params, buffers, TASK.support[0])
    assert after["untouched.weight"].data_ptr() == buffers["untouched.weight"].data_ptr()
    assert after["teacher.weight"].data_ptr() != buffers["teacher.weight"].data_ptr()


def test_what_several_parts_of_the_library_watch_is_seen_by_each() -> None:
    """An embedding has a formula of its own under vmap, and draws have streams; both may write to a weight."""

    class Bounded(nn.Module):
        def __init__(self, noisy: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, max_norm=None if noisy else 0.1)
            self.noisy = noisy

        def forward(self, ids: Tensor) -> Tensor:
            if self.noisy:
                with torch.no_grad():
                    self.table.weight.normal_()
            return self.table(ids).sum(-1, keepdim=True)  # type: ignore[no-any-return]

    ids, y = torch.tensor([0, 1, 3]), torch.zeros(3, 1).double()
    for noisy in (False, True):
        net = Bounded(noisy).double()
        problem = fm.inner_problem(net, mse, optimizer=fm.optim.sgd(0.1))
        meta = {"params": fm.init_params(net)}
        before = meta["params"]["table.weight"].detach().clone()
        with pytest.raises(fm.GraphError, match=r"The parameter 'table\.weight' would be written in place"):
            fm.unroll(problem, meta, fm.Task((ids, y), (ids, y)), steps=1)
        assert torch.equal(meta["params"]["table.weight"], before)
