"""``out.state`` in a loss, or in a carry: attached under exact estimators, refused by the others."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm

EXACT = [fm.Reverse(), fm.MixedMode(), fm.ForwardMode(), fm.ForwardMode(1), fm.ForwardMode(2)]
OTHERS: list[Any] = [
    fm.EvolutionStrategies(0.01, 2, chunk=1),
    fm.PersistentES(0.01, 2, 2, chunk=1),
]


def leaf(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


def case() -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    """A net with frozen weights and running statistics, and three numbers that are learned."""
    with fm.rng.forked(1):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
        data = [(torch.randn(6, 3).double(), torch.randn(6, 1).double()) for _ in range(2)]
    net[0].bias.requires_grad_(False)
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: F.mse_loss(predict(batch[0]), batch[1]),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["rest"][0], weight_decay=meta["rest"][1]),
    )
    return problem, {"lr": leaf(0.2), "rest": leaf(0.6, 0.05)}, fm.Task(*data)


def penalized(problem: fm.Problem, meta: Any, task: fm.Task, **options: Any) -> Tensor:
    """The meta-loss with a term that the user makes from the last state."""
    out = fm.unroll(problem, meta, task, steps=3, **options)
    kept = out.state.params, out.state.opt_state  # running statistics are constants in torch
    terms = [(each**3).sum() for each in fm.tree.tensors(kept) if each.is_floating_point()]
    return out.loss + 0.1 * torch.stack(terms).sum()


def slopes(loss: Tensor, meta: Any) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, fm.tree.leaves(meta))])


def differences(h: float = 1e-5) -> Tensor:
    problem, meta, task = case()
    found = []
    for way in torch.eye(3, dtype=torch.float64):
        ends = []
        for sign in (1, -1):
            moved = {"lr": meta["lr"] + sign * h * way[0], "rest": meta["rest"] + sign * h * way[1:]}
            with torch.no_grad():
                ends.append(penalized(problem, moved, task))
        found.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(found)


@pytest.mark.parametrize("estimator", EXACT, ids=repr)
def test_a_term_of_the_last_state_equals_finite_differences(estimator: Any) -> None:
    problem, meta, task = case()
    got = slopes(penalized(problem, meta, task, estimator=estimator), meta)
    torch.testing.assert_close(got, differences(), rtol=1e-6, atol=1e-9)
    exact = slopes(penalized(problem, meta, task), meta)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", EXACT, ids=repr)
def test_a_carry_of_the_last_state_is_differentiated_through(estimator: Any) -> None:
    problem, meta, task = case()
    first = fm.unroll(problem, meta, task, steps=2, estimator=estimator)
    rest = fm.unroll(problem, meta, task, steps=2, carry=fm.Carry(first.state, 2))
    whole = fm.unroll(problem, meta, task, steps=4)
    torch.testing.assert_close(slopes(rest.loss, meta), slopes(whole.loss, meta), rtol=1e-10, atol=1e-10)
    cut = fm.unroll(problem, meta, task, steps=2, carry=first.carry)
    assert float((slopes(cut.loss, meta) - slopes(fm.unroll(problem, meta, task, steps=4).loss, meta)).norm()) > 1e-4


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_stacked_tasks(strategy: Any) -> None:
    problem, meta, task = case()
    tasks = fm.tasks.stack([task, fm.Task(task.query, task.support)])
    found = []
    for estimator in (fm.ForwardMode(2), fm.Reverse()):
        out = fm.unroll_batch(problem, meta, tasks, steps=2, strategy=strategy, estimator=estimator)
        found.append(slopes(out.state.params["3.weight"].pow(3).sum() + out.loss, meta))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_state_alone_and_a_part_of_it() -> None:
    problem, meta, task = case()
    found = []
    for estimator in (fm.ForwardMode(), fm.Reverse()):
        out = fm.unroll(problem, meta, task, steps=3, estimator=estimator)
        found.append(torch.autograd.grad(out.state.params["0.weight"].sum(), meta["rest"])[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_state_of_forward_mode_is_differentiated_once() -> None:
    problem, meta, task = case()
    out = fm.unroll(problem, meta, task, steps=2, estimator=fm.ForwardMode())
    with pytest.raises(fm.GraphError, match=r"create_graph=True, but this estimator's"):
        torch.autograd.grad(out.state.params["0.weight"].sum(), meta["lr"], create_graph=True)


def test_the_tangents_go_with_the_state() -> None:
    """The loss alone does not keep them."""
    problem, meta, task = case()
    out = fm.unroll(problem, meta, task, steps=2, estimator=fm.ForwardMode())
    tangent = weakref.ref(out.state.params["0.weight"].grad_fn)
    loss = out.loss
    del out
    gc.collect()
    assert tangent() is None
    loss.backward()
    assert meta["lr"].grad is not None


def test_the_user_s_tensors_stay_detached() -> None:
    """A state may hand out a tensor of the problem itself."""
    table = torch.ones(3, dtype=torch.float64)

    def step(rate: Tensor, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w.sin() * batch).sum())(state["w"])
        return {"w": state["w"] - rate * slope, "table": table}, fm.StepInfo(loss)

    problem = fm.Problem(
        lambda rate, task, seed: {"w": torch.ones(3).double(), "table": table},
        step,
        lambda rate, state, query, seed: (state["w"] * state["table"]).sum(),
    )
    for estimator in (fm.ForwardMode(), fm.EvolutionStrategies(0.1, 2)):
        fm.unroll(problem, leaf(0.1), fm.Task(table, None), steps=2, estimator=estimator)
        assert not table.requires_grad
        assert table.grad_fn is None


# ---- refused


@pytest.mark.parametrize("estimator", OTHERS, ids=repr)
def test_a_term_of_the_last_state_is_refused(estimator: Any) -> None:
    problem, meta, task = case()
    with pytest.raises(
        fm.GraphError, match=rf"from out\.state, which {type(estimator).__name__} does not.*\.detach\(\)"
    ):
        penalized(problem, meta, task, estimator=estimator).backward()


@pytest.mark.parametrize("estimator", OTHERS, ids=repr)
def test_a_carry_of_the_last_state_is_refused(estimator: Any) -> None:
    problem, meta, task = case()
    out = fm.unroll(problem, meta, task, steps=2, estimator=estimator)
    with pytest.raises(fm.ArgumentError, match=rf"out\.state of an unroll by {type(estimator).__name__}.*out\.carry"):
        fm.unroll(problem, meta, task, steps=2, carry=fm.Carry(out.state, 2))
    going_on = fm.unroll(problem, meta, task, steps=2, carry=fm.Carry(out.carry.state, 2))
    assert going_on.loss.requires_grad
    with torch.no_grad():
        value = fm.unroll(problem, meta, task, steps=2, carry=fm.Carry(out.state, 2)).loss
    torch.testing.assert_close(value, going_on.loss.detach())


def test_reptile_refuses_its_state_too() -> None:
    _, _, task = case()
    with fm.rng.forked(1):
        start = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    problem = fm.inner_problem(
        start, lambda meta, predict, batch: F.mse_loss(predict(batch[0]), batch[1]), optimizer=fm.optim.sgd(0.1)
    )
    out = fm.unroll(problem, {"params": fm.init_params(start)}, task, steps=2, estimator=fm.Reptile())
    with pytest.raises(fm.GraphError, match=r"out\.state, which Reptile does not differentiate"):
        out.state.params["0.weight"].sum().backward()
    with pytest.raises(fm.ArgumentError, match=r"out\.state of an unroll by Reptile"):
        fm.unroll(problem, {"params": fm.init_params(start)}, task, steps=2, carry=fm.Carry(out.state, 2))
    out.loss.backward()
