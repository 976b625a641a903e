"""Mutants: the values of the true problem, its structure, and another derivative wherever they should have one."""

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import MetaGradientCheck, MetaGradientMismatch, check_meta_grad, mutants
from funcmeta.testing.mutants import MUTANTS

NET = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()


def case(momentum: float = 0.5, **options: Any) -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    with fm.rng.forked(0):
        x, y = torch.randn(3, 4, 2).double(), torch.randn(3, 4, 1).double()
    problem = fm.inner_problem(NET, mse, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=momentum), **options)
    meta = {"params": fm.init_params(NET), "lr": torch.tensor(0.2, dtype=torch.float64, requires_grad=True)}
    return problem, meta, fm.Task((x, y), (x + 0.1, y))


def gradient(problem: fm.Problem, meta: Any, tasks: fm.Task, **options: Any) -> list[Tensor]:
    loss = fm.unroll_batch(problem, meta, tasks, steps=3, **options).loss
    return list(torch.autograd.grad(loss, fm.tree.leaves(meta)))


@cache
def figures(trajectory_loss: bool) -> MetaGradientCheck:
    """Those of the truth."""
    return check_meta_grad(*case(trajectory_loss=trajectory_loss), steps=3, strategy="vmap")


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("trajectory_loss", [False, True])
def test_values_are_those_of_the_truth(name: str, strategy: Any, trajectory_loss: bool) -> None:
    problem, meta, tasks = case(trajectory_loss=trajectory_loss)
    truth = fm.unroll_batch(problem, meta, tasks, steps=3, strategy=strategy)
    other = fm.unroll_batch(MUTANTS[name](problem), meta, tasks, steps=3, strategy=strategy)
    torch.testing.assert_close(other.loss, truth.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(other.info.losses, truth.info.losses, rtol=1e-12, atol=0)
    fm.tree.check_same(truth.state, other.state)


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("trajectory_loss", [False, True])
def test_every_check_rejects_every_mutant(name: str, memory: Any, strategy: Any, trajectory_loss: bool) -> None:
    problem, meta, tasks = case(trajectory_loss=trajectory_loss)
    truth, mutant = figures(trajectory_loss), MUTANTS[name](problem)
    with pytest.raises(MetaGradientMismatch, match=rf"under Reverse\(\) and {re.escape(repr(memory))} differs"):
        check_meta_grad(mutant, meta, tasks, steps=3, memory=memory, strategy=strategy, reference=truth)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_check_with_its_own_differences_rejects_every_mutant(name: str) -> None:
    problem, meta, tasks = case()
    with pytest.raises(MetaGradientMismatch):
        check_meta_grad(MUTANTS[name](problem), {"lr": meta["lr"]}, tasks, steps=3, strategy="vmap")


def test_half_detached_lies_half_way_for_one_step() -> None:
    problem, meta, tasks = case()
    grads = [
        torch.autograd.grad(fm.unroll_batch(each, meta, tasks, steps=1).loss, fm.tree.leaves(meta))
        for each in (problem, mutants.half_detached(problem), mutants.detached(problem))
    ]
    for exact, half, first in zip(*grads, strict=True):
        torch.testing.assert_close(half, (exact + first) / 2)


def test_detached_is_first_order() -> None:
    problem, meta, tasks = case()
    other = gradient(problem, meta, tasks, estimator=fm.FirstOrder())
    torch.testing.assert_close(gradient(mutants.detached(problem), meta, tasks), other)


def test_dropped_moment_is_the_truth_without_a_moment() -> None:
    problem, meta, tasks = case(momentum=0.0)
    torch.testing.assert_close(gradient(mutants.dropped_moment(problem), meta, tasks), gradient(problem, meta, tasks))


def test_off_by_one_is_the_truth_for_constant_gradients() -> None:
    step = fm.value_and_grad(lambda w: (w * torch.tensor([1.0, 2.0])).sum())

    def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = step(w)
        return w - meta["lr"] * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta["w"], take, lambda meta, w, query, seed: (w**2).sum())
    meta = {"w": torch.ones(2, requires_grad=True), "lr": torch.tensor(0.1, requires_grad=True)}
    task = fm.Task(torch.ones(1), None)
    grads = [
        torch.autograd.grad(fm.unroll(each, meta, task, steps=3).loss, fm.tree.leaves(meta))
        for each in (problem, mutants.off_by_one(problem))
    ]
    torch.testing.assert_close(*grads)


def test_dropped_moment_needs_one() -> None:
    def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        return w, fm.StepInfo(w.sum())

    problem = fm.Problem(lambda meta, task, seed: meta, take, lambda meta, w, query, seed: w.sum())
    mutant = mutants.dropped_moment(problem)
    with pytest.raises(fm.ArgumentError, match=r"state\.opt_state, but the state is a Tensor\. Let init return"):
        fm.unroll(mutant, torch.ones(2, requires_grad=True), fm.Task(torch.ones(1), None), steps=1)
