"""MAML under Lightning, beside a plain loop: a training step returns the loss of an algorithm.

The outer loop is ordinary PyTorch, so that of Lightning's trainer will do: ``training_step`` returns what
``algorithm.loss`` does, whose graph leads to ``meta``, the parameters of the module. Both loops end on the same
numbers. Two things to know:

- Lightning validates in ``torch.inference_mode``, where an inner training can take no gradient and an unroll raises:
  pass ``Trainer(inference_mode=False)``.
- Under ``strategy="ddp"`` the loader has to give each process tasks of its own; Lightning puts a sampler into it.

Needs the extras ``demo`` and ``lightning``.
"""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import lightning
import torch
import typer
from torch import Tensor

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from _few_shot import OUTER_LR, MetaLoss, difference, draw, few_shot, loader, plain
from _show import save

import funcmeta as fm


class FewShot(lightning.LightningModule):
    """Meta as the parameters of a Lightning module."""

    def __init__(self, algorithm: fm.algorithms.Algorithm) -> None:
        super().__init__()
        self.objective, self.losses = MetaLoss(algorithm), []

    def training_step(self, tasks: fm.Task, index: int) -> Tensor:
        """The meta-loss of a batch of tasks."""
        value: Tensor = self.objective(tasks)
        self.losses.append(value.item())
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all that is learned."""
        return torch.optim.Adam(self.parameters(), lr=OUTER_LR)


def train(algorithm: fm.algorithms.Algorithm, iterations: int) -> FewShot:
    """One epoch of so many batches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    model = FewShot(algorithm)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.fit(model, loader(iterations))
    return model


def main(
    quick: Annotated[bool, typer.Option(help="A short training.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("with_lightning"),
) -> None:
    """Train by Lightning and by a plain loop, and compare what was learned."""
    torch.set_num_threads(1)
    iterations = 100 if quick else 2000
    algorithm = few_shot()
    began = time.perf_counter()
    model = train(algorithm, iterations)
    middle = time.perf_counter()
    meta, losses = plain(algorithm, iterations)
    seconds = {"Lightning": middle - began, "plain loop": time.perf_counter() - middle}
    apart = difference(model.objective.meta, meta)
    print(f"Largest difference after {iterations} iterations: {apart:.1e}.")
    print(" ".join(f"{name}: {each:.1f} s." for name, each in seconds.items()))
    figures = {"iterations": iterations, "losses": losses, "difference": apart, "seconds": seconds}
    save(out, figures, draw({"Lightning": model.losses, "plain loop": losses}))


if __name__ == "__main__":
    typer.run(main)
