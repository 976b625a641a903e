"""EvolutionStrategies: the formula on what was tried, and the expectation against closed forms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_mixed_mode import by_hand, close, first_task, leaf, mlp, of_module
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim, rng

SIGMA = 0.3
RIGHT, WRONG = 4.0, 8.0
"""Standard errors: no expectation that is right is so many away, none that is wrong is so near."""
NOTHING = fm.Task(torch.ones(1), None)


class Linear(NamedTuple):
    """s' = A s + B θ from s = θ, with shares ½|s − t|² of the meta-loss: quadratic in θ."""

    problem: fm.Problem
    meta: Any


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(*, shares: bool = True, final: bool = True) -> Linear:
    with rng.forked(11):
        a, b, t = 0.4 * numbers(3, 3), numbers(3, 3), numbers(3)

    def loss(s: Tensor) -> Tensor:
        return 0.5 * (s - t).square().sum()

    def step(meta: Any, s: Tensor, batch: Any, seed: int) -> Any:
        s = a @ s + b @ meta["u"] * meta["c"]
        return s, fm.StepInfo(loss(s), loss(s) if shares else None)

    judge = (lambda meta, s, query, seed: loss(s)) if final else None
    problem = fm.Problem(lambda meta, task, seed: meta["u"] * 1, step, judge)
    return Linear(problem, {"u": leaf(0.5, -1.0, 0.7), "c": torch.tensor(1.3, dtype=torch.float64)})


def gradient(case: Linear, estimator: Any, *, steps: int, seed: int = 0, **more: Any) -> Tensor:
    """The meta-gradient as one vector."""
    leaves = [each for each in fm.tree.leaves(case.meta) if each.requires_grad]
    loss = fm.unroll(case.problem, case.meta, NOTHING, steps=steps, estimator=estimator, seed=seed, **more).loss
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, leaves)])


def deviation(draw: Callable[[int], Tensor], expected: Tensor, *, repeats: int = 150) -> float:
    """By how many standard errors the mean over seeds is away from what it should be, in the worst coordinate."""
    drawn = torch.stack([draw(seed) for seed in range(repeats)])
    return float(((drawn.mean(0) - expected) / (drawn.std(0) / repeats**0.5)).abs().max())


def test_the_expectation_is_the_gradient_of_a_quadratic_loss() -> None:
    case = linear()
    exact = gradient(case, fm.Reverse(), steps=4)

    def draw(seed: int) -> Tensor:
        return gradient(case, fm.EvolutionStrategies(SIGMA, 20), steps=4, seed=seed)

    assert deviation(draw, exact) < RIGHT
    for wrong in (2 * exact, exact / 2, SIGMA * exact, exact / SIGMA, -exact):
        assert deviation(draw, wrong, repeats=50) > WRONG


def test_the_expectation_is_the_gradient_of_the_smoothed_loss() -> None:
    """E (x + ε)⁴ = x⁴ + 6 x² σ² + 3 σ⁴, whose slope is 4 x³ + 12 x σ²."""
    problem = fm.Problem(
        lambda meta, task, seed: meta, lambda meta, s, batch, seed: (s, fm.StepInfo(s)), lambda meta, s, *_: s**4
    )
    x, sigma = leaf(0.8), 0.5

    def draw(seed: int) -> Tensor:
        return gradient(Linear(problem, x), fm.EvolutionStrategies(sigma, 20), steps=1, seed=seed)

    at = float(x.detach())
    assert deviation(draw, torch.tensor(4 * at**3 + 12 * at * sigma**2).double()) < RIGHT
    assert deviation(draw, torch.tensor(4 * at**3).double()) > WRONG


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_formula_on_what_was_tried(pairs: int) -> None:
    """Each particle is seen by itself: opposite perturbations, of the deviation σ, with the same draws."""
    tried: list[Any] = []
    seeds: list[list[int]] = []
    case = by_hand(lambda meta, w, batch, seed: (seeds[-1].append(seed), (w * meta["lr"], fm.StepInfo(w.sum())))[1])

    def init(meta: Any, task: Any, seed: int) -> Tensor:
        tried.append(meta)
        seeds.append([seed])
        return meta["w"] * 1

    problem = case.problem._replace(init=init)
    task = first_task(case.tasks)
    out = fm.unroll(problem, case.meta, task, steps=2, estimator=fm.EvolutionStrategies(SIGMA, pairs, 1), seed=3)
    leaves = list(case.meta.values())
    got = torch.autograd.grad(out.loss, leaves)
    copies = [fm.tree.detach(each) for each in tried[-2 * pairs :]]
    assert len({tuple(each) for each in seeds if len(each) > 1}) == 1
    expected = [torch.zeros_like(each) for each in leaves]
    for plus, minus in zip(copies[:pairs], copies[pairs:], strict=True):
        high, low = (fm.unroll(problem, each, task, steps=2, seed=3).loss for each in (plus, minus))
        for place, name in enumerate(case.meta):
            noise = plus[name] - case.meta[name].detach()
            close(minus[name], case.meta[name].detach() - noise)
            expected[place] = expected[place] + noise * (high - low) / (2 * pairs * SIGMA**2)
    close(list(got), expected, 1e-10)


