"""Learn an optimizer on random quadratics and on the training of a small network, and race it against tuned ones.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent" (arXiv:1606.04474), sections 3.1
and 3.2: an LSTM with two layers of 20, shared over coordinates, is trained over 100 steps in windows of 20, its inner
gradients constants. It is then run on functions that it has not seen, for longer, and on other networks, beside SGD,
momentum, RMSprop and Adam with the best learning rate of a logarithmic grid for each course.

``--task quadratics --save FILE`` made the optimizer that ``funcmeta.learned.pretrained()`` loads.
"""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.algorithms import l2l


class Name(StrEnum):
    """What the optimizer is trained on."""

    quadratics = "quadratics"
    digits = "digits"


class Point(nn.Module):
    """A vector that a function is minimized by."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))


def quadratic(meta: Any, predict: Any, batch: Any) -> Tensor:
    """‖Wθ − y‖²."""
    W, y = batch
    return (W @ predict.params["theta"] - y).square().sum()


def quadratics(dimension: int, steps: int) -> fm.Course:
    """Random quadratics, from a standard normal start."""

    def start(seed: int) -> dict[str, Tensor]:
        return {"theta": torch.randn(dimension, generator=torch.Generator().manual_seed(seed))}

    return fm.Course(Point(dimension), quadratic, fm.tasks.quadratics(dimension), steps, start)


class Digits:
    """MNIST-1D as tasks: each sees the training set in batches of its own, drawn anew for every step."""

    def __init__(self, batch_size: int = 64) -> None:
        self._batch_size = batch_size
        self._signals, self._labels = fm.tasks.mnist1d(batch_size=4000).support(0)

    def sample(self, seed: int) -> fm.Task:
        """One task."""
        return fm.Task(lambda step: self._batch(seed, step, ()), None)

    def sample_batch(self, seed: int, tasks: int) -> fm.Task:
        """Stacked tasks."""
        return fm.Task(lambda step: self._batch(seed, step, (tasks,)), None)

    def _batch(self, seed: int, step: int, tasks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(fm.rng.fold(seed, step))
        rows = torch.randint(len(self._labels), (*tasks, self._batch_size), generator=generator)
        return self._signals[rows], self._labels[rows]


def digit_loss(meta: Any, predict: Any, batch: Any) -> Tensor:
    """Cross-entropy."""
    x, y = batch
    return F.cross_entropy(predict(x), y)


def digits(width: int, steps: int, activation: type[nn.Module] = nn.Sigmoid) -> fm.Course:
    """A network with one hidden layer on MNIST-1D, a random batch a step."""
    net = nn.Sequential(nn.Linear(40, width), activation(), nn.Linear(width, 10))
    return fm.Course(net, digit_loss, Digits(), steps)


TRAINED = {Name.quadratics: quadratics(10, 100), Name.digits: digits(20, 100)}
COURSES = {
    Name.quadratics: {
        "100 steps, as trained": quadratics(10, 100),
        "400 steps": quadratics(10, 400),
        "20 dimensions": quadratics(20, 100),
    },
    Name.digits: {
        "100 steps, as trained": digits(20, 100),
        "400 steps": digits(20, 400),
        "40 hidden units": digits(40, 100),
        "ReLU": digits(20, 100, nn.ReLU),
    },
}


def train(course: fm.Course, iterations: int, tasks: int, lr: float, seed: int) -> fm.LearnedOptimizer:
    """Meta-train the LSTM; the weights that did best on validation tasks are kept."""
    torch.manual_seed(seed)
    optimizer = fm.learned.lstm()
    algorithm = l2l.build(
        optimizer, course.module, course.loss_fn, steps=course.steps, start=course.start, nonfinite="skip"
    )
    meta = algorithm.init()
    outer = torch.optim.Adam(meta["optimizer"].values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, iterations, eta_min=lr / 30)
    best, kept = float("inf"), meta["optimizer"]
    for iteration in track(range(iterations), "meta-training"):
        batch = course.tasks.sample_batch(seed=2 * iteration + 1, tasks=tasks)
        for loss in algorithm.windows(meta, batch, seed=iteration):
            outer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(meta["optimizer"].values(), 1.0)
            outer.step()
        schedule.step()
        if iteration % 20 == 19 or iteration == iterations - 1:
            score = validate(fm.as_transform(optimizer, meta["optimizer"]), course, tasks)
            if score < best:
                best, kept = score, {name: weight.detach().clone() for name, weight in meta["optimizer"].items()}
    optimizer.load_state_dict(kept)
    return optimizer


def validate(transform: fm.Transform, course: fm.Course, tasks: int) -> float:
    """The median loss at the end, on tasks that are neither trained nor evaluated on."""
    held = course._replace(tasks=course.tasks)
    return float(
        fm.evaluate_optimizers({"it": transform}, {"": held}, baselines={}, tasks=tasks, seed=10**6).rows[0].median
    )


def main(
    task: Annotated[Name, typer.Option(help="What the optimizer is trained on.")] = Name.quadratics,
    iterations: Annotated[int, typer.Option(help="Trainings of the optimizees, each of a batch of tasks.")] = 700,
    tasks: Annotated[int, typer.Option(help="Tasks in a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the outer Adam.")] = 3e-3,
    held_out: Annotated[int, typer.Option(help="Tasks that are evaluated on, and as many to tune rates on.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Where to write the optimizer.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for picture and figures.")] = Path("l2l"),
    quick: Annotated[bool, typer.Option(help="A minute instead of a quarter of an hour.")] = False,
) -> None:
    """Learn an optimizer, and race it."""
    torch.set_num_threads(1)  # sums in another order make other weights
    began = time.perf_counter()
    optimizer = train(TRAINED[task], *((10, 8) if quick else (iterations, tasks)), lr, seed)
    if save:
        fm.learned.save(optimizer, save)
        print(f"Wrote {save}.")
    courses = dict(list(COURSES[task].items())[:1]) if quick else COURSES[task]
    rates = (0.01, 0.1, 1.0) if quick else fm.evaluation.RATES
    count = 16 if quick else held_out
    result = fm.evaluate_optimizers({"LSTM": optimizer}, courses, rates=rates, tasks=count, tuning_tasks=count)
    print(result)
    out.mkdir(parents=True, exist_ok=True)
    result.plot(out / "picture.png")
    (out / "figures.json").write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    print(f"Wrote {out / 'picture.png'} and {out / 'figures.json'} after {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
