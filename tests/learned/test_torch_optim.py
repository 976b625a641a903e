"""Learned optimizers in ordinary training, by the interface of torch.optim."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcmeta as fm
from funcmeta import learned


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(net(x), x[:, :1]).backward()
        optimizer.step()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def test_a_transform_trains_as_the_optimizer_of_torch() -> None:
    ours, theirs = network(), network()
    train(ours, learned.TorchOptimizer(ours.parameters(), fm.optim.adam(0.01)), 5)
    train(theirs, torch.optim.Adam(theirs.parameters(), 0.01), 5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_it_equals_the_inner_problem() -> None:
    torch.manual_seed(1)
    optimizer = learned.lstm(hidden=4)
    net = network()
    x = torch.randn(8, 3)
    problem = fm.inner_problem(
        net, lambda meta, predict, batch: F.mse_loss(predict(batch), batch[:, :1]), optimizer=fm.as_transform(optimizer)
    )
    with torch.no_grad():
        expected = fm.unroll(problem, {}, fm.Task(x, x), steps=4).state.params
    steps = learned.TorchOptimizer(net.named_parameters(), optimizer)
    for _ in range(4):
        steps.zero_grad()
        F.mse_loss(net(x), x[:, :1]).backward()
        steps.step()
    for name, param in net.named_parameters():
        torch.testing.assert_close(param.detach(), expected[name])


def test_it_goes_on_from_a_saved_state(tmp_path: Any) -> None:
    torch.manual_seed(1)
    optimizer = learned.mlp()
    whole, parts = network(), network()
    steps = learned.TorchOptimizer(whole.named_parameters(), optimizer)
    train(whole, steps, 3)
    train(whole, steps, 3, seed=1)
    first = learned.TorchOptimizer(parts.named_parameters(), optimizer)
    train(parts, first, 3)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = learned.TorchOptimizer(parts.named_parameters(), optimizer)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(parts, second, 3, seed=1)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_closure_is_called_once() -> None:
    net = network()
    optimizer = learned.TorchOptimizer(net.parameters(), learned.linear())
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == [1]
    assert all(param.is_leaf and param.requires_grad for param in net.parameters())


def test_the_state_is_not_the_parameters_nor_the_gradients() -> None:
    """Gates keep the static weights as they were, though the parameters are written in place."""
    param = nn.Parameter(torch.tensor([1.0]))
    gates = learned.gates(copy=0.5, update=0.1, flush=0.5, hidden=0)
    optimizer = learned.TorchOptimizer([param], gates)
    transform, values = fm.as_transform(gates), {"0": torch.tensor([1.0])}
    state = transform.init(values)
    earlier = None
    for _ in range(3):
        param.grad = torch.ones(1)
        optimizer.step()
        earlier = earlier or optimizer.state_dict()["state"]["funcmeta"]["leaves"][0].clone()
        updates, state = transform.update({"0": torch.ones(1)}, state, values)
        values = fm.tree.detach(fm.apply_updates(values, updates))
        torch.testing.assert_close(param.detach(), values["0"])
    assert earlier == 1.0


def test_a_copy_goes_on_by_itself() -> None:
    net = network()
    optimizer = learned.TorchOptimizer(net.parameters(), fm.optim.adam(0.01))
    train(net, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    for group, own in zip(twin.param_groups[0]["params"], net.parameters(), strict=True):
        group.grad = own.grad.clone() if own.grad is not None else None
    optimizer.step()
    twin.step()
    for one, other in zip(net.parameters(), twin.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("transform", "make"),
    [
        (fm.optim.adam(0.01), lambda params: torch.optim.Adam(params, 0.01)),
        (fm.optim.sgd(0.1, momentum=0.9), lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)),
    ],
    ids=["adam", "momentum"],
)
def test_parameters_without_a_gradient_stay(transform: fm.Transform, make: Any) -> None:
    """Two layers take turns, and one step comes without any gradient."""
    ours, theirs = network(), network()
    both = (ours, learned.TorchOptimizer(ours.parameters(), transform)), (theirs, make(theirs.parameters()))
    for turn in (0, 2, 0, None, 0, 2, 2):
        for net, optimizer in both:
            optimizer.zero_grad()
            if turn is not None:
                net[turn](torch.ones(1, net[turn].in_features)).square().sum().backward()
            optimizer.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    assert not torch.equal(ours[2].weight, network()[2].weight)


def test_bad_input() -> None:
    net = network()
    with pytest.raises(fm.ArgumentError, match=r"expected a LearnedOptimizer or a Transform\. Pass e\.g\."):
        learned.TorchOptimizer(net.parameters(), torch.optim.SGD)
    with pytest.raises(fm.ArgumentError, match=r"params come in several groups, expected one\. Make one"):
        learned.TorchOptimizer([{"params": net[0].parameters()}, {"params": net[2].parameters()}], learned.linear())
    other = nn.Linear(1, 1)
    adam = learned.TorchOptimizer(other.parameters(), fm.optim.adam(0.1))
    other(torch.ones(1, 1)).sum().backward()
    adam.step()
    with pytest.raises(fm.StructureError, match="Load what the same optimizer saved"):
        learned.TorchOptimizer(net.parameters(), fm.optim.adam(0.1)).load_state_dict(adam.state_dict())
    with pytest.raises(fm.ArgumentError, match="several groups"):
        adam.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(fm.ArgumentError, match=r"options \['lr'\], which nothing would read"):
        learned.TorchOptimizer([{"params": list(other.parameters()), "lr": 0.1}], learned.linear())
    foreign = torch.optim.Adam(other.parameters())
    foreign.step()
    with pytest.raises(fm.StructureError, match="expected 'funcmeta'"):
        adam.load_state_dict(foreign.state_dict())
    counting = fm.Transform(lambda params: 0, lambda grads, state, params: (grads, state + 1))
    with pytest.raises(fm.ArgumentError, match=r"state holds \[0\], expected tensors alone"):
        learned.TorchOptimizer(other.parameters(), counting)
    words = nn.Embedding(3, 2, sparse=True)
    sparse = learned.TorchOptimizer(words.parameters(), learned.linear())
    words(torch.tensor([0])).sum().backward()
    with pytest.raises(fm.ArgumentError, match=r"is torch.sparse_coo, expected a dense one\. Use sparse=False"):
        sparse.step()
    with pytest.raises(fm.StructureError, match="Load what the same optimizer saved"):
        learned.TorchOptimizer(other.parameters(), learned.lstm()).load_state_dict(adam.state_dict())
