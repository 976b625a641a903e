"""W0: what this library adds to a loop written by hand, with a meta-gradient and without, on the network of W4."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from contest import Bar, Result, Run, Settings, check_agreement, race
from torch import Tensor
from w4_momentum import Training, build, by_hand, funcmeta

import funcmeta as fm

TITLE = "overhead: MLP 784-256-256-10, batch 128, 20 steps of momentum SGD"


def funcmeta_inner_loop(training: Training, steps: int, *, compiled: bool = False) -> Run:
    """This library, without a meta-gradient."""

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(predict(x), y)

    lr, momentum = (float(training.meta[name].detach()) for name in ("lr", "momentum"))
    problem = fm.inner_problem(training.net, loss, optimizer=fm.optim.sgd(lr, momentum=momentum))
    problem = fm.compile(problem) if compiled else problem
    task = fm.Task(training.batch, training.batch(steps))

    def run() -> Any:
        with torch.no_grad():
            return list(fm.unroll(problem, {}, task, steps=steps).state.params.values())

    return run


def torch_optim(training: Training, steps: int) -> Run:
    """The usual loop of torch; the module is put back first, so that each run is the same."""
    lr, momentum = (float(training.meta[name].detach()) for name in ("lr", "momentum"))
    start = {name: tensor.clone() for name, tensor in training.net.state_dict().items()}
    net = training.net

    def run() -> Any:
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
        for step in range(steps):
            x, y = training.batch(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        x, y = training.batch(steps)
        with torch.no_grad():
            F.cross_entropy(net(x), y)
        return list(net.parameters())

    return run


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """Gradients, or trained parameters, compared; then both races."""
    steps = 2 if settings.quick else 20
    training = build(settings.quick)
    with_gradient = {
        "by hand": by_hand(training, steps),
        "funcmeta": funcmeta(training, steps, fm.StoreAll()),
    }
    without = {
        "torch.optim": torch_optim(build(settings.quick), steps),
        "funcmeta inner loop": funcmeta_inner_loop(training, steps),
        "funcmeta inner loop, compiled": funcmeta_inner_loop(training, steps, compiled=True),
    }
    check_agreement(with_gradient, "by hand")
    check_agreement(without, "torch.optim")
    rows = [*race(with_gradient, settings), *race(without, settings)]
    seconds = {row.name: row.median for row in rows}
    return Result(
        "W0",
        TITLE,
        rows,
        [
            Bar("meta-gradient: funcmeta / by hand", seconds["funcmeta"] / seconds["by hand"], 1.05),
            Bar("inner loop: funcmeta / torch.optim", seconds["funcmeta inner loop"] / seconds["torch.optim"], 1.10),
            Bar(
                "inner loop, compiled: funcmeta / torch.optim",
                seconds["funcmeta inner loop, compiled"] / seconds["torch.optim"],
                1.10,
                beyond=True,
            ),
        ],
        machine=dict(machine),
    )
