"""Any algorithm as a meta-training sees it: a loss of tasks, perhaps in windows that hand on a carry."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import take
from funcmeta._check import is_number
from funcmeta._errors import ArgumentError, ReplayError
from funcmeta._typing import Meta
from funcmeta.algorithms import Algorithm, dynamic_lm, l2l
from funcmeta.algorithms._algorithm import EstimatedLoss
from funcmeta.problem import Predict
from funcmeta.tasks import Sampler, Streams, Task
from funcmeta.tasks._task import seeds, unstack
from funcmeta.training import _carries
from funcmeta.training._carries import Spread
from funcmeta.unroll import Carry

Score = Callable[[Predict, Task], Tensor | float]


class Stream(IntEnum):
    """What the seed of a run is folded with first. Each use has its own number, so no two uses share a seed."""

    TRAINING = 0
    VALIDATION = 1
    STEP = 2  # torch's global generators during an outer step
    EVALUATION = 3


class Objective(Protocol):
    """What an outer step minimizes. A batch is what ``sample`` returned, a carry what ``loss`` did."""

    def sample(self, seed: int, batch_size: int) -> Any:
        """The batch of this seed."""

    def begin(self, meta: Meta, batch: Any, seed: int) -> Any:
        """The carry before the first window."""

    def loss(self, meta: Meta, batch: Any, seed: int, carry: Any) -> tuple[Tensor, Any]:
        """The 0-d loss of a window, and the carry of the next; None when the batch is done."""

    def may_leave_out(self, meta: Meta) -> bool:
        """Whether there are windows in which a learned leaf of ``meta`` gets no gradient."""

    def part_of_batch(self, batch: Any, rows: slice) -> Any:
        """Some of the tasks."""

    def part_of_carry(self, carry: Any, rank: int, ranks: int) -> Any:
        """What one of several processes goes on with."""

    def joined(self, carries: list[Any]) -> Any:
        """The carry of all from those of the processes."""

    def check_judged(self, number: int, score: Score | None) -> None:
        """Raise unless so many tasks can be judged by this score."""

    def judge(self, meta: Meta, index: int, seed: int, score: Score | None) -> float:
        """The score of one held-out task, which follows from index or seed; the loss when no score is given."""


def objective(algorithm: Any, tasks: Sampler | Streams, spread: Spread = "tasks", *, name: str = "tasks") -> Objective:
    """The objective of any of the library's algorithms on tasks of a sampler, which errors call by its name."""
    if isinstance(algorithm, dynamic_lm.DynamicLanguageModel):
        if not isinstance(tasks, Streams):
            raise ArgumentError(f"{name} is a {type(tasks).__name__}, expected streams. Pass Corpus.streams(...).")
        if spread != "tasks":
            raise ArgumentError(
                f"spread is {spread!r}, but of streams processes share tasks only. Pass spread='tasks'."
            )
        return _Streams(algorithm, tasks)
    if isinstance(tasks, Streams):
        raise ArgumentError(f"{name} are streams, which only dynamic_lm reads. Pass a sampler of tasks.")
    if not callable(getattr(tasks, "sample_batch", None)):
        raise ArgumentError(f"{name} is a {type(tasks).__name__}, expected a sampler. Pass e.g. tasks.glyphs().")
    if isinstance(algorithm, l2l.L2L):
        return _Windows(algorithm, tasks, spread)
    if all(callable(getattr(algorithm, name, None)) for name in ("init", "loss", "adapt")):
        return _Whole(algorithm, tasks)
    raise ArgumentError(
        f"algorithm is a {type(algorithm).__name__}, expected what algorithms.<name>.build(...) returns. Pass an "
        f"Algorithm(init, loss, adapt) of your own for anything else."
    )


def check_repeatable(aim: Objective, seed: int, batch_size: int) -> None:
    """Raise unless the same seed gives the same tasks."""
    drawn = []
    for _ in range(2):
        with rng.forked(seed):  # torch's global generators follow from seed and step in a training
            drawn.append(tree.tensors(aim.sample(seed, batch_size)))
    first, second = drawn
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
        raise ReplayError(
            "The sampler gave two different batches for one seed, so that a resumed run would see other tasks. Draw "
            "from torch.Generator().manual_seed(seed) alone."
        )