def test_perturbations_follow_the_seed() -> None:
    case = linear()
    estimator = fm.EvolutionStrategies(SIGMA, 2000)
    first, same, other = (gradient(case, estimator, steps=2, seed=seed) for seed in (1, 1, 2))
    close(first, same, 0.0)
    assert not torch.allclose(first, other, rtol=1e-6)


def noisy() -> tuple[fm.Problem, Any]:
    """A net with dropout and a step that draws."""
    with rng.forked(2):
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)).double()
    setting = of_module(net)
    plain = setting.problem

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        state, info = plain.step(meta, state, batch, seed)
        shaken = {name: each + 0.1 * torch.randn_like(each) for name, each in state.params.items()}
        return state._replace(params=shaken), info

    return plain._replace(step=step), setting


@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("strategy", ["single", "vmap", "loop"])
def test_chunks_draw_the_same_and_give_the_same(strategy: str, chunk: int) -> None:
    problem, setting = noisy()
    tasks = setting.tasks

    def run(chunk: int | None) -> list[Tensor]:
        options = {"steps": 3, "estimator": fm.EvolutionStrategies(0.1, 4, chunk)}
        if strategy == "single":
            loss = fm.unroll(problem, setting.meta, first_task(tasks), **options).loss  # type: ignore[arg-type]
        else:
            loss = fm.unroll_batch(problem, setting.meta, tasks, strategy=strategy, **options).loss  # type: ignore[arg-type]
        return list(torch.autograd.grad(loss, fm.tree.leaves(setting.meta)))

    close(run(chunk), run(1), 1e-9)
    close(run(None), run(1), 1e-9)


def test_stacked_tasks_share_their_perturbations_under_vmap() -> None:
    setting = of_module(mlp())
    twice = fm.Task(*fm.tree.map(lambda each: torch.stack([each[0], each[0]]), setting.tasks[:2]))
    estimator = fm.EvolutionStrategies(0.1, 4)
    one = fm.unroll(setting.problem, setting.meta, first_task(twice), steps=3, estimator=estimator).loss
    both = fm.unroll_batch(setting.problem, setting.meta, twice, steps=3, estimator=estimator, strategy="vmap").loss
    leaves = fm.tree.leaves(setting.meta)
    close(torch.autograd.grad(both, leaves), torch.autograd.grad(one, leaves), 1e-9)


@pytest.mark.parametrize("trajectory", [False, True])
def test_results_are_those_without_perturbation(trajectory: bool) -> None:
    setting = of_module(mlp(), trajectory_loss=trajectory)
    task = first_task(setting.tasks)
    ours, theirs = (
        fm.unroll(setting.problem, setting.meta, task, steps=3, estimator=each, seed=4)
        for each in (fm.EvolutionStrategies(0.1, 2), fm.Reverse())
    )
    close(ours.loss.detach(), theirs.loss.detach())
    close(ours.info.losses, theirs.info.losses)
    close(ours.state, fm.tree.detach(theirs.state))
    close(ours.carry, theirs.carry)


def test_a_loss_that_has_no_derivative() -> None:
    """A step function of the sum: smoothed by N(0, σ²) it has the density as its slope."""
    problem = fm.Problem(
        lambda meta, task, seed: meta,
        lambda meta, s, batch, seed: (s, fm.StepInfo(s)),
        lambda meta, s, *_: (s > 1.0).double(),
    )
    x, sigma = leaf(0.8), 0.5

    def draw(seed: int) -> Tensor:
        return gradient(Linear(problem, x), fm.EvolutionStrategies(sigma, 20), steps=1, seed=seed)

    density = torch.distributions.Normal(0.8, sigma).log_prob(torch.tensor(1.0)).exp().double()
    assert deviation(draw, density) < RIGHT


