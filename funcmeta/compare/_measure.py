"""What a computation costs: evaluations and seconds, each measured where it happens."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcmeta.problem import Problem

FEWEST, MOST, ENOUGH_SECONDS = 3, 15, 1.0
"""How often a computation is timed: at least, at most, and no longer than this when it was timed often enough."""


class Counted:
    """A problem that counts its evaluations, and remembers whether any of its meta-losses carried a graph."""

    def __init__(self, problem: Problem) -> None:
        self.evaluations = 0
        self._attached = False
        judge = problem.meta_loss

        def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
            result = problem.step(meta, state, batch, seed)
            share = result[1].meta_loss
            self._note(share)
            return result

        def meta_loss(meta: Any, state: Any, query: Any, seed: int) -> Tensor:
            assert judge is not None
            loss = judge(meta, state, query, seed)
            self._note(loss)
            return loss

        self.problem = Problem(problem.init, step, None if judge is None else meta_loss)

    def constant_after(self, steps: int) -> bool:
        """Whether so many steps and the meta-loss were evaluated, and no meta-loss carried a graph."""
        complete = self.evaluations == steps + (self.problem.meta_loss is not None)
        return complete and not self._attached

    def _note(self, loss: Any) -> None:
        self.evaluations += 1
        self._attached |= isinstance(loss, Tensor) and loss.requires_grad


def median_seconds(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The median wall time of each run; they take turns, so that a busy moment of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() - began > ENOUGH_SECONDS * len(runs):
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}
