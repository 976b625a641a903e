"""W2: an initial point for few-shot classification of images of Omniglot's shape, by a convolutional network."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from contest import IN_DOUBLE, Bar, Result, Run, Settings, check_agreement, fastest, race, ratio
from few_shot import FewShot, funcmeta, torch_contestants
from machine import floor
from torch import nn

import funcmeta as fm

TITLE = "Omniglot-shaped MAML, 8 tasks x 5 steps, strided 4-conv-64 with BatchNorm, 5-way 1-shot, 15 queries"
WAYS = 5
LEFT_OUT = (
    "Left out: plain torch.func and torchopt's sgd under vmap, which here differ from the right gradient by 1e-3 of "
    "its norm: torch's fused batch normalization has a wrong second derivative under vmap with batched weights. "
    "And JAX with vmap over tasks, which takes longer than with map."
)


def build(quick: bool) -> FewShot:
    """Random images; the network without pooling of Finn et al. (2017), section 5.2, on statistics of the batch."""
    torch.manual_seed(0)
    tasks, queries, steps, channels, blocks, side = (2, 2, 1, 2, 1, 4) if quick else (8, 15, 5, 64, 4, 28)
    layers: list[nn.Module] = []
    for before in (1, *[channels] * (blocks - 1)):
        convolution = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, WAYS))
    support, query = (
        (torch.rand(tasks, shots * WAYS, 1, side, side), torch.arange(WAYS).repeat(tasks, shots))
        for shots in (1, queries)
    )
    return FewShot(net, F.cross_entropy, fm.Task(support, query), steps, lr=0.1)


def contestants(case: FewShot, settings: Settings) -> dict[str, Run]:
    """Everyone, the reference first."""
    found = torch_contestants(case, peers=settings.peers)
    if settings.peers and find_spec("jax"):
        import few_shot_jax
        import w2_jax

        ways = few_shot_jax.contestants(case, w2_jax.forward, w2_jax.cross_entropy)
        found["jax map"] = ways["jax map"]
    return found


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """Gradients compared, then the race, in which the first order runs along."""
    case = build(settings.quick)
    runs = contestants(case, settings)
    check_agreement(torch_contestants(case.double(), peers=settings.peers), "by hand, loop", IN_DOUBLE)
    check_agreement({name: run for name, run in runs.items() if name != "funcmeta compiled"}, "by hand, loop")
    rows = race({**runs, "funcmeta first order": funcmeta(case, estimator=fm.FirstOrder())}, settings)
    eager, compiled, first = (fastest(rows, f"funcmeta {name}") for name in ("eager", "compiled", "first order"))
    peer = fastest(rows, "torchopt", "higher", "jax")
    return Result(
        "W2",
        TITLE,
        rows,
        [
            Bar("funcmeta eager / the fastest peer", ratio(eager, peer), 1.05),
            Bar("funcmeta compiled / the fastest peer", ratio(compiled, peer), 0.8),
            Bar(
                "funcmeta, the faster / the fastest peer",
                ratio(fastest(rows, "funcmeta eager", "funcmeta compiled"), peer),
                0.6,
                beyond=True,
            ),
            Bar("second order / first order, eager", ratio(eager, first), 1.8, beyond=True),
        ],
        floor(runs["by hand, loop"], machine),
        [LEFT_OUT],
        dict(machine),
    )
