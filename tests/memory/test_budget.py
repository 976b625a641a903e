"""budget: what is foretold is what is measured, and the policy that it picks takes the fewest evaluations that fit."""

import pickle
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_cases import Setting, close, gradient, learned_optimizer, setting, tightest, wanted
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.memory._account import Account
from funcmeta.memory._account import _run as of_plan
from funcmeta.memory._sizes import Run, Sizes
from funcmeta.testing import LiveBytes


def entropy(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(predict(x), y)


def wide() -> Setting:
    """More parameters than activations."""
    net = nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 5))
    problem = fm.inner_problem(net, entropy, optimizer=lambda m: optim.sgd(m["lr"], momentum=m["momentum"]))
    hypers = {"lr": torch.tensor(0.1, requires_grad=True), "momentum": torch.tensor(0.9, requires_grad=True)}
    batch = torch.randn(8, 50), torch.randint(5, (8,))
    return Setting(problem, {"params": fm.init_params(net), **hypers}, fm.Task(batch, batch))


def convolutional() -> Setting:
    """More activations than parameters, a query three times the support, and a frozen start."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    problem = fm.inner_problem(net, entropy, optimizer=lambda m: optim.adam(m["lr"], eps=1e-3))
    support = torch.randn(10, 1, 16, 16), torch.randint(5, (10,))
    query = torch.randn(30, 1, 16, 16), torch.randint(5, (30,))
    return Setting(problem, {"lr": torch.tensor(0.01, requires_grad=True)}, fm.Task(support, query))


def trajectory() -> Setting:
    """All inner losses count, on a batch that is larger than everything else."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    problem = fm.inner_problem(net, entropy, optimizer=lambda m: optim.sgd(m["lr"]), trajectory_loss=True)
    batch = torch.randn(400, 3), torch.randint(2, (400,))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.1, requires_grad=True)}
    return Setting(problem, meta, fm.Task(batch, batch))


CASES = {"wide": wide, "convolutional": convolutional, "trajectory": trajectory}


@cache
def built(name: str) -> Setting:
    with fm.rng.forked(1):
        return CASES[name]()


def peak(name: str, steps: int, memory: Any) -> tuple[int, fm.Plan]:
    """The bytes of an unroll and its derivative, and the plan that was followed."""
    case = built(name)
    with LiveBytes() as live:
        out = fm.unroll(*case, steps=steps, memory=memory)
        torch.autograd.grad(out.loss, wanted(case.meta))
    assert out.info.memory is not None
    return live.peak, out.info.memory


@pytest.mark.parametrize("share", [1.2, 0.9, 0.5, 0.2])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", CASES)
def test_the_peak_stays_within_the_budget(name: str, steps: int, share: float) -> None:
    everything, _ = peak(name, steps, fm.StoreAll())
    given, smallest = int(share * everything), tightest(built(name), steps).bytes
    if smallest > given:  # which is no excuse
        assert smallest < 1.2 * peak(name, steps, fm.Revolve(1))[0]
        given = smallest
    measured, plan = peak(name, steps, fm.budget(given))
    alone, _ = peak(name, steps, plan.memory)
    assert measured <= given
    assert plan.estimate is not None
    assert alone <= plan.estimate.peak_bytes <= given


@pytest.mark.parametrize("name", CASES)
def test_store_all_is_chosen_when_it_just_fits(name: str) -> None:
    steps = 25
    everything, _ = peak(name, steps, fm.StoreAll())
    assert peak(name, steps, fm.budget(int(1.05 * everything)))[1].memory == fm.StoreAll()
    assert peak(name, steps, fm.budget(int(0.95 * everything)))[1].memory != fm.StoreAll()


