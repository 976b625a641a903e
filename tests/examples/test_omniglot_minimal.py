"""The minimal split of Omniglot: learned nearest neighbours against the published baseline."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from real_data import OMNIGLOT, needs

import funcmeta as fm

SCRIPT = "published/omniglot_minimal.py"
Load = Callable[[str], ModuleType]

published = needs(OMNIGLOT / "all_runs.zip")


def run(example: Load, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    example(SCRIPT).main(OMNIGLOT, out=out, **options)
    assert (out / "picture.png").stat().st_size > 10_000
    rows = json.loads((out / "figures.json").read_text())["rows"]
    assert all(len(row["by_run"]) == 20 for row in rows)
    return {row["method"]: row for row in rows}


def test_no_image_sees_another(example: Load) -> None:
    net = example(SCRIPT).network()
    torch.nn.init.normal_(net[-1].weight)
    images = torch.rand(6, 1, 28, 28)
    together = net(images)
    assert together.shape == (6, 20)
    torch.testing.assert_close(together, torch.cat([net(image[None]) for image in images]), rtol=1e-5, atol=1e-5)


def test_each_step_of_reptile_sees_every_class_once(example: Load) -> None:
    tasks = fm.tasks.glyphs(ways=20, shots=1, queries=4, size=16).sample_batch(seed=0, tasks=2)
    given = example(SCRIPT).one_example_a_step(tasks)
    assert given.query is None
    assert torch.equal(given.support(0)[0], tasks.support[0])
    for step in range(5):
        images, labels = given.support(step)
        assert images.shape == (2, 20, 1, 16, 16)
        assert labels.tolist() == [list(range(20))] * 2
    assert torch.equal(given.support(4)[0], tasks.query[0][:, 60:])


@published
def test_a_short_training_is_ahead_of_chance(example: Load, tmp_path: Path) -> None:
    rows = run(example, tmp_path, quick=True)
    assert list(rows) == ["MAML", "first-order MAML", "Reptile", "Meta-SGD"]
    assert all(row["error"] < 0.9 for row in rows.values())


@pytest.mark.slow
@published
def test_the_whole_run_is_ahead_of_the_published_baseline(example: Load, tmp_path: Path) -> None:
    rows = run(example, tmp_path)
    assert rows["MAML"]["error"] < 0.3875
    assert rows["Meta-SGD"]["error"] < 0.3875
