"""PersistentES: unbiased over windows, where truncation is not, and particles that go on from call to call."""

from typing import Any

import pytest
import torch
from test_evolution_strategies import NOTHING, RIGHT, SIGMA, WRONG, Linear, deviation, gradient, linear
from test_mixed_mode import by_hand, close, first_task, leaf, mlp, of_module
from torch import Tensor

import funcmeta as fm

STEPS = 6


@pytest.mark.parametrize("length", [1, 2, 4, 6])
@pytest.mark.parametrize("judged", ["shares", "final", "both"])
def test_the_expectation_is_the_gradient_over_all_windows(judged: str, length: int) -> None:
    case = linear(shares=judged != "final", final=judged != "shares")
    exact = gradient(case, fm.Reverse(), steps=STEPS)

    def draw(seed: int) -> Tensor:
        return gradient(case, fm.PersistentES(SIGMA, 20, length), steps=STEPS, seed=seed)

    assert deviation(draw, exact) < RIGHT


def test_what_is_wrong_is_rejected() -> None:
    case = linear()
    exact = gradient(case, fm.Reverse(), steps=STEPS)

    def draw(seed: int) -> Tensor:
        return gradient(case, fm.PersistentES(SIGMA, 20, 2), steps=STEPS, seed=seed)

    for wrong in (2 * exact, exact / 2, SIGMA * exact, exact / SIGMA, gradient(case, fm.Truncated(2), steps=STEPS)):
        assert deviation(draw, wrong) > WRONG


def test_strategies_that_begin_anew_in_each_window_are_biased() -> None:
    case = linear()
    exact, truncated = (gradient(case, each, steps=STEPS) for each in (fm.Reverse(), fm.Truncated(2)))

    def draw(seed: int) -> Tensor:
        estimator = fm.Truncated(2, fm.EvolutionStrategies(SIGMA, 20))
        return gradient(case, estimator, steps=STEPS, seed=seed)

    assert deviation(draw, exact) > WRONG
    assert deviation(draw, truncated) < RIGHT


@pytest.mark.parametrize("chunk", [None, 3, 1])
def test_one_window_is_evolution_strategies(chunk: int | None) -> None:
    case = linear()
    one = gradient(case, fm.PersistentES(SIGMA, 4, 10, chunk), steps=STEPS, seed=2)
    close(one, gradient(case, fm.EvolutionStrategies(SIGMA, 4), steps=STEPS, seed=2), 1e-10)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_same(chunk: int) -> None:
    case = linear()
    some, every = (gradient(case, fm.PersistentES(SIGMA, 4, 2, each), steps=STEPS, seed=2) for each in (chunk, None))
    close(some, every, 1e-10)


def test_the_formula_on_what_was_tried() -> None:
    """Each particle is seen by itself, window by window."""
    tried: list[Tensor] = []

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        tried.append(meta["lr"].detach())
        w = w * meta["lr"]
        return w, fm.StepInfo(w.sum(), w.sum())

    case = by_hand(step)
    problem = case.problem._replace(meta_loss=None)
    meta = {"w": case.meta["w"].detach(), "lr": case.meta["lr"]}
    pairs, sigma = 2, 0.2
    out = fm.unroll(problem, meta, NOTHING, steps=4, estimator=fm.PersistentES(sigma, pairs, 2, chunk=1))
    (got,) = torch.autograd.grad(out.loss, meta["lr"])
    rates = torch.stack(tried[4:]).reshape(2, 2 * pairs, 2)  # window, particle, step; the first four without noise
    close(rates[..., 0], rates[..., 1])
    noise = rates[..., 0] - meta["lr"].detach()
    close(noise[:, :pairs], -noise[:, pairs:])
    assert len({round(float(each), 12) for each in noise.abs().flatten()}) == 2 * pairs
    growth = rates.permute(1, 0, 2).reshape(2 * pairs, 4).cumprod(1) * meta["w"].sum()
    losses = growth.reshape(2 * pairs, 2, 2).sum(2)  # particle, window
    sums = noise[:, :pairs].cumsum(0)
    expected = (sums.T * (losses[:pairs] - losses[pairs:])).sum() / (2 * pairs * sigma**2)
    close(got, expected, 1e-10)


def test_calls_that_carry_on_add_up_to_one() -> None:
    case = linear(final=False)
    estimator = fm.PersistentES(SIGMA, 3, 2)
    whole = fm.unroll(case.problem, case.meta, NOTHING, steps=6, estimator=estimator, seed=5)
    carry, total = None, torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        part = fm.unroll(case.problem, case.meta, NOTHING, steps=2, estimator=estimator, seed=5, carry=carry)
        total = total + torch.autograd.grad(part.loss, case.meta["u"])[0]
        carry = part.carry
    close(total, torch.autograd.grad(whole.loss, case.meta["u"])[0], 1e-10)
    close(part.carry, whole.carry, 1e-10)
    assert part.carry.step == 6


