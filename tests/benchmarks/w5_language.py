"""W5: a learned update of an LSTM language model of ten million parameters, by the exact gradient through 100 steps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from contest import Bar, Result, Row, Run, Settings, check_agreement, ratio
from machine import floor
from peaks import peak_of
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.estimators import Estimator
from funcmeta.memory import Memory

TITLE = "LSTM language model with 10.6 M parameters, learned update over momenta, 100 steps of 64 x 16 words"
DECAYS = (0.5, 0.9)
"""Of the momenta that the learned update sees beside the gradient."""
LIMIT, TOO_MUCH = 6e9, 20e9
"""Bytes: what the run may take, and what storing every step takes at least."""
RUN, REVERSE, MIXED = "funcmeta, 100 steps", "funcmeta Reverse, 10 steps", "funcmeta MixedMode, 10 steps"
FEW, MORE = "funcmeta StoreAll, 4 steps", "funcmeta StoreAll, 8 steps"
MIXED_FEW, MIXED_MORE = "funcmeta StoreAll and MixedMode, 4 steps", "funcmeta StoreAll and MixedMode, 8 steps"


class LanguageModel(nn.Module):
    """Two recurrent layers between an embedding and a decoder that share their weight."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, words: Tensor) -> Tensor:
        """The scores of each next word."""
        return self.decoder(self.layers(self.embedding(words))[0])  # type: ignore[no-any-return]


def learned_update(mix: Tensor) -> fm.Transform:
    """For each tensor a learned mixture of its gradient and its momenta.

    Args:
        mix: [tensors, 1 + momenta], how much of each is subtracted from the tensor.
    """

    def init(params: Any) -> Any:
        return [{name: torch.zeros_like(param) for name, param in params.items()} for _ in DECAYS]

    def update(grads: Any, momenta: Any, params: Any) -> Any:
        momenta = [
            {name: decay * kept[name] + (1 - decay) * grad for name, grad in grads.items()}
            for decay, kept in zip(DECAYS, momenta, strict=True)
        ]
        changes = {
            name: -sum(weight * each[name] for weight, each in zip(weights, (grads, *momenta), strict=True))
            for name, weights in zip(grads, mix.unbind(), strict=True)
        }
        return changes, momenta

    return fm.Transform(init, update)


def funcmeta(quick: bool, steps: int, memory: Memory, estimator: Estimator = fm.Reverse()) -> Run:  # noqa: B008
    """This library, on random words."""
    torch.manual_seed(0)
    words, width, rows, columns = (11, 3, 2, 3) if quick else (4000, 700, 64, 16)
    net = LanguageModel(words, width)
    mix = torch.full((len(list(net.parameters())), 1 + len(DECAYS)), 0.1, requires_grad=True)

    def loss(meta: Any, predict: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(predict(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    problem = fm.inner_problem(net, loss, optimizer=lambda meta: learned_update(meta["mix"]))
    batches = torch.randint(words, (10, rows, columns + 1))
    task = fm.Task(lambda step: batches[step % len(batches)], batches[-1])

    def run() -> Any:
        out = fm.unroll(problem, {"mix": mix}, task, steps=steps, memory=memory, estimator=estimator)
        return torch.autograd.grad(out.loss, [mix])

    return run


def alone(name: str, settings: Settings, steps: int) -> Run:
    """The computation of this name for a process of its own."""
    few: dict[str, Callable[[], Run]] = {
        FEW: lambda: funcmeta(settings.quick, steps, fm.StoreAll()),
        MORE: lambda: funcmeta(settings.quick, steps, fm.StoreAll()),
        MIXED_FEW: lambda: funcmeta(settings.quick, steps, fm.StoreAll(), fm.MixedMode()),
        MIXED_MORE: lambda: funcmeta(settings.quick, steps, fm.StoreAll(), fm.MixedMode()),
        RUN: lambda: funcmeta(settings.quick, steps, fm.budget(int(0.8 * LIMIT))),
        REVERSE: lambda: funcmeta(settings.quick, steps, fm.Segments(5)),
        MIXED: lambda: funcmeta(settings.quick, steps, fm.Segments(5), fm.MixedMode()),
    }
    return few[name]()


def measure(settings: Settings, machine: Mapping[str, Any]) -> Result:
    """The gradients of all ways compared at few steps; then the memory of each in a process of its own."""
    ways: dict[str, Run] = {
        "StoreAll": funcmeta(settings.quick, 2, fm.StoreAll()),
        "Segments": funcmeta(settings.quick, 2, fm.Segments(1)),
        "MixedMode": funcmeta(settings.quick, 2, fm.StoreAll(), fm.MixedMode()),
    }
    needed = {FEW: 4, MORE: 8, MIXED_FEW: 4, MIXED_MORE: 8, REVERSE: 10, MIXED: 10, RUN: 100}
    check_agreement(ways, "StoreAll")
    asked = {FEW: 4} if settings.quick else needed
    peaks = {name: peak_of("W5", name, settings, steps, live=steps <= 10) for name, steps in asked.items()}
    rows = {
        name: Row(name, [peak.seconds], peak.live_bytes, peak.resident_bytes) for name, peak in peaks.items() if peak
    }
    stored = _extrapolated(rows.get(FEW), rows.get(MORE), 100)
    mixed = _extrapolated(rows.get(MIXED_FEW), rows.get(MIXED_MORE), 100)
    whole = rows.get(RUN)
    return Result(
        "W5",
        TITLE,
        list(rows.values()),
        [
            Bar("100 steps, peak of the process / 6 GB", ratio(whole and whole.resident_bytes, LIMIT), 1.0),
            Bar("20 GB / live tensors of StoreAll at 100 steps, extrapolated", ratio(TOO_MUCH, stored), 1.0),
            Bar(
                "MixedMode / Reverse under StoreAll at 100 steps, extrapolated", ratio(mixed, stored), 0.5, beyond=True
            ),
            Bar(
                "MixedMode / Reverse under Segments(5), live tensors",
                ratio(*(row and row.live_bytes for row in (rows.get(MIXED), rows.get(REVERSE)))),
                0.5,
                beyond=True,
            ),
        ],
        floor(ways["StoreAll"], machine).times(100 / 2),
        []
        if stored is None
        else [f"StoreAll would keep {stored / 1e9:.1f} GB of tensors alive at 100 steps: extrapolated from 4 and 8"],
        dict(machine),
    )


def _extrapolated(few: Row | None, more: Row | None, steps: int) -> float | None:
    """The live bytes at so many steps, from those at 4 and 8."""
    if not few or not more or few.live_bytes is None or more.live_bytes is None:
        return None
    return few.live_bytes + (more.live_bytes - few.live_bytes) / 4 * (steps - 4)
