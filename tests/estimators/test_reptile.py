"""Reptile: the way from where training ended back to where it began, as a gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def setting(*tasks: int, **options: Any) -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(0.1, momentum=0.9), **options)
    batches = (torch.randn(*tasks, 5, 3).double(), torch.randn(*tasks, 5, 2).double())
    return problem, {"params": fm.init_params(net)}, fm.Task(batches, None)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def trained(problem: fm.Problem, meta: Any, task: fm.Task, steps: int) -> tuple[Any, Tensor]:
    """Final parameters and last inner loss, by hand."""
    meta = fm.tree.detach(meta)
    state = problem.init(meta, task, 0)
    for _ in range(steps):
        state, info = problem.step(meta, state, task.support, 0)
    return state.params, info.loss


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_the_gradient_is_the_way_back(steps: int, memory: Any) -> None:
    problem, meta, task = setting()
    out = fm.unroll(problem, meta, task, steps=steps, estimator=fm.Reptile(), memory=memory)
    (2 * out.loss).backward()
    params, last = trained(problem, meta, task, steps)
    close(out.loss.detach(), last)
    close(out.loss.detach(), out.info.losses[-1])
    close(out.state.params, params)
    for name, leaf in meta["params"].items():
        close(leaf.grad, 2 * (leaf.detach() - params[name]))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_over_tasks_it_is_the_mean(strategy: Any) -> None:
    problem, meta, tasks = setting(3)
    out = fm.unroll_batch(problem, meta, tasks, steps=3, estimator=fm.Reptile(), strategy=strategy)
    out.loss.backward()
    each = [fm.Task(tuple(leaf[index] for leaf in tasks.support), None) for index in range(3)]
    ends, losses = zip(*[trained(problem, meta, task, 3) for task in each], strict=True)
    close(out.loss.detach(), torch.stack(losses).mean())
    for name, leaf in meta["params"].items():
        close(leaf.grad, leaf.detach() - torch.stack([end[name] for end in ends]).mean(0))


def test_the_gradient_flows_on_to_what_the_parameters_were_computed_from() -> None:
    problem, meta, task = setting()
    scale = torch.tensor(1.0).double().requires_grad_()
    scaled = {"params": {name: leaf.detach() * scale for name, leaf in meta["params"].items()}}
    fm.unroll(problem, scaled, task, steps=2, estimator=fm.Reptile()).loss.backward()
    params, _ = trained(problem, meta, task, 2)
    before = fm.tree.detach(meta["params"])
    close(scale.grad, fm.tree.dot(fm.tree.map(torch.sub, before, params), before))


def test_no_query_is_read() -> None:
    problem, meta, task = setting(meta_loss_fn=lambda *arguments: 1 / 0)
    fm.unroll(problem, meta, task, steps=1, estimator=fm.Reptile()).loss.backward()


def test_it_is_not_differentiable_again() -> None:
    problem, meta, task = setting()
    out = fm.unroll(problem, meta, task, steps=2, estimator=fm.Reptile())
    leaves = fm.tree.leaves(meta["params"])
    scale = torch.tensor(2.0, requires_grad=True)
    for loss in (out.loss, scale * out.loss):
        with pytest.raises(fm.GraphError, match=r"create_graph=True, but this estimator's cannot be differentiated"):
            torch.autograd.grad(loss, leaves, create_graph=True, retain_graph=True)


def test_what_else_is_in_meta_has_no_gradient() -> None:
    problem, meta, task = setting()
    meta["lr"] = torch.tensor(0.1).double().requires_grad_()
    with pytest.raises(fm.UnreachedLeafError, match=r"meta\['lr'\].*Reptile moves the initial parameters only: set"):
        fm.unroll(problem, meta, task, steps=2, estimator=fm.Reptile())


def test_what_it_refuses() -> None:
    problem, meta, task = setting()
    with pytest.raises(fm.ArgumentError, match=r"Reptile was asked for 0 steps, expected at least 1"):
        fm.unroll(problem, meta, task, steps=0, estimator=fm.Reptile())
    bare = fm.Problem(lambda meta, task, seed: (meta, 0), lambda *arguments: None, None)
    with pytest.raises(
        fm.ArgumentError, match=r"Reptile reads state\.params, but the state is a tuple. Let init return"
    ):
        fm.unroll(bare, torch.ones(2, requires_grad=True), task, steps=1, estimator=fm.Reptile())
