"""W1: an initial point for regression of sine waves, 25 tasks of 5 steps at once."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from contest import Bar, Result, Run, Settings, check_agreement, fastest, race, ratio
from few_shot import FewShot, by_hand_vmap, torch_contestants, torchopt_vmap
from machine import floor
from torch import Tensor, nn

import funcmeta as fm

TITLE = "sinusoid MAML, 25 tasks x 5 steps, MLP 1-40-40-1"


def build(quick: bool) -> FewShot:
    """The problem of Finn et al. (2017), section 5.1, with 5 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    tasks = fm.tasks.sinusoids(shots=10, queries=10).sample_batch(seed=0, tasks=3 if quick else 25)
    return FewShot(net, F.mse_loss, tasks, steps=2 if quick else 5, lr=0.01)


def contestants(case: FewShot, settings: Settings) -> dict[str, Run]:
    """Everyone, the reference first."""
    found = {
        **torch_contestants(case, peers=settings.peers),
        "by hand, vmap": by_hand_vmap(case),
        "by hand, batched": by_hand_batched(case),
    }
    if settings.peers and find_spec("torchopt"):
        found["torchopt sgd, vmap"] = torchopt_vmap(case)
    if settings.peers and find_spec("jax"):
        import few_shot_jax
        import jax

        def forward(params: list[Any], x: Any) -> Any:
            for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
                x = jax.nn.relu(x @ weight.T + bias)
            return x @ params[-2].T + params[-1]

        ways = few_shot_jax.contestants(case, forward, lambda out, y: ((out - y) ** 2).mean())
        names = ["jax vmap"] if settings.quick else ["jax vmap", "jax vmap, scan"]
        found.update({name: ways[name] for name in names})
    return found


def by_hand_batched(case: FewShot) -> Run:
    """Plain torch with a task dimension in every tensor: the least that eager torch can do."""
    start = list(fm.init_params(case.net).values())

    def loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
            x = torch.baddbmm(bias[:, None], x, weight.mT).relu()
        out = torch.baddbmm(params[-1][:, None], x, params[-2].mT)
        return (out - y).square().mean((1, 2))

    def run() -> Any:
        params = [param.expand(case.count, *param.shape) for param in start]
        for _ in range(case.steps):
            grads = torch.autograd.grad(loss(params, *case.tasks.support).sum(), params, create_graph=True)
            params = [param - case.lr * by for param, by in zip(params, grads, strict=True)]
        return torch.autograd.grad(loss(params, *case.tasks.query).mean(), start)

    return run


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """Gradients compared, then the race."""
    case = build(settings.quick)
    runs = contestants(case, settings)
    check_agreement(runs, "by hand, loop")
    rows = race(runs, settings)
    eager, compiled = fastest(rows, "funcmeta eager"), fastest(rows, "funcmeta compiled")
    jax, loop, mapped = (fastest(rows, name) for name in ("jax", "torchopt MetaSGD", "torchopt sgd"))
    return Result(
        "W1",
        TITLE,
        rows,
        [
            Bar("funcmeta eager / torchopt MetaSGD", ratio(eager, loop), 1 / 7),
            Bar("funcmeta compiled / torchopt MetaSGD", ratio(compiled, loop), 1 / 35),
            Bar("funcmeta eager / torchopt sgd under vmap", ratio(eager, mapped), 1.0, beyond=True),
            Bar("funcmeta compiled / JAX", ratio(compiled, jax), 0.8, beyond=True),
        ],
        floor(runs["by hand, batched"], machine),
        machine=dict(machine),
    )
