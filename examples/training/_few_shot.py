"""The meta-training that the scripts of this folder have in common: MAML on sine curves, by Adam."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import funcmeta as fm

OUTER_LR, TASKS = 1e-3, 8


def loss(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return F.mse_loss(predict(x), y)


def few_shot(width: int = 40, steps: int = 3) -> fm.algorithms.Algorithm:
    """MAML for a network 1-width-width-1 in double precision, always the same one."""
    with fm.rng.forked(0):
        net = nn.Sequential(
            nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        ).double()
    return fm.algorithms.maml.build(net, loss, steps=steps, lr=0.01, strategy="vmap")


class MetaLoss(nn.Module):
    """Meta as the parameters of a module, and the whole unroll in its forward pass, where wrappers expect it."""

    def __init__(self, algorithm: fm.algorithms.Algorithm) -> None:
        super().__init__()
        self.algorithm, self.shape = algorithm, algorithm.init()
        self.leaves = nn.ParameterList(fm.tree.leaves(self.shape))

    @property
    def meta(self) -> Any:
        """The parameters as the algorithm knows them."""
        return fm.tree.like(self.shape, self.leaves)

    def forward(self, tasks: fm.Task) -> Tensor:
        """The mean meta-loss of stacked tasks."""
        return self.algorithm.loss(self.meta, tasks)


class Batches(Dataset[fm.Task]):
    """Batch number i of tasks, for all i below a number."""

    def __init__(self, number: int, tasks: int = TASKS) -> None:
        self.number, self.tasks = number, tasks
        self.sampler = fm.tasks.sinusoids(dtype=torch.float64)

    def __len__(self) -> int:
        """The number of batches."""
        return self.number

    def __getitem__(self, index: int) -> fm.Task:
        """The batch of this index, a pure function of it."""
        return self.sampler.sample_batch(seed=index, tasks=self.tasks)._replace(spec=None)


def loader(iterations: int) -> DataLoader[fm.Task]:
    """The batches in their order; each is a stack of tasks already."""
    return DataLoader(Batches(iterations), batch_size=None)


def plain(algorithm: fm.algorithms.Algorithm, iterations: int) -> tuple[Any, list[float]]:
    """The outer loop in plain torch: what was learned, and the loss of each iteration."""
    meta, losses = algorithm.init(), []
    outer = torch.optim.Adam(fm.tree.leaves(meta), lr=OUTER_LR)
    for tasks in track(loader(iterations), "plain loop", total=iterations):
        outer.zero_grad()
        value = algorithm.loss(meta, tasks)
        value.backward()
        outer.step()
        losses.append(value.item())
    return meta, losses


def difference(one: Any, other: Any) -> float:
    """The largest between two trees of tensors."""
    pairs = zip(fm.tree.leaves(one), fm.tree.leaves(other), strict=True)
    return max((left.detach() - right.detach()).abs().max().item() for left, right in pairs)


def draw(curves: dict[str, list[float]]) -> Figure:
    """The losses of several loops."""
    picture = Figure(figsize=(6, 3.6), layout="constrained")
    plane = picture.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        plane.plot(losses, style, label=name)
    plane.set(xlabel="outer iteration", ylabel="meta-loss")
    plane.legend(frameon=False)
    return picture