@pytest.mark.parametrize("name", ["wide", "trajectory"])
def test_less_memory_takes_more_evaluations(name: str) -> None:
    everything, _ = peak(name, 20, fm.StoreAll())
    smallest = tightest(built(name), 20).bytes
    plans = [peak(name, 20, fm.budget(each))[1] for each in range(smallest, 2 * everything, everything // 3)]
    evaluations = [plan.evaluations for plan in plans]
    assert evaluations == sorted(evaluations, reverse=True)
    assert evaluations[0] == fm.plan(fm.Revolve(1), 20).evaluations
    assert evaluations[-1] == 20


def test_nothing_that_fits_takes_fewer_evaluations() -> None:
    everything, _ = peak("wide", 8, fm.StoreAll())
    for share in (0.95, 0.8):
        given = int(share * everything)
        _, chosen = peak("wide", 8, fm.budget(given))
        policies = [fm.Segments(n) for n in range(1, 8)] + [fm.Revolve(n) for n in range(1, 8)]
        better = [each for each in policies if fm.plan(each, 8).evaluations < chosen.evaluations]
        assert all(peak("wide", 8, each)[0] > 0.7 * given for each in better)


def test_what_was_chosen_is_said() -> None:
    plan = peak("trajectory", 30, fm.budget(2_000_000))[1]
    assert plan.memory == fm.StoreAll()
    assert str(plan).startswith("StoreAll(): 30 steps in 30 evaluations (1.00 a step), at most 0 states kept; expected")
    assert str(plan).endswith("MB, 1.00 times the time of StoreAll()")
    plan = peak("trajectory", 30, tightest(built("trajectory"), 30))[1]
    assert plan.memory == fm.Revolve(1)
    assert plan.estimate is not None
    assert plan.estimate.time_factor > 2


def test_the_smallest_budget_is_named_and_does() -> None:
    with pytest.raises(
        fm.MemoryBudgetError, match=r"within the budget of 1000 bytes\. The smallest .* is (\d+) bytes"
    ) as e:
        peak("wide", 30, fm.budget(1000))
    smallest = e.value.smallest
    assert f"Pass budget({smallest}) or more" in str(e.value)
    assert peak("wide", 30, fm.budget(smallest))[1].memory == fm.Revolve(1)
    with pytest.raises(fm.MemoryBudgetError):
        peak("wide", 30, fm.budget(smallest - 1))
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.smallest) == (str(e.value), smallest)


def test_there_is_room_for_comparing_repeated_steps() -> None:
    case = learned_optimizer()
    given = tightest(case, 60)
    with LiveBytes() as live:
        out = fm.unroll(*case, steps=60, memory=given)
        torch.autograd.grad(out.loss, wanted(case.meta))
    assert out.info.memory is not None
    assert out.info.memory.memory == fm.Revolve(1)
    assert live.peak <= given.bytes


@pytest.mark.parametrize("steps", [1, 30, 400])
def test_there_is_room_for_the_tensor_of_all_losses(steps: int) -> None:
    """Of steps this small it takes more than anything that happens before."""
    plan = fm.unroll(*learned_optimizer(), steps=steps, memory=fm.budget(10**8)).info.memory
    assert plan is not None
    assert plan.estimate is not None
    assert plan.memory == fm.StoreAll()
    case = learned_optimizer()
    with LiveBytes() as live:
        out = fm.unroll(*case, steps=steps, memory=fm.StoreAll())
        torch.autograd.grad(out.loss, wanted(case.meta))
    assert live.peak <= plan.estimate.peak_bytes


def sizes(**given: Any) -> Sizes:
    """Sizes of nothing but what is given; the short runs take nothing."""
    nothing = dict.fromkeys(("meta", "initial", "state", "notes", "loss", "norms"), 0)
    run = Run(4, 0, 0, 0, 0)
    runs = {"one": run, "whole": replace(run, steps=3), "single": run, "paired": run}
    return Sizes(**{**nothing, "shares": False, "seconds": 1.0, "graph_seconds": 1.0, **runs, **given})


@pytest.mark.parametrize(
    ("given", "states", "part", "peak", "kept"),
    [
        ({"whole": Run(3, 100, 60, 10, 0)}, 0, 8, 150, 110),  # five steps more
        ({"single": Run(4, 100, 60, 10, 0)}, 1, 1, 100, 60),
        ({"paired": Run(4, 100, 60, 10, 0)}, 1, 2, 100, 60),
        ({"paired": Run(4, 100, 60, 10, 0)}, 1, 5, 130, 90),  # three steps more
        ({"paired": Run(4, 100, 60, 10, 6)}, 1, 5, 148, 108),  # which is what a step leaves behind
        ({"state": 10}, 3, 1, 20, 20),  # beside the initial state, which the short runs store as well
        ({"state": 10}, 3, 2, 20, 20),
        ({"state": 10}, 0, 8, 0, 0),
        ({"notes": 10}, 1, 1, 40, 40),  # of the four steps that the short run does not take
        ({"notes": 10}, 0, 8, 0, 0),  # which are among what a step adds
        ({"loss": 10}, 0, 8, 80, 80),  # the tensor of all losses
        ({"loss": 10}, 1, 1, 80 + 7 * 28 * 10, 80),  # 28 comparisons at the most
        ({"norms": 10}, 1, 1, 90, 0),
    ],
    ids=str,
)
def test_each_size_counts_as_often_as_it_is_alive(given: Any, states: int, part: int, peak: int, kept: int) -> None:
    """In 8 steps."""
    found = sizes(**given).run(8, states, part)
    assert found is not None
    assert (found.peak, found.kept) == (peak, kept)


def test_what_was_not_counted_is_not_foretold() -> None:
    none = sizes(whole=None, single=None, paired=None)
    assert [none.run(8, *each) for each in ((0, 8), (1, 1), (1, 4))] == [None] * 3


def test_the_time_is_that_of_every_evaluation() -> None:
    """A step with its graph and its derivative takes 5, one without 2: the first 6 of 9 run without, then all with."""
    factor = sizes(seconds=2.0, graph_seconds=5.0).factor(fm.plan(fm.Segments(3), 9))
    assert factor == pytest.approx((6 * 2 + 9 * 5) / (9 * 5))


def test_only_steps_of_the_run_are_measured() -> None:
    case, asked = setting(), []
    first = fm.unroll(*case, steps=1)

    def support(index: int) -> Any:
        asked.append(index)
        return case.task.support(index) if callable(case.task.support) else case.task.support

    task = fm.Task(support, case.task.query)
    fm.unroll(case.problem, case.meta, task, steps=2, carry=first.carry, memory=fm.budget(10**9))
    assert set(asked) == {1, 2}


class Counted:
    """Short runs that were counted before."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes


def test_it_chooses_what_looking_at_every_policy_would() -> None:
    counted = sizes(
        state=100,
        whole=Run(3, 4000, 3500, 1000, 0),
        single=Run(4, 1800, 1300, 1000, 0),
        paired=Run(4, 2800, 2300, 1000, 0),
    )
    steps, kinds = 40, set()
    every: list[Any] = [fm.StoreAll(), *map(fm.Segments, range(2, steps)), *map(fm.Revolve, range(1, steps))]
    plans = [fm.plan(each, steps) for each in every]
    peaks = [of_plan(counted, each).peak for each in plans]
    for given in range(min(peaks), max(peaks) + 1, 100):
        chosen = Account(given, None)._choose(Counted(counted), steps, 1, 0)  # type: ignore[arg-type]
        assert of_plan(counted, chosen).peak <= given
        assert chosen.evaluations == min(
            each.evaluations for each, peak in zip(plans, peaks, strict=True) if peak <= given
        )
        kinds.add(type(chosen.memory))
    assert kinds == {fm.StoreAll, fm.Segments, fm.Revolve}


def test_one_step_and_none() -> None:
    everything, _ = peak("convolutional", 1, fm.StoreAll())
    assert peak("convolutional", 1, fm.budget(2 * everything))[1].memory == fm.StoreAll()
    with pytest.raises(fm.MemoryBudgetError):
        peak("convolutional", 1, fm.budget(1000))
    case = setting()
    meta = {"params": case.meta["params"], "lr": torch.tensor(0.1).double()}
    assert fm.unroll(case.problem, meta, case.task, steps=0, memory=fm.budget(1)).loss.isfinite()


def test_without_a_graph_there_is_nothing_to_choose() -> None:
    with torch.no_grad():
        plan = fm.unroll(*setting(), steps=5, memory=fm.budget(1)).info.memory
    assert plan is None


def test_tasks_in_a_loop_share_the_budget() -> None:
    case = setting("plain", (3,))
    with LiveBytes() as live:
        fm.unroll_batch(*case, steps=80, strategy="loop").loss.backward()
    given, everything = 2 * live.peak // 3, live.peak
    expected = [leaf.grad for leaf in wanted(case.meta)]
    case = setting("plain", (3,))
    with LiveBytes() as live:
        out = fm.unroll_batch(*case, steps=80, strategy="loop", memory=fm.budget(given))
        out.loss.backward()
    assert live.peak <= given < everything
    assert out.info.memory is not None
    assert out.info.memory.memory != fm.StoreAll()
    close([leaf.grad for leaf in wanted(case.meta)], expected)


def test_first_order_needs_less() -> None:
    """What is measured is the step as the estimator takes it."""
    case = built("wide")
    plans = [
        fm.unroll(*case, steps=30, memory=fm.budget(10**9), estimator=each).info.memory
        for each in (fm.Reverse(), fm.FirstOrder())
    ]
    exact, first = (plan.estimate.peak_bytes for plan in plans if plan and plan.estimate)
    assert first < 0.9 * exact


def test_inside_torch_func_it_is_refused() -> None:
    case = setting()
    with pytest.raises(fm.ArgumentError, match=r"cannot measure steps inside torch.func. Use StoreAll\(\) there"):
        torch.func.grad(lambda meta: fm.unroll(case.problem, meta, case.task, steps=3, memory=fm.budget(10**9)).loss)(
            fm.tree.detach(case.meta)
        )


@pytest.mark.parametrize("given", [0, -1, 1e6, "300 MB", True, None])
def test_bad_budgets(given: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a positive integer. Pass bytes, e.g. 300 \* 10\*\*6"):
        fm.budget(given)


def test_the_gradient_is_that_of_store_all() -> None:
    case = setting("batch norm")
    close(gradient(case, tightest(case)), gradient(case, fm.StoreAll()))


def test_tasks_in_a_loop_name_the_budget_of_all() -> None:
    case = setting("plain", (3,))
    with pytest.raises(fm.MemoryBudgetError, match="within the budget of 1000 bytes") as error:
        fm.unroll_batch(*case, steps=20, strategy="loop", memory=fm.budget(1000))
    with LiveBytes() as live:
        out = fm.unroll_batch(*case, steps=20, strategy="loop", memory=fm.budget(error.value.smallest))
        out.loss.backward()
    assert live.peak <= error.value.smallest


def test_auto_takes_the_loop_without_a_trial() -> None:
    case = setting("plain", (3,))
    with LiveBytes() as live:
        out = fm.unroll_batch(*case, steps=20, memory=fm.budget(100_000))
        out.loss.backward()
    assert out.info.strategy == "loop"
    assert live.peak <= 100_000
