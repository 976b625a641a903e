"""What holds for every problem: right gradients, steps that add up, tasks and memories that do not matter."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcmeta as fm
from funcmeta._batching import take
from funcmeta.testing import TOLERANCES, check_meta_grad, strategies
from funcmeta.testing.strategies import Case, Optimizer, SmoothLoss

STEPS = st.integers(1, 4)
MEMORIES = st.sampled_from([fm.Segments(1), fm.Segments(2), fm.Segments()])


def gradient(loss: Tensor, meta: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, fm.tree.leaves(meta), materialize_grads=True))


def assert_agree(got: Any, expected: Any, tolerance: float) -> None:
    """Leaf by leaf relative to the largest entry; a leaf below 1e-3 of the largest of all, relative to that."""
    sizes = [float(leaf.detach().abs().max()) if leaf.numel() else 0.0 for leaf in fm.tree.leaves(expected)]
    for mine, other, size in zip(fm.tree.leaves(got), fm.tree.leaves(expected), sizes, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * max(size, 1e-3 * max(sizes)))


@given(strategies.problems(), STEPS)
def test_meta_gradients_equal_finite_differences(case: Case, steps: int) -> None:
    check_meta_grad(*case, steps=steps, tolerance=TOLERANCES.drawn, order=2, allow_vacuous=True)


@given(strategies.problems())
def test_no_step_is_the_identity(case: Case) -> None:
    problem, meta, task = case
    out = fm.unroll(*case, steps=0)
    expected = problem.meta_loss(meta, problem.init(meta, task, 0), task.query, 0)  # type: ignore[misc]
    assert_agree((out.loss, out.state.params), (expected, meta["params"]), 0.0)
    assert_agree(gradient(out.loss, meta), gradient(expected, meta), TOLERANCES.memory)
    assert out.info.losses.shape == (0,)


@given(strategies.problems(), STEPS, STEPS)
def test_steps_add_up(case: Case, first: int, second: int) -> None:
    whole = fm.unroll(*case, steps=first + second)
    begun = fm.unroll(*case, steps=first)
    detached = fm.unroll(*case, steps=second, carry=begun.carry)
    attached = fm.unroll(*case, steps=second, carry=fm.Carry(begun.state, begun.carry.step))
    # The loss of the first part is left out of the second; where the steps have shares, they are the difference.
    shares = 0.1 * begun.info.losses.sum() if case.problem.step.__self__.shares else 0.0  # type: ignore[attr-defined]
    for part in (detached, attached):
        assert_agree((part.loss + shares, part.state), (whole.loss, whole.state), TOLERANCES.memory)
        assert part.carry.step == first + second
        assert torch.equal(torch.cat([begun.info.losses, part.info.losses]), whole.info.losses)
    if isinstance(shares, float):
        assert_agree(gradient(attached.loss, case.meta), gradient(whole.loss, case.meta), TOLERANCES.memory)
    assert not any(leaf.requires_grad for leaf in fm.tree.leaves(begun.carry.state))


@given(strategies.problems(tasks=2), STEPS)
def test_batched_tasks_are_looped_tasks(case: Case, steps: int) -> None:
    vmap, loop = (fm.unroll_batch(*case, steps=steps, strategy=strategy) for strategy in ("vmap", "loop"))
    assert_agree((vmap.loss, vmap.state, vmap.info.losses), (loop.loss, loop.state, loop.info.losses), TOLERANCES.exact)
    assert_agree(gradient(vmap.loss, case.meta), gradient(loop.loss, case.meta), TOLERANCES.exact)


@given(strategies.problems(tasks=3), STEPS, st.permutations(range(3)), st.sampled_from(["vmap", "loop"]))
def test_the_order_of_tasks_does_not_matter(case: Case, steps: int, order: list[int], strategy: Any) -> None:
    problem, meta, task = case
    tasks = [take(task, index) for index in order]
    support = [each.support for each in tasks]
    mixed = fm.Task(
        (lambda step: torch.stack([each(step) for each in support])) if callable(support[0]) else torch.stack(support),
        torch.stack([each.query for each in tasks]),
    )
    one = fm.unroll_batch(problem, meta, task, steps=steps, strategy=strategy)
    other = fm.unroll_batch(problem, meta, mixed, steps=steps, strategy=strategy)
    assert_agree(other.loss, one.loss, TOLERANCES.memory)
    assert_agree(other.state.params, fm.tree.map(lambda leaf: leaf[list(order)], one.state.params), TOLERANCES.memory)
    assert_agree(gradient(other.loss, meta), gradient(one.loss, meta), TOLERANCES.exact)


PLAIN = st.builds(
    lambda lr, momentum: Optimizer("sgd momentum", (), (("lr", lr), ("momentum", momentum))),
    st.floats(0.01, 0.1),
    st.floats(0.1, 0.8),
)


@given(strategies.problems(optimizer=PLAIN), STEPS, st.floats(0.1, 10.0))
def test_a_scaled_loss_and_an_unscaled_rate_leave_the_path_of_sgd(case: Case, steps: int, scale: float) -> None:
    training = case.problem.step.__self__  # type: ignore[attr-defined]

    def scaled(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, grads = fm.value_and_grad(lambda params: scale * training.inner_loss(meta, params, batch))(state.params)
        transform = training.optimizer.build({**meta["hypers"], "lr": meta["hypers"]["lr"] / scale})
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = fm.apply_updates(state.params, updates)
        info = fm.StepInfo(loss, 0.1 * loss / scale if training.shares else None)
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), info

    other = fm.unroll(case.problem._replace(step=scaled), *case[1:], steps=steps)
    expected = fm.unroll(*case, steps=steps)
    assert_agree((other.loss, other.state.params), (expected.loss, expected.state.params), TOLERANCES.memory)
    assert_agree(gradient(other.loss, case.meta), gradient(expected.loss, case.meta), TOLERANCES.exact)


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


@given(strategies.problems(), STEPS, MEMORIES)
def test_segments_store_as_much_as_is_needed(case: Case, steps: int, memory: Any) -> None:
    """The gradients agree to 1e-12, or to what the last digit of meta makes of them where that is more."""
    kept, replayed = fm.unroll(*case, steps=steps), fm.unroll(*case, steps=steps, memory=memory)
    assert_agree((replayed.loss, replayed.state), (kept.loss, kept.state), 0.0)
    got, expected = gradient(replayed.loss, case.meta), gradient(kept.loss, case.meta)
    beside = fm.tree.map(lambda leaf: torch.nextafter(leaf.detach(), leaf + 1).requires_grad_(), case.meta)
    moved = gradient(fm.unroll(case.problem, beside, case.task, steps=steps).loss, beside)
    sizes = [largest(leaf) for leaf in expected]
    for ours, theirs, other, size in zip(got, expected, moved, sizes, strict=True):
        allowed = max(TOLERANCES.memory * max(size, 1e-3 * max(sizes)), 8 * largest(theirs - other))
        assert largest(ours - theirs) <= allowed


@given(strategies.problems(tasks=2), STEPS, st.sampled_from(["vmap", "loop"]), MEMORIES)
def test_arguments_are_never_changed(case: Case, steps: int, strategy: Any, memory: Any) -> None:
    batch = case.task.support(0) if callable(case.task.support) else case.task.support
    every = [*fm.tree.leaves(case.meta), batch, case.task.query]
    before = [(leaf.detach().clone(), leaf._version, leaf.requires_grad) for leaf in every]
    out = fm.unroll_batch(*case, steps=steps, strategy=strategy, memory=memory)
    gradient(out.loss, case.meta)
    for leaf, (value, version, attached) in zip(every, before, strict=True):
        assert torch.equal(leaf.detach(), value)
        assert (leaf._version, leaf.requires_grad, leaf.grad) == (version, attached, None)


@given(st.integers(1, 3), STEPS, st.integers(0, 99), MEMORIES)
def test_modules_are_never_changed(width: int, steps: int, seed: int, memory: Any) -> None:
    with fm.rng.forked(seed):
        net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh()).double()
        x = torch.randn(4, 2, dtype=torch.float64)
    before = {name: leaf.clone() for name, leaf in net.state_dict().items()}
    problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).cos().sum(), optimizer=fm.optim.sgd(0.1))
    meta = {"params": fm.init_params(net)}
    out = fm.unroll(problem, meta, fm.Task(x, x), steps=steps, memory=memory)
    gradient(out.loss, meta)
    assert net.training
    assert all(torch.equal(leaf, before[name]) for name, leaf in net.state_dict().items())
    assert all(leaf.grad is None for leaf in net.parameters())


@given(strategies.parameter_trees(), strategies.smooth_losses(), strategies.smooth_losses())
def test_one_step_of_sgd_by_hand(params: Any, loss: SmoothLoss, judge: SmoothLoss) -> None:
    """dL/dθ = (I - lr H) ∇L(θ'), dL/dlr = -g · ∇L(θ'), with the Hessian as torch.func gives it."""
    leaves, spec = fm.tree.flatten(params)
    sizes = [leaf.numel() for leaf in leaves]
    x, rate = torch.linspace(-1, 1, 3, dtype=torch.float64), 0.1

    def unflat(flat: Tensor) -> Any:
        pieces = [piece.reshape(leaf.shape) for piece, leaf in zip(flat.split(sizes), leaves, strict=True)]
        return fm.tree.unflatten(pieces, spec)

    flat = torch.cat([leaf.flatten() for leaf in leaves])
    gradient_of = torch.func.grad(lambda w: loss(unflat(w), x))
    outer = torch.func.grad(lambda w: judge(unflat(w), x))(flat - rate * gradient_of(flat))
    hessian = torch.func.jacrev(gradient_of)(flat)

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        value, grads = fm.value_and_grad(loss)(state, batch)
        return fm.tree.map(lambda leaf, grad: leaf - meta["lr"] * grad, state, grads), fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["params"], step, lambda meta, state, x, seed: judge(state, x))
    meta = fm.tree.map(
        lambda leaf: leaf.requires_grad_(), {"params": params, "lr": torch.tensor(rate, dtype=torch.float64)}
    )
    got = gradient(fm.unroll(problem, meta, fm.Task(x, x), steps=1).loss, meta)
    expected = fm.tree.leaves({"params": unflat(outer - rate * hessian @ outer), "lr": -gradient_of(flat) @ outer})
    assert_agree(got, expected, TOLERANCES.memory)
