"""Truncated: the graph is cut every so many steps, windows aligned to the end."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_mixed_mode import by_hand, close, data, descending, first_task, leaf, mlp, of_module, wavy
from test_mixed_mode import gradient as gradient_of
from torch import Tensor

import funcmeta as fm
from funcmeta import optim

STEPS = 7
MEMORIES = (fm.StoreAll(), fm.Segments(2), fm.Segments(1), fm.Revolve(2), fm.Offload(fm.Segments(2)), fm.budget(10**8))
INNER = (fm.Reverse(), fm.FirstOrder())


gradient = partial(gradient_of, steps=STEPS)


def case(trajectory: Any = True) -> Any:
    """A net with momentum whose initial parameters and learning rate are learned."""
    judge = (
        None if trajectory is True else (lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean())
    )
    return of_module(mlp(), trajectory_loss=trajectory, meta_loss_fn=judge)


def by_loop(setting: Any, length: int, *, first_order: bool) -> dict[str, Tensor]:
    """The truncated meta-gradient by a loop that detaches, and a hand-written SGD with momentum."""
    meta, task = setting.meta, first_task(setting.tasks)
    net, names = mlp(), list(setting.meta["params"])

    def loss_at(params: dict[str, Tensor], batch: Any) -> Tensor:
        return (torch.func.functional_call(net, params, (batch[0],)) - batch[1]).square().mean()

    params, velocity = meta["params"], {name: torch.zeros_like(each) for name, each in meta["params"].items()}
    total = torch.zeros((), dtype=torch.float64)
    for index in range(STEPS):
        if index and (STEPS - index) % length == 0:
            params = {name: each.detach().requires_grad_() for name, each in params.items()}
            velocity = {name: each.detach() for name, each in velocity.items()}
        loss = loss_at(params, task.support)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        grads = [each.detach() for each in grads] if first_order else grads
        velocity = {name: 0.7 * velocity[name] + each for name, each in zip(names, grads, strict=True)}
        params = {name: params[name] - meta["lr"] * velocity[name] for name in names}
        total = total + weight(index) * loss
    leaves = dict(fm.tree.named_leaves(meta, "meta"))
    found = torch.autograd.grad(total + loss_at(params, task.query), list(leaves.values()), allow_unused=True)
    return {name: each for name, each in zip(leaves, found, strict=True) if each is not None}


def weight(step: Any) -> Any:
    return 0.5 + step


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
@pytest.mark.parametrize("estimator", INNER, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 9])
def test_it_is_the_loop_that_detaches(length: int, estimator: Any, memory: Any) -> None:
    setting = case(weight)
    got = gradient(setting, fm.Truncated(length, estimator), memory=memory)
    close(got, by_loop(setting, length, first_order=estimator == fm.FirstOrder()))


@pytest.mark.parametrize("estimator", [fm.MixedMode(), fm.ForwardMode()], ids=repr)
@pytest.mark.parametrize("strategy", ["single", "vmap", "loop"])
def test_windows_are_differentiated_by_any_estimator(strategy: str, estimator: Any) -> None:
    setting = case()
    setting.meta["params"] = fm.tree.detach(setting.meta["params"])
    expected = gradient(setting, fm.Truncated(3), strategy)
    close(gradient(setting, fm.Truncated(3, estimator), strategy), expected)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_over_tasks_it_is_the_mean(strategy: str) -> None:
    setting = case()
    singles = []
    for index in range(2):
        task = fm.Task(*[tuple(each[index] for each in part) for part in setting.tasks[:2]])
        loss = fm.unroll(setting.problem, setting.meta, task, steps=STEPS, estimator=fm.Truncated(2)).loss
        singles.append(torch.autograd.grad(loss, fm.tree.leaves(setting.meta)))
    mean = [(a + b) / 2 for a, b in zip(*singles, strict=True)]
    close(list(gradient(setting, fm.Truncated(2), strategy).values()), mean)


def test_with_a_final_loss_alone_the_last_steps_count() -> None:
    """w' = w + a and L = w: each step that counts gives the slope 1."""
    problem = fm.Problem(
        lambda meta, task, seed: torch.zeros(()),
        lambda meta, w, batch, seed: (w + meta, fm.StepInfo(w)),
        lambda meta, w, query, seed: w,
    )
    a = torch.tensor(1.0, requires_grad=True)
    task = fm.Task(torch.ones(1), None)
    for length, expected in ((1, 1.0), (2, 2.0), (5, 5.0), (6, 5.0)):
        out = fm.unroll(problem, a, task, steps=5, estimator=fm.Truncated(length))
        assert float(torch.autograd.grad(out.loss, a)[0]) == expected
        assert float(out.loss.detach()) == 5.0


