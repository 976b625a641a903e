"""First order: the inner gradients are constants, all else is differentiated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim

memories = pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1), fm.Segments(3)], ids=repr)


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def setting(*tasks: int) -> tuple[nn.Module, dict[str, Any], fm.Task]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.3).double().requires_grad_()}
    batches = [(torch.randn(*tasks, 5, 3).double(), torch.randn(*tasks, 5, 2).double()) for _ in range(2)]
    return net, meta, fm.Task(*batches)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def by_hand(net: nn.Module, meta: Any, task: fm.Task, steps: int, momentum: float) -> tuple[Tensor, Tensor]:
    """Meta-loss and the sum of its shares, by a loop whose gradients are detached."""
    params, trace, share = meta["params"], None, torch.zeros(()).double()

    def loss(params: Any, batch: Any) -> Tensor:
        return (torch.func.functional_call(net, params, batch[0]) - batch[1]).square().mean()

    for _ in range(steps):
        value = loss(params, task.support)
        share = share + value
        grads = [each.detach() for each in torch.autograd.grad(value, list(params.values()), retain_graph=True)]
        trace = grads if trace is None else [momentum * old + new for old, new in zip(trace, grads, strict=True)]
        params = {name: leaf - meta["lr"] * by for (name, leaf), by in zip(params.items(), trace, strict=True)}
    return loss(params, task.query), share


@memories
@pytest.mark.parametrize("trajectory", [False, True])
def test_it_is_a_loop_with_detached_gradients(trajectory: bool, memory: Any) -> None:
    net, meta, task = setting()
    problem = fm.inner_problem(
        net,
        mse,
        optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.8),
        trajectory_loss=trajectory,
        meta_loss_fn=mse,
    )
    out = fm.unroll(problem, meta, task, steps=4, estimator=fm.FirstOrder(), memory=memory)
    last, share = by_hand(net, meta, task, 4, 0.8)
    expected = last + share if trajectory else last
    close(out.loss, expected)
    leaves = fm.tree.leaves(meta)
    got = torch.autograd.grad(out.loss, leaves)
    close(got, torch.autograd.grad(expected, leaves))
    exact = torch.autograd.grad(fm.unroll(problem, meta, task, steps=4).loss, leaves)
    assert max(float((a - b).abs().max()) for a, b in zip(got, exact, strict=True)) > 1e-3


@memories
def test_the_learning_rate_has_its_gradient(memory: Any) -> None:
    """For SGD, dL/dlr = -Σ_k ⟨∇L, g_k⟩ and dL/dθ_0 = ∇L(θ_K)."""
    net, meta, task = setting()
    problem = fm.inner_problem(net, mse, optimizer=lambda meta: optim.sgd(meta["lr"]))
    out = fm.unroll(problem, meta, task, steps=3, estimator=fm.FirstOrder(), memory=memory)
    out.loss.backward()
    final = {name: leaf.detach().requires_grad_() for name, leaf in out.state.params.items()}
    slope = torch.autograd.grad(
        problem.meta_loss(meta, out.state._replace(params=final), task.query, 0), final.values()
    )
    close([leaf.grad for leaf in meta["params"].values()], list(slope))
    moved = [meta["params"][name].detach() - final[name].detach() for name in final]
    close(meta["lr"].grad, -fm.tree.dot(moved, list(slope)) / meta["lr"].detach())


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_tasks_in_a_batch(strategy: Any) -> None:
    net, meta, tasks = setting(3)
    problem = fm.inner_problem(net, mse, optimizer=lambda meta: optim.sgd(meta["lr"]))
    losses = [
        by_hand(net, meta, fm.Task(*[tuple(leaf[index] for leaf in part) for part in tasks[:2]]), 3, 0.0)[0]
        for index in range(3)
    ]
    out = fm.unroll_batch(problem, meta, tasks, steps=3, estimator=fm.FirstOrder(), strategy=strategy)
    leaves = fm.tree.leaves(meta)
    close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(torch.stack(losses).mean(), leaves))


@memories
def test_the_weights_of_a_learned_loss_have_no_first_order_gradient(memory: Any) -> None:
    net, meta, task = setting()
    meta["weights"] = torch.ones(2).double().requires_grad_()

    def weighted(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return ((predict(x) - y).square() * meta["weights"]).mean()

    problem = fm.inner_problem(net, weighted, optimizer=lambda meta: optim.sgd(meta["lr"]), meta_loss_fn=mse)
    with pytest.raises(
        fm.UnreachedLeafError, match=r"meta\['weights'\].*Under FirstOrder .* use Reverse\(\), or"
    ) as caught:
        fm.unroll(problem, meta, task, steps=3, estimator=fm.FirstOrder(), memory=memory).loss.backward()
    assert caught.value.leaves == ("meta['weights']",)
    assert "through the inner gradient" in caught.value.advice
    fm.unroll(problem, meta, task, steps=3, memory=memory).loss.backward()
    assert meta["weights"].grad is not None


def test_a_step_without_value_and_grad_is_refused() -> None:
    """With torch.autograd.grad, torch.func.grad, or in one step of several."""

    def hidden(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        return w - 0.1 * torch.func.grad(lambda w: (w**4).sum())(w), fm.StepInfo((w**4).sum())

    def open_at_first(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        if float(batch) < 2:
            _, slope = fm.value_and_grad(lambda w: (w**4).sum())(w)
            return w - 0.1 * slope, fm.StepInfo((w**4).sum())
        return hidden(meta, w, batch, seed)

    for step, at in ((hidden, 0), (open_at_first, 2)):
        problem = fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, w, query, seed: w.sum())
        task = fm.Task(lambda index: torch.tensor(float(index)), None)
        message = (
            rf"gradient of step {at} constant: the step took none through funcmeta.value_and_grad. Use it in place"
        )
        with pytest.raises(fm.GraphError, match=message):
            fm.unroll(problem, torch.ones(2, requires_grad=True), task, steps=4, estimator=fm.FirstOrder())


def test_every_gradient_of_a_step_is_constant() -> None:
    """A step with two inner gradients, one inside the other's update, equals the loop with both detached."""

    def loss(w: Tensor) -> Tensor:
        return (torch.sin(w) ** 2).sum()

    def step(meta: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(loss)(w)
        _, ahead = fm.value_and_grad(loss)(w - meta * slope)
        return w - meta * ahead, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: torch.ones(2).double() * meta, step, lambda meta, w, q, seed: w.sum())
    meta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    out = fm.unroll(problem, meta, fm.Task(torch.ones(1), None), steps=1, estimator=fm.FirstOrder())
    w = torch.ones(2).double() * 0.3
    gradient = torch.func.grad(loss)
    close(torch.autograd.grad(out.loss, meta)[0], (1 - gradient(w - 0.3 * gradient(w))).sum())


def test_it_can_be_differentiated_again() -> None:
    """With constant gradients L = (w - lr c)³ in w and lr, so d²L/dw dlr = -6 (w - lr c) c."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(lambda w: w**2)(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, w, query, seed: w**3)
    meta = {"w": torch.tensor(2.0, requires_grad=True), "lr": torch.tensor(0.25, requires_grad=True)}
    out = fm.unroll(problem, meta, fm.Task(torch.ones(1), None), steps=1, estimator=fm.FirstOrder())
    (first,) = torch.autograd.grad(out.loss, meta["w"], create_graph=True)
    assert float(first.detach()) == 3.0
    assert float(torch.autograd.grad(first, meta["lr"])[0]) == -24.0
