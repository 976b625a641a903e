"""horizon_report: figures against hand-made values, what is repeated, and what it says of bad inputs."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import funcmeta as fm
from funcmeta.estimators import Outcome, Primal
from funcmeta.estimators._attach import attach

NOTHING = fm.Task(torch.ones(1), None)


def counter() -> tuple[fm.Problem, Any]:
    """w' = w + a from 0, judged by 3·w₁ − w₂ at the end: r = K (3, −1)."""

    def step(a: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        return w + a, fm.StepInfo(w.sum())

    problem = fm.Problem(lambda a, task, seed: torch.zeros(2), step, lambda a, w, query, seed: 3 * w[0] - w[1])
    return problem, torch.ones(2, requires_grad=True)


@dataclass(frozen=True)
class Shaken:
    """The exact gradient r plus shift and noise: E e = shift, Σ var e = 2 noise²."""

    shift: float
    noise: float
    calls: list[int]
    unreached_advice: ClassVar[str] = ""

    def __call__(self, primal: Primal, meta: Any, memory: Any) -> Outcome:
        self.calls.append(primal.seed)
        loss, path, _ = fm.Reverse()(primal, meta, memory)
        assert loss is not None
        (exact,) = torch.autograd.grad(loss, meta)
        draws = torch.randn(2, generator=fm.rng.generator(primal.seed))
        return Outcome(
            attach(loss.detach(), [exact + torch.tensor([0.0, self.shift]) + self.noise * draws], [meta]), path
        )


def report(estimators: Any, **changes: Any) -> fm.HorizonReport:
    problem, meta = counter()
    return fm.horizon_report(problem, meta, NOTHING, **{"horizons": [4], "estimators": estimators, **changes})


def test_truncation_and_its_bias() -> None:
    rows = report({"one": fm.Truncated(1), "exact": fm.Reverse()}, horizons=[1, 2, 8]).rows
    assert [(row.horizon, row.name) for row in rows] == [(k, name) for k in (1, 2, 8) for name in ("one", "exact")]
    for row in rows:
        expected = 1 - 1 / row.horizon if row.name == "one" else 0.0
        assert row.bias == pytest.approx(expected, abs=1e-6)
        assert (row.bias_error, row.variance, row.repeats) == (0.0, 0.0, 2)
        assert row.cosine == pytest.approx(1.0, abs=1e-6)
        assert row.exact_norm == pytest.approx(row.horizon * math.sqrt(10), rel=1e-6)
        assert row.seconds > 0


def test_bias_and_variance_of_what_is_known() -> None:
    size, repeats = 4 * math.sqrt(10), 400
    (row,) = report({"shaken": Shaken(2.0, 1.0, [])}, repeats=repeats).rows
    assert row.repeats == repeats
    assert row.variance * size**2 == pytest.approx(2.0, rel=0.15)
    assert row.bias_error == pytest.approx((row.variance / repeats) ** 0.5, rel=1e-6)
    assert abs(row.bias * size - 2.0) < 4 * row.bias_error * size
    assert 0.9 < row.cosine < 1.0


def test_evolution_strategies_are_unbiased_here_and_truncation_is_not() -> None:
    estimators = {
        "ES": fm.EvolutionStrategies(0.1, 4),
        "PES": fm.PersistentES(0.1, 4, 2),
        "truncated ES": fm.Truncated(2, fm.EvolutionStrategies(0.1, 4)),
    }
    rows = {row.name: row for row in report(estimators, horizons=[6], repeats=60).rows}
    assert rows["ES"].bias < 2.5 * rows["ES"].bias_error
    assert rows["PES"].bias < 2.5 * rows["PES"].bias_error
    assert rows["truncated ES"].bias > 0.5 > 4 * rows["truncated ES"].bias_error
    assert rows["PES"].variance > rows["ES"].variance


def test_what_is_the_same_for_two_seeds_is_not_repeated() -> None:
    fixed, moving, reference = Shaken(1.0, 0.0, []), Shaken(1.0, 1.0, []), Shaken(0.0, 0.0, [])
    report({"fixed": fixed, "moving": moving}, repeats=5, reference=reference)
    assert len(fixed.calls) == 1 + 2
    assert len(moving.calls) == 1 + 5
    assert len(reference.calls) == 2


def test_a_training_that_draws_is_held_against_its_own_truth() -> None:
    """The rate of growth is drawn: Reverse differs from seed to seed, and its error does not."""

    def step(a: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        return w + a * torch.rand(()), fm.StepInfo(w.sum())

    problem, meta = counter()
    problem = problem._replace(step=step)
    estimators = {"exact": fm.Reverse(), "one": fm.Truncated(1)}
    exact, one = fm.horizon_report(problem, meta, NOTHING, horizons=[4], estimators=estimators, repeats=50).rows
    assert (exact.bias, exact.variance, exact.repeats) == (0.0, 0.0, 2)
    assert one.repeats == 50
    assert one.bias == pytest.approx(0.75, abs=0.05)
    assert one.variance > 0


def test_a_memory_policy_for_the_reference_and_an_estimator() -> None:
    pair = (fm.Reverse(), fm.Segments(2))
    result = report({"segments": pair}, reference=pair)
    assert result.rows[0].bias == 0.0
    assert result.reference == "Reverse()"


def test_leaves_that_an_estimator_does_not_reach() -> None:
    problem, _ = counter()
    meta = {"a": torch.ones(2, requires_grad=True), "w": torch.zeros(2, requires_grad=True)}
    problem = problem._replace(
        init=lambda meta, task, seed: meta["w"] * 1,
        step=lambda meta, w, batch, seed: (w + meta["a"], fm.StepInfo(w.sum())),
    )
    result = fm.horizon_report(problem, meta, NOTHING, horizons=[3], estimators={"cut": fm.Truncated(1)})
    assert result.rows[0].unreached == ("meta['w']",)
    assert result.rows[0].bias == pytest.approx(math.sqrt((2**2 + 1) / (3**2 + 1)), rel=1e-6)
    assert "'cut' gives no gradient to meta['w'] after 3 steps: gradient 0." in str(result)


def test_the_table() -> None:
    text = str(report({"one": fm.Truncated(1), "a longer name": Shaken(1.0, 1.0, [])}, horizons=[4, 100]))
    head, second, empty, columns, *lines = text.splitlines()
    assert head == "Meta-gradients over the number of inner steps, float32 on cpu, against Reverse()."
    assert second == "Bias and variance are relative to the exact gradient; up to 20 repeats."
    assert empty == ""
    assert columns.split() == ["steps", "estimator", "bias", "variance", "cosine", "time"]
    assert len({len(line) for line in (columns, *lines)}) == 1
    assert lines[0].split()[:4] == ["4", "one", "0.750", "±"]
    assert [line.split()[0] for line in lines] == ["4", "4", "100", "100"]


def test_the_dict_is_json() -> None:
    result = report({"one": fm.Truncated(1)})
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["rows"][0]["name"] == "one"
    assert content["rows"][0]["bias"] == 0.75
    assert content["repeats"] == 20


def test_a_gradient_of_zero_has_no_relative_error() -> None:
    problem, meta = counter()
    problem = problem._replace(meta_loss=lambda a, w, query, seed: 0.0 * w.sum())
    result = fm.horizon_report(problem, meta, NOTHING, horizons=[2], estimators={"one": fm.Truncated(1)})
    assert math.isnan(result.rows[0].bias)
    assert result.to_dict()["rows"][0]["bias"] is None
    assert "nan" in str(result)


@pytest.mark.parametrize("name", ["picture.png", "deeper/picture.svg"])
def test_the_picture(tmp_path: Path, name: str) -> None:
    estimators = {"one": fm.Truncated(1), "shaken": Shaken(1.0, 1.0, []), "exact": fm.Reverse()}
    report(estimators, horizons=[1, 4, 10]).plot(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


def test_meta_is_not_touched() -> None:
    problem, meta = counter()
    fm.horizon_report(problem, meta, NOTHING, horizons=[2], estimators={"one": fm.Truncated(1)})
    assert meta.grad is None
    assert torch.equal(meta, torch.ones(2))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no horizons": ({"horizons": []}, r"horizons is \[\], expected a list of numbers of steps\. Pass e\.g\. \[1, 10"),
    "one number": ({"horizons": 5}, r"horizons is 5, expected a list"),
    "no steps": ({"horizons": [0]}, r"a horizon is 0, expected a positive integer\. Pass e\.g\. horizons=\[1, 10"),
    "one repeat": ({"repeats": 1}, r"repeats is 1, expected an integer of at least 2\. Pass e\.g\. repeats=20"),
    "no estimators": ({"estimators": {}}, r"estimators is \{\}, expected a dict of at least one name and estimator"),
    "a bad reference": ({"reference": fm.Reverse}, r"estimators\['the reference'\] is .*Reverse.*Pass e\.g\. Reverse"),
    "a bad seed": ({"seed": -1}, r"seed is -1, expected an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changes, says = BAD[case]
    with pytest.raises(fm.ArgumentError, match=says):
        report(**{"estimators": {"one": fm.Truncated(1)}, **changes})


def test_nothing_is_learned() -> None:
    problem, meta = counter()
    with pytest.raises(fm.ArgumentError, match=r"No leaf of meta requires grad.*Call requires_grad_\(\) on it"):
        fm.horizon_report(problem, meta.detach(), NOTHING, horizons=[1], estimators={"one": fm.Truncated(1)})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    plot: Callable[[Path], None] = report({"one": fm.Truncated(1)}).plot
    with pytest.raises(fm.MissingExtraError, match="Drawing needs matplotlib, which the extra demo brings"):
        plot(tmp_path / "picture.png")


def test_the_task_is_the_one_that_was_given() -> None:
    """w' = w + a·x: the exact gradient after K steps is K·x."""

    def step(a: Tensor, w: Tensor, batch: Any, seed: int) -> Any:
        return w + a * batch, fm.StepInfo(w)

    problem = fm.Problem(lambda a, task, seed: torch.zeros(()), step, lambda a, w, query, seed: w)
    for x in (2.0, 5.0):
        task = fm.Task(torch.tensor(x), None)
        (row,) = fm.horizon_report(
            problem, torch.ones((), requires_grad=True), task, horizons=[3], estimators={"exact": fm.Reverse()}
        ).rows
        assert row.exact_norm == pytest.approx(3 * x)