def test_initial_parameters_are_reached_in_the_first_window_only() -> None:
    """w' = w + a with shares w: in windows of 2, 1 and 2 steps the share of w_0 counts for w_0 alone."""
    problem = fm.Problem(
        lambda meta, task, seed: meta["w"] * 1,
        lambda meta, w, batch, seed: (w + meta["a"], fm.StepInfo(w, w)),
        None,
    )
    meta = {"w": torch.tensor(0.0, requires_grad=True), "a": torch.tensor(1.0, requires_grad=True)}
    out = fm.unroll(problem, meta, fm.Task(torch.ones(1), None), steps=5, estimator=fm.Truncated(2))
    slopes = torch.autograd.grad(out.loss, list(meta.values()))
    assert [float(each) for each in slopes] == [1.0, 0.0 + 1.0 + 1.0]


def test_a_carry_with_its_graph_is_reached_in_the_first_window() -> None:
    setting = case()
    task = first_task(setting.tasks)

    def run(estimator: Any) -> Sequence[Tensor]:
        first = fm.unroll(setting.problem, setting.meta, task, steps=2)
        rest = fm.unroll(
            setting.problem, setting.meta, task, steps=3, estimator=estimator, carry=fm.Carry(first.state, 2)
        )
        return torch.autograd.grad(first.loss + rest.loss, fm.tree.leaves(setting.meta))

    close(run(fm.Truncated(3)), run(fm.Reverse()))
    assert not torch.allclose(run(fm.Truncated(2))[0], run(fm.Reverse())[0])


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
def test_results_are_those_of_reverse(memory: Any) -> None:
    setting = case(weight)
    ours, theirs = (
        fm.unroll(
            setting.problem, setting.meta, first_task(setting.tasks), steps=5, estimator=each, memory=memory, seed=4
        )
        for each in (fm.Truncated(2), fm.Reverse())
    )
    close(ours.loss.detach(), theirs.loss.detach())
    close(ours.info.losses, theirs.info.losses)
    close(ours.carry, theirs.carry)
    assert len(ours.info.aux) == 5
    assert ours.info.memory.steps == 5


def test_no_steps_and_no_grad() -> None:
    setting = of_module(mlp())
    task = first_task(setting.tasks)
    out = fm.unroll(setting.problem, setting.meta, task, steps=0, estimator=fm.Truncated(2))
    close(out.loss.detach(), fm.unroll(setting.problem, setting.meta, task, steps=0).loss.detach())
    with torch.no_grad():
        out = fm.unroll(setting.problem, setting.meta, task, steps=3, estimator=fm.Truncated(2))
    assert not out.loss.requires_grad


def test_a_second_derivative() -> None:
    setting = descending(lambda meta, w, batch: wavy(w * meta["a"], batch), {"a": leaf(0.7)})
    again = []
    for estimator in (fm.Truncated(9), fm.Reverse()):
        out = fm.unroll(setting.problem, setting.meta, first_task(setting.tasks), steps=3, estimator=estimator)
        (slope,) = torch.autograd.grad(out.loss, setting.meta["a"], create_graph=True)
        again.append(torch.autograd.grad(slope, list(setting.meta.values())))
    close(*again)


def test_compiled() -> None:
    setting = case(weight)
    compiled = setting._replace(problem=fm.compile(setting.problem, backend="aten"))
    close(gradient(compiled, fm.Truncated(3)), gradient(setting, fm.Truncated(3)))


def test_a_long_training_in_the_memory_of_a_window() -> None:
    from funcmeta._live_bytes import LiveBytes

    net = mlp()
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: wavy(predict(batch[0]).mean(1)[:3], batch),
        optimizer=(lambda meta: optim.sgd(meta["lr"])),
    )
    task = first_task(data())

    def peak(steps: int, estimator: Any) -> int:
        with LiveBytes() as live:
            fm.unroll(problem, {"lr": leaf(0.1)}, task, steps=steps, estimator=estimator)
        return live.peak

    losses = 2 * 8 * (60 - 6)  # one a step, and the tensor of all
    assert peak(60, fm.Truncated(2)) - losses <= peak(6, fm.Truncated(2)) < 0.15 * peak(60, fm.Reverse())


def descent(calls: list[int], shares: Any = lambda index: True) -> Any:
    """A step that counts itself, on a state of 400 numbers, and gives a share of the meta-loss where asked."""

    def step(rate: Any, state: Any, index: Any, seed: int) -> Any:
        calls.append(int(index))
        loss, slope = fm.value_and_grad(lambda w: torch.cos(w).sum())(state)
        following = state - rate * slope
        return following, fm.StepInfo(loss, (following**2).sum() if shares(int(index)) else None)

    start = torch.linspace(-1, 1, 400).double()
    problem = fm.Problem(lambda *_: start, step, lambda rate, state, query, seed: (state**3).sum())
    return problem, leaf(0.1), fm.Task(lambda index: torch.tensor(index), None)


