"""Read characters of unknown alphabets from one example each, after training on 136 or 156 other characters.

The minimal split of Lake, Salakhutdinov and Tenenbaum 2015 (doi:10.1126/science.aab3050): train on the small background
set 1 or 2, test on the 20 one-shot runs, each with 20 characters of one alphabet. Nearest neighbours by the modified
Hausdorff distance err in 38.75 % (the demo of github.com/brendenlake/omniglot). Here MAML, its first order, Reptile and
Meta-SGD train the same network. Its normalization is within each image, so that no test image sees another.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from _show import save

import funcmeta as fm

WAYS, FILTERS, TASKS = 20, 32, 8
HAUSDORFF = 0.3875


class Method(NamedTuple):
    """An algorithm for a number of inner steps, those numbers, the optimizer outside, and how a task is given to it."""

    build: Callable[[nn.Module, int], fm.algorithms.Algorithm]
    steps: int
    test_steps: int
    outer: Callable[[list[Tensor]], torch.optim.Optimizer]
    queries: int = 1
    given: Callable[[fm.Task], fm.Task] = lambda tasks: tasks


def adam(leaves: list[Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of those that differentiate a query loss."""
    return torch.optim.Adam(leaves, lr=2e-3)


def maml(net: nn.Module, steps: int) -> fm.algorithms.Algorithm:
    """Exact meta-gradients of the initial parameters."""
    return fm.algorithms.maml.build(net, loss, steps=steps, lr=0.4, strategy="vmap")


def first_order_maml(net: nn.Module, steps: int) -> fm.algorithms.Algorithm:
    """The same with inner gradients as constants; it wants several small steps, for one of 0.4 teaches it nothing."""
    return fm.algorithms.maml.build(net, loss, steps=steps, lr=0.1, strategy="vmap", estimator=fm.FirstOrder())


def reptile(net: nn.Module, steps: int) -> fm.algorithms.Algorithm:
    """Towards where training on more examples ends."""
    return fm.algorithms.reptile.build(net, loss, steps=steps, optimizer=fm.optim.sgd(0.1), strategy="vmap")


def meta_sgd(net: nn.Module, steps: int) -> fm.algorithms.Algorithm:
    """A learning rate for each weight, learned with the initial parameters."""
    return fm.algorithms.meta_sgd.build(net, loss, steps=steps, lr=0.4, strategy="vmap")


def jittered(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image under a slight affine map of its own, against overfitting 20 drawings of each character."""
    images, labels = batch
    flat = images.flatten(0, 1)
    maps = torch.eye(2, 3) + 0.1 * torch.randn(len(flat), 2, 3, generator=generator) * torch.tensor([1, 1, 0.5])
    grid = F.affine_grid(maps, list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, align_corners=False).view_as(images), labels


def one_example_a_step(tasks: fm.Task) -> fm.Task:
    """The same examples without a query: each inner step sees another example of every class."""
    images, labels = (torch.cat(pair, dim=1) for pair in zip(tasks.support, tasks.query, strict=True))

    def support(step: int) -> tuple[Tensor, Tensor]:
        rows = slice(WAYS * step, WAYS * (step + 1))
        return images[:, rows], labels[:, rows]

    return fm.Task(support, None)


METHODS = {
    "MAML": Method(maml, 1, 1, adam),
    "first-order MAML": Method(first_order_maml, 3, 3, adam),
    "Reptile": Method(
        reptile, 5, 20, lambda leaves: torch.optim.SGD(leaves, lr=1.0), queries=4, given=one_example_a_step
    ),
    "Meta-SGD": Method(meta_sgd, 1, 1, adam),
}


def network() -> nn.Module:
    """Four convolutions that halve the image, each normalized over all of an image, and a linear layer of zeros."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, FILTERS, FILTERS, FILTERS):
        convolution = nn.Conv2d(channels, FILTERS, 3, stride=2, padding=1)
        layers += [convolution, nn.GroupNorm(1, FILTERS), nn.ReLU()]
    head = nn.Linear(4 * FILTERS, WAYS)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.Flatten(), head)


