"""W3: the weights of a coordinate-wise LSTM optimizer, by the exact gradient of the losses along its training."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contest import Bar, Result, Run, Settings, check_agreement, fastest, race, ratio
from machine import floor
from torch import Tensor

import funcmeta as fm

TITLE = "LSTM(20, 20) optimizer of an MLP 784-20-10, 20 steps, batch 128"
SCALE = 10.0
"""The p of the paper's preprocessing: gradients below exp(-p) are seen linearly, those above by logarithm and sign."""
STRIDE = 0.1
"""What the LSTM's output is multiplied by."""


class Training(NamedTuple):
    """A training: an LSTM's initial weights, the trained network's sizes and initial parameters, and the data."""

    weights: dict[str, Tensor]
    sizes: tuple[int, ...]
    start: Tensor
    inputs: Tensor
    labels: Tensor

    @property
    def steps(self) -> int:
        """One fewer than there are batches: the last batch judges the result."""
        return len(self.inputs) - 1

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the trained tensors, in their order in the flat vector of parameters."""
        return [shape for before, after in pairwise(self.sizes) for shape in ((before, after), (after,))]

    def cells(self) -> tuple[Tensor, ...]:
        """The LSTM's state at the beginning: for both layers what it puts out and what it remembers, [20, parameters].

        Coordinates come last, so that the gates of a layer are parts of one tensor without gaps.
        """
        return tuple(torch.zeros(self.weights["out"].shape[1], len(self.start)) for _ in range(4))


def build(quick: bool) -> Training:
    """Random data; the network of Andrychowicz et al. (2016), section 3.2, and their optimizer."""
    torch.manual_seed(0)
    sizes, hidden, steps, batch = ((12, 4, 3), 5, 2, 6) if quick else ((784, 20, 10), 20, 20, 128)
    shapes = {
        "first": (4 * hidden, 2 + hidden),
        "first bias": (4 * hidden, 1),
        "second": (4 * hidden, 2 * hidden),
        "second bias": (4 * hidden, 1),
        "out": (1, hidden),
    }
    weights = {name: (0.1 * torch.randn(shape)).requires_grad_() for name, shape in shapes.items()}
    count = sum(before * after + after for before, after in pairwise(sizes))
    inputs, labels = torch.rand(steps + 1, batch, sizes[0]), torch.randint(sizes[-1], (steps + 1, batch))
    return Training(weights, sizes, 0.05 * torch.randn(count), inputs, labels)


def loss(training: Training, params: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The trained network's, whose parameters are one vector."""
    parts = params.split([math.prod(shape) for shape in training.shapes])
    first, bias, second, second_bias = (part.view(shape) for part, shape in zip(parts, training.shapes, strict=True))
    return F.cross_entropy((x @ first + bias).sigmoid() @ second + second_bias, y)


def update(weights: Mapping[str, Tensor], grad: Tensor, cells: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The learned optimizer: what to add to each parameter, and its next state."""
    seen = torch.stack([grad.abs().clamp_min(math.exp(-SCALE)).log() / SCALE, (grad * math.exp(SCALE)).clamp(-1, 1)])
    first, kept_first, second, kept_second = cells
    first, kept_first = _cell(seen, first, kept_first, weights["first"], weights["first bias"])
    second, kept_second = _cell(first, second, kept_second, weights["second"], weights["second bias"])
    return STRIDE * (weights["out"] @ second)[0], (first, kept_first, second, kept_second)


def _cell(x: Tensor, out: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    enter, forget, new, leave = torch.addmm(bias, weight, torch.cat([x, out])).chunk(4)
    kept = forget.sigmoid() * kept + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * kept.tanh(), kept


def funcmeta(training: Training, *, compiled: bool = False) -> Run:
    """This library: a problem of its own, whose state is (parameters, cells)."""

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return training.start, training.cells()

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        params, cells = state
        value, grad = fm.value_and_grad(lambda params: loss(training, params, *batch))(params)
        change, cells = update(meta, grad, cells)
        return (params + change, cells), fm.StepInfo(value, meta_loss=value)

    problem = fm.Problem(init, step, lambda meta, state, query, seed: loss(training, state[0], *query))
    problem = fm.compile(problem) if compiled else problem
    batches = list(zip(training.inputs, training.labels, strict=True))
    task = fm.Task(batches.__getitem__, batches[-1])

    def run() -> Any:
        out = fm.unroll(problem, training.weights, task, steps=training.steps)
        return torch.autograd.grad(out.loss, list(training.weights.values()))

    return run


def by_hand(training: Training) -> Run:
    """Plain torch."""
    batches = list(zip(training.inputs, training.labels, strict=True))

    def run() -> Any:
        params, cells, total = training.start.clone().requires_grad_(), training.cells(), torch.zeros(())
        for batch in batches[:-1]:
            value = loss(training, params, *batch)
            (grad,) = torch.autograd.grad(value, params, create_graph=True)
            change, cells = update(training.weights, grad, cells)
            params, total = params + change, total + value
        total = total + loss(training, params, *batches[-1])
        return torch.autograd.grad(total, list(training.weights.values()))

    return run


def contestants(training: Training, settings: Settings) -> dict[str, Run]:
    """Everyone, the reference first."""
    found = {
        "by hand, loop": by_hand(training),
        "funcmeta eager": funcmeta(training),
        "funcmeta compiled": funcmeta(training, compiled=True),
    }
    if settings.peers and find_spec("jax"):
        import w3_jax

        ways = w3_jax.contestants(training)
        found.update({"jax scan": ways["jax scan"]} if settings.quick else ways)
    return found


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """Gradients compared, then the race."""
    training = build(settings.quick)
    runs = contestants(training, settings)
    check_agreement(runs, "by hand, loop")
    rows = race(runs, settings)
    jax = fastest(rows, "jax")
    return Result(
        "W3",
        TITLE,
        rows,
        [
            Bar("funcmeta, the faster / JAX", ratio(fastest(rows, "funcmeta"), jax), 0.8),
            Bar("funcmeta, the faster / JAX", ratio(fastest(rows, "funcmeta"), jax), 0.4, beyond=True),
            Bar(
                "funcmeta eager / by hand",
                ratio(fastest(rows, "funcmeta eager"), fastest(rows, "by hand")),
                1.05,
                beyond=True,
            ),
        ],
        floor(runs["by hand, loop"], machine),
        machine=dict(machine),
    )