def test_leaves_of_two_dtypes_and_constants_in_meta() -> None:
    case = linear()
    case.meta.update(u=torch.tensor([0.5, -1.0, 0.7], requires_grad=True), c=leaf(1.3), n=torch.tensor(2))
    plain = case.problem
    problem = fm.Problem(
        lambda meta, task, seed: meta["u"].double(),
        lambda meta, s, batch, seed: plain.step({"u": meta["u"].double(), "c": meta["c"]}, s / meta["n"], batch, seed),
        plain.meta_loss,
    )
    out = fm.unroll(problem, case.meta, NOTHING, steps=2, estimator=fm.EvolutionStrategies(1e-3, 4000))
    exact = fm.unroll(problem, case.meta, NOTHING, steps=2)
    leaves = [case.meta["u"], case.meta["c"]]
    got, expected = (torch.autograd.grad(each.loss, leaves) for each in (out, exact))
    assert [each.dtype for each in got] == [torch.float32, torch.float64]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.2, atol=0.2)


def test_leaves_of_one_shape_are_perturbed_independently() -> None:
    problem = fm.Problem(
        lambda meta, task, seed: meta["x"] - 3 * meta["y"],
        lambda meta, s, batch, seed: (s, fm.StepInfo(s)),
        lambda meta, s, *_: s,
    )
    case = Linear(problem, {"x": leaf(0.1), "y": leaf(0.2)})

    def draw(seed: int) -> Tensor:
        return gradient(case, fm.EvolutionStrategies(SIGMA, 5), steps=1, seed=seed)

    assert deviation(draw, torch.tensor([1.0, -3.0]).double()) < RIGHT
    assert deviation(draw, torch.tensor([-2.0, -2.0]).double()) > WRONG


def test_no_steps() -> None:
    case = linear()
    exact = gradient(case, fm.Reverse(), steps=0)
    assert deviation(lambda seed: gradient(case, fm.EvolutionStrategies(1.0, 3), steps=0, seed=seed), exact) < RIGHT


@pytest.mark.parametrize("why", ["no_grad", "no leaf"])
def test_without_anything_to_perturb(why: str) -> None:
    case = linear()
    meta = fm.tree.detach(case.meta) if why == "no leaf" else case.meta
    with torch.set_grad_enabled(why == "no leaf"):
        out = fm.unroll(case.problem, meta, NOTHING, steps=2, estimator=fm.EvolutionStrategies(0.1, 2))
    assert not out.loss.requires_grad


def test_a_carry_goes_on() -> None:
    case = linear()
    first = fm.unroll(case.problem, case.meta, NOTHING, steps=2)
    exact = gradient(case, fm.Reverse(), steps=2, carry=first.carry)

    def draw(seed: int) -> Tensor:
        return gradient(case, fm.EvolutionStrategies(SIGMA, 5), steps=2, seed=seed, carry=first.carry)

    assert deviation(draw, exact) < RIGHT


@pytest.mark.parametrize("estimator", [fm.EvolutionStrategies(0.1, 3), fm.PersistentES(0.1, 3, 2)], ids=repr)
def test_compiled(estimator: Any) -> None:
    setting = of_module(mlp(), trajectory_loss=True)
    task = first_task(setting.tasks)
    got, expected = (
        torch.autograd.grad(
            fm.unroll(problem, setting.meta, task, steps=4, estimator=estimator).loss, fm.tree.leaves(setting.meta)
        )
        for problem in (fm.compile(setting.problem, backend="aten"), setting.problem)
    )
    close(got, expected, 1e-9)


def test_compared() -> None:
    case = linear()
    estimators = {
        "exact": fm.Reverse(),
        "truncated": fm.Truncated(2),
        "ES": fm.EvolutionStrategies(0.01, 300),
        "PES": fm.PersistentES(0.01, 300, 2),
    }
    rows = {row.name: row for row in fm.compare(case.problem, case.meta, NOTHING, steps=4, estimators=estimators).rows}
    assert rows["ES"].cosine > 0.98
    assert rows["PES"].cosine > 0.95
    assert rows["truncated"].relative_error > 0


# ---- shared among processes


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_over_shares_is_the_whole_population(ranks: int, chunk: int | None) -> None:
    case = linear()
    everyone = [(0, 1), *[(rank, ranks) for rank in range(ranks)]]
    whole, *shares = (
        gradient(case, fm.EvolutionStrategies(SIGMA, 8, chunk, share), steps=4, seed=5) for share in everyone
    )
    close(torch.stack(shares).mean(0), whole, 1e-12)
    assert not torch.allclose(shares[0], shares[1], rtol=1e-3)