@pytest.mark.parametrize("memory", MEMORIES[:-1], ids=repr)
@pytest.mark.parametrize("shares", [lambda index: True, lambda index: False, lambda index: index == 3])
def test_the_plan_is_of_all_windows(memory: Any, shares: Any) -> None:
    calls: list[int] = []
    problem, rate, task = descent(calls, shares)
    out = fm.unroll(problem, rate, task, steps=11, estimator=fm.Truncated(4), memory=memory)
    out.loss.backward()
    assert (out.info.memory.memory, out.info.memory.steps) == (memory, 11)
    assert out.info.memory.evaluations == len(calls)
    taken = [index for each in out.info.memory.actions if len(each) == 2 for index in range(*each)]
    assert taken[:11] == sorted(taken[:11])[:11] or set(taken) == set(range(11))
    assert sorted(taken) == sorted(calls)


@pytest.mark.parametrize("inner", [fm.Reverse(), fm.FirstOrder(), fm.MixedMode()], ids=repr)
@pytest.mark.parametrize("shares", [lambda index: True, lambda index: False, lambda index: index % 7 == 6])
def test_a_budget_holds_for_all_windows_together(inner: Any, shares: Any) -> None:
    """Or is refused, which names one that holds; shares that begin after the first window as well."""

    def run(memory: Any) -> tuple[int, Any, Tensor]:
        problem, rate, task = descent([], shares)
        with fm.testing.LiveBytes() as live:
            estimator = fm.Truncated(6, inner)
            out = fm.unroll(problem, rate, task, steps=40, estimator=estimator, memory=memory)
            (slope,) = torch.autograd.grad(out.loss, rate)
        return live.peak, out.info.memory, slope

    whole, _, expected = run(fm.StoreAll())
    kept, refused = 0, []
    for given in range(10_000, 3 * whole, whole // 4):
        try:
            peak, plan, slope = run(fm.budget(given))
        except fm.MemoryBudgetError as error:
            refused.append(error.smallest - given)
            continue
        kept += 1
        assert peak <= given
        assert plan.steps == 40
        close(slope, expected)
    assert kept >= 4
    assert all(missing > 0 for missing in refused)


def test_a_budget_for_windows_within_windows_is_refused() -> None:
    with pytest.raises(fm.ArgumentError, match=r"windows within windows. Use Truncated\(3\) by itself"):
        fm.unroll(*descent([]), steps=9, estimator=fm.Truncated(6, fm.Truncated(3)), memory=fm.budget(10**9))


# ---- refused


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
def test_initial_parameters_without_a_share_in_the_first_window(memory: Any) -> None:
    setting = of_module(mlp())
    with pytest.raises(
        fm.UnreachedLeafError,
        match=r"meta\['params'\]\['0.weight'\].*Truncated\(length=2\) goes back to the cut.*take a length of at least "
        r"all steps, or give every step a share \(trajectory_loss\)\. .*requires_grad=False",
    ):
        gradient(setting, fm.Truncated(2), memory=memory)


def test_nothing_reached() -> None:
    setting = by_hand(lambda meta, w, batch, seed: (w * 1, fm.StepInfo(w.sum())))
    meta = {"w": setting.meta["w"]}
    with pytest.raises(fm.DetachedError, match=r"does not depend on meta.*Truncated\(length=1\) goes back to the cut"):
        fm.unroll(setting.problem, meta, first_task(setting.tasks), steps=3, estimator=fm.Truncated(1))


@pytest.mark.parametrize("length", [0, -1, 1.5, True, None])
def test_bad_lengths(length: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"length is .*, expected a positive integer\. Pass e\.g\. length=20"):
        fm.Truncated(length)


@pytest.mark.parametrize("estimator", [fm.FirstOrder, "first order", None])
def test_bad_estimators(estimator: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"estimator is .*, expected an estimator\. Pass e\.g\. FirstOrder\(\)"):
        fm.Truncated(3, estimator)


def test_windows_in_windows() -> None:
    setting = case()
    with pytest.raises(
        fm.ArgumentError, match=r"was given PersistentES\(.*\), which has windows of its own\. Use that"
    ):
        gradient(setting, fm.Truncated(3, fm.PersistentES(0.1, 2, 3)))


def test_estimators_compare_and_print() -> None:
    assert fm.Truncated(2) == fm.Truncated(2) != fm.Truncated(3)
    assert repr(fm.Truncated(2, fm.FirstOrder())) == "Truncated(length=2, estimator=FirstOrder())"


@pytest.mark.parametrize("estimator", [fm.Truncated(2), fm.Reverse(), fm.ForwardMode()], ids=str)
def test_without_any_meta_loss_it_says_so(estimator: Any) -> None:
    def step(meta: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        return w * meta, fm.StepInfo(w.detach())

    problem = fm.Problem(lambda meta, task, seed: torch.ones(()).double(), step, None)
    with pytest.raises(fm.ArgumentError, match="There is no meta-loss"):
        fm.unroll(problem, leaf(0.5), fm.Task(torch.ones(1), None), steps=5, estimator=estimator)


# ---- leaves that act before the last cut alone, and estimators that are no windows


def judged_late(threshold: bool = False) -> tuple[fm.Problem, dict[str, Tensor], fm.Task]:
    """Two rates, of the first half of four steps and of the second; a weight of the loss at the end."""

    def step(meta: Any, w: Tensor, batch: Tensor, seed: int) -> Any:
        w, index = w[:2], w[2]
        loss, slope = fm.value_and_grad(lambda w: ((w * batch).sin() ** 2).sum())(w)
        rate = meta["early"] if int(index) < 2 else meta["late"]
        return torch.cat([w - rate * slope, (index + 1)[None]]), fm.StepInfo(loss)

    def judge(meta: Any, w: Tensor, query: Tensor, seed: int) -> Tensor:
        if threshold:  # without a derivative
            return (w[:2] > meta["weight"]).double().sum() + (w[:2] ** 2).sum()
        return meta["weight"] * (w[:2] ** 2).sum()

    meta = {"start": leaf(0.8, -0.5), "early": leaf(0.1), "late": leaf(0.2), "weight": leaf(0.7)}
    start = fm.Problem(lambda meta, task, seed: torch.cat([meta["start"], torch.zeros(1).double()]), step, judge)
    batch = torch.tensor([1.0, 2.0]).double()
    return start, meta, fm.Task(batch, batch)


ATTACHED = [fm.ForwardMode(), fm.ForwardMode(1), fm.EvolutionStrategies(0.1, 3, chunk=1)]


@pytest.mark.parametrize("inside", [fm.Reverse(), fm.MixedMode(), *ATTACHED], ids=repr)
@pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")
def test_what_acts_before_the_cut_alone_is_named(inside: Any) -> None:
    problem, meta, task = judged_late()
    with pytest.raises(fm.UnreachedLeafError, match=r"meta\['start'\], meta\['early'\], which .*Truncated\(length=2\)"):
        fm.unroll(problem, meta, task, steps=4, estimator=fm.Truncated(2, inside))
    frozen = {**meta, "start": meta["start"].detach(), "early": meta["early"].detach()}
    wanted = [frozen["late"], frozen["weight"]]
    got = fm.unroll(problem, frozen, task, steps=4, estimator=fm.Truncated(2, inside)).loss
    if not isinstance(inside, fm.EvolutionStrategies):
        expected = fm.unroll(problem, frozen, task, steps=4, estimator=fm.Truncated(2)).loss
        close(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted))
    else:
        assert all(float(each) for each in torch.autograd.grad(got, wanted))


@pytest.mark.parametrize("inside", ATTACHED, ids=repr)
@pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")
def test_a_leaf_that_acts_in_a_later_step_of_the_window_is_used(inside: Any) -> None:
    """Steps 1 to 3 are the window: the first of it does not read the late rate."""
    problem, meta, task = judged_late()
    own = {**meta, "start": meta["start"].detach()}
    out = fm.unroll(problem, own, task, steps=4, estimator=fm.Truncated(3, inside))
    assert all(float(each) for each in torch.autograd.grad(out.loss, [own["early"], own["late"], own["weight"]]))


def test_strategies_see_what_has_no_derivative() -> None:
    problem, meta, task = judged_late(threshold=True)
    own = {**meta, "start": meta["start"].detach(), "early": meta["early"].detach()}
    out = fm.unroll(problem, own, task, steps=4, estimator=fm.Truncated(2, fm.EvolutionStrategies(0.3, 9, chunk=1)))
    assert out.loss.grad_fn is not None
    assert len(torch.autograd.grad(out.loss, [own["late"], own["weight"]])) == 2


def test_reptile_has_no_windows() -> None:
    with pytest.raises(fm.ArgumentError, match=r"given Reptile\(\), whose way back .* Use Reptile\(\) by itself"):
        fm.Truncated(2, fm.Reptile())