def test_the_carry_holds_the_particles() -> None:
    case = linear()
    first = fm.unroll(case.problem, case.meta, NOTHING, steps=2, estimator=fm.PersistentES(SIGMA, 3, 2))
    states, (sums,) = first.carry.particles  # type: ignore[misc]
    assert states.shape == (6, 3)
    assert sums.shape == (3, 3)
    close(states[:3] - first.carry.state, first.carry.state - states[3:])  # a linear training
    assert fm.unroll(case.problem, case.meta, NOTHING, steps=2).carry.particles is None


def test_a_last_window_may_be_shorter() -> None:
    case = linear()
    exact = gradient(case, fm.Reverse(), steps=5)
    assert deviation(lambda seed: gradient(case, fm.PersistentES(SIGMA, 10, 3), steps=5, seed=seed), exact) < RIGHT


def test_no_steps() -> None:
    case = linear()
    exact = gradient(case, fm.Reverse(), steps=0)
    assert deviation(lambda seed: gradient(case, fm.PersistentES(1.0, 3, 3), steps=0, seed=seed), exact) < RIGHT


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_stacked_tasks_carry_on(strategy: Any) -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    estimator = fm.PersistentES(0.1, 2, 2)

    def run(steps: int, carry: Any) -> tuple[Tensor, Any]:
        out = fm.unroll_batch(*setting, steps=steps, estimator=estimator, seed=3, strategy=strategy, carry=carry)
        return torch.autograd.grad(out.loss, setting.meta["lr"])[0], out.carry

    whole, end = run(4, None)
    first, middle = run(2, None)
    second, last = run(2, middle)
    close(first + second, whole, 1e-9)
    close(last, end, 1e-9)
    sums = middle.particles.sums[-1]
    assert sums.shape == ((2,) if strategy == "vmap" else (2, 2))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_particles_stay_with_the_strategy_that_made_them(strategy: Any) -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    options: Any = {"estimator": fm.PersistentES(0.1, 2, 2), "steps": 2}
    first = fm.unroll_batch(*setting, strategy=strategy, **options)
    out = fm.unroll_batch(*setting, strategy="auto", carry=first.carry, **options)
    assert out.info.strategy == strategy


def test_stacked_tasks_are_the_mean_of_single_ones_in_a_loop() -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    options: Any = {"steps": 4, "estimator": fm.PersistentES(0.1, 2, 2)}
    both = fm.unroll_batch(*setting, seed=3, strategy="loop", **options).loss
    singles = []
    for index in range(2):
        task = fm.Task(*[tuple(each[index] for each in part) for part in setting.tasks[:2]])
        singles.append(fm.unroll(setting.problem, setting.meta, task, seed=fm.rng.fold(3, index), **options).loss)
    leaves = fm.tree.leaves(setting.meta)
    expected = torch.autograd.grad(torch.stack(singles).mean(), leaves)
    close(torch.autograd.grad(both, leaves), expected, 1e-10)


def test_results_are_those_without_perturbation() -> None:
    case = linear()
    ours, theirs = (
        fm.unroll(case.problem, case.meta, NOTHING, steps=5, estimator=each)
        for each in (fm.PersistentES(0.1, 2, 2), fm.Reverse())
    )
    close(ours.loss.detach(), theirs.loss.detach())
    close(ours.info.losses, theirs.info.losses)
    close(ours.carry.state, theirs.carry.state)


def test_without_grad_mode() -> None:
    case = linear()
    with torch.no_grad():
        out = fm.unroll(case.problem, case.meta, NOTHING, steps=2, estimator=fm.PersistentES(0.1, 2, 2))
    assert not out.loss.requires_grad
    assert out.carry.particles is None


# ---- shared among processes


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_over_shares_is_the_whole_population(ranks: int, chunk: int | None) -> None:
    case = linear()
    whole, *shares = (
        gradient(case, fm.PersistentES(SIGMA, 8, 2, chunk, share), steps=STEPS, seed=4) for share in everyone(ranks)
    )
    close(torch.stack(shares).mean(0), whole, 1e-12)
    assert not torch.allclose(shares[0], shares[1], rtol=1e-3)


def everyone(ranks: int) -> list[tuple[int, int]]:
    """All in one process, then the share of each of several."""
    return [(0, 1), *[(rank, ranks) for rank in range(ranks)]]


