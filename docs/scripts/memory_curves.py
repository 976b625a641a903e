"""Measure bytes and seconds of an unroll against its number of steps under each memory policy, for docs/memory.md.

Run it alone on the machine: ``python docs/scripts/memory_curves.py``. It writes docs/images/memory.png and the table
between the two marks in docs/memory.md. Numbers of steps may be given as arguments.
"""

import gc
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import funcmeta as fm
from funcmeta.testing import LiveBytes

DOCS = Path(__file__).parents[1]
MARKS = "<!-- measured by docs/scripts/memory_curves.py -->", "<!-- end of what was measured -->"
STEPS = [25, 50, 100, 200, 400]
REPEATS = 3
POLICIES = [fm.StoreAll(), fm.Segments(), fm.Revolve(12), fm.Revolve(4), fm.budget(100_000_000)]


def workload() -> tuple[fm.Problem, Any, fm.Task]:
    """Momentum SGD with learned rate and momentum on an MLP 784-256-256-10, batch 128, in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: F.cross_entropy(predict(batch[0]), batch[1]),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["momentum"]),
    )
    hypers = {name: torch.tensor(value, requires_grad=True) for name, value in (("lr", 0.05), ("momentum", 0.9))}
    batch = torch.randn(128, 784), torch.randint(10, (128,))
    return problem, {"params": fm.init_params(net), **hypers}, fm.Task(batch, batch)


def run(case: Any, steps: int, memory: Any) -> fm.Plan | None:
    """One unroll and its meta-gradient."""
    out = fm.unroll(*case, steps=steps, memory=memory)
    torch.autograd.grad(out.loss, fm.tree.leaves(case[1]))
    return out.info.memory


def figures(case: Any, steps: int) -> dict[str, tuple[float, float, fm.Plan]]:
    """Megabytes, seconds and plan of each policy; the timed runs take turns."""
    names = [str(memory) for memory in POLICIES]
    peaks, plans = {}, {}
    for name, memory in zip(names, POLICIES, strict=True):
        with LiveBytes() as live:
            plans[name] = run(case, steps, memory)
        peaks[name] = live.peak / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPEATS):
        for name, memory in zip(names, POLICIES, strict=True):
            gc.collect()
            began = time.perf_counter()
            run(case, steps, memory)
            seconds[name].append(time.perf_counter() - began)
    return {name: (peaks[name], statistics.median(seconds[name]), plans[name]) for name in names}


def table(measured: dict[int, dict[str, tuple[float, float, fm.Plan]]]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        f"Measured with torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads; "
        f"medians of {REPEATS} runs, bytes by `LiveBytes`.",
        "",
        "| policy | steps | evaluations a step | peak, MB | of `StoreAll` | seconds | of `StoreAll` |",
        "|---|---|---|---|---|---|---|",
    ]
    for steps, row in measured.items():
        most, least, _ = row["StoreAll()"]
        for name, (peak, seconds, plan) in row.items():
            lines.append(
                f"| `{name}` | {steps} | {plan.evaluations / steps:.2f} | {peak:.1f} | {peak / most:.3f} "
                f"| {seconds:.2f} | {seconds / least:.2f} |"
            )
    return "\n".join(lines)


def draw(measured: dict[int, dict[str, tuple[float, float, fm.Plan]]]) -> None:
    """Memory and time against steps, side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps = list(measured)
    for name in measured[steps[0]]:
        for place, axis in enumerate(axes):
            axis.loglog(steps, [row[name][place] for row in measured.values()], "o-", markersize=3, label=name)
    for axis, what in zip(axes, ("peak bytes, MB", "seconds"), strict=True):
        axis.set(xlabel="inner steps", ylabel=what)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(DOCS / "images" / "memory.png", dpi=150)


def main() -> None:
    """Measure, draw, and put the table into the page."""
    case, measured = workload(), {}
    for steps in [int(each) for each in sys.argv[1:]] or STEPS:
        measured[steps] = figures(case, steps)
        print(steps, {name: (round(row[0], 1), round(row[1], 2)) for name, row in measured[steps].items()}, flush=True)
    draw(measured)
    page = DOCS / "memory.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{table(measured)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
