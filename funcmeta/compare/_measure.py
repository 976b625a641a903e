"""What a computation costs: evaluations, bytes and seconds, each measured where it happens."""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcmeta import tree
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


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this mode the bytes of all tensors that come to life are counted until they die; ``peak`` is the most.

    A storage counts once, however many views it has. What a kernel takes and gives back by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in given and _key(leaf) not in self._known:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self._live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = size
        self._live += size
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._live -= self._known.pop(key)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were in use on the device during the run, above those in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as live:
        run()
    return int(live.peak)


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


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
