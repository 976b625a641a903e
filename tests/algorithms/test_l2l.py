"""Learned optimizers in training: windows, starts, horizons, scaling, imitation, and what happens to NaN."""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned
from funcmeta.algorithms import l2l
from funcmeta.algorithms._scaffold import rescaled
from funcmeta.algorithms._start import fresh_start

unroll_batch_module = importlib.import_module("funcmeta.unroll_batch")


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def quadratic(meta: Any, predict: Any, batch: Any) -> Tensor:
    W, y = batch
    return (W @ predict.params["theta"] - y).square().sum()


def start(seed: int) -> dict[str, Tensor]:
    return {"theta": torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


TASKS = fm.tasks.quadratics(3, dtype=torch.float64).sample_batch(seed=0, tasks=4)


def build(optimizer: fm.LearnedOptimizer | None = None, **options: Any) -> l2l.L2L:
    torch.manual_seed(0)
    optimizer = optimizer or learned.lstm(hidden=3, layers=1, scale=0.1).double()
    return l2l.build(optimizer, Point(), quadratic, **{"steps": 6, "window": 3, "start": start, **options})


def gradient(loss: Tensor, meta: Any) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(meta["optimizer"].values()))])


def by_hand(meta: Any, tasks: fm.Task, seed: int, *, detach: bool) -> list[Tensor]:
    """The window losses by a plain loop over tasks and steps: parameters, gradients and updates written out."""
    torch.manual_seed(0)
    optimizer = learned.lstm(hidden=3, layers=1, scale=0.1).double()
    windows: list[list[Tensor]] = [[], []]
    for index in range(4):
        W, y = (each[index] for each in tasks.support)
        theta = start(fm.rng.fold(seed, 0, index))["theta"]
        transform = fm.as_transform(optimizer, meta["optimizer"])
        state = transform.init({"theta": theta})
        for window in windows:
            total = torch.zeros((), dtype=torch.float64)
            theta, state = theta.detach(), fm.tree.detach(state)
            for _ in range(3):
                total = total + (W @ theta - y).square().sum()
                grad = 2 * W.T @ (W @ theta - y)
                updates, state = transform.update({"theta": grad.detach() if detach else grad}, state, {"theta": theta})
                theta = theta + updates["theta"]
            window.append(total + (W @ theta - y).square().sum())
    return [torch.stack(window).mean() for window in windows]


@pytest.mark.parametrize(("estimator", "detach"), [(fm.FirstOrder(), True), (fm.Reverse(), False)])
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_windows_are_those_of_a_loop_by_hand(estimator: Any, detach: bool, strategy: str) -> None:
    algorithm = build(estimator=estimator, strategy=strategy)
    meta = algorithm.init()
    expected = by_hand(meta, TASKS, 5, detach=detach)
    for got, wanted in zip(algorithm.windows(meta, TASKS, seed=5), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(got, meta), gradient(wanted, meta), rtol=1e-10, atol=1e-12)


def test_first_and_second_order_differ() -> None:
    found = []
    for estimator in (fm.FirstOrder(), fm.Reverse()):
        algorithm = build(estimator=estimator)
        meta = algorithm.init()
        found.append(gradient(next(iter(algorithm.windows(meta, TASKS))), meta))
    assert float((found[0] - found[1]).norm() / found[1].norm()) > 1e-3


def test_the_loss_of_a_whole_training_has_the_gradients_of_its_windows() -> None:
    algorithm = build(estimator=fm.Reverse())
    meta = algorithm.init()
    for tasks in (TASKS, TASKS._replace(query=None)):
        whole = gradient(algorithm.loss(meta, tasks, seed=2), meta)
        parts = [gradient(loss, meta) for loss in algorithm.windows(meta, tasks, seed=2)]
        torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-10, atol=1e-12)
    cut = fm.unroll_batch(
        algorithm.problem,
        meta,
        TASKS._replace(query=None),
        steps=6,
        estimator=fm.Truncated(3),
        seed=2,
        carry=l2l.carry_of(algorithm.problem, meta, TASKS, 2, start),
    )
    torch.testing.assert_close(gradient(cut.loss, meta), whole, rtol=1e-10, atol=1e-12)


