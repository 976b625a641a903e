"""The unrolled inner training: values, randomness, carries, and gradients that can be written down."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import check_meta_grad, finite_difference

ONE = fm.Task(torch.ones(1), torch.ones(1))


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def batch(points: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(points, 3).double(), torch.randn(points, 2).double()


def setting(*layers: nn.Module) -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    module = nn.Sequential(nn.Linear(3, 4), *(layers or [nn.Tanh()]), nn.Linear(4, 2)).double()
    problem = fm.inner_problem(module, mse, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.5))
    meta = {"params": fm.init_params(module), "lr": torch.tensor(0.3).double().requires_grad_()}
    return problem, meta, fm.Task(batch(), batch(7))


def gradient(loss: Tensor, meta: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, fm.tree.leaves(meta)))


def close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- gradients that can be written down


def toy(transform: fm.Transform) -> fm.Problem:
    """f(a, x) = a x² from a₀ = 1, with meta = x."""

    def init(x: Tensor, task: fm.Task, seed: int) -> Any:
        start = {"a": torch.ones_like(x).detach()}
        return start, transform.init(start)

    def step(x: Tensor, state: Any, batch: Any, seed: int) -> tuple[Any, fm.StepInfo]:
        params, rest = state
        loss, grads = fm.value_and_grad(lambda params: params["a"] * x**2)(params)
        updates, rest = transform.update(grads, rest, params)
        return (fm.apply_updates(params, updates), rest), fm.StepInfo(loss)

    return fm.Problem(init, step, lambda x, state, query, seed: state[0]["a"] * x**2)


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
@pytest.mark.parametrize(
    ("transform", "estimator", "loss", "expected"),
    [
        (optim.sgd(1.0), fm.Reverse(), -12.0, -28.0),
        (optim.sgd(1.0), fm.FirstOrder(), -12.0, -12.0),
        (optim.chain(optim.clip_by_norm(2.0), optim.sgd(1.0)), fm.Reverse(), -4.0, -4.0),
        (optim.chain(optim.clip_by_norm(2.0), optim.sgd(1.0)), fm.FirstOrder(), -4.0, -4.0),
    ],
    ids=["exact", "first order", "clipped", "clipped, first order"],
)
def test_the_scalar_toy(transform: fm.Transform, estimator: Any, loss: float, expected: float, memory: Any) -> None:
    """a₁ = 1 - x², L = x² - x⁴: dL/dx = 2x - 4x³ = -28; first order 2 a₁ x = -12; clipped a₁ = -1, so -4."""
    x = torch.tensor(2.0).double().requires_grad_()
    out = fm.unroll(toy(transform), x, ONE, steps=1, estimator=estimator, memory=memory)
    out.loss.backward()
    assert float(out.loss.detach()) == loss
    assert x.grad is not None
    assert float(x.grad) == expected


def test_the_example_of_the_design() -> None:
    """Five-way one-shot glyphs, exact second order, an lr that is learned."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 5))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(predict(x), y)

    problem = fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"]))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.4, requires_grad=True)}
    task = fm.tasks.glyphs(ways=5, shots=1, queries=15).sample(seed=0)
    out = fm.unroll(problem, meta, task, steps=5)
    out.loss.backward()
    assert out.info.losses[-1] < 0.5 * out.info.losses[0]
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in fm.tree.leaves(meta))


# ---- steps, batches, carry


def test_no_steps_judge_the_initial_point() -> None:
    problem, meta, task = setting()
    out = fm.unroll(problem, meta, task, steps=0)
    close(out.loss, problem.meta_loss(meta, problem.init(meta, task, 0), task.query, 0))
    assert out.info.losses.shape == (0,)
    assert out.info.aux == ()
    assert int(out.state.step) == 0
    out.loss.backward()
    assert meta["params"]["0.weight"].grad is not None
    assert meta["lr"].grad is None


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_an_unroll_goes_on_where_another_stopped(memory: Any) -> None:
    """unroll(a + b) is unroll(b) after unroll(a): batches and draws of a step follow its index."""
    problem, meta, task = setting(nn.Dropout(0.3), nn.Tanh())
    batches = [batch() for _ in range(5)]
    task = task._replace(support=lambda step: batches[step])
    whole = fm.unroll(problem, meta, task, steps=5, seed=3, memory=memory)
    first = fm.unroll(problem, meta, task, steps=2, seed=3, memory=memory)
    assert first.carry.step == 2
    assert not any(leaf.requires_grad for leaf in fm.tree.leaves(first.carry.state))
    second = fm.unroll(problem, meta, task, steps=3, seed=3, memory=memory, carry=first.carry)
    close(second.loss, whole.loss)
    close(torch.cat([first.info.losses, second.info.losses]), whole.info.losses)
    close(second.state.params, whole.state.params)
    assert int(second.state.step) == second.carry.step == 5

    through = fm.Carry(first.state, 2)
    both = fm.unroll(problem, meta, task, steps=3, seed=3, memory=memory, carry=through)
    close(gradient(both.loss, meta), gradient(whole.loss, meta))


