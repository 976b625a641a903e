"""Measure what each estimator costs and how far it is from the exact meta-gradient, for docs/estimators.md.

Run it alone on the machine: ``python docs/scripts/estimator_costs.py``. It writes the two tables between the marks in
docs/estimators.md.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm

PAGE = Path(__file__).parents[1] / "estimators.md"
MARKS = "<!-- measured by docs/scripts/estimator_costs.py -->", "<!-- end of what was measured -->"

HYPERS = {
    "`Reverse()`": fm.Reverse(),
    "`MixedMode()`": fm.MixedMode(),
    "`ForwardMode()`": fm.ForwardMode(),
    "`FirstOrder()`": fm.FirstOrder(),
    "`Truncated(10)`": fm.Truncated(10),
    "`EvolutionStrategies(0.01, pairs=10)`": fm.EvolutionStrategies(0.01, pairs=10),
    "`PersistentES(0.01, pairs=10, length=10)`": fm.PersistentES(0.01, pairs=10, length=10),
}
STARTS = {
    "`Reverse()`": fm.Reverse(),
    "`MixedMode()`": fm.MixedMode(),
    "`FirstOrder()`": fm.FirstOrder(),
    "`Reptile()`": fm.Reptile(),
    "`EvolutionStrategies(0.01, pairs=10, chunk=1)`": fm.EvolutionStrategies(0.01, pairs=10, chunk=1),
}


def cross_entropy(meta: Any, predict: Any, batch: Any) -> Tensor:
    """The loss of a classifier."""
    x, y = batch
    return F.cross_entropy(predict(x), y)


def hypers() -> fm.Comparison:
    """Learning rate and momentum, by the sum of the losses of 60 steps of an MLP 784-64-5 on 65 drawings."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 5))
    problem = fm.inner_problem(
        net,
        cross_entropy,
        optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["momentum"]),
        trajectory_loss=True,
    )
    x, y = fm.tasks.glyphs(ways=5, shots=13, queries=1).sample(seed=0).support
    meta = {name: torch.tensor(value, requires_grad=True) for name, value in (("lr", 0.1), ("momentum", 0.8))}
    return fm.compare(problem, meta, fm.Task((x, y), None), steps=60, estimators=HYPERS)


def starts() -> fm.Comparison:
    """The initial parameters of four convolutions with 16 channels, by 5 steps on 5-way 1-shot drawings."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.GELU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))
    problem = fm.inner_problem(net, cross_entropy, optimizer=fm.optim.sgd(0.1))
    task = fm.tasks.glyphs(ways=5, shots=1, queries=15).sample(seed=0)
    return fm.compare(problem, {"params": fm.init_params(net)}, task, steps=5, estimators=STARTS)


def table(comparison: fm.Comparison) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| estimator | cosine | norm ratio | relative error "
        "| time, of `Reverse` | memory, of `Reverse` | evaluations |",
        "|---|---|---|---|---|---|---|",
    ]
    exact = comparison.rows[0]
    for row in comparison.rows:
        error = f"{row.relative_error:.0e}" if row.relative_error < 1e-3 else f"{row.relative_error:.2f}"
        lines.append(
            f"| {row.name} | {row.cosine:.2f} | {row.norm_ratio:.2f} | {error} | {row.seconds / exact.seconds:.2f} "
            f"| {row.peak_bytes / exact.peak_bytes:.2f} | {row.evaluations} |"
        )
    return lines


def main() -> None:
    """Measure, and put the tables into the page."""
    lines = [
        f"Measured with torch {torch.__version__} on {platform.machine()}, {torch.get_num_threads()} threads. "
        "Times are medians of interleaved runs, memory is the peak of live tensors."
    ]
    for made in (hypers, starts):
        comparison = made()
        exact = comparison.rows[0]
        lines += [
            "",
            f"{made.__doc__} `Reverse` takes {1000 * exact.seconds:.0f} ms and {exact.peak_bytes / 1e6:.1f} MB.",
            "",
            *table(comparison),
        ]
    print("\n".join(lines))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