def test_without_a_query_no_window_has_a_single_step() -> None:
    tasks = TASKS._replace(query=None)
    algorithm = build(steps=7)
    assert [loss.requires_grad for loss in algorithm.windows(algorithm.init(), tasks)] == [True, True]
    with pytest.raises(fm.ArgumentError, match=r"a window has 1 step, expected at least 2 where tasks have no query"):
        next(iter(build(window=1).windows(algorithm.init(), tasks)))


def test_the_strategy_is_measured_with_the_states_that_tasks_begin_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh layers cannot be drawn under vmap, the training of many of them can be run there."""
    net = nn.Linear(1, 1)
    algorithm = l2l.build(
        learned.linear(),
        net,
        lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        steps=2,
        window=2,
        strategy="auto",
    )
    measured, found = unroll_batch_module._measured_both, []
    monkeypatch.setattr(unroll_batch_module, "_measured_both", lambda *args: found.append(measured(*args)) or found[-1])
    meta, tasks = algorithm.init(), fm.tasks.sinusoids().sample_batch(seed=0, tasks=16)
    list(algorithm.windows(meta, tasks))
    assert not found[0].why
    assert found[0].costs["vmap"].of(2) < float("inf")


def test_meta_is_what_init_returned() -> None:
    algorithm = build()
    for meta, got in (({}, r"\[\]"), ({**algorithm.init(), "extra": torch.ones(1)}, "extra"), (3, "int")):
        with pytest.raises(fm.StructureError, match=rf"meta has .*{got}.*, expected \['optimizer'\]\. Pass what init"):
            next(iter(algorithm.windows(meta, TASKS)))


def test_the_logarithm_of_the_horizon_is_drawn_evenly() -> None:
    draw = l2l._length((2, 200))
    lengths = torch.tensor([draw(seed) for seed in range(400)]).double()
    assert 0.4 < (lengths < 20).double().mean() < 0.6


def test_the_problem_is_exact() -> None:
    algorithm = build(estimator=fm.Reverse())
    task = fm.tasks.quadratics(3, dtype=torch.float64).sample(seed=1)
    check = fm.check_meta_grad(algorithm.problem, algorithm.init(), task, steps=4)
    assert not check.vacuous


def test_meta_may_change_between_windows() -> None:
    algorithm = build()
    meta = algorithm.init()
    outer = torch.optim.SGD(meta["optimizer"].values(), lr=0.1)
    before = [weight.detach().clone() for weight in meta["optimizer"].values()]
    count = 0
    for loss in algorithm.windows(meta, TASKS):
        outer.zero_grad()
        loss.backward()
        outer.step()
        count += 1
    assert count == 2
    assert any(not torch.equal(old, new) for old, new in zip(before, meta["optimizer"].values(), strict=True))


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    algorithm = build(learned.lstm(hidden=8).double(), steps=20, window=10)
    meta = algorithm.init()
    outer = torch.optim.Adam(meta["optimizer"].values(), lr=0.01)
    sampler = fm.tasks.quadratics(3, dtype=torch.float64)
    held_out = sampler.sample_batch(seed=10**6, tasks=16)
    before = algorithm.loss(meta, held_out).item()
    for iteration in range(12):
        for loss in algorithm.windows(meta, sampler.sample_batch(seed=iteration, tasks=8), seed=iteration):
            outer.zero_grad()
            loss.backward()
            outer.step()
    assert algorithm.loss(meta, held_out).item() < 0.7 * before


def test_horizons() -> None:
    algorithm = build(steps=(3, 30), window=1)
    lengths = [len(list(algorithm.windows(algorithm.init(), TASKS, seed=seed))) for seed in range(12)]
    assert min(lengths) >= 3
    assert max(lengths) <= 30
    assert len(set(lengths)) > 4
    curriculum = build(steps=lambda seed: 3 * (1 + seed))
    assert [len(list(curriculum.windows(curriculum.init(), TASKS, seed=seed))) for seed in range(3)] == [1, 2, 3]
    assert len(list(build(steps=7).windows(build().init(), TASKS))) == 3


def test_every_task_begins_elsewhere_and_a_seed_begins_again() -> None:
    algorithm = build(learned.linear(gradient=-1e-12).double(), steps=1, window=1)
    batch = fm.tree.map(lambda leaf: leaf[:1].expand_as(leaf), TASKS.support)
    same = fm.Task(batch, batch)
    problem, meta = algorithm.problem, algorithm.init()
    states = l2l.carry_of(problem, meta, same, 3, start).state.params["theta"]
    assert len({tuple(row.tolist()) for row in states}) == 4
    losses = [next(iter(algorithm.windows(meta, same, seed=seed))).item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_a_learned_start_gets_a_gradient_from_the_first_window() -> None:
    algorithm = build(learn_start=True, estimator=fm.Reverse())
    meta = algorithm.init()
    first, second = itertools.islice(algorithm.windows(meta, TASKS), 2)
    (grad,) = torch.autograd.grad(first, meta["params"]["theta"], retain_graph=True)
    assert grad.norm() > 0
    assert torch.autograd.grad(second, meta["params"]["theta"], allow_unused=True) == (None,)


def test_rescaling_is_training_another_function() -> None:
    """Gradient descent of rate η on ℓ(c ⊙ p) moves θ = c ⊙ p by −η c² ∇ℓ."""
    torch.manual_seed(0)
    params, grads = start(0), start(1)
    transform = rescaled(fm.optim.sgd(0.1), 2.0)
    state = transform.init(params)
    scales = state.scales["theta"]
    assert bool(((scales.log().abs() <= 2.0) & (scales != 1)).all())
    updates, _ = transform.update(grads, state, params)
    torch.testing.assert_close(updates["theta"], -0.1 * scales**2 * grads["theta"], rtol=1e-12, atol=0)
    shrinking = fm.as_transform(learned.linear(gradient=0.0, parameter=-0.5).double())
    updates, _ = rescaled(shrinking, 2.0).update(grads, state._replace(inner=shrinking.init(params)), params)
    torch.testing.assert_close(updates["theta"], -0.5 * params["theta"], rtol=1e-12, atol=0)


def test_scaling_is_drawn_by_the_seed() -> None:
    algorithm = build(scaling=2.0)
    meta = algorithm.init()
    losses = [sum(loss.item() for loss in algorithm.windows(meta, TASKS, seed=seed)) for seed in (0, 0, 1)]
    plain = sum(loss.item() for loss in build().windows(build().init(), TASKS, seed=0))
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != plain


def test_imitation_of_its_own_updates_is_perfect_and_leads_towards_the_teacher() -> None:
    teacher = fm.optim.sgd(0.05)
    perfect = build(learned.linear(gradient=-0.05).double(), teacher=teacher)
    assert perfect.imitation(perfect.init(), TASKS).item() == pytest.approx(0.0, abs=1e-10)
    twice = build(learned.linear(gradient=-0.1).double(), teacher=teacher)
    meta = twice.init()
    loss = twice.imitation(meta, TASKS)
    assert loss.item() == pytest.approx(3.0)  # three steps, each with |u - u*|² = |u*|²
    assert gradient(loss, meta)[0] < 0  # a larger (less negative) weight is nearer to the teacher's
    with pytest.raises(fm.ArgumentError, match=r"no teacher to imitate\. Pass"):
        build().imitation(meta, TASKS)


def test_nan_is_reported_with_its_step_and_skipped_only_when_asked() -> None:
    wild = learned.linear(gradient=1e30).double()
    meta = build(wild).init()
    with pytest.raises(fm.NonFiniteError, match="step"):
        list(build(wild, steps=30, strategy="vmap").windows(meta, TASKS))  # "auto" may run the tasks one by one
    skipping = build(wild, steps=30, window=30, nonfinite="skip")
    with (
        pytest.warns(fm.NonFiniteWarning),
        pytest.raises(fm.NonFiniteError, match=r"first window of the training of seed 7 is not finite\. Lower"),
    ):
        skipping.loss(meta, TASKS, seed=7)
    with pytest.warns(fm.NonFiniteWarning, match=r"rest of the training of seed 7 is skipped: .*step"):
        assert len(list(build(wild, steps=30, nonfinite="skip", strategy="vmap").windows(meta, TASKS, seed=7))) < 10


def test_adapt_trains_a_fresh_module() -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return (predict(x) - y).square().mean()

    algorithm = l2l.build(learned.linear(gradient=-0.05), net, loss, steps=50)
    task = fm.tasks.sinusoids(shots=20).sample(seed=0)
    predict = algorithm.adapt(algorithm.init(), task, seed=1)
    x, y = task.support
    assert (predict(x) - y).square().mean() < y.square().mean()
    assert not predict(x).requires_grad


def test_fresh_parameters_are_those_of_the_layers() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = {name: param.clone() for name, param in net.named_parameters()}
    first, again, other = (fresh_start(net)(seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert all(torch.equal(before[name], param) for name, param in net.named_parameters())
    with pytest.raises(fm.ArgumentError, match=r"\['theta'\] belong to no layer .* Pass start="):
        fresh_start(Point())
    with pytest.raises(fm.ArgumentError, match="belong to no layer"):
        fresh_start(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0, expected a positive integer"),
        ({"steps": 0}, "steps is 0, expected a positive integer"),
        ({"steps": (5, 2)}, r"steps is \(5, 2\), expected bounds \(low, high\)"),
        ({"steps": (0, 2)}, "steps is 0"),
        ({"scaling": -1.0}, r"scaling is -1.0, expected a number in \[0, 20\)"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore', expected one of"),
        ({"start": None}, "Pass start="),
        ({"optimizer": nn.Linear(1, 1)}, "optimizer is a Linear, expected a LearnedOptimizer"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        build(**options)


def test_a_curriculum_that_gives_no_steps_is_refused() -> None:
    algorithm = build(steps=lambda seed: 0)
    with pytest.raises(fm.ArgumentError, match=r"steps\(seed\) is 0, expected a positive integer"):
        next(iter(algorithm.windows(algorithm.init(), TASKS)))


@pytest.mark.parametrize("options", [{}, {"start": None, "learn_start": True}, {"steps": (3, 9)}])
def test_windows_can_be_taken_one_by_one(options: dict[str, Any]) -> None:
    algorithm = build(**options)
    meta = algorithm.init()
    expected = [loss.item() for loss in algorithm.windows(meta, TASKS, seed=4)]
    carry, found = algorithm.begin(meta, TASKS, seed=4), []
    while True:
        loss, carry = algorithm.window(meta, TASKS, seed=4, carry=carry)
        found.append(loss.item())
        if carry is None:
            break
    assert found == expected


def test_a_carry_of_another_training_is_refused() -> None:
    algorithm = build()
    meta = algorithm.init()
    carry = algorithm.begin(meta, TASKS)
    assert carry is not None
    with pytest.raises(fm.ArgumentError, match=r"carry is at step 2 of the training of seed 0, .* begin at \[0, 3\]"):
        algorithm.window(meta, TASKS, carry=carry._replace(step=2))
    with pytest.raises(fm.ArgumentError, match=r"carry is at step 6 .* Pass what window or begin returned"):
        algorithm.window(meta, TASKS, carry=carry._replace(step=6))
    with pytest.raises(fm.StructureError, match=r"meta has \['params'\], expected \['optimizer'\]"):
        algorithm.begin({"params": {}}, TASKS)