@dataclass(frozen=True)
class _Whole:
    """Algorithms whose loss is that of whole inner trainings."""

    algorithm: Algorithm
    tasks: Sampler

    def sample(self, seed: int, batch_size: int) -> Task:
        batch = self.tasks.sample_batch(seed, batch_size)
        if not isinstance(batch, Task):
            raise ArgumentError(
                f"sample_batch returned a {type(batch).__name__}, expected a Task of {batch_size} stacked tasks. "
                f"Return what funcmeta.tasks.stack makes of a list of them."
            )
        for part in (() if callable(batch.support) else batch.support, batch.query):
            for leaf in tree.tensors(part):
                if not leaf.ndim or len(leaf) != batch_size:
                    raise ArgumentError(
                        f"sample_batch({seed}, {batch_size}) has a {tree.describe(leaf)}, expected {batch_size} tasks "
                        f"along the first dimension. Return what funcmeta.tasks.stack makes of a list of tasks."
                    )
        return batch

    def begin(self, meta: Meta, batch: Task, seed: int) -> None:
        return None

    def loss(self, meta: Meta, batch: Task, seed: int, carry: None) -> tuple[Tensor, None]:
        return self.algorithm.loss(meta, batch, seed=seed), None

    def may_leave_out(self, meta: Meta) -> bool:
        return not isinstance(self.algorithm.loss, EstimatedLoss)  # ours say themselves that a leaf is not reached

    def part_of_batch(self, batch: Task, rows: slice) -> Task:
        support, query = take(tuple(batch[:2]), rows)
        return Task(support, query, batch.spec[rows] if isinstance(batch.spec, tuple) else batch.spec)

    def part_of_carry(self, carry: Any, rank: int, ranks: int) -> Any:
        return carry

    def joined(self, carries: list[Any]) -> Any:
        return carries[0]

    def check_judged(self, number: int, score: Score | None) -> None:
        pass

    def judge(self, meta: Meta, index: int, seed: int, score: Score | None) -> float:
        one = self.sample(seed, 1)
        if score is None:
            with torch.no_grad():
                return self.algorithm.loss(meta, one, seed=seed).item()
        task = unstack(one, 0)
        with torch.no_grad():
            value = score(self.algorithm.adapt(meta, task, seed=seed), task)
        if not (value.numel() == 1 if isinstance(value, Tensor) else is_number(value)):
            raise ArgumentError(f"score returned {tree.describe(value)}, expected a number. Reduce it by mean().")
        return float(value)


@dataclass(frozen=True)
class _Windows(_Whole):
    """Learned optimizers, whose trainings go on from window to window."""

    algorithm: l2l.L2L  # type: ignore[assignment]
    spread: Spread = "tasks"

    def begin(self, meta: Meta, batch: Task, seed: int) -> Carry | None:  # type: ignore[override]
        return self.algorithm.begin(meta, batch, seed=seed)

    def loss(self, meta: Meta, batch: Task, seed: int, carry: Carry | None) -> tuple[Tensor, Carry | None]:  # type: ignore[override]
        return self.algorithm.window(meta, batch, seed=seed, carry=carry)

    def may_leave_out(self, meta: Meta) -> bool:
        return "params" in meta  # where a training begins is felt in its first window

    def judge(self, meta: Meta, index: int, seed: int, score: Score | None) -> float:
        if score is not None:
            return super().judge(meta, index, seed, score)
        one, total = self.sample(seed, 1), 0.0
        with torch.no_grad():
            carry, going_on = self.algorithm.begin(meta, one, seed=seed), True
            while going_on:  # to the end, or to what is not finite, whatever the algorithm skips
                loss, carry = self.algorithm.window(meta, one, seed=seed, carry=carry)
                total, going_on = total + loss.item(), carry is not None
        return total

    def part_of_carry(self, carry: Carry | None, rank: int, ranks: int) -> Carry | None:
        return carry and _carries.part(carry, self.spread, rank, ranks)

    def joined(self, carries: list[Carry | None]) -> Carry | None:
        present = [each for each in carries if each]
        return _carries.joined(present, self.spread) if present else None


@dataclass(frozen=True)
class _Streams:
    """Language models that learn while they read: each task is a stream, which is read from window to window."""

    algorithm: dynamic_lm.DynamicLanguageModel
    tasks: Streams

    def sample(self, seed: int, batch_size: int) -> list[Task]:
        return [self.tasks.sample(each) for each in seeds(seed, batch_size)]

    def begin(self, meta: Meta, batch: list[Task], seed: int) -> None:
        return None

    def loss(self, meta: Meta, batch: list[Task], seed: int, carry: list[Carry] | None) -> tuple[Tensor, Any]:
        carries: list[Any] = [None] * len(batch) if carry is None else carry
        outs = [self.algorithm.loss(meta, task, carry=own) for task, own in zip(batch, carries, strict=True)]
        done = all(out.carry.step == len(task.spec) for out, task in zip(outs, batch, strict=True))
        return torch.stack([out.loss for out in outs]).mean(), None if done else [out.carry for out in outs]

    def may_leave_out(self, meta: Meta) -> bool:
        return False

    def part_of_batch(self, batch: list[Task], rows: slice) -> list[Task]:
        return batch[rows]

    def part_of_carry(self, carry: list[Carry] | None, rank: int, ranks: int) -> list[Carry] | None:
        return None if carry is None else carry[rank * len(carry) // ranks : (rank + 1) * len(carry) // ranks]

    def joined(self, carries: list[list[Carry] | None]) -> list[Carry] | None:
        return None if carries[0] is None else [each for part in carries for each in part or ()]

    def check_judged(self, number: int, score: Score | None) -> None:
        articles = len(self.tasks.articles)
        if score is not None or number > articles:
            raise ArgumentError(
                f"A language model is judged by its loss on one article after the other, and there are {articles}. "
                f"Leave score out, and judge on no more than these."
            )

    def judge(self, meta: Meta, index: int, seed: int, score: Score | None) -> float:
        return torch.cat(self.algorithm.adapt(meta, self.tasks.alone(index)).losses).mean().item()
