"""An optimizer that is learned with its initial parameters, beside MAML, on characters from one example each.

Ravi and Larochelle 2017, "Optimization as a Model for Few-Shot Learning": the update of each weight is an LSTM cell,
θ' = f θ − i ∇ℓ, whose gates f and i see gradient, loss and weight. MAML learns the initial parameters alone and takes
steps of SGD. All begin with the same network, see the same tasks and take as many inner steps. In meta-training and in
the test the network normalizes by the batch that it sees.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))
from _show import save

import funcmeta as fm
from funcmeta.algorithms import Algorithm, maml, meta_lstm

WAYS, STEPS, TASKS, OUTER_LR, SGD_LR = 5, 5, 4, 3e-3, 0.1
QUICK, WHOLE = (60, 100), (600, 400)
"""Iterations of training, and tasks to test on."""


def network(filters: int = 8) -> nn.Module:
    """Four convolutions that halve 28 x 28 pixels to 2 x 2, and a linear layer."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * filters, WAYS))


def loss(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    images, labels = batch
    return F.cross_entropy(predict(images), labels)


def first_order_maml(net: nn.Module) -> Algorithm:
    """Inner gradients as constants."""
    return maml.build(net, loss, steps=STEPS, lr=SGD_LR, estimator=fm.FirstOrder(), strategy="vmap")


def exact_maml(net: nn.Module) -> Algorithm:
    """Through the inner gradients."""
    return maml.build(net, loss, steps=STEPS, lr=SGD_LR, strategy="vmap")


def lstm(net: nn.Module) -> Algorithm:
    """First order, as in the paper."""
    return meta_lstm.build(net, loss, steps=STEPS, strategy="vmap")


METHODS: dict[str, Callable[[nn.Module], Algorithm]] = {
    "first-order MAML": first_order_maml,
    "MAML": exact_maml,
    "meta-LSTM": lstm,
}


def sampler(data: str, path: Path | None, split: str) -> fm.tasks.Sampler:
    """Tasks of one example and 15 queries a class."""
    if data == "glyphs":
        return fm.tasks.glyphs(ways=WAYS, shots=1, queries=15, split=split)
    if data != "omniglot" or path is None:
        raise typer.BadParameter("--data is glyphs or omniglot, and omniglot needs --path, the folder of its archives.")
    return fm.tasks.omniglot(path, ways=WAYS, shots=1, queries=15, split=split, rotations=split == "train")


def train(name: str, algorithm: Algorithm, tasks: fm.tasks.Sampler, iterations: int) -> Any:
    """What the algorithm learns from so many batches of tasks."""
    meta = algorithm.init()
    leaves = fm.tree.leaves(meta)
    outer = torch.optim.Adam(leaves, lr=OUTER_LR)
    for seed in track(range(iterations), f"training by {name}"):
        outer.zero_grad()
        algorithm.loss(meta, tasks.sample_batch(seed, TASKS), seed=seed).backward()
        nn.utils.clip_grad_norm_(leaves, 1.0)
        outer.step()
    return meta


def test(algorithm: Algorithm, meta: Any, tasks: fm.tasks.Sampler, number: int) -> tuple[float, float]:
    """Accuracy on the queries of tasks never seen, and half its 95 % interval over them."""
    right = []
    for seed in range(number):
        task = tasks.sample(seed)
        images, labels = task.query
        with torch.no_grad():
            right.append((algorithm.adapt(meta, task)(images).argmax(-1) == labels).double().mean())
    return torch.stack(right).mean().item(), 1.96 * torch.stack(right).std().item() / math.sqrt(number)


def gates(net: nn.Module, meta: Any, task: fm.Task) -> list[dict[str, list[float]]]:
    """The 10, 50 and 90 % quantiles of both gates over all weights, after each step on one task."""
    problem = meta_lstm.problem(net, loss, meta_lstm.Cell())
    rows, quantiles = [], torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        for steps in range(1, STEPS + 1):
            state = fm.unroll(problem, meta, task, steps=steps).state.opt_state
            rows.append({name: getattr(state, name).quantile(quantiles).tolist() for name in ("forget", "enter")})
    return rows


def draw(rows: list[dict[str, Any]], opened: list[dict[str, list[float]]]) -> Figure:
    """The accuracies, and the gates."""
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    bars, *planes = picture.subplots(1, 3, width_ratios=(2, 1, 1))
    accuracies, margins = zip(*[row["accuracy"] for row in rows], strict=True)
    bars.bar(
        [row["method"].replace(" ", "\n") for row in rows], accuracies, yerr=margins, color=["0.7", "C0", "C1", "C2"]
    )
    bars.axhline(1 / WAYS, color="k", linestyle=":", linewidth=1)
    bars.set(ylabel="accuracy", title="tasks that were never seen")
    steps = range(1, STEPS + 1)
    for plane, name, title in zip(planes, ("enter", "forget"), ("input gate i", "forget gate f"), strict=True):
        low, middle, high = zip(*[row[name] for row in opened], strict=True)
        plane.fill_between(steps, low, high, alpha=0.3, label="10 to 90 % of the weights")
        plane.plot(steps, middle, "o-", label="median")
        plane.set(xlabel="step", title=title)
    planes[0].axhline(SGD_LR, color="k", linestyle=":", label="MAML's learning rate")
    picture.legend(*planes[0].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    return picture


def main(
    data: Annotated[str, typer.Option(help="glyphs or omniglot.")] = "glyphs",
    path: Annotated[Path | None, typer.Option(help="Folder with Omniglot's archives.")] = None,
    quick: Annotated[bool, typer.Option(help="A short training, a small test.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("meta_lstm"),
) -> None:
    """Train three algorithms on characters, and test them on characters of other scripts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began, net = time.perf_counter(), network()
    iterations, number = QUICK if quick else WHOLE
    known, unseen = (sampler(data, path, split) for split in ("train", "test"))
    rows: list[dict[str, Any]] = []

    def enter(name: str, algorithm: Algorithm, meta: Any) -> None:
        accuracy, margin = test(algorithm, meta, unseen, number)
        rows.append({"method": name, "accuracy": (accuracy, margin)})
        print(f"{name:17} {accuracy:.3f} ± {margin:.3f}")

    untrained = exact_maml(net)
    enter("untrained, SGD", untrained, untrained.init())
    for name, build in METHODS.items():
        algorithm = build(net)
        meta = train(name, algorithm, known, iterations)
        enter(name, algorithm, meta)
    opened = gates(net, meta, unseen.sample(0))
    figures = {"data": data, "iterations": iterations, "tasks": number, "rows": rows, "gates": opened}
    save(out, {**figures, "seconds": time.perf_counter() - began}, draw(rows, opened))


if __name__ == "__main__":
    typer.run(main)