@pytest.mark.parametrize("strategy", ["single", "vmap", "loop"])
def test_shares_of_noisy_trainings(strategy: str) -> None:
    problem, setting = noisy()
    leaves = fm.tree.leaves(setting.meta)

    def run(share: tuple[int, int]) -> list[Tensor]:
        options: Any = {"steps": 3, "estimator": fm.EvolutionStrategies(0.1, 4, share=share), "seed": 6}
        if strategy == "single":
            loss = fm.unroll(problem, setting.meta, first_task(setting.tasks), **options).loss
        else:
            loss = fm.unroll_batch(problem, setting.meta, setting.tasks, strategy=strategy, **options).loss
        return list(torch.autograd.grad(loss, leaves))

    whole, first, second = (run(share) for share in [(0, 1), (0, 2), (1, 2)])
    close([(a + b) / 2 for a, b in zip(first, second, strict=True)], whole, 1e-12)


# ---- refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sigma": 0.0}, r"sigma is 0\.0, expected a positive number\. Pass e\.g\. sigma=0\.1"),
        ({"sigma": -1}, r"sigma is -1, expected a positive number"),
        ({"pairs": 0}, r"pairs is 0, expected a positive integer\. Pass e\.g\. pairs=50"),
        ({"chunk": 0}, r"chunk is 0, expected a positive integer or None\. Pass e\.g\. chunk=100"),
    ],
)
def test_bad_numbers(arguments: Any, says: str) -> None:
    for build in (fm.EvolutionStrategies, lambda **options: fm.PersistentES(length=1, **options)):
        with pytest.raises(fm.ArgumentError, match=says):
            build(**{"sigma": 0.1, "pairs": 2, **arguments})


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0), (0.0, 2), [0, 1], (0,), 1])
def test_bad_shares(share: Any) -> None:
    with pytest.raises(
        fm.ArgumentError, match=r"share is .*, expected \(rank, ranks\) with 0 <= rank < ranks\. Pass e\.g\. share=\("
    ):
        fm.EvolutionStrategies(0.1, 4, share=share)


def test_pairs_that_the_processes_can_not_share() -> None:
    with pytest.raises(fm.ArgumentError, match=r"pairs is 4, which 3 processes cannot share evenly\. Pass a multiple"):
        fm.EvolutionStrategies(0.1, 4, share=(0, 3))


@pytest.mark.parametrize("where", ["step", "meta-loss"])
def test_a_particle_without_a_finite_loss(where: str) -> None:
    def blown(s: Tensor) -> Tensor:
        return s.sum() + torch.where(s[0] > 0.5, torch.inf, 0.0)

    def step(meta: Any, s: Tensor, batch: Any, seed: int) -> Any:
        return s + 0.3, fm.StepInfo(blown(s) if where == "step" else s.sum())

    problem = fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, s, *_: blown(s - 0.3))
    case = Linear(problem, leaf(0.0, 0.0))
    what = "inner loss of step 1" if where == "step" else "meta-loss"
    with pytest.raises(
        fm.NonFiniteError,
        match=rf"The {what} is NaN or infinite for \d+ of 20 particles of EvolutionStrategies.*Lower sigma",
    ):
        gradient(case, fm.EvolutionStrategies(0.15, 10), steps=2)


def test_a_task_of_a_particle_without_a_finite_loss() -> None:
    def step(meta: Any, s: Tensor, x: Tensor, seed: int) -> Any:
        return s, fm.StepInfo(s + torch.where(s * x > 0.5, torch.nan, 0.0))

    problem = fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, s, *_: s)
    tasks = fm.Task(torch.tensor([0.0, 1.0]), torch.zeros(2))
    with pytest.raises(fm.NonFiniteError, match=r"inner loss of step 0 is NaN or infinite for \d+ of 20 particles"):
        fm.unroll_batch(problem, leaf(0.0), tasks, steps=1, strategy="vmap", estimator=fm.EvolutionStrategies(1.0, 10))


def test_a_step_that_vmap_can_not_run() -> None:
    def step(meta: Any, s: Tensor, batch: Any, seed: int) -> Any:
        return (s + 1 if s[0].item() > 0 else s - 1), fm.StepInfo(s.sum())

    case = Linear(fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, s, *_: s.sum()), leaf(0.3, 0.1))
    with pytest.raises(
        fm.ArgumentError,
        match=r"20 particles of EvolutionStrategies cannot run at once under vmap; torch said: .*Pass chunk=1, which",
    ):
        gradient(case, fm.EvolutionStrategies(0.1, 10), steps=2)
    assert gradient(case, fm.EvolutionStrategies(0.1, 10, 1), steps=2).isfinite().all()


