"""Curves for TensorBoard, read back by its own reader."""

import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import adam, few_shot

import funcmeta as fm
from funcmeta.training import Folder, Mean, Record, fit, tensorboard

NAMES = {
    *("train/loss", "train/gradient_norm", "train/learning_rate", "train/alarms", "train/seconds_per_step"),
    *("validation/mean", "validation/margin"),
}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_the_curves_are_the_records(tmp_path: Path) -> None:
    case = few_shot()
    with tensorboard(tmp_path / "curves") as watch:
        fitted = fit(case.algorithm, case.tasks, adam, steps=4, watch=[watch], **case.options)
    found = curves(tmp_path / "curves")
    assert set(found) == NAMES
    steps = [record for record in fitted.records if record.step]
    expected = {
        "train/loss": [(record.step, record.loss) for record in steps],
        "train/gradient_norm": [(record.step, record.norm) for record in steps],
        "train/seconds_per_step": [(record.step, record.seconds) for record in steps],
        "train/learning_rate": [(record.step, record.rate) for record in fitted.records],
        "train/alarms": [(record.step, 0.0) for record in fitted.records],
        "validation/mean": [(each.step, each.validation.value) for each in fitted.records if each.validation],
        "validation/margin": [(each.step, each.validation.margin) for each in fitted.records if each.validation],
    }
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name
    assert [step for step, _ in found["validation/mean"]] == [0, 3, 4]


def record(step: int, alarms: int = 0) -> Record:
    return Record(step, 1.0 / step, 2.0, 0.1, 0.5, alarms=alarms)


def test_a_resumed_run_does_not_double_its_curves(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as watch:
        for step in range(1, 8):
            watch(record(step, step // 2))
    with tensorboard(tmp_path) as watch:  # killed at 7, with a checkpoint at 5
        for step in range(6, 10):
            watch(record(step, 2 + step % 6))
    found = curves(tmp_path)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 10))
    assert [value for _, value in found["train/alarms"]] == [0, 1, 1, 2, 2, 2, 3, 4, 5]


def test_what_is_not_finite_is_left_out_and_what_is_large_is_taken(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as watch:
        watch(Record(1, None, None, 0.1, 0.5, "exploded", Mean(1e308, math.inf), alarms=1))
        watch(Record(2, 1e308, -1e308, math.inf, 0.5))
    found = curves(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [2]
    assert [step for step, _ in found["train/alarms"]] == [1, 2]


def test_a_run_that_begins_anew_hides_the_one_of_before(tmp_path: Path) -> None:
    for number in (3, 2):
        with tensorboard(tmp_path) as watch:
            watch(Record(0, None, None, 0.1, 0.0, None, Mean(1.0, 0.5)))
            for step in range(1, number + 1):
                watch(record(step, step))
    found = curves(tmp_path)
    assert [value for _, value in found["train/alarms"]] == [0, 1, 2]
    assert found["validation/mean"] == [(0, 1.0)]


def test_it_follows_a_run_that_is_stopped_and_taken_up(tmp_path: Path) -> None:
    case = few_shot()
    for steps in (3, 5):
        with tensorboard(tmp_path / "curves") as watch:
            folder = Folder(tmp_path / "run", resume=True)
            fit(case.algorithm, case.tasks, adam, steps=steps, folder=folder, watch=[watch], **case.options)
    found = curves(tmp_path / "curves")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for points in found.values() for _, value in points)


def test_nothing_is_made_without_a_record_and_a_bad_folder_is_an_error(tmp_path: Path) -> None:
    with tensorboard(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(fm.SaveError, match=r"file/curves could not be written: Not a directory"),
        tensorboard(tmp_path / "file" / "curves") as watch,
    ):
        watch(record(1))


def test_tensorboard_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = r'need tensorboard, which the extra tensorboard brings.*"\.\[tensorboard\]"'
    with pytest.raises(fm.MissingExtraError, match=message), tensorboard(tmp_path):
        pass
