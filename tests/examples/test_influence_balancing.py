"""Influence balancing: the derivatives in closed form, and who finds the optimum."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import funcmeta as fm

SCRIPT = "published/influence_balancing.py"
Load = Callable[[str], ModuleType]


def truncated(length: int) -> float:
    """(s₀ − 1) · Σ_k ds₀/dθ over the last steps at rest: θ in place i is felt C(k, i) / 2^k as much k steps later."""
    signs = [1] * 10 + [-1] * 13
    felt = sum(sign * math.comb(k, place) / 2**k for k in range(length) for place, sign in enumerate(signs))
    return (-6 * 0.5 - 1) * felt


def test_the_derivatives(example: Load) -> None:
    script = example(SCRIPT)
    found = script.slopes()
    assert found["exact"] == pytest.approx((8.0, 24.0), rel=1e-9)
    for length in (1, 10, 50):
        assert found[f"truncated, K={length}"] == pytest.approx((8.0, truncated(length)), rel=1e-9)
    for name, (_, slope) in found.items():
        assert round(slope, 2) == script.PUBLISHED[name]


def test_forward_mode_goes_the_right_way_and_truncation_the_wrong_one(example: Load) -> None:
    script = example(SCRIPT)
    right = script.learn("", fm.ForwardMode(), outer_steps=2, steps=100, lr=1e-2, carries=False)
    theta = 0.5
    for found in right[1:]:
        theta -= 1e-2 * 6 * (6 * theta + 1)
        assert found == pytest.approx(theta, abs=1e-6)
    wrong = script.learn("", fm.Truncated(1), outer_steps=200, steps=1, lr=1e-4, carries=True)
    assert wrong[-1] > 0.52


def test_persistent_strategies_go_the_right_way_and_others_the_wrong_one(example: Load) -> None:
    script = example(SCRIPT)
    options = {"outer_steps": 400, "steps": 1, "lr": 1e-4, "carries": True}
    assert script.learn("", fm.PersistentES(0.1, 500, 1), **options)[-1] < 0.0
    assert script.learn("", fm.EvolutionStrategies(0.1, 500), **options)[-1] > 0.55


@pytest.mark.slow
def test_the_whole_run(example: Load, tmp_path: Path) -> None:
    example(SCRIPT).main(out=tmp_path)
    ends = {name: path[-1] for name, path in json.loads((tmp_path / "figures.json").read_text())["theta"].items()}
    assert ends["forward mode, 100 steps"] == pytest.approx(-1 / 6, abs=1e-4)
    assert ends["PES, K=1"] == pytest.approx(-1 / 6, abs=0.02)
    assert ends["ES, K=1"] > 1.0
    assert ends["truncated, K=1"] > 1.0
    assert (tmp_path / "picture.png").stat().st_size > 10_000