def loss(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    images, labels = batch
    return F.cross_entropy(predict(images), labels)


def train(name: str, sampler: fm.tasks.FewShot, iterations: int) -> tuple[Any, list[float]]:
    """What was learned, and the losses on the way; the outer learning rate falls to 0."""
    method = METHODS[name]
    algorithm = method.build(network(), method.steps)
    meta = algorithm.init()
    outer = method.outer(fm.tree.leaves(meta))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, iterations)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for iteration in track(range(iterations), f"training by {name}"):
        support, query, _ = sampler.sample_batch(iteration, TASKS)
        tasks = fm.Task(jittered(support, generator), jittered(query, generator))
        outer.zero_grad()
        value = algorithm.loss(meta, method.given(tasks))
        value.backward()
        outer.step()
        schedule.step()
        losses.append(value.item())
    return meta, losses


def errors(name: str, meta: Any, runs: list[fm.Task]) -> list[float]:
    """The share of wrong answers in each run; every test image is read by itself."""
    method = METHODS[name]
    algorithm = method.build(network(), method.test_steps)
    wrong = []
    for run in runs:
        images, labels = run.query
        answers = algorithm.adapt(meta, run)(images).argmax(1)
        wrong.append((answers != labels).float().mean().item())
    return wrong


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over the runs and half its 95 % interval."""
    shares = torch.tensor(values)
    return shares.mean().item(), 1.96 * shares.std().item() / math.sqrt(len(values))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Errors beside the baseline's, and the losses of the training."""
    picture = Figure(figsize=(10, 3.8), layout="constrained")
    bars, curves = picture.subplots(1, 2)
    for place, row in enumerate(rows):
        bars.bar(place, 100 * row["error"], yerr=100 * row["margin"], color=f"C{place}")
        window = max(1, len(row["losses"]) // 50)
        smooth = torch.tensor(row["losses"]).unfold(0, window, window).mean(1)
        curves.plot([window * index for index in range(len(smooth))], smooth, color=f"C{place}", label=row["method"])
    bars.axhline(100 * HAUSDORFF, color="k", linestyle="--", label="modified Hausdorff distance")
    bars.legend(frameon=False)
    bars.set_xticks(range(len(rows)), [row["method"] for row in rows])
    bars.set(ylabel="wrong, %", ylim=(0, 100), title="20 one-shot runs")
    curves.set(xlabel=f"iterations of {TASKS} tasks", ylabel="outer loss", title="training")
    curves.legend(frameon=False)
    return picture


def main(
    data: Annotated[Path, typer.Argument(help="Folder with all_runs.zip and images_background_small1.zip.")],
    background: Annotated[str, typer.Option(help="Which set to train on: small1 or small2.")] = "small1",
    iterations: Annotated[int, typer.Option(help="Outer iterations of each method.")] = 1000,
    quick: Annotated[bool, typer.Option(help="5 iterations, which show that it runs and not much more.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("omniglot_minimal"),
) -> None:
    """Train four algorithms on a small background set, and test them on the one-shot runs."""
    torch.set_num_threads(1)
    archive = data / f"images_background_{background}.zip"
    runs = fm.tasks.omniglot_runs(data)
    sampler = fm.tasks.omniglot(archive, WAYS, shots=1, queries=1, split="background", rotations=True)
    rows = []
    for name, method in METHODS.items():
        began = time.perf_counter()
        meta, losses = train(name, replace(sampler, queries=method.queries), 5 if quick else iterations)
        seconds = time.perf_counter() - began
        by_run = errors(name, meta, runs)
        error, margin = interval(by_run)
        print(f"{name:17} error {100 * error:.1f} ± {100 * margin:.1f} % after {seconds:.0f} s")
        rows.append(
            {"method": name, "error": error, "margin": margin, "seconds": seconds, "by_run": by_run, "losses": losses}
        )
    print(f"modified Hausdorff distance {100 * HAUSDORFF} %, by chance 95 %")
    save(out, {"background": background, "published": HAUSDORFF, "rows": rows}, draw(rows))


if __name__ == "__main__":
    typer.run(main)
