"""``funcmeta train`` and ``funcmeta evaluate``: every algorithm, settings, resumption, signals and errors."""

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import tomli_w
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import funcmeta as fm
from funcmeta.cli import _train
from funcmeta.cli._app import app
from funcmeta.cli._settings import ALGORITHMS, READS, Settings, reads, settings, text

IMAGES = ("--filters", "2", "--queries", "1", "--inner-steps", "1")
SMALL: dict[str, tuple[str, ...]] = {
    "l2l": ("--inner-steps", "6", "--window", "3", "--batch-size", "2", "--optimizer", "linear"),
    "dynamic_lm": ("--vocabulary", "50", "--width", "4", "--static-epochs", "1", "--segment", "200", "--window", "3"),
}
SHORT = ("--steps", "4", "--validate-every", "2", "--validation-tasks", "2", "--checkpoint-every", "3")


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def train(algorithm: str, out: Path, *options: str) -> Any:
    return call("train", algorithm, "--out", str(out), *SMALL.get(algorithm, IMAGES), *SHORT, *options)


def config(out: Path) -> dict[str, Any]:
    return tomllib.loads((out / "config.toml").read_text())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_is_judged_and_goes_on(algorithm: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(algorithm, out)
    assert result.exit_code == 0, result.output
    assert "Ended after step 4" in result.output
    assert f"Wrote {out / 'meta.safetensors'} and {out / 'report.html'}." in result.output
    assert "4/4" in result.stderr
    assert "Held-out tasks" not in (out / "report.html").read_text()
    assert config(out)["algorithm"] == algorithm
    meta = fm.training.load(out / "meta.safetensors")
    judged = call("evaluate", str(out), "--number", "3")
    assert judged.exit_code == 0, judged.output
    assert f"Wrote {out / 'evaluation.json'} and {out / 'report.html'}." in judged.output
    page = (out / "report.html").read_text()
    assert "Held-out tasks, test" in page
    assert f"<dt>algorithm</dt><dd>{algorithm}</dd>" in page
    assert "the run went on" not in page.lower()
    found = json.loads((out / "evaluation.json").read_text())
    assert found["split"] == "test"
    assert found["higher_is_better"] is (found["score"] == "query accuracy")
    assert len(found["scores"]) == found["number"] == 3
    assert found["mean"] == pytest.approx(sum(found["scores"]) / 3)
    sign = -1 if found["higher_is_better"] else 1
    worse = sum(sign * new > sign * old for new, old in zip(found["scores"], found["scores_at_first"], strict=True))
    assert f"Worse than at first: {worse} of 3 tasks." in judged.output
    for scores in (found["scores"], found["scores_at_first"]):
        assert f"median {sorted(scores)[1]:.4g} ({sorted(scores)[0]:.4g} to " in judged.output
    again = call("train", "--out", str(out), "--resume", "--steps", "6")
    assert again.exit_code == 0, again.output
    assert "Ended after step 6" in again.output
    *lines, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == list(range(7))
    assert last == {"ended": "steps"}
    assert "Ended at step 6, the last one." in (out / "report.html").read_text()
    del meta


def test_the_best_of_an_accuracy_is_the_highest(tmp_path: Path) -> None:
    assert train("maml", tmp_path, "--meta-lr", "0.05", "--queries", "4").exit_code == 0
    lines = [json.loads(line).get("validation") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    best = max(line["value"] for line in lines if line)
    assert re.search(rf"best validation, step \d</span><b>{best:.3f} ±", (tmp_path / "report.html").read_text())


def test_curves_for_tensorboard_go_on(tmp_path: Path) -> None:
    assert train("maml", tmp_path, "--tensorboard").exit_code == 0
    result = call("train", "--out", str(tmp_path), "--resume", "--steps", "6", "--tensorboard")
    assert result.exit_code == 0, result.output
    assert "1/6" not in result.stderr
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.step for each in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_without_tensorboard_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = train("maml", tmp_path, "--tensorboard")
    assert result.exit_code == 2
    assert "Error: Curves for TensorBoard need tensorboard, which the extra tensorboard brings" in result.output
    assert not list(tmp_path.iterdir())


def test_options_come_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('algorithm = "maml"\nfilters = 2\nqueries = 1\nsteps = 3\nmeta_lr = 1\nvalidate_every = 0\n')
    result = call("train", "--config", str(file), "--out", str(tmp_path / "run"), "--steps", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    told = config(tmp_path / "run")
    unread = {"optimizer", "window", "vocabulary", "width", "segment", "static_epochs", "validation_tasks", "patience"}
    assert set(told) == set(Settings.__dataclass_fields__) - unread
    assert (told["filters"], told["steps"], told["seed"], told["meta_lr"], told["inner_lr"]) == (2, 2, 5, 1, 0.1)


def test_defaults_follow_the_algorithm_and_the_tasks() -> None:
    assert settings({"algorithm": "l2l"}, None).tasks == "quadratics"
    assert settings({"algorithm": "dynamic_lm"}, None).batch_size == 1
    lines = settings({"algorithm": "maml", "tasks": "sinusoids"}, None)
    assert (lines.model, lines.shots, lines.inner_lr) == ("mlp", 10, 0.01)
    assert settings({"algorithm": "reptile", "inner_lr": 0.5}, None).inner_lr == 0.5


OTHER: dict[str, Any] = {
    "tasks": "omniglot:somewhere",
    "model": "mlp",
    "ways": 4,
    "shots": 2,
    "queries": 3,
    "size": 20,
    "filters": 3,
    "inner_steps": 2,
    "inner_lr": 0.25,
    "estimator": "truncated:1",
    "memory": "segments:2",
    "strategy": "loop",
    "optimizer": "linear",
    "window": 4,
    "vocabulary": 60,
    "width": 5,
    "segment": 30,
    "static_epochs": 2,
    "steps": 7,
    "batch_size": 6,
    "accumulate": 2,
    "meta_lr": 0.125,
    "schedule": "cosine",
    "clip": 2.0,
    "alarm": "lower",
    "limit": 8.0,
    "validate_every": 3,
    "validation_tasks": 5,
    "patience": 2,
    "checkpoint_every": 9,
    "seed": 11,
    "dtype": "float64",
    "threads": 2,
}
"""For every setting a value that is no default."""


def test_every_setting_is_among_those_that_are_tried() -> None:
    assert [*OTHER] == [name for name in Settings.__dataclass_fields__ if name != "algorithm"]
    assert set().union(*READS.values()) == {"algorithm", *OTHER}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_setting_is_taken_or_refused(
    algorithm: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Settings] = []
    monkeypatch.setattr(_train, "recipe", lambda settings, *_: told.append(settings) or MagicMock())
    monkeypatch.setattr(_train, "fit", lambda *_, **__: sys.exit(3))
    (tmp_path / "mine.toml").write_text(f"{name} = {json.dumps(OTHER[name])}")
    needed = ("--estimator", "pes:0.1:2") if name == "window" and {"shots", "window"} <= READS[algorithm] else ()
    for number, words in enumerate(
        [(f"--{name.replace('_', '-')}", str(OTHER[name])), ("--config", str(tmp_path / "mine.toml"))]
    ):
        out = tmp_path / str(number)
        result = call("train", algorithm, *words, *needed, "--out", str(out))
        if name in READS[algorithm]:
            assert result.exit_code == 3, result.output
            assert config(out)[name] == OTHER[name] == getattr(told[number], name)
        else:
            assert result.exit_code == 2
            expected = f"Error: {name} is {OTHER[name]!r}, which {algorithm} does not read. It reads algorithm, tasks, "
            assert expected in result.output
            assert not out.exists()


class Recorded:
    """Settings that note which of them are read."""

    def __init__(self, told: Settings) -> None:
        self.told, self.names = told, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.told, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_reads_what_it_says_and_nothing_else(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorded] = []
    monkeypatch.setattr(_train, "settings", lambda *given: made.append(Recorded(settings(*given))) or made[-1])
    monkeypatch.setattr(_train, "text", lambda each: text(each.told))
    result = train(algorithm, tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(made[0].names) == sorted(reads(made[0].told)) == sorted(config(tmp_path))


def test_the_page_says_what_is_read() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| (`maml`.*|`reptile`.*|`meta_lstm`.*|`l2l`.*|`dynamic_lm`.*) \| (.*) \|$", page, re.MULTILINE
    )
    common = set(re.findall(r"`(\w+)`", re.search(r"^All read (.*?)\. ", page, re.MULTILINE | re.DOTALL)[1]))
    said = {}
    for algorithms, names in rows:
        own = set(re.findall(r"`(\w+)`", names)) - {"maml"}
        for algorithm in re.findall(r"`(\w+)`", algorithms):
            said[algorithm] = said["maml"] - own if "without" in names else {"algorithm", *common, *own}
    assert said == READS


@pytest.mark.parametrize("algorithm", ["reptile", "l2l"])
def test_a_folder_that_has_every_setting_goes_on(algorithm: str, tmp_path: Path) -> None:
    assert train(algorithm, tmp_path).exit_code == 0
    every = {**asdict(Settings(algorithm)), "estimator": "reptile", **config(tmp_path)}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(every))
    result = call("train", "--out", str(tmp_path), "--resume", "--steps", "5")
    assert "Ended after step 5" in result.output
    assert call("evaluate", str(tmp_path), "--number", "2").exit_code == 0
    refused = call("train", "--out", str(tmp_path), "--resume", "--segment", "20")
    assert f"segment is 20, which {algorithm} does not read" in refused.output


@pytest.mark.parametrize(
    "options",
    [
        ("--estimator", "first", "--memory", "segments:1", "--dtype", "float64"),
        ("--estimator", "mixed", "--memory", "revolve:1", "--dtype", "bfloat16"),
        ("--estimator", "truncated:1", "--memory", "segments", "--schedule", "cosine", "--clip", "1"),
        ("--estimator", "pes:0.01:2", "--window", "1", "--inner-steps", "2"),
        ("--estimator", "es:0.01:2", "--alarm", "skip", "--limit", "1e9", "--patience", "1", "--accumulate", "2"),
    ],
)
def test_settings_that_go_together(options: tuple[str, ...], tmp_path: Path) -> None:
    result = train("maml", tmp_path, *options)
    assert result.exit_code == 0, result.output


def test_sinusoids_in_a_loop_without_validation(tmp_path: Path) -> None:
    words = (
        "--tasks",
        "sinusoids",
        "--strategy",
        "loop",
        "--validate-every",
        "0",
        "--steps",
        "2",
        "--inner-steps",
        "1",
    )
    result = call("train", "maml", "--out", str(tmp_path), *words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["rnnprop", "mlp", "hierarchical", "lstm"])
def test_kinds_of_learned_optimizers_and_persistent_strategies(kind: str, tmp_path: Path) -> None:
    result = train("l2l", tmp_path, "--optimizer", kind, "--estimator", "pes:0.01:2")
    assert result.exit_code == 0, result.output


UNREAD = "which maml does not read with"
ERRORS: list[tuple[tuple[str, ...], str]] = [
    (("train",), "algorithm is None, expected one of maml, anil"),
    (("train", "mmaml"), "algorithm is 'mmaml', expected one of maml"),
    (("train", "maml", "--steps", "0"), "steps is 0, expected a positive integer"),
    (("train", "maml", "--seed", "-1"), "seed is -1"),
    (("train", "maml", "--meta-lr", "0"), "meta_lr is 0.0, expected a positive number"),
    (("train", "maml", "--clip", "-1"), "clip is -1.0, expected 0 for none, or a positive number"),
    (("train", "maml", "--schedule", "steps"), "schedule is 'steps', expected one of constant, cosine"),
    (("train", "maml", "--patience", "2", "--validate-every", "0"), f"patience is 2, {UNREAD} validate_every 0. It"),
    (("train", "maml", "--validation-tasks", "2", "--validate-every", "0"), "validation_tasks is 2, which maml does n"),
    (("train", "maml", "--damaged", "previous"), "damaged is 'previous', which is read only by --resume. Pass both"),
    (("train", "maml", "--ways", "2", "--tasks", "sinusoids"), f"ways is 2, {UNREAD} tasks 'sinusoids'. It reads alg"),
    (("train", "maml", "--size", "20", "--tasks", "sinusoids"), f"size is 20, {UNREAD} tasks 'sinusoids'. It reads "),
    (("train", "maml", "--filters", "2", "--tasks", "sinusoids"), f"filters is 2, {UNREAD} model 'mlp'. It reads "),
    (("train", "maml", "--filters", "2", "--model", "mlp"), f"filters is 2, {UNREAD} model 'mlp'. It reads algorithm"),
    (("train", "maml", "--memory", "store", "--estimator", "es:1:2"), f"memory is 'store', {UNREAD} estimator 'es:1:"),
    (("train", "maml", "--memory", "store", "--estimator", "pes:1:2"), f"memory is 'store', {UNREAD} estimator 'pes"),
    (("train", "maml", "--window", "2"), f"window is 2, {UNREAD} estimator 'second'. It reads algorithm, tasks"),
    (("train", "maml", "--estimator", "third"), "estimator is 'third', expected one of second, first, mixed, trunc"),
    (("train", "maml", "--estimator", "es:x:2"), "estimator is 'es:x:2', expected one of"),
    (("train", "maml", "--estimator", "es:-1:2"), "sigma is -1.0, expected a positive number"),
    (("train", "maml", "--memory", "revolve"), "memory is 'revolve', expected one of store, segments[:LENGTH], revol"),
    (("train", "reptile", "--estimator", "first"), "estimator is 'first', which reptile does not read. It reads algo"),
    (("train", "maml", "--tasks", "quadratics"), "data is 'quadratics', expected glyphs"),
    (("train", "l2l", "--tasks", "glyphs"), "tasks is 'glyphs', expected quadratics for l2l"),
    (("train", "l2l", "--optimizer", "adam"), "optimizer is 'adam', expected one of linear, lstm"),
    (("train", "dynamic_lm", "--tasks", "novels"), "tasks is 'novels', expected pydoc, wikipedia"),
    (("train", "dynamic_lm", "--estimator", "es:1:2"), "estimator is 'es:1:2', which does not go with dynamic_lm"),
    (("train", "dynamic_lm", "--dtype", "bfloat16"), "dtype is 'bfloat16', which does not go with dynamic_lm"),
    (("train", "maml", "--config", "nowhere.toml"), "nowhere.toml cannot be read as TOML"),
    (("evaluate", "nowhere"), "nowhere has no config.toml. Pass the folder of a run"),
    (("evaluate", "nowhere", "--part", "all"), "part is 'all', expected one of 'train', 'validation', 'test'"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=lambda value: " ".join(value)[:40] if value else "")
def test_errors_are_said_in_a_line(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*words)
    assert result.exit_code == 2
    assert f"Error: {message}" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "sets 'stepz', which is no setting. Known are algorithm, tasks"),
        ('steps = "many"', "sets steps to 'many', expected a value of type int"),
        ("steps = true", "sets steps to True, expected a value of type int"),
        ("= 3", "cannot be read as TOML"),
    ],
)
def test_a_file_with_something_else(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    result = call("train", "maml", "--config", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_not_changed(tmp_path: Path) -> None:
    assert train("maml", tmp_path).exit_code == 0
    assert "has a run in it. Pass --resume to go on with it, or another --out" in train("maml", tmp_path).output
    changed = call("train", "--out", str(tmp_path), "--resume", "--inner-lr", "0.3")
    assert changed.exit_code == 2
    assert "begun with other settings: inner_lr was 0.1, now 0.3. Resume it without them" in changed.output
    (tmp_path / "mine.toml").write_text("meta_lr = 0.5")
    file = call("train", "--out", str(tmp_path), "--resume", "--config", str(tmp_path / "mine.toml"))
    assert "begun with other settings: meta_lr was 0.001, now 0.5" in file.output
    (tmp_path / "checkpoints" / "step-00000004.safetensors").write_bytes(b"")
    damaged = call("train", "--out", str(tmp_path), "--resume", "--steps", "5")
    assert damaged.exit_code == 2
    assert "step-00000003.safetensors is older: pass damaged='previous'" in damaged.output
    previous = call("train", "--out", str(tmp_path), "--resume", "--steps", "5", "--damaged", "previous")
    assert "Ended after step 5" in previous.output


def test_a_cosine_is_not_stretched(tmp_path: Path) -> None:
    assert train("maml", tmp_path, "--schedule", "cosine").exit_code == 0
    longer = call("train", "--out", str(tmp_path), "--resume", "--steps", "8")
    assert "steps was 4, now 8, but the cosine of the learning rate ends at the first" in longer.output


def test_a_run_that_an_alarm_stopped_goes_on_as_it_advises(tmp_path: Path) -> None:
    assert train("maml", tmp_path, "--limit", "1e-9").exit_code == 2
    on = call("train", "--out", str(tmp_path), "--resume", "--alarm", "skip")
    assert "Ended after step 4" in on.output
    assert "4 steps were left out" in on.output


def test_a_diverging_run_ends_with_an_error(tmp_path: Path) -> None:
    result = train("maml", tmp_path, "--limit", "1e-9")
    assert result.exit_code == 2
    assert "Error: Outer step 1: The meta-gradient has the norm" in result.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_a_line(number: signal.Signals, tmp_path: Path) -> None:
    words = ["train", "maml", "--out", str(tmp_path), *IMAGES, "--steps", "100000", "--validate-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "funcmeta", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"Stopped by {number.name} after step " in text
    assert f"To go on: funcmeta train --out {tmp_path} --resume" in text
    assert not (tmp_path / "report.html").exists()
    step = len(log.read_text().splitlines()) - 1
    assert json.loads(log.read_text().splitlines()[-1]) == {"ended": number.name}
    assert [path.name for path in (tmp_path / "checkpoints").glob(f"*{step:08d}*")]
    resumed = call("train", "--out", str(tmp_path), "--resume", "--steps", str(step + 1))
    assert f"Ended after step {step + 1}" in resumed.output
