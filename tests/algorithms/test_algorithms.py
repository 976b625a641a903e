"""Every algorithm learns, and does what its name says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.algorithms import Algorithm, anil, maml, meta_sgd, reptile
from funcmeta.testing import finite_difference


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def net(width: int = 32) -> nn.Sequential:
    with fm.rng.forked(1):
        return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


BUILD: dict[str, Callable[..., Algorithm]] = {
    "maml": lambda module, **options: maml.build(module, mse, steps=2, lr=0.05, **options),
    "first-order maml": lambda module, **options: maml.build(
        module, mse, steps=2, lr=0.05, estimator=fm.FirstOrder(), **options
    ),
    "anil": lambda module, **options: anil.build(module, mse, head="4.", steps=2, lr=0.05, **options),
    "meta_sgd": lambda module, **options: meta_sgd.build(module, mse, steps=1, lr=0.05, **options),
    "reptile": lambda module, **options: reptile.build(module, mse, steps=10, optimizer=optim.sgd(0.05), **options),
}
OUTER = {"reptile": lambda leaves: torch.optim.SGD(leaves, lr=1.0)}
algorithms = pytest.mark.parametrize("name", BUILD)


def judged(algorithm: Algorithm, meta: Any, sampler: Any) -> float:
    """The loss after adaptation, over 40 tasks that training does not see."""
    total = 0.0
    for seed in range(10**6, 10**6 + 40):
        task = sampler.sample(seed)
        with torch.no_grad():
            total += float(mse(None, algorithm.adapt(meta, task), task.query))
    return total / 40


@algorithms
def test_it_learns_sinusoids(name: str) -> None:
    algorithm, sampler = BUILD[name](net(), strategy="vmap"), fm.tasks.sinusoids(shots=10)
    meta = algorithm.init()
    outer = OUTER.get(name, lambda leaves: torch.optim.Adam(leaves, lr=5e-3))(fm.tree.leaves(meta))
    before = judged(algorithm, meta, sampler)
    for seed in range(60 if name == "reptile" else 120):
        outer.zero_grad()
        algorithm.loss(meta, sampler.sample_batch(seed, tasks=16), seed=seed).backward()
        outer.step()
    after = judged(algorithm, meta, sampler)
    assert after < 0.75 * before


@algorithms
def test_init_gives_fresh_leaves(name: str) -> None:
    module = net()
    algorithm = BUILD[name](module)
    first, second = algorithm.init(), algorithm.init()
    for a, b in zip(fm.tree.leaves(first), fm.tree.leaves(second), strict=True):
        assert a.is_leaf
        assert a.requires_grad
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert all(torch.equal(first["params"][key], leaf) for key, leaf in module.named_parameters())


@algorithms
def test_adapt_changes_nothing_but_what_it_returns(name: str) -> None:
    module = net()
    algorithm, task = BUILD[name](module), fm.tasks.sinusoids(shots=5).sample(seed=0)
    meta = algorithm.init()
    kept = fm.tree.map(lambda leaf: leaf.detach().clone(), meta)
    predict = algorithm.adapt(meta, task)
    assert not any(leaf.requires_grad for leaf in predict.params.values())
    for key, leaf in module.named_parameters():
        assert torch.equal(leaf, kept["params"][key])
        assert leaf.grad is None
    for a, b in zip(fm.tree.leaves(meta), fm.tree.leaves(kept), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None
    assert predict(torch.zeros(3, 1)).shape == (3, 1)


@algorithms
def test_adapt_is_the_inner_loop_of_the_loss(name: str) -> None:
    """Over one task, the loss is that of the adapted module; Reptile's is its last inner loss."""
    algorithm, sampler = BUILD[name](net(), strategy="loop"), fm.tasks.sinusoids(shots=5)
    meta, seed = algorithm.init(), fm.rng.fold(4, 0)
    loss = algorithm.loss(meta, sampler.sample_batch(4, tasks=1))
    predict = algorithm.adapt(meta, sampler.sample(seed))
    if name == "reptile":
        moved = fm.tree.map(torch.sub, meta["params"], predict.params)
        slopes = torch.autograd.grad(loss, list(meta["params"].values()))
        torch.testing.assert_close(list(slopes), [moved[key].detach() for key in moved])
    else:
        torch.testing.assert_close(loss.detach(), mse(None, predict, sampler.sample(seed).query).detach())


def test_adapt_needs_no_query_and_keeps_statistics() -> None:
    module = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    algorithm = maml.build(module, mse, steps=3, lr=0.05)
    task = fm.tasks.sinusoids(shots=5).sample(seed=0)._replace(query=None)
    predict = algorithm.adapt(algorithm.init(), task)
    assert int(predict.buffers["1.num_batches_tracked"]) == 3
    assert int(module[1].num_batches_tracked) == 0


def test_anil_leaves_the_body_alone_and_learns_it() -> None:
    algorithm, sampler = BUILD["anil"](net()), fm.tasks.sinusoids(shots=5)
    meta = algorithm.init()
    predict = algorithm.adapt(meta, sampler.sample(seed=0))
    for key, leaf in meta["params"].items():
        assert torch.equal(predict.params[key], leaf) == (not key.startswith("4."))
    algorithm.loss(meta, sampler.sample_batch(0, tasks=3)).backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in meta["params"].values())


