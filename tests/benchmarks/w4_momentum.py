"""W4: learning rate and momentum by the exact gradient through 1,000 steps of training, under every memory policy."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contest import IN_DOUBLE, Bar, Result, Row, Run, Settings, check_agreement, fastest, race, ratio
from machine import floor
from peaks import peak_of
from torch import Tensor, nn
from torch.func import functional_call

import funcmeta as fm
from funcmeta.memory import Memory

TITLE = "momentum SGD with learned lr and momentum, MLP 784-256-256-10, batch 128, 1,000 steps"
LIMIT = 300e6
"""Bytes that 10,000 steps may take."""
LONG = "funcmeta, 10,000 steps"


class Training(NamedTuple):
    """A network, what is learned about its training, and the data."""

    net: nn.Module
    meta: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Of this step."""
        return self.batches[step % len(self.batches)]

    def double(self) -> "Training":
        """The same in double precision."""
        meta = {name: leaf.detach().double().requires_grad_() for name, leaf in self.meta.items()}
        return Training(copy.deepcopy(self.net).double(), meta, [(x.double(), y) for x, y in self.batches])


def build(quick: bool) -> Training:
    """Random data."""
    torch.manual_seed(0)
    wide, hidden, batch = (6, 4, 3) if quick else (784, 256, 128)
    layers = nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    meta = {"lr": torch.tensor(0.01, requires_grad=True), "momentum": torch.tensor(0.8, requires_grad=True)}
    batches = [(torch.randn(batch, wide), torch.randint(10, (batch,))) for _ in range(20)]
    return Training(nn.Sequential(*layers), meta, batches)


def policies(quick: bool) -> dict[str, Memory]:
    """What is compared."""
    return {
        "funcmeta StoreAll": fm.StoreAll(),
        "funcmeta Segments": fm.Segments(),
        "funcmeta Revolve(12)": fm.Revolve(2 if quick else 12),
    }


def funcmeta(training: Training, steps: int, memory: Memory) -> Run:
    """This library."""

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(predict(x), y)

    problem = fm.inner_problem(
        training.net, loss, optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["momentum"])
    )
    task = fm.Task(training.batch, training.batch(steps))

    def run() -> Any:
        out = fm.unroll(problem, training.meta, task, steps=steps, memory=memory)
        return torch.autograd.grad(out.loss, list(training.meta.values()))

    return run


def by_hand(training: Training, steps: int) -> Run:
    """Plain torch, which keeps every step."""
    lr, momentum = training.meta["lr"], training.meta["momentum"]

    def loss(params: Mapping[str, Tensor], step: int) -> Tensor:
        x, y = training.batch(step)
        return F.cross_entropy(functional_call(training.net, dict(params), (x,)), y)

    def run() -> Any:
        params = fm.init_params(training.net)
        velocity: dict[str, Tensor] = {}
        for step in range(steps):
            grads = torch.autograd.grad(loss(params, step), list(params.values()), create_graph=True)
            named = dict(zip(params, grads, strict=True))
            velocity = {
                name: momentum * velocity[name] + grad if name in velocity else grad for name, grad in named.items()
            }
            params = {name: param - lr * velocity[name] for name, param in params.items()}
        return torch.autograd.grad(loss(params, steps), [lr, momentum])

    return run


def alone(name: str, settings: Settings, steps: int) -> Run:
    """The computation of this name for a process of its own."""
    memories: dict[str, Callable[[], Memory]] = {
        LONG: lambda: fm.budget(int(0.8 * LIMIT)),
        **{each: lambda each=each: policies(settings.quick)[each] for each in policies(settings.quick)},
    }
    return funcmeta(build(settings.quick), steps, memories[name]())


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """Gradients compared, times in turns, then the memory of each in a process of its own."""
    training, steps = build(settings.quick), 4 if settings.quick else 1000
    named = policies(settings.quick)
    runs = {
        "by hand": by_hand(training, steps),
        **{name: funcmeta(training, steps, memory) for name, memory in named.items()},
    }
    exact, few = training.double(), min(steps, 100)
    ways = {name: funcmeta(exact, few, memory) for name, memory in named.items()}
    check_agreement({"by hand": by_hand(exact, few), **ways}, "by hand", IN_DOUBLE)
    rows = {row.name: row for row in race(runs, settings)}
    for name in () if settings.quick else named:
        needed = peak_of("W4", name, settings, steps, live=True)
        if needed:
            rows[name] = Row(name, rows[name].seconds, needed.live_bytes, needed.resident_bytes)
    long = None
    if not settings.quick:
        long = peak_of("W4", LONG, settings, 10 * steps)
    if long:
        rows[LONG] = Row(LONG, [long.seconds], long.live_bytes, long.resident_bytes)
    return Result(
        "W4",
        TITLE,
        list(rows.values()),
        [
            *_against_storing_all(rows, "funcmeta Segments", 1 / 12, 1.5),
            *_against_storing_all(rows, "funcmeta Revolve(12)", 1 / 40, 2.5),
            Bar("10,000 steps, peak of the process / 300 MB", long and long.resident_bytes / LIMIT, 1.0, beyond=True),
        ],
        floor(by_hand(training, 2), machine).times(steps / 2),
        machine=dict(machine),
    )


def _against_storing_all(rows: Mapping[str, Row], name: str, memory: float, time: float) -> list[Bar]:
    one, all_stored = rows.get(name), rows["funcmeta StoreAll"]
    return [
        Bar(f"{name} / StoreAll, live tensors", ratio(one and one.live_bytes, all_stored.live_bytes), memory),
        Bar(f"{name} / StoreAll, process", ratio(one and one.resident_bytes, all_stored.resident_bytes), memory),
        Bar(f"{name} / StoreAll, time", ratio(fastest(rows.values(), name), all_stored.median), time),
    ]
