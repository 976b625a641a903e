"""The learned learning rate on MNIST-1D comes out as published, to every digit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = "published/mnist1d_learned_lr.py"
Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("policy", ["StoreAll()", "Segments()", "Revolve(12)"])
def test_the_figures_of_the_third_outer_step(policy: str, example: Load) -> None:
    script = example(SCRIPT)
    initial_lr = 0.15 if policy == "StoreAll()" else 1.5
    path = script.learn(initial_lr, 4, script.POLICIES[policy])
    assert " ".join(f"{figure:.4g}" for figure in path[3]) == script.PUBLISHED[initial_lr][3]


@pytest.mark.slow
def test_the_figures_of_the_whole_run(example: Load, tmp_path: Path) -> None:
    example(SCRIPT).main(out=tmp_path)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 12
    assert [row["ours"] for row in rows] == [row["published"] for row in rows]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
