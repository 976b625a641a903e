"""MAML under Accelerate, beside a plain loop: its ``prepare`` wraps a module whose forward pass is the meta-loss.

The outer loop is ordinary PyTorch, so the lines that Accelerate asks for are the only ones that change. Both loops end
on the same numbers. With several processes (``accelerate launch``) the module becomes a ``DistributedDataParallel``,
which finds the gradients because the whole unroll lies in the forward pass, and every process gets batches of its own.

Needs the extras ``demo`` and ``accelerate``.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from rich.progress import track

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from _few_shot import OUTER_LR, MetaLoss, difference, draw, few_shot, loader, plain
from _show import save

import funcmeta as fm


def train(algorithm: fm.algorithms.Algorithm, iterations: int) -> tuple[MetaLoss, list[float]]:
    """What was learned, and the loss of each iteration."""
    accelerator = Accelerator(cpu=True)
    module = MetaLoss(algorithm)
    outer = torch.optim.Adam(module.parameters(), lr=OUTER_LR)
    prepared, outer, batches = accelerator.prepare(module, outer, loader(iterations))
    losses = []
    for tasks in track(batches, "Accelerate", total=iterations):
        outer.zero_grad()
        value = prepared(tasks)
        accelerator.backward(value)
        outer.step()
        losses.append(value.item())
    return accelerator.unwrap_model(prepared), losses


def main(
    quick: Annotated[bool, typer.Option(help="A short training.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("with_accelerate"),
) -> None:
    """Train by Accelerate and by a plain loop, and compare what was learned."""
    torch.set_num_threads(1)
    iterations = 100 if quick else 2000
    algorithm = few_shot()
    began = time.perf_counter()
    module, ours = train(algorithm, iterations)
    middle = time.perf_counter()
    meta, losses = plain(algorithm, iterations)
    seconds = {"Accelerate": middle - began, "plain loop": time.perf_counter() - middle}
    apart = difference(module.meta, meta)
    print(f"Largest difference after {iterations} iterations: {apart:.1e}.")
    print(" ".join(f"{name}: {each:.1f} s." for name, each in seconds.items()))
    figures = {"iterations": iterations, "losses": losses, "difference": apart, "seconds": seconds}
    save(out, figures, draw({"Accelerate": ours, "plain loop": losses}))


if __name__ == "__main__":
    typer.run(main)
