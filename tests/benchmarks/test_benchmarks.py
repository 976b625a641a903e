"""Every workload runs in a tiny size: contestants agree on the gradient, and the tables are written. No times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report
import torch
import w1_sinusoid
from contest import Bar, Disagreement, Result, Row, Settings, check_agreement, fastest, race, ratio
from few_shot import funcmeta
from machine import Traffic, floor
from rich.console import Console
from workloads import WORKLOADS, load

import funcmeta as fm

MACHINE = {
    "processor": "2 cores",
    "versions": {"torch": "2"},
    "operations_per_second": 1e9,
    "bytes_per_second": 1e9,
}


def result(**changes: Any) -> Result:
    rows = [Row("funcmeta eager", [1.0, 2.0, 3.0]), Row("other", [8.0], 10, 2_000_000)]
    bars = [Bar("one / other", 0.25, 0.5), Bar("wish", 0.75, 0.5, beyond=True), Bar("absent", None, 1.0)]
    return Result(**{"workload": "W1", "title": "t", "rows": rows, "bars": bars, "machine": MACHINE, **changes})


@pytest.mark.parametrize("name", WORKLOADS)
def test_contestants_agree(name: str) -> None:
    found = load(name).measure(Settings(quick=True), MACHINE)
    assert found.workload == name
    assert [row.name for row in found.rows if row.name.startswith("funcmeta")]
    assert all(row.seconds or row.live_bytes or row.resident_bytes for row in found.rows)
    assert Result.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_another_gradient_is_found_out() -> None:
    case = w1_sinusoid.build(quick=True)
    runs = {"exact": funcmeta(case), "first order": funcmeta(case, estimator=fm.FirstOrder())}
    with pytest.raises(Disagreement, match=r"first order differs from exact by .*, allowed 1.0e-04"):
        check_agreement(runs, "exact")


def test_a_gradient_that_is_not_finite_is_found_out() -> None:
    runs = {"exact": lambda: [torch.ones(2)], "broken": lambda: [torch.tensor([1.0, torch.nan])]}
    with pytest.raises(Disagreement, match="broken differs from exact by nan"):
        check_agreement(runs, "exact")


def test_contestants_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or [] for name in "ab"}
    rows = race(runs, Settings(seconds=0.0))
    assert order == list("aabb") * 5
    assert [len(row.seconds) for row in rows] == [5, 5]


def test_bars_say_whether_they_are_reached() -> None:
    assert [bar.verdict for bar in result().bars] == ["reached", "not reached", "not measured"]
    assert fastest(result().rows, "funcmeta", "other") == 2.0
    assert fastest(result().rows, "jax") is None
    assert ratio(1.0, None) is None
    assert ratio(1.0, 4.0) == 0.25


def test_the_floor_counts_operations_and_bytes() -> None:
    left, right = torch.randn(2, 3), torch.randn(3, 4)
    found = floor(lambda: (left @ right).view(8), MACHINE)
    assert found.operations == 2 * 2 * 3 * 4
    assert found.traffic == 4 * (6 + 12 + 8)
    with Traffic() as traffic:
        left.add_(1.0)
        left.mT[0]
    assert traffic.bytes == 4 * (6 + 6)


def test_results_are_written(tmp_path: Path) -> None:
    page = tmp_path / report.PAGE
    page.write_text("before\n<!-- W1 begins -->old<!-- W1 ends -->\nafter\n")
    report.save({"W1": result()}, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- W1 begins -->\n\nMeasured on 2 cores")
    assert text.endswith("<!-- W1 ends -->\nafter\n")
    assert "old" not in text
    assert "| funcmeta eager | 1.00 | 2 s | ± 50% | 3 |  |" in text
    assert "| other | 4.00 | 8 s |  | 1 | 2 MB |" in text
    assert "| wish | 0.75 | 0.5 (beyond) | not reached |" in text
    assert Result.from_dict(json.loads((tmp_path / report.DATA).read_text())["W1"]) == result()
    assert (tmp_path / "images" / "benchmark_w1.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"performance.md has no place for W2. Put the lines"):
        report.save({"W2": result(workload="W2")}, tmp_path)


def test_results_are_shown() -> None:
    console = Console(record=True, width=120)
    report.show(result(notes=["a remark"]), console)
    text = console.export_text()
    assert "one / other: 0.25, at most 0.5: reached" in text
    assert "a remark" in text


def test_tiny_sizes_are_not_published(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "leave out --quick or --output" in done.stderr
