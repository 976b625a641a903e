"""Measure bias and variance of meta-gradients in the training of an LSTM optimizer, for docs/learned.md.

Run it as ``python docs/scripts/horizon.py``; it takes minutes. The optimizer is meta-trained on quadratics by the first
batches of examples/published/l2l.py. Then ``horizon_report`` holds estimators against the exact gradient by its
weights, of one training on one function that it has not seen, from 20 random starts. It writes docs/horizon.json,
docs/images/horizon.png and the table between the two marks in docs/learned.md.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "published"))
from l2l import Point, quadratic

import funcmeta as fm
from funcmeta.algorithms import l2l

DOCS = Path(__file__).parents[1]
MARKS = "<!-- measured by docs/scripts/horizon.py -->", "<!-- end of what was measured -->"
BATCHES, TASKS, HELD_OUT = 20, 64, 10**6
STARTS = 20
HORIZONS = [5, 20, 50, 100]
ESTIMATORS = {
    "FirstOrder()": fm.FirstOrder(),
    "Truncated(20)": fm.Truncated(20),
    "Truncated(20, FirstOrder())": fm.Truncated(20, fm.FirstOrder()),
    "EvolutionStrategies(0.01, 50)": fm.EvolutionStrategies(sigma=0.01, pairs=50),
    "PersistentES(0.01, 50, 20)": fm.PersistentES(sigma=0.01, pairs=50, length=20),
}


def start(seed: int) -> dict[str, torch.Tensor]:
    """Where a training begins: standard normal."""
    return {"theta": torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def trained() -> tuple[l2l.L2L, Any, fm.Task]:
    """The algorithm, its meta some way into the training, and a function to measure on."""
    torch.manual_seed(0)
    tasks = fm.tasks.quadratics(dtype=torch.float64)
    algorithm = l2l.build(fm.learned.lstm().double(), Point(10).double(), quadratic, steps=100, start=start)
    meta = algorithm.init()
    outer = torch.optim.Adam(meta["optimizer"].values(), lr=3e-3)
    for batch in range(BATCHES):
        values = []
        for value in algorithm.windows(meta, tasks.sample_batch(seed=2 * batch + 1, tasks=TASKS), seed=batch):
            outer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(meta["optimizer"].values(), 1.0)
            outer.step()
            values.append(f"{value.item():.1f}")
        print(f"batch {batch}, losses of the windows: {', '.join(values)}", flush=True)
    return algorithm, meta, tasks.sample(seed=HELD_OUT)


def norms(algorithm: l2l.L2L, meta: Any, task: fm.Task, steps: int) -> list[float]:
    """Of the exact gradient, for each start, which are those of the report."""
    found = []
    for seed in [fm.rng.fold(0, index) for index in range(STARTS)]:
        loss = fm.unroll(algorithm.problem, meta, task, steps=steps, seed=seed).loss
        found.append(fm.tree.norm(torch.autograd.grad(loss, fm.tree.leaves(meta))).item())
    return found


def table(report: fm.HorizonReport, sizes: dict[int, list[float]]) -> str:
    """The figures as a table in Markdown."""
    lines = [f"| {' | '.join(['', *[f'{steps} steps' for steps in sizes]])} |", "|---" * (len(sizes) + 1) + "|"]
    norm = [f"{statistics.median(found):,.0f}, {max(found):,.0f}" for found in sizes.values()]
    lines.append(f"| {' | '.join(['norm of the exact gradient: median, largest', *norm])} |")
    for name in ESTIMATORS:
        cells = [
            f"{row.bias:.3f} ± {row.bias_error:.3f}, {row.variance:.2g}, {row.cosine:.2f}"
            for row in report.rows
            if row.name == name
        ]
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, draw, and put the table into the page."""
    torch.set_num_threads(1)
    algorithm, meta, task = trained()
    report = fm.horizon_report(algorithm.problem, meta, task, horizons=HORIZONS, estimators=ESTIMATORS, repeats=STARTS)
    sizes = {steps: norms(algorithm, meta, task, steps) for steps in HORIZONS}
    print(report)
    report.plot(DOCS / "images" / "horizon.png")
    figures = {"batches": BATCHES, "tasks": TASKS, "torch": torch.__version__, "norms": sizes} | report.to_dict()
    (DOCS / "horizon.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = DOCS / "learned.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{table(report, sizes)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
