"""Options that all algorithms share: estimator, memory policy, strategy and mode are those that were given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.algorithms import anil, l2l, maml, meta_lstm, meta_sgd

STEPS = 4


def net(dropout: float = 0.0) -> nn.Sequential:
    with fm.rng.forked(1):
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()


class Counted:
    """A squared error that counts how often it is evaluated."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, meta: Any, predict: Any, batch: Any) -> Tensor:
        self.calls += 1
        x, y = batch
        return (predict(x) - y).square().mean()


def learned_start(seed: int) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in net().named_parameters()}


BUILD: dict[str, Callable[..., Any]] = {
    "maml": lambda module, loss, **options: maml.build(module, loss, steps=STEPS, lr=0.1, **options),
    "anil": lambda module, loss, **options: anil.build(module, loss, head="3.", steps=STEPS, lr=0.1, **options),
    "meta_sgd": lambda module, loss, **options: meta_sgd.build(module, loss, steps=STEPS, lr=0.1, **options),
    "meta_lstm": lambda module, loss, **options: meta_lstm.build(module, loss, steps=STEPS, hidden=3, **options),
    "l2l": lambda module, loss, **options: l2l.build(
        fm.learned.linear(gradient=-0.1).double(),
        module,
        loss,
        steps=STEPS,
        window=STEPS,
        start=learned_start,
        **options,
    ),
}
algorithms = pytest.mark.parametrize("name", BUILD)
inner_loops = pytest.mark.parametrize("name", [name for name in BUILD if name != "l2l"])


def result(name: str, tasks: int = 1, dropout: float = 0.0, **options: Any) -> tuple[float, Tensor, int]:
    """The loss, the meta-gradient, and how often the inner loss was evaluated; the first time does not count."""
    loss = Counted()
    with fm.rng.forked(2):
        algorithm = BUILD[name](net(dropout), loss, **options)
        meta = algorithm.init()
    sampler = fm.tasks.sinusoids(shots=5, dtype=torch.float64)
    batch = sampler.sample_batch(seed=0, tasks=tasks)
    if name == "l2l":
        batch = batch._replace(query=None)
    for _ in range(2):
        loss.calls = 0
        value = algorithm.loss(meta, batch)
        grads = torch.autograd.grad(value, [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad])
    return value.item(), torch.cat([grad.flatten() for grad in grads]), loss.calls


@algorithms
def test_the_estimator_is_the_one_that_was_given(name: str) -> None:
    exact, first = (result(name, strategy="loop", estimator=each) for each in (fm.Reverse(), fm.FirstOrder()))
    assert exact[0] == pytest.approx(first[0], rel=1e-12)
    assert float((exact[1] - first[1]).norm() / exact[1].norm()) > 1e-4


@algorithms
def test_the_memory_policy_is_the_one_that_was_given(name: str) -> None:
    whole, parts = (result(name, strategy="loop", memory=each) for each in (fm.StoreAll(), fm.Segments(1)))
    assert parts[2] == whole[2] + STEPS - 1
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-12)


@algorithms
def test_the_strategy_is_the_one_that_was_given(name: str) -> None:
    together, loop = (result(name, tasks=3, strategy=each) for each in ("vmap", "loop"))
    assert loop[2] == 3 * together[2]
    torch.testing.assert_close(loop[1], together[1], rtol=1e-9, atol=1e-12)


@algorithms
def test_the_mode_is_the_one_that_was_given(name: str) -> None:
    plain = result(name, strategy="loop")[0]
    assert result(name, strategy="loop", dropout=0.9, train=False)[0] == pytest.approx(plain, rel=1e-12)
    assert result(name, strategy="loop", dropout=0.9, train=True)[0] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["maml", "anil", "meta_sgd"])
def test_the_rate_is_the_one_that_was_given(name: str) -> None:
    """Where no step is taken in effect, the loss is that of the initial parameters."""
    build = {"maml": maml.build, "meta_sgd": meta_sgd.build}.get(name)
    losses = []
    for lr in (1e-12, 0.1):
        loss = Counted()
        algorithm = (
            anil.build(net(), loss, head="3.", steps=STEPS, lr=lr)
            if build is None
            else build(net(), loss, steps=STEPS, lr=lr)
        )
        task = fm.tasks.sinusoids(shots=5, dtype=torch.float64).sample(seed=0)
        losses.append(algorithm.loss(algorithm.init(), fm.tasks.stack([task])).item())
    untrained = float((net()(task.query[0]) - task.query[1]).square().mean().detach())
    assert losses[0] == pytest.approx(untrained, rel=1e-9)
    assert losses[1] != pytest.approx(untrained, rel=1e-2)
