"""The learned optimizer's example: its quick form, and what it made."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import funcmeta as fm

SCRIPT = "published/l2l.py"
Load = Callable[[str], ModuleType]


def test_the_digits_are_batches_of_their_own(example: Load) -> None:
    digits = example(SCRIPT).Digits(batch_size=8)
    x, y = digits.sample_batch(seed=1, tasks=3).support(0)
    assert x.shape == (3, 8, 40)
    assert y.shape == (3, 8)
    again, _ = digits.sample_batch(seed=1, tasks=3).support(0)
    later, _ = digits.sample_batch(seed=1, tasks=3).support(1)
    assert torch.equal(x, again)
    assert not torch.equal(x, later)
    assert not torch.equal(x[0], x[1])


def test_one_iteration_trains_and_saves(example: Load, tmp_path: Path) -> None:
    script = example(SCRIPT)
    course = script.quadratics(4, 20)
    optimizer = script.train(course, 2, 4, 3e-3, 0)
    fm.learned.save(optimizer, tmp_path / "lstm.safetensors")
    assert fm.learned.load(tmp_path / "lstm.safetensors").kind == "lstm"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["quadratics", "digits"])
def test_the_quick_form(task: str, example: Load, tmp_path: Path) -> None:
    script = example(SCRIPT)
    script.main(task=script.Name(task), quick=True, out=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["optimizer"] for row in figures["rows"]} == {"LSTM", "SGD", "momentum", "RMSprop", "Adam"}
    assert (tmp_path / "picture.png").stat().st_size > 10_000
