"""Meta-parameters that are sharded among processes by FSDP2, beside one process that holds all of them.

    torchrun --nproc-per-node=2 examples/training/fsdp2.py --quick

``fully_shard`` of a module whose parameters are ``meta`` and whose forward pass is the whole unroll: before the unroll
meta is gathered, after the backward pass the gradients are averaged and scattered, and the outer optimizer sees its
shards only. Each process has its part of the tasks; all end where one process with all tasks does.

What is shared is what lives from one outer step to the next: meta, its gradient and what the optimizer keeps, with
Adam four times the bytes of meta in all. What is not: during the unroll every process holds the whole of meta and its
whole gradient, because every inner step reads all of it, and on top of them the states and graphs that the memory
policy keeps. So an inner training has to fit on one process with its policy, and sharding does not help where the
graph is what is large. A module may not be sharded layer by layer: an unroll takes meta as a tree, not by the calls
of its layers, which are what gathers a layer.

Under torch 2.13 it works on the CPU with gloo, under every memory policy, with ``Reverse``, ``MixedMode``,
``FirstOrder`` and evolution strategies. It was not run on GPUs, nor on several machines.

Needs the extra ``demo``.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from _few_shot import OUTER_LR, TASKS, Batches, MetaLoss, difference, few_shot
from _show import save

import funcmeta as fm
from funcmeta._live_bytes import LiveBytes

Bytes = dict[str, int]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(module: MetaLoss, outer: torch.optim.Optimizer) -> Bytes:
    """What this process holds between two outer steps, and what it gathers for the next one."""
    kept = [each for state in outer.state.values() for each in state.values() if isinstance(each, Tensor)]
    parts = {
        "meta": list(module.parameters()),
        "its gradient": [leaf.grad for leaf in module.parameters() if leaf.grad is not None],
        "Adam": kept,
    }
    found = {name: sum(local(leaf).nbytes for leaf in leaves) for name, leaves in parts.items()}
    gathered = [leaf.numel() * leaf.element_size() for leaf in module.parameters() if isinstance(leaf, DTensor)]
    return {**found, "gathered": sum(gathered)}


def train(module: MetaLoss, iterations: int, rows: slice, name: str) -> tuple[torch.optim.Optimizer, float]:
    """The outer loop on some of the tasks of each batch: its optimizer, and the last loss."""
    outer, batches = torch.optim.Adam(module.parameters(), lr=OUTER_LR), Batches(iterations)
    for index in track(range(iterations), name, disable=dist.get_rank() > 0):
        outer.zero_grad()
        value = module(some(batches[index], rows))
        value.backward()
        outer.step()
    return outer, value.item()


def some(tasks: fm.Task, rows: slice) -> fm.Task:
    """Some of a stack of tasks."""
    return fm.Task(*fm.tree.map(lambda leaf: leaf[rows], tasks[:2]))


def of_unroll(module: MetaLoss, rows: slice) -> int:
    """The most bytes that come to life during an unroll and its backward pass, beside what was gathered before."""
    with LiveBytes() as counter:
        module(some(Batches(1)[0], rows)).backward()
    return counter.peak


def full(module: MetaLoss) -> list[Tensor]:
    """The whole of meta, in every process."""
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in module.parameters()]


def draw(rows: dict[str, Bytes]) -> Figure:
    """The bytes of one process in each way."""
    picture = Figure(figsize=(6, 3.6), layout="constrained")
    plane = picture.subplots()
    for place, (way, parts) in enumerate(rows.items()):
        places, megabytes = [at + 0.4 * place for at in range(len(parts))], [each / 1e6 for each in parts.values()]
        plane.bar(places, megabytes, 0.38, label=way)
    plane.set_xticks([at + 0.2 for at in range(len(parts))], list(parts))
    plane.set(yscale="log", ylabel="MB in one process")
    plane.legend(frameon=False)
    return picture


def main(
    quick: Annotated[bool, typer.Option(help="A small network, a short training.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("fsdp2"),
) -> None:
    """Train with shards and without, and compare what was learned and what a process holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    iterations, width = (10, 128) if quick else (100, 1024)
    own = slice(rank * TASKS // ranks, (rank + 1) * TASKS // ranks)
    algorithm = few_shot(width, steps=2)
    module, whole = MetaLoss(algorithm), MetaLoss(algorithm)
    fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
    outer, _ = train(module, iterations, own, f"{ranks} shards")
    rows = {f"one of {ranks} shards": held(module, outer)}
    learned = [leaf.full_tensor() for leaf in module.parameters() if isinstance(leaf, DTensor)]
    rows[f"one of {ranks} shards"]["one unroll"] = of_unroll(module, own)
    if rank == 0:
        outer, loss = train(whole, iterations, slice(None), "one process")
        rows["not sharded"] = held(whole, outer)
        rows["not sharded"]["one unroll"] = of_unroll(whole, own)
        apart = difference(learned, list(whole.parameters()))
        for way, parts in rows.items():
            print(f"{way:16}", "  ".join(f"{name}: {number / 1e6:.2f} MB" for name, number in parts.items()))
        print(f"Largest difference after {iterations} iterations: {apart:.1e}.")
        save(out, {"iterations": iterations, "loss": loss, "rows": rows, "difference": apart}, draw(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
