"""Every learned optimizer: its meta-gradient against finite differences, however it is computed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned

STEPS = 4
KINDS = ("linear", "lstm", "lstm, plain", "rnnprop", "mlp", "hierarchical", "hyperparameters")
MEMORIES = (fm.StoreAll(), fm.Segments(2), fm.Revolve(2), fm.Offload(fm.Segments(2)), fm.budget(10**9))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make(kind: str, module: nn.Module) -> fm.LearnedOptimizer:
    """A small optimizer of each kind, its steps large enough to matter."""
    torch.manual_seed(2)
    makers = {
        "linear": lambda: learned.linear(gradient=-0.3, parameter=-0.05),
        "lstm": lambda: learned.lstm(hidden=3, scale=0.5),
        "lstm, plain": lambda: learned.lstm(hidden=3, layers=1, preprocess="none", scale=0.5),
        "rnnprop": lambda: learned.rnnprop(hidden=3, layers=1, scale=0.5),
        "mlp": lambda: learned.mlp(hidden=4, step_scale=0.1, exp_scale=0.1),
        "hierarchical": lambda: learned.hierarchical(coordinate=3, tensor=2, scale=0.2),
        "hyperparameters": lambda: learned.hyperparameters(fm.init_params(module), lr=0.3, momentum=0.5, per="layer"),
    }
    return makers[kind]().double()


def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def case(kind: str) -> tuple[fm.Problem, Any, fm.Task]:
    """Train a small network by a learned optimizer; meta are its weights and the initial parameters."""
    module = network()
    optimizer = make(kind, module)
    problem = fm.inner_problem(
        module, loss, optimizer=lambda meta: fm.as_transform(optimizer, meta["optimizer"]), trajectory_loss=True
    )
    torch.manual_seed(3)
    x, y = torch.randn(STEPS, 5, 3, dtype=torch.float64), torch.randn(STEPS, 5, 2, dtype=torch.float64)
    meta = {"params": fm.init_params(module), "optimizer": fm.init_params(optimizer)}
    return problem, meta, fm.Task(lambda step: (x[step], y[step]), None)


def gradients(problem: fm.Problem, meta: Any, task: fm.Task, **options: Any) -> list[Tensor]:
    out = fm.unroll(problem, meta, task, steps=STEPS, **options)
    return list(torch.autograd.grad(out.loss, [*meta["params"].values(), *meta["optimizer"].values()]))


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    whole, reference = (torch.cat([each.flatten() for each in gradient]) for gradient in (got, expected))
    assert float((whole - reference).norm() / reference.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_exact_and_first_order_is_rejected(kind: str) -> None:
    problem, meta, task = case(kind)
    check = fm.check_meta_grad(problem, meta, task, steps=STEPS)
    assert not check.vacuous
    with pytest.raises(fm.testing.MetaGradientMismatch):
        fm.check_meta_grad(problem, meta, task, steps=STEPS, estimator=fm.FirstOrder(), reference=check)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_memory_policy_gives_the_same(kind: str, memory: Any) -> None:
    problem, meta, task = case(kind)
    assert_close(gradients(problem, meta, task, memory=memory), gradients(problem, meta, task), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_mode_gives_the_same(kind: str) -> None:
    problem, meta, task = case(kind)
    assert_close(gradients(problem, meta, task, estimator=fm.MixedMode()), gradients(problem, meta, task), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gives_the_same(kind: str) -> None:
    problem, meta, task = case(kind)
    fast = fm.compile(problem, backend="aten")
    assert_close(gradients(fast, meta, task), gradients(problem, meta, task), 1e-12)
    assert_close(gradients(fast, meta, task, memory=fm.Segments(2)), gradients(problem, meta, task), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_same(kind: str) -> None:
    problem, meta, task = case(kind)
    assert_close(gradients(fm.compile(problem), meta, task), gradients(problem, meta, task), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_tasks_give_the_mean(kind: str) -> None:
    problem, meta, _ = case(kind)
    torch.manual_seed(4)
    tasks = fm.Task((torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)), None)
    found = []
    for strategy in ("vmap", "loop"):
        out = fm.unroll_batch(problem, meta, tasks, steps=STEPS, strategy=strategy)
        found.append(list(torch.autograd.grad(out.loss, [*meta["params"].values(), *meta["optimizer"].values()])))
    assert_close(found[0], found[1], 1e-12)


def detached_gradient(optimizer: fm.LearnedOptimizer, meta: Any) -> fm.Transform:
    exact = fm.as_transform(optimizer, meta["optimizer"])
    return fm.Transform(
        exact.init, lambda grads, state, params: exact.update({k: g.detach() for k, g in grads.items()}, state, params)
    )


def detached_state(optimizer: fm.LearnedOptimizer, meta: Any) -> fm.Transform:
    exact = fm.as_transform(optimizer, meta["optimizer"])
    return fm.Transform(exact.init, lambda grads, state, params: exact.update(grads, fm.tree.detach(state), params))


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [*[(kind, detached_gradient) for kind in KINDS], *[(kind, detached_state) for kind in KINDS if kind != "linear"]],
)
def test_a_wrong_meta_gradient_is_found(kind: str, mutant: Any) -> None:
    _, meta, task = case(kind)
    module = network()
    optimizer = make(kind, module)
    problem = fm.inner_problem(module, loss, optimizer=lambda meta: mutant(optimizer, meta), trajectory_loss=True)
    with pytest.raises((fm.testing.MetaGradientMismatch, fm.UnreachedLeafError)):
        fm.check_meta_grad(problem, meta, task, steps=STEPS)
