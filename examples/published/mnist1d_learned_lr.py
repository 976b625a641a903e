"""Learn the learning rate of 200 SGD steps on MNIST-1D by gradient descent through the training.

Greydanus 2020, "Scaling Down Deep Learning" (arXiv:2011.14439): from a rate far too large and from one too small, 50
outer steps reach 0.62. The published figures are those that the notebook metalearn-learn-rate of
github.com/greydanus/mnist1d prints. The meta-gradient is exact under each memory policy, so all give the same ones.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
from _show import save

import funcmeta as fm

STEPS = 200
OUTER_LR = 0.3
POLICIES: dict[str, fm.memory.Memory] = {
    "StoreAll()": fm.StoreAll(),
    "Segments()": fm.Segments(),
    "Revolve(12)": fm.Revolve(12),
}
PUBLISHED = {
    1.5: {3: "1.808 1.588 1.259", 48: "1.716 1.505 0.6243"},
    0.15: {3: "1.722 1.555 0.4909", 48: "1.716 1.506 0.6203"},
}
"""By the initial rate and the outer step: mean of the 200 losses, last loss, and rate after the step."""


def learn(initial_lr: float, outer_steps: int, memory: fm.memory.Memory) -> list[tuple[float, float, float]]:
    """The three figures of each outer step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 10))

    def loss(meta: Any, predict: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(predict(x), y)

    problem = fm.inner_problem(
        net, loss, optimizer=lambda meta: fm.optim.sgd(meta["lr"]), trajectory_loss=lambda step: 1 / STEPS
    )
    task = fm.tasks.mnist1d(batch_size=50)
    lr = torch.tensor(initial_lr, requires_grad=True)
    outer = torch.optim.SGD([lr], lr=OUTER_LR)
    figures = []
    for _ in track(range(outer_steps), f"from {initial_lr}, {memory}"):
        outer.zero_grad()
        out = fm.unroll(problem, {"lr": lr}, task, steps=STEPS, memory=memory)
        out.loss.backward()
        outer.step()
        figures.append((out.loss.item(), out.info.losses[-1].item(), lr.item()))
    return figures


def draw(paths: dict[float, list[tuple[float, float, float]]]) -> Figure:
    """Mean loss, last loss and learning rate against outer steps."""
    picture = Figure(figsize=(11, 3.2), layout="constrained")
    for panel, (axes, title) in enumerate(
        zip(picture.subplots(1, 3), ("mean loss of the 200 steps", "last loss", "learning rate"), strict=True)
    ):
        for initial_lr, path in paths.items():
            axes.plot([figures[panel] for figures in path], label=f"from {initial_lr}")
        axes.set(title=title, xlabel="outer step")
        axes.grid(alpha=0.25)
    picture.axes[2].legend(frameon=False)
    return picture


def main(
    quick: Annotated[bool, typer.Option(help="4 outer steps instead of 50.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("mnist1d_learned_lr"),
) -> None:
    """Learn a learning rate, under three memory policies, and compare with the published figures."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = {
        name: {initial_lr: learn(initial_lr, 4 if quick else 50, memory) for initial_lr in PUBLISHED}
        for name, memory in POLICIES.items()
    }
    rows = []
    for name, paths in runs.items():
        for initial_lr, path in paths.items():
            for step, published in PUBLISHED[initial_lr].items():
                if step < len(path):
                    ours = " ".join(f"{figure:.4g}" for figure in path[step])
                    rows.append(
                        {"memory": name, "from": initial_lr, "step": step, "ours": ours, "published": published}
                    )
                    print(f"{name:12} from {initial_lr:<5} step {step:<3} ours: {ours:20} published: {published}")
    seconds = time.perf_counter() - began
    save(out, {"rows": rows, "runs": runs, "seconds": seconds}, draw(runs["StoreAll()"]))


if __name__ == "__main__":
    typer.run(main)