def test_maml_is_the_meta_gradient_of_its_formula() -> None:
    """Written once more with torch.func alone."""
    module, sampler = net(8).double(), fm.tasks.sinusoids(shots=5, dtype=torch.float64)
    algorithm = maml.build(module, mse, steps=2, lr=0.05)
    meta, tasks = algorithm.init(), sampler.sample_batch(0, tasks=3)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(module, params, (x,)) - y).square().mean()

    def one(params: Any, support: Any, query: Any) -> Tensor:
        for _ in range(2):
            slopes = torch.func.grad(loss)(params, *support)
            params = {key: leaf - 0.05 * slopes[key] for key, leaf in params.items()}
        return loss(params, *query)

    def mean(params: Any) -> Tensor:
        return torch.func.vmap(one, in_dims=(None, 0, 0))(params, tasks.support, tasks.query).mean()

    algorithm.loss(meta, tasks).backward()
    expected = torch.func.grad(mean)(fm.tree.detach(meta["params"]))
    for key, leaf in meta["params"].items():
        torch.testing.assert_close(leaf.grad, expected[key], rtol=1e-9, atol=1e-12)


def test_meta_sgd_differentiates_every_learning_rate() -> None:
    module, sampler = net(8).double(), fm.tasks.sinusoids(shots=5, dtype=torch.float64)
    algorithm = meta_sgd.build(module, mse, steps=3, lr=0.05)
    meta, tasks = algorithm.init(), sampler.sample_batch(0, tasks=3)
    assert all(
        rate.shape == meta["params"][key].shape and bool((rate == 0.05).all()) for key, rate in meta["lr"].items()
    )
    algorithm.loss(meta, tasks).backward()
    constant = fm.tree.detach(meta)
    for key, rate in meta["lr"].items():
        direction = {each: torch.randn_like(leaf) * (each == key) for each, leaf in meta["lr"].items()}
        expected = finite_difference(
            lambda rates: algorithm.loss({**constant, "lr": rates}, tasks), constant["lr"], direction, order=4
        )
        torch.testing.assert_close((rate.grad * direction[key]).sum(), expected, rtol=1e-6, atol=1e-10)


def test_reptile_of_one_step_is_joint_training() -> None:
    """θ_0 - θ_1 = lr ∇ℓ, averaged over tasks."""
    module, sampler = net(8).double(), fm.tasks.sinusoids(shots=5, dtype=torch.float64)
    algorithm = reptile.build(module, mse, steps=1, optimizer=optim.sgd(0.05))
    meta, tasks = algorithm.init(), sampler.sample_batch(0, tasks=3)
    loss = algorithm.loss(meta, tasks)
    loss.backward()
    x, y = tasks.support
    joint = (module(x) - y).square().mean()
    joint.backward()
    torch.testing.assert_close(loss.detach(), joint.detach(), rtol=1e-12, atol=0.0)
    for key, leaf in module.named_parameters():
        torch.testing.assert_close(meta["params"][key].grad, 0.05 * leaf.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
@algorithms
def test_bad_steps(name: str, steps: Any) -> None:
    build = {
        "reptile": lambda: reptile.build(net(), mse, steps=steps, optimizer=optim.sgd(0.1)),
        "anil": lambda: anil.build(net(), mse, head="4.", steps=steps, lr=0.1),
        "meta_sgd": lambda: meta_sgd.build(net(), mse, steps=steps, lr=0.1),
    }.get(name, lambda: maml.build(net(), mse, steps=steps, lr=0.1))
    with pytest.raises(fm.ArgumentError, match=rf"steps is {steps}, expected a positive integer. Pass e.g. steps=5"):
        build()


def test_other_bad_arguments() -> None:
    with pytest.raises(
        fm.ArgumentError, match=r"head is 'classifier.', with which none of .*'4.bias'\] begins. Pass e.g. '2.'"
    ):
        anil.build(net(), mse, head="classifier.", steps=1, lr=0.1)
    for lr in (0.0, -0.1, float("nan")):
        with pytest.raises(fm.ArgumentError, match=r"lr is .*, expected a positive number. Pass e.g. lr=0.1"):
            meta_sgd.build(net(), mse, steps=1, lr=lr)
    with pytest.raises(fm.ArgumentError, match=r"lr is -0.1, expected a number at least 0"):
        maml.build(net(), mse, steps=1, lr=-0.1)
    with pytest.raises(fm.ArgumentError, match=r"expected a torch\.nn\.Module"):
        maml.build(len, mse, steps=1, lr=0.1)  # type: ignore[arg-type]


def test_predictions_may_be_taken_in_eval_mode() -> None:
    """Dropout is on while training; with ``evaluate`` the trained module predicts without it."""
    module = nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    algorithm = maml.build(module, mse, steps=2, lr=0.01)
    meta, task, x = algorithm.init(), fm.tasks.sinusoids().sample(seed=0), torch.ones(4, 1)
    noisy, calm = algorithm.adapt(meta, task), algorithm.adapt(meta, task, evaluate=True)
    assert all(torch.equal(noisy.params[name], calm.params[name]) for name in noisy.params)
    assert not torch.equal(noisy(x), noisy(x))
    assert torch.equal(calm(x), calm(x))