def test_a_detached_carry_truncates() -> None:
    problem, meta, task = setting()
    first = fm.unroll(problem, meta, task, steps=2)
    second = fm.unroll(problem, meta, task, steps=1, carry=first.carry)
    second.loss.backward()
    assert meta["params"]["0.weight"].grad is None
    assert meta["lr"].grad is not None


def test_a_batch_for_every_step() -> None:
    problem, meta, task = setting()
    batches = [batch() for _ in range(3)]
    asked: list[int] = []

    def support(step: int) -> Any:
        asked.append(step)
        return batches[step]

    out = fm.unroll(problem, meta, task._replace(support=support), steps=3)
    assert asked == [0, 1, 2]
    state = problem.init(meta, task, 0)
    for each in batches:
        state, _ = problem.step(meta, state, each, 0)
    close(out.state.params, state.params)


def test_info_tells_losses_and_further_output() -> None:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        loss, slope = fm.value_and_grad(lambda w: (w**2).sum())(w)
        return w - meta * slope, fm.StepInfo(loss, aux={"norm": slope.norm(), "note": "descend"})

    problem = fm.Problem(lambda meta, task, seed: torch.ones(2), step, lambda meta, w, query, seed: w.sum())
    out = fm.unroll(problem, torch.tensor(0.25, requires_grad=True), ONE, steps=2)
    assert out.info.losses.tolist() == [2.0, 0.5]
    assert [each["note"] for each in out.info.aux] == ["descend", "descend"]
    close(torch.stack([each["norm"] for each in out.info.aux]), torch.tensor([8.0, 2.0]).sqrt(), 1e-6)
    assert not out.info.losses.requires_grad
    assert not out.info.aux[1]["norm"].requires_grad
    assert out.info.strategy == "single"


# ---- randomness


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_the_seed_decides_every_draw(memory: Any) -> None:
    problem, meta, task = setting(nn.Dropout(0.5))
    before = torch.get_rng_state()
    outs = [fm.unroll(problem, meta, task, steps=3, seed=seed, memory=memory) for seed in (1, 1, 2)]
    slopes = [gradient(out.loss, meta) for out in outs]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert all(torch.equal(a, b) for a, b in zip(slopes[0], slopes[1], strict=True))
    assert not torch.equal(outs[0].loss, outs[2].loss)
    assert len(set(outs[0].info.losses.tolist()) & set(outs[2].info.losses.tolist())) == 0


def test_every_step_draws_anew() -> None:
    net = nn.Dropout(0.5)
    module = nn.Sequential(nn.Linear(1, 64), net)
    seen: list[Tensor] = []

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        out = predict(batch)
        seen.append(out == 0)
        return out.square().mean()

    fm.unroll(fm.inner_problem(module, loss, optimizer=optim.sgd(0.0)), {}, ONE, steps=3)
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 4


# ---- modes of autograd, shapes of meta


def test_without_grad_mode_no_graph_is_made() -> None:
    problem, meta, task = setting()
    with torch.no_grad():
        out = fm.unroll(problem, meta, task, steps=3)
    assert not any(leaf.requires_grad for leaf in [out.loss, *fm.tree.leaves(out.state)])
    close(out.loss, fm.unroll(problem, meta, task, steps=3).loss.detach())


def test_a_meta_without_leaves_that_require_grad_makes_no_graph() -> None:
    problem, meta, task = setting()
    out = fm.unroll(problem, fm.tree.detach(meta), task, steps=3)
    assert not any(leaf.requires_grad for leaf in [out.loss, *fm.tree.leaves(out.state)])
    assert torch.is_grad_enabled()


def test_the_gradient_flows_on_through_a_meta_that_was_computed() -> None:
    problem, meta, task = setting()
    log_lr = meta["lr"].detach().log().requires_grad_()
    fm.unroll(problem, {**meta, "lr": log_lr.exp()}, task, steps=3).loss.backward()
    (slope,) = torch.autograd.grad(fm.unroll(problem, meta, task, steps=3).loss, meta["lr"])
    close(log_lr.grad, slope * meta["lr"].detach())


