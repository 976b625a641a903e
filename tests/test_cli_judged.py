"""``funcmeta train`` and ``funcmeta evaluate`` judge on the part that they say."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import funcmeta as fm
from funcmeta.cli import _recipe, _train
from funcmeta.cli._app import app
from funcmeta.cli._settings import settings
from funcmeta.training import Evaluation, Mean


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page for the browser."""
    monkeypatch.setattr(_train, "report", lambda folder: folder)


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def words_of(number: int) -> str:
    return "b " * (number % 5 + 1) + "c " * (number % 7 + 1) + "d " * (number % 3)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("maml", ("--tasks", "sinusoids", "--inner-steps", "1")),
        ("reptile", ("--model", "mlp", "--inner-steps", "2", "--inner-lr", "0.3", "--queries", "3")),
        ("l2l", ("--inner-steps", "4", "--window", "2", "--optimizer", "linear", "--batch-size", "2")),
        ("dynamic_lm", ("--vocabulary", "20", "--width", "4", "--static-epochs", "1", "--segment", "90")),
    ],
)
def test_a_run_is_validated_and_judged_on_the_part_that_it_says(
    algorithm: str, words: tuple[str, ...], small: None, tmp_path: Path
) -> None:
    """Validation and evaluation by hand on what the recipe has for each part, at the initial meta."""
    if algorithm == "dynamic_lm":
        for part, titles in (("valid", string.ascii_uppercase + string.ascii_lowercase[:12]), ("test", "123")):
            lines = "".join(f" \n = {title} = \n \n " + words_of(ord(title)) * 12 + "\n" for title in titles)
            (tmp_path / f"{part}.txt").write_text(lines)
        words = (*words, "--tasks", f"wikitext:{tmp_path}")
    few = ("--validation-tasks", "3", "--steps", "1", "--meta-lr", "0.05", "--seed", "4")
    result = call("train", algorithm, *words, *few, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    made = _recipe.recipe(settings({}, tmp_path / "config.toml"), tmp_path, _train.Ranks())
    start = made.algorithm.init()

    def by_hand(part: str, stream: int, seed: int) -> float:
        tasks = made.tasks(part)
        if algorithm == "dynamic_lm":
            readings = [made.algorithm.adapt(start, tasks.alone(index)).losses for index in range(3)]
            return sum(torch.cat(each).mean().item() for each in readings) / 3
        scores = []
        for index in range(3):
            own = fm.rng.fold(seed, stream, index)
            task = fm.tasks._task.unstack(tasks.sample_batch(own, 1), 0)
            with torch.no_grad():
                scores.append(float(made.score(made.algorithm.adapt(start, task, seed=own), task)))
        return sum(scores) / 3

    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert record["validation"]["value"] == pytest.approx(by_hand("validation", 1, 4), rel=1e-5)
    found = {}
    for part, seed in (("train", 0), ("validation", 0), ("test", 0), ("test", 7)):
        if seed and algorithm == "dynamic_lm":
            continue
        told = ("--part", part, "--number", "3", *(("--seed", str(seed)) if seed else ()))
        assert call("evaluate", str(tmp_path), *told).exit_code == 0
        content = json.loads((tmp_path / "evaluation.json").read_text())
        assert content["at_first"]["value"] == pytest.approx(by_hand(part, 3, seed), rel=1e-5)
        assert (content["split"], content["seed"], content["number"]) == (part, seed, 3)
        found[part, seed] = tuple(content["scores"])
    assert len({*found.values()}) == len(found)


def test_what_is_judged_on_if_nothing_is_said(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--tasks", "sinusoids", "--steps", "1", "--validation-tasks", "2")
    assert call("train", "maml", *words, "--out", str(tmp_path)).exit_code == 0
    seen = []

    def evaluate(algorithm: Any, meta: Any, tasks: Any, *, number: int, score: Any, seed: int) -> Evaluation:
        seen.append((tasks.part, number, seed))
        return Evaluation(torch.zeros(number), Mean(0.0, 0.0))

    monkeypatch.setattr(_train, "evaluate", evaluate)
    assert call("evaluate", str(tmp_path)).exit_code == 0
    assert seen == [("test", 200, 0)] * 2


def test_a_seed_that_is_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('algorithm = "dynamic_lm"')
    result = call("evaluate", str(tmp_path), "--seed", "3")
    assert result.exit_code == 2
    assert "Error: seed is 3, which dynamic_lm does not read: it is judged on articles. Leave it out." in result.output
