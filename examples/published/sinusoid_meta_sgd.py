"""Few-shot regression of sine curves by MAML and by Meta-SGD, which learns a learning rate for each weight too.

Li, Zhou, Chen and Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (arXiv:1707.09835), table 1, the
rows trained with 5 points: y = a · sin(ω x + φ), a in [0.1, 5], ω in [0.8, 1.2], φ in [0, π], a network 1-40-40-1, one
inner step, tested with 5, 10 and 20 points of new curves. The paper trains on 60,000 meta-batches of 4 curves; here
there are fewer and larger ones, which is faster, and the outer learning rate falls to 0.
"""

import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from _show import save

import funcmeta as fm

SHOTS = (5, 10, 20)
PUBLISHED = {"MAML": ((1.13, 0.18), (0.85, 0.14), (0.71, 0.12)), "Meta-SGD": ((0.90, 0.16), (0.63, 0.12), (0.50, 0.10))}
"""Mean squared error and half its 95 % interval, for each number of points."""
TASKS, TRAINING_SHOTS, OUTER_LR = 25, 5, 1e-3
REPEATS = 20  # draws of the points of each test curve

Row = dict[str, Any]


def sample(generator: torch.Generator, curves: int) -> Tensor:
    """Amplitude, frequency and phase of so many curves: [curves, 3, 1]."""
    low, high = torch.tensor([0.1, 0.8, 0.0]), torch.tensor([5.0, 1.2, math.pi])
    return torch.lerp(low, high, torch.rand(curves, 3, generator=generator))[..., None]


def points(curves: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The points of each curve at x, which is [curves, points]: x and y, both [curves, points, 1]."""
    amplitude, frequency, phase = curves.unbind(1)
    return x[..., None], (amplitude * torch.sin(frequency * x + phase))[..., None]


def draw_x(generator: torch.Generator, curves: int, shots: int) -> Tensor:
    """Places in [-5, 5]: [curves, shots]."""
    return 10 * torch.rand(curves, shots, generator=generator) - 5


def loss(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return F.mse_loss(predict(x), y)


def train(name: str, iterations: int) -> tuple[fm.algorithms.Algorithm, Any]:
    """The algorithm, and the initial parameters (and learning rates) it has learned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    build = fm.algorithms.maml.build if name == "MAML" else fm.algorithms.meta_sgd.build
    algorithm = build(net, loss, steps=1, lr=0.01, strategy="vmap")
    meta = algorithm.init()
    for rate in meta.get("lr", {}).values():
        nn.init.uniform_(rate, 0.005, 0.1)
    outer = torch.optim.Adam(fm.tree.leaves(meta), lr=OUTER_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, iterations)
    generator = torch.Generator().manual_seed(1)
    for _ in track(range(iterations), f"training by {name}"):
        curves = sample(generator, TASKS)
        support, query = (points(curves, draw_x(generator, TASKS, TRAINING_SHOTS)) for _ in range(2))
        outer.zero_grad()
        algorithm.loss(meta, fm.Task(support, query)).backward()
        outer.step()
        schedule.step()
    return algorithm, meta


def test(algorithm: fm.algorithms.Algorithm, meta: Any, shots: int, curves: int) -> tuple[float, float]:
    """Mean squared error on new curves after one step on so many points of each, and half its 95 % interval."""
    generator = torch.Generator().manual_seed(2)
    grid = torch.linspace(-5, 5, 100).expand(REPEATS, 100)
    errors = []
    for curve in sample(generator, curves):
        same = curve.expand(REPEATS, 3, 1)
        task = fm.Task(points(same, draw_x(generator, REPEATS, shots)), points(same, grid))
        with torch.no_grad():
            errors.append(algorithm.loss(meta, task))
    return torch.stack(errors).mean().item(), 1.96 * torch.stack(errors).std().item() / math.sqrt(curves)


def draw(rows: list[Row], trained: dict[str, tuple[fm.algorithms.Algorithm, Any]]) -> Figure:
    """The table as bars, and one curve as it is learned from 5 points."""
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    bars, plane = picture.subplots(1, 2)
    for index, name in enumerate(PUBLISHED):
        errors, margins = zip(*[row["ours"] for row in rows if row["algorithm"] == name], strict=True)
        places = [place + 0.36 * index for place in range(len(SHOTS))]
        bars.bar(places, errors, 0.34, yerr=margins, label=f"{name}, ours")
        published = [error for error, _ in PUBLISHED[name]]
        bars.plot(places, published, "k_", markersize=18, label="published" if index else None)
    bars.set_xticks([place + 0.18 for place in range(len(SHOTS))], [f"{shots} points" for shots in SHOTS])
    bars.set(ylabel="mean squared error", title="new curves, trained with 5 points")
    bars.legend(frameon=False)
    generator = torch.Generator().manual_seed(5)
    curve = sample(generator, 1)
    x = torch.linspace(-5, 5, 100)
    task = fm.Task(points(curve, draw_x(generator, 1, 5)), None)
    plane.plot(x, points(curve, x[None])[1].flatten(), "k", linewidth=1, label="the curve")
    plane.plot(*(each.flatten() for each in task.support), "ko", label="5 points")
    for name, (algorithm, meta) in trained.items():
        predict = algorithm.adapt(meta, fm.Task(tuple(each[0] for each in task.support), None))
        plane.plot(x, predict(x[:, None]).detach().flatten(), label=name)
    plane.set_title("one curve after one step")
    plane.legend(frameon=False)
    return picture


def main(
    quick: Annotated[bool, typer.Option(help="A short training, a small test.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("sinusoid_meta_sgd"),
) -> None:
    """Train MAML and Meta-SGD on sine curves, and compare with the published table."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    iterations, curves = (500, 50) if quick else (20_000, 500)
    trained = {name: train(name, iterations) for name in PUBLISHED}
    rows: list[Row] = []
    for name, published in PUBLISHED.items():
        for shots, figures in zip(SHOTS, published, strict=True):
            ours = test(*trained[name], shots, curves)
            rows.append({"algorithm": name, "shots": shots, "ours": ours, "published": figures})
            print(
                "{:9} {:2} points  ours: {:.2f} ± {:.2f}  published: {:.2f} ± {:.2f}".format(
                    name, shots, *ours, *figures
                )
            )
    ratios = [second["ours"][0] / first["ours"][0] for first, second in zip(rows[:3], rows[3:], strict=True)]
    print("Meta-SGD / MAML:", " ".join(f"{ratio:.2f}" for ratio in ratios))
    seconds = time.perf_counter() - began
    save(out, {"iterations": iterations, "rows": rows, "ratios": ratios, "seconds": seconds}, draw(rows, trained))


if __name__ == "__main__":
    typer.run(main)
