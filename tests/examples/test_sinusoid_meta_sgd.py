"""MAML and Meta-SGD on sine curves: the published table from the whole run, its order from a short one."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = "published/sinusoid_meta_sgd.py"
Load = Callable[[str], ModuleType]


def run(example: Load, out: Path, *, quick: bool) -> dict[str, Any]:
    example(SCRIPT).main(quick=quick, out=out)
    assert (out / "picture.png").stat().st_size > 10_000
    figures: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return figures


def test_the_curves_are_those_of_the_paper(example: Load) -> None:
    script = example(SCRIPT)
    generator = torch.Generator().manual_seed(0)
    curves = script.sample(generator, 4000)
    amplitude, frequency, phase = curves.squeeze(-1).T
    for values, low, high in ((amplitude, 0.1, 5.0), (frequency, 0.8, 1.2), (phase, 0.0, torch.pi)):
        assert values.min() >= low
        assert values.max() <= high
        torch.testing.assert_close(values.mean(), torch.tensor((low + high) / 2), rtol=0.05, atol=0)
    x, y = script.points(curves, script.draw_x(generator, 4000, 7))
    assert x.shape == y.shape == (4000, 7, 1)
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    assert y[3, 2] == pytest.approx((amplitude[3] * torch.sin(frequency[3] * x[3, 2] + phase[3])).item(), abs=1e-5)


def test_meta_sgd_is_ahead_after_a_short_training(example: Load, tmp_path: Path) -> None:
    figures = run(example, tmp_path, quick=True)
    assert len(figures["rows"]) == 6
    assert all(row["ours"][0] < 3.2 for row in figures["rows"])
    assert all(ratio < 0.85 for ratio in figures["ratios"])


@pytest.mark.slow
def test_the_whole_run_gives_the_published_table(example: Load, tmp_path: Path) -> None:
    figures = run(example, tmp_path, quick=False)
    for row in figures["rows"]:
        error, margin = row["published"]
        assert row["ours"][0] <= error + margin, row
    assert all(ratio < 0.92 for ratio in figures["ratios"])
