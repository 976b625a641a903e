"""The race of optimizers: the same starts, tuned rates, divergence, table and picture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.evaluation._evaluate import losses_of
from funcmeta.evaluation._rows import quartiles


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3))


def quadratic(meta: Any, predict: Any, batch: Any) -> Tensor:
    W, y = batch
    return (W @ predict.params["theta"] - y).square().sum()


def start(seed: int) -> dict[str, Tensor]:
    return {"theta": torch.randn(3, generator=torch.Generator().manual_seed(seed))}


COURSE = fm.Course(Point(), quadratic, fm.tasks.quadratics(3), 20, start)
RATES = (0.001, 0.03, 10.0)


def test_rows_and_curves(tmp_path: Path) -> None:
    entrants = {"linear": fm.learned.linear(gradient=-0.001), "fixed": fm.optim.sgd(0.001)}
    courses = {"short": COURSE, "long": COURSE._replace(steps=40)}
    result = fm.evaluate_optimizers(entrants, courses, rates=RATES, tasks=6, tuning_tasks=5)
    assert [(row.course, row.optimizer) for row in result.rows] == [
        (course, name) for course in courses for name in ("linear", "fixed", "SGD", "momentum", "RMSprop", "Adam")
    ]
    rows = {(row.course, row.optimizer): row for row in result.rows}
    assert rows["short", "linear"].rate is None
    assert rows["short", "SGD"].rate in RATES
    assert result.curves["short", "SGD"].shape == (21, 6)
    assert result.curves["long", "SGD"].shape == (41, 6)
    torch.testing.assert_close(result.curves["short", "linear"], result.curves["short", "fixed"])
    first = {name: curve[0] for (course, name), curve in result.curves.items() if course == "short"}
    assert all(torch.allclose(each, first["linear"]) for each in first.values())
    assert str(result).splitlines()[2].split()[:2] == ["course", "optimizer"]
    json.dumps(result.to_dict(), allow_nan=False)
    result.plot(tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_the_best_rate_is_taken_and_one_that_diverges_is_not() -> None:
    result = fm.evaluate_optimizers(
        {"fixed": fm.optim.sgd(0.03)}, {"c": COURSE}, baselines={"SGD": fm.optim.sgd}, rates=RATES, tasks=8
    )
    fixed, tuned = result.rows
    assert tuned.rate == 0.03
    assert not tuned.at_edge
    assert "a better one may lie outside" not in str(result)
    narrow = fm.evaluate_optimizers(
        {"fixed": fm.optim.sgd(0.03)}, {"c": COURSE}, baselines={"SGD": fm.optim.sgd}, rates=(1e-4, 1e-3), tasks=8
    )
    assert [row.at_edge for row in narrow.rows] == [False, True]
    assert str(narrow).endswith("The rate of 'SGD' on 'c' is the last of those tried: a better one may lie outside.")
    assert tuned.median == fixed.median
    with pytest.raises(fm.ArgumentError, match=r"'SGD' diverges at every rate of \[1e\+30\]\. Pass smaller ones"):
        fm.evaluate_optimizers(
            {"fixed": fm.optim.sgd(0.03)}, {"c": COURSE}, baselines={"SGD": fm.optim.sgd}, rates=(1e30,), tasks=2
        )


def test_losses_are_those_of_a_loop_by_hand() -> None:
    tasks = COURSE.tasks.sample_batch(seed=1, tasks=2)
    losses = losses_of(fm.optim.sgd(0.03), COURSE, tasks, 5)
    for index in range(2):
        W, y = (each[index] for each in tasks.support)
        theta = start(fm.rng.fold(5, 0, index))["theta"]
        for step in range(21):
            torch.testing.assert_close(losses[step, index], (W @ theta - y).square().sum(), rtol=1e-4, atol=1e-5)
            theta = theta - 0.03 * 2 * W.T @ (W @ theta - y)


def test_a_training_that_diverges_counts_as_infinite_and_the_others_stay() -> None:
    W, y = COURSE.tasks.sample_batch(seed=1, tasks=3).support
    tasks = fm.Task((torch.stack([W[0], 1e6 * W[1], W[2]]), y), (W, y))
    together = losses_of(fm.optim.sgd(0.001), COURSE, tasks, 0)
    assert together[-1].isfinite().tolist() == [True, False, True]
    assert together[0].isfinite().all()
    alone = losses_of(fm.optim.sgd(0.001), COURSE, fm.Task((W, y), (W, y)), 0)
    torch.testing.assert_close(together[:, 0], alone[:, 0])


def test_infinite_losses_are_counted() -> None:
    result = fm.evaluate_optimizers(
        {"wild": fm.optim.sgd(1e8)}, {"c": COURSE._replace(steps=8)}, baselines={}, tasks=3, tuning_tasks=1
    )
    assert result.rows[0].diverged == 3
    assert math.isinf(result.rows[0].median)
    assert result.to_dict()["rows"][0]["median"] is None


def test_rates_are_tuned_on_other_tasks_and_starts_than_those_of_the_race() -> None:
    seen: dict[str, list[Any]] = {"tasks": [], "starts": []}

    class Watched:
        def sample_batch(self, seed: int, tasks: int) -> fm.Task:
            seen["tasks"].append(seed)
            return COURSE.tasks.sample_batch(seed, tasks)

    def watched_start(seed: int) -> dict[str, Tensor]:
        seen["starts"].append(seed)
        return start(seed)

    course = COURSE._replace(tasks=Watched(), start=watched_start, steps=2)
    fm.evaluate_optimizers(
        {"fixed": fm.optim.sgd(0.01)},
        {"c": course},
        baselines={"SGD": fm.optim.sgd},
        rates=(0.001, 0.01),
        tasks=3,
        tuning_tasks=2,
    )
    assert len(set(seen["tasks"])) == 2
    fixed, tuning, held_out = seen["starts"][:3], seen["starts"][3:7], seen["starts"][7:]
    assert fixed == held_out
    assert tuning[:2] == tuning[2:]
    assert not set(tuning) & set(held_out)


def test_quartiles() -> None:
    losses = torch.tensor([[5.0, 1.0, 2.0, 4.0, 3.0]])
    assert [each.item() for each in quartiles(losses)] == [2.0, 3.0, 4.0]
    assert quartiles(torch.tensor([1.0, 2.0, torch.inf, torch.nan]))[1] == 2.0


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_one_that_diverges_changes_no_other_where_a_module_draws(strategy: str) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return (predict(batch) - 1).square().mean()

    course = fm.Course(net, loss, COURSE.tasks, 5)
    x = torch.ones(2, 4, 2)
    wild = torch.stack([x[0], 1e12 * x[1]])
    tame, torn = (losses_of(fm.optim.sgd(0.01), course, fm.Task(b, b), 0, strategy=strategy) for b in (x, wild))
    assert torch.equal(tame[:, 0], torn[:, 0])
    assert torn[-1, 1].isinf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": {}}, "at least one optimizer and one course"),
        ({"courses": {}}, "at least one optimizer and one course"),
        ({"optimizers": {"Adam": fm.optim.sgd(0.1)}}, "no name twice. Name them apart"),
        ({"optimizers": {"a": 3}}, r"optimizers\['a'\] is 3, expected a LearnedOptimizer, a Transform, or a function"),
        ({"courses": {"c": COURSE._replace(steps=0)}}, r"courses\['c'\]\.steps is 0, expected a positive integer"),
        ({"strategy": "auto"}, "strategy is 'auto', expected one of"),
        ({"rates": ()}, r"rates are \(\), expected positive floats"),
        ({"rates": (0.1, -1.0)}, "expected positive floats"),
        ({"tasks": 0}, "tasks is 0, expected a positive integer"),
        ({"tuning_tasks": 1.5}, "tuning_tasks is 1.5"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"optimizers": {"a": fm.optim.sgd(0.1)}, "courses": {"c": COURSE}, **change}
    optimizers, courses = arguments.pop("optimizers"), arguments.pop("courses")
    with pytest.raises(fm.ArgumentError, match=message):
        fm.evaluate_optimizers(optimizers, courses, **arguments)


def test_a_training_that_vmap_can_not_run_is_named_and_runs_in_a_loop() -> None:
    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        value = quadratic(meta, predict, batch)
        return value if batch[1].sum().item() > 1e9 else 2 * value

    arguments: dict[str, Any] = {"baselines": {}, "tasks": 2, "tuning_tasks": 1}
    courses = {"c": COURSE._replace(loss_fn=loss, steps=2)}
    with pytest.raises(fm.GraphError, match=r"cannot run as one batch: vmap: .* Pass strategy='loop'"):
        fm.evaluate_optimizers({"a": fm.optim.sgd(0.01)}, courses, **arguments)
    fm.evaluate_optimizers({"a": fm.optim.sgd(0.01)}, courses, strategy="loop", **arguments)


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_tasks_and_starts_follow_from_the_seed(strategy: str) -> None:
    def first_losses(seed: int, course: fm.Course = COURSE) -> Tensor:
        entrants = {"fixed": fm.optim.sgd(0.03)}
        result = fm.evaluate_optimizers(entrants, {"c": course}, baselines={}, tasks=3, seed=seed, strategy=strategy)
        assert result.seed == seed
        return result.curves["c", "fixed"][0]

    one_start = COURSE._replace(start=lambda seed: start(0))
    assert torch.equal(first_losses(1), first_losses(1))
    assert not torch.equal(first_losses(1), first_losses(2))
    assert not torch.equal(first_losses(1, one_start), first_losses(2, one_start))  # the tasks alone


def test_each_course_has_its_own_network_tasks_steps_and_starts() -> None:
    other = fm.Course(Point(), quadratic, fm.tasks.quadratics(3), 7, lambda seed: {"theta": torch.full((3,), 100.0)})
    result = fm.evaluate_optimizers(
        {"fixed": fm.optim.sgd(0.001)}, {"near": COURSE, "far": other}, baselines={}, tasks=4
    )
    near, far = result.curves["near", "fixed"], result.curves["far", "fixed"]
    assert (len(near), len(far)) == (21, 8)
    assert float(far[0].min()) > 100 * float(near[0].max())