def test_errors_of_a_particle_are_passed_on() -> None:
    def step(meta: Any, s: Tensor, batch: Any, seed: int) -> Any:
        return (torch.cat([s, s]) if torch._C._functorch.is_batchedtensor(s) else s), fm.StepInfo(s.sum())

    case = Linear(fm.Problem(lambda meta, task, seed: meta * 1, step, lambda meta, s, *_: s.sum()), leaf(0.3, 0.1))
    with pytest.raises(fm.StructureError, match="Step 0 changed it"):
        gradient(case, fm.EvolutionStrategies(0.1, 2), steps=1)


@pytest.mark.parametrize("where", ["loss", "step", "meta-loss"])
def test_a_captured_tensor(where: str) -> None:
    outside = leaf(0.5)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        scale = outside if where == "loss" else 1.0
        value, slope = fm.value_and_grad(lambda w: (w * scale).pow(2).sum())(w)
        return w - meta["lr"] * slope * (outside if where == "step" else 1.0), fm.StepInfo(value)

    case = by_hand(step, judge=lambda meta, w, query, seed: w.sum() * (outside if where == "meta-loss" else 1.0))
    with pytest.raises(fm.CapturedTensorError, match="`outside`"):
        fm.unroll(case.problem, case.meta, first_task(case.tasks), steps=2, estimator=fm.EvolutionStrategies(0.1, 2))


@pytest.mark.parametrize("estimator", [fm.EvolutionStrategies(0.1, 2), fm.PersistentES(0.1, 2, 1)], ids=repr)
def test_a_carry_that_requires_grad(estimator: Any) -> None:
    case = linear()
    first = fm.unroll(case.problem, case.meta, NOTHING, steps=2)
    with pytest.raises(fm.ArgumentError, match=r"requires grad by itself.*by meta only\. Pass an earlier unroll's out"):
        gradient(case, estimator, steps=2, carry=fm.Carry(first.state, 0))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_inside_torch_func(transform: str) -> None:
    case = linear()
    inputs = fm.tree.map(lambda each: each.detach()[None] if transform == "vmap" else each.detach(), case.meta)
    with pytest.raises(fm.ArgumentError, match=r"EvolutionStrategies runs its particles by .* Use Reverse\(\) there"):
        getattr(torch.func, transform)(
            lambda meta: fm.unroll(case.problem, meta, NOTHING, steps=1, estimator=fm.EvolutionStrategies(0.1, 2)).loss
        )(inputs)


def test_a_second_derivative() -> None:
    case = linear()
    out = fm.unroll(case.problem, case.meta, NOTHING, steps=1, estimator=fm.EvolutionStrategies(0.1, 2))
    with pytest.raises(fm.GraphError, match=r"create_graph=True, but this estimator's cannot be differentiated again"):
        torch.autograd.grad(out.loss, case.meta["u"], create_graph=True)


def test_a_problem_without_a_meta_loss() -> None:
    case = linear(shares=False, final=False)
    with pytest.raises(fm.ArgumentError, match="There is no meta-loss"):
        gradient(case, fm.EvolutionStrategies(0.1, 2), steps=2)


def test_under_torch_optim() -> None:
    """A learning rate that is too low rises."""
    net = mlp()
    setting = of_module(net)
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        optimizer=lambda meta: optim.sgd(meta["log"].exp()),
    )
    meta = {"log": leaf(-4.0)}
    outer = torch.optim.Adam(meta.values(), 0.2)
    losses = []
    for seed in range(8):
        outer.zero_grad()
        out = fm.unroll(
            problem,
            meta,
            first_task(setting.tasks),
            steps=5,
            estimator=fm.EvolutionStrategies(0.1, 4),
            seed=seed,
        )
        out.loss.backward()
        outer.step()
        losses.append(float(out.loss.detach()))
    assert losses == sorted(losses, reverse=True)


def test_estimators_compare_and_print() -> None:
    assert fm.EvolutionStrategies(0.1, 2) == fm.EvolutionStrategies(0.1, 2) != fm.EvolutionStrategies(0.2, 2)
    assert repr(fm.EvolutionStrategies(0.1, 2)) == "EvolutionStrategies(sigma=0.1, pairs=2, chunk=None, share=(0, 1))"