class Both(NamedTuple):
    """A meta that is no dict."""

    rates: tuple[Tensor, list[Tensor]]
    start: Tensor


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_meta_may_be_any_tree(memory: Any) -> None:
    def step(meta: Both, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(w)
        return w - meta.rates[0] * meta.rates[1][0] * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta.start, step, lambda meta, w, query, seed: (w**3).sum())
    leaves = [torch.rand(()).double(), torch.rand(2).double(), torch.rand(2).double()]
    meta = Both((leaves[0], [leaves[1]]), leaves[2])
    check_meta_grad(problem, fm.tree.map(lambda leaf: leaf.requires_grad_(), meta), ONE, steps=3, memory=memory)


def test_gradients_of_several_tasks_add_up() -> None:
    problem, meta, task = setting()
    other = fm.Task(batch(), batch())
    for each in (task, other):
        fm.unroll(problem, meta, each, steps=2).loss.backward()
    together = fm.unroll(problem, meta, task, steps=2).loss + fm.unroll(problem, meta, other, steps=2).loss
    close([leaf.grad for leaf in fm.tree.leaves(meta)], gradient(together, meta))


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
def test_inside_torch_func(estimator: Any) -> None:
    problem, meta, task = setting()

    def loss(meta: Any) -> Tensor:
        return fm.unroll(problem, meta, task, steps=3, estimator=estimator).loss

    close(fm.tree.leaves(torch.func.grad(loss)(fm.tree.detach(meta))), gradient(loss(meta), meta), 1e-10)


def test_the_meta_gradient_by_forward_mode() -> None:
    problem, meta, task = setting()
    meta = fm.tree.detach(meta)
    direction = fm.tree.map(torch.randn_like, meta)

    def loss(meta: Any) -> Tensor:
        return fm.unroll(problem, meta, task, steps=3).loss

    forward = torch.func.jvp(loss, (meta,), (direction,))[1]
    close(forward, fm.tree.dot(torch.func.grad(loss)(meta), direction), 1e-10)


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_the_meta_gradient_can_be_differentiated_again(memory: Any) -> None:
    problem, meta, task = setting()
    direction = fm.tree.map(torch.randn_like, meta)

    def slope(meta: Any) -> Tensor:
        """The derivative of the meta-loss along the direction, with its graph."""
        meta = fm.tree.map(lambda leaf: leaf.requires_grad_(), meta)
        loss = fm.unroll(problem, meta, task, steps=3, memory=memory).loss
        return fm.tree.dot(list(torch.autograd.grad(loss, fm.tree.leaves(meta), create_graph=True)), direct)

    direct = fm.tree.leaves(direction)
    across = fm.tree.map(torch.randn_like, meta)
    expected = finite_difference(slope, fm.tree.detach(meta), across, order=4)
    computed = fm.tree.dot(list(torch.autograd.grad(slope(meta), fm.tree.leaves(meta))), fm.tree.leaves(across))
    torch.testing.assert_close(computed, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
def test_a_compiled_step(estimator: Any) -> None:
    """The inner gradient inside a compiled step is differentiated, or held constant, as outside."""
    torch._dynamo.reset()

    def step(rate: Tensor, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(w)
        return w - rate * slope, fm.StepInfo(loss)

    rate, slopes = torch.tensor(0.3).double().requires_grad_(), []
    for each in (step, torch.compile(step, backend="aot_eager")):
        problem = fm.Problem(lambda rate, task, seed: rate.expand(2), each, lambda rate, w, query, seed: (w**3).sum())
        out = fm.unroll(problem, rate, ONE, steps=3, estimator=estimator)
        slopes.append(torch.autograd.grad(out.loss, rate)[0])
    close(*slopes)


# ---- arguments


def test_a_bad_step_is_told() -> None:
    problem, meta, task = setting()
    with pytest.raises(
        fm.StructureError, match=r"step returned a InnerState, expected the pair \(state, StepInfo\(loss\)\)"
    ):
        fm.unroll(problem._replace(step=lambda *arguments: problem.step(*arguments)[0]), meta, task, steps=1)
    with pytest.raises(fm.ArgumentError, match=r"steps is True, expected an integer of 0 or more. Pass e.g. steps=5"):
        fm.unroll(problem, meta, task, steps=True)