@pytest.mark.parametrize("strategy", ["single", "vmap", "loop"])
def test_shares_carry_on(strategy: Any) -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    leaves = fm.tree.leaves(setting.meta)

    def run(share: tuple[int, int]) -> list[Tensor]:
        carry, found = None, [torch.zeros_like(leaf) for leaf in leaves]
        estimator = fm.PersistentES(0.1, 4, 2, share=share)
        for _ in range(3):
            if strategy == "single":
                task = first_task(setting.tasks)
                out = fm.unroll(setting.problem, setting.meta, task, steps=4, estimator=estimator, seed=3, carry=carry)
            else:
                out = fm.unroll_batch(*setting, steps=4, estimator=estimator, seed=3, strategy=strategy, carry=carry)
            carry, grads = out.carry, torch.autograd.grad(out.loss, leaves)
            found = [before + each for before, each in zip(found, grads, strict=True)]
        return found

    whole, first, second = (run(share) for share in everyone(2))
    close([(a + b) / 2 for a, b in zip(first, second, strict=True)], whole, 1e-12)


def test_the_particles_of_another_share() -> None:
    case, carry = begun()
    with pytest.raises(fm.ArgumentError, match=r"expected \[\(1, 3\)\]\. Go on with the same pairs and share"):
        gradient(case, fm.PersistentES(0.1, 2, 2, share=(0, 2)), steps=2, carry=carry)


# ---- refused


def begun(**changes: Any) -> tuple[Linear, fm.Carry]:
    case = linear()
    out = fm.unroll(case.problem, case.meta, NOTHING, steps=2, estimator=fm.PersistentES(0.1, 2, 2))
    return case, out.carry._replace(**changes)


def test_a_carry_without_particles() -> None:
    case, carry = begun(particles=None)
    with pytest.raises(
        fm.ArgumentError,
        match=r"carry is at step 2 and holds no particles, which PersistentES goes on with\. Pass the out\.carry of an",
    ):
        gradient(case, fm.PersistentES(0.1, 2, 2), steps=2, carry=carry)
    gradient(case, fm.PersistentES(0.1, 2, 2), steps=2, carry=carry._replace(step=0))


@pytest.mark.parametrize(
    "estimator", [fm.Reverse(), fm.EvolutionStrategies(0.1, 2), fm.Truncated(1), fm.ForwardMode()], ids=repr
)
def test_particles_for_another_estimator(estimator: Any) -> None:
    case, carry = begun()
    with pytest.raises(
        fm.ArgumentError,
        match=r"carry holds particles, which .* does not go on with.*or Carry\(carry\.state, carry\.step\) to leave",
    ):
        gradient(case, estimator, steps=2, carry=carry)


def test_particles_without_grad_mode() -> None:
    case, carry = begun()
    with torch.no_grad(), pytest.raises(fm.ArgumentError, match="nor any estimator without grad mode"):
        fm.unroll(case.problem, case.meta, NOTHING, steps=2, estimator=fm.PersistentES(0.1, 2, 2), carry=carry)


@pytest.mark.parametrize("what", ["pairs", "leaves"])
def test_particles_of_another_kind(what: str) -> None:
    case, carry = begun()
    if what == "leaves":
        case.meta["c"] = leaf(1.0)
    with pytest.raises(
        fm.ArgumentError,
        match=r"have perturbations of shapes \[\(2, 3\)\], expected .*Go on with the same pairs and share, the same",
    ):
        gradient(case, fm.PersistentES(0.1, 3 if what == "pairs" else 2, 2), steps=2, carry=carry)


def test_particles_of_another_strategy() -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    options: Any = {"steps": 2, "estimator": fm.PersistentES(0.1, 2, 2)}
    for one, other in (("vmap", "loop"), ("loop", "vmap")):
        carry = fm.unroll_batch(*setting, strategy=one, **options).carry
        with pytest.raises(fm.ArgumentError, match=r"one strategy for stacked tasks \('vmap' or 'loop'\)"):
            fm.unroll_batch(*setting, strategy=other, carry=carry, **options)


@pytest.mark.parametrize("length", [0, 2.0, None])
def test_bad_lengths(length: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"length is .*, expected a positive integer\. Pass e\.g\. length=20"):
        fm.PersistentES(0.1, 2, length)


def test_a_particle_without_a_finite_loss() -> None:
    def step(meta: Any, s: Tensor, batch: Any, seed: int) -> Any:
        return s + 0.3, fm.StepInfo(s + torch.where(s > 0.95, torch.inf, 0.0), s)

    case = Linear(fm.Problem(lambda meta, task, seed: meta * 1, step, None), leaf(0.0))
    with pytest.raises(
        fm.NonFiniteError, match=r"inner loss of step [23] is NaN or .* of 20 particles of PersistentES"
    ):
        gradient(case, fm.PersistentES(0.15, 10, 1), steps=4)


def test_estimators_compare_and_print() -> None:
    assert fm.PersistentES(0.1, 2, 3) == fm.PersistentES(0.1, 2, 3) != fm.PersistentES(0.1, 2, 4)
    assert repr(fm.PersistentES(0.1, 2, 3)) == "PersistentES(sigma=0.1, pairs=2, length=3, chunk=None, share=(0, 1))"
