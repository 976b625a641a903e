"""The state of a meta-training: one outer step after the other, and all that the rest depends on."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._errors import ArgumentError, DivergenceError, NonFiniteWarning
from funcmeta._typing import Meta
from funcmeta.training._carries import Spread
from funcmeta.training._evaluation import Validation, judged
from funcmeta.training._folder import Record, finite
from funcmeta.training._objective import Objective, Stream
from funcmeta.training._ranks import Averaged, Ranks, detached

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler

HOPELESS = 100
"""Steps in a row that may be left out before a training ends all the same."""


class Alarm(NamedTuple):
    """What to do about a meta-gradient that is not finite, or larger than a limit.

    Attributes:
        action: "stop" raises ``DivergenceError``; "skip" leaves the step out; "lower" leaves it out and halves the
            outer learning rate from then on.
        limit: norm of the meta-gradient, before clipping, above which it counts as exploding.

    Examples:
        >>> Alarm("skip", limit=100.0).action
        'skip'

    Source: this library.
    """

    action: Literal["stop", "skip", "lower"] = "stop"
    limit: float = math.inf


class Plan(NamedTuple):
    """What a training is told, apart from what it trains."""

    seed: int
    batch_size: int
    accumulate: int
    clip: float | None
    alarm: Alarm
    validation: Validation | None
    spread: Spread


class _Best(NamedTuple):
    """The best that validation saw."""

    score: float
    step: int
    meta: Meta


@dataclass
class _Lane:
    """One of the batches that a step averages over: its number, and where in it the training is."""

    number: int
    carry: Any = None
    batch: Any = field(default=None, repr=False)


class Run:
    """All that changes during a training."""

    def __init__(
        self,
        aim: Objective,
        held_out: Objective | None,
        meta: Meta,
        optimizer: Callable[[Meta], Optimizer],
        scheduler: Callable[[Optimizer], Scheduler] | None,
        plan: "Plan",
        ranks: Ranks,
    ) -> None:
        self.meta, self.validation, self.ranks = meta, plan.validation, ranks
        self._aim, self._held_out, self._plan = aim, held_out, plan
        self._learned = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
        ranks.begin_alike(tree.leaves(meta))
        self._optimizer = optimizer(meta)
        if not isinstance(self._optimizer, Optimizer):
            raise ArgumentError(
                f"optimizer returned a {type(self._optimizer).__name__}, expected an optimizer of torch. Pass e.g. "
                f"lambda meta: torch.optim.Adam(meta['params'].values(), lr=1e-3)."
            )
        _check_held(self._optimizer, meta)
        self._scheduler = scheduler(self._optimizer) if scheduler else None
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ArgumentError(
                "scheduler made a ReduceLROnPlateau, which waits for a score that fit does not give it. Pass another, "
                "or alarm=Alarm('lower')."
            )
        self._loss = Averaged(aim, meta, ranks)
        self.step, self.alarms, self.lanes = 0, 0, [_Lane(number) for number in range(plan.accumulate)]
        self.best: _Best | None = None
        self.begun = False
        self._factor, self._in_a_row, self._stale = 1.0, 0, 0

    @property
    def rate(self) -> float:
        """The learning rate of the first group."""
        return float(self._optimizer.param_groups[0]["lr"]) * self._factor

    @property
    def exhausted(self) -> bool:
        """Whether validation has lost its patience."""
        patience = self.validation.patience if self.validation else None
        return patience is not None and self._stale >= patience

    def advance(self) -> Record:
        """One outer step."""
        began, rate = time.perf_counter(), self.rate
        with rng.forked(rng.fold(self._plan.seed, Stream.STEP, self.step)):
            loss, norm, alarm = self._gradients()
        self.step += 1
        if alarm is None:
            self._in_a_row = 0
            self._update()
        else:
            self.alarms, self._in_a_row = self.alarms + 1, self._in_a_row + 1
            if self._plan.alarm.action == "lower":
                self._factor /= 2
        if self._scheduler:
            self._scheduler.step()
        seconds = time.perf_counter() - began
        return Record(self.step, finite(loss), finite(norm), rate, seconds, alarm, alarms=self.alarms)

    def validated(self, record: Record) -> Record:
        """The record with the score on held-out tasks; the best meta is kept."""
        plan, seed = self.validation, self._plan.seed
        assert plan is not None
        assert self._held_out is not None
        found = judged(
            self._held_out,
            tree.detach(self.meta),
            plan.number,
            plan.score,
            seed,
            self.ranks,
            Stream.VALIDATION,
            forgiving=True,
        )
        mean = found.mean
        score = mean.value
        better = math.isfinite(score) and (
            self.best is None or ((score > self.best.score) == plan.higher_is_better and score != self.best.score)
        )
        if better:
            self.best, self._stale = _Best(score, self.step, tree.map(torch.clone, tree.detach(self.meta))), 0
        else:
            self._stale += 1
        if not math.isfinite(score):
            warnings.warn(
                f"The validation after step {self.step} is not finite: there are tasks whose training diverges. It "
                f"counts as no better than those before.",
                NonFiniteWarning,
                stacklevel=2,
            )
            return record
        return record._replace(validation=mean, best=better)

    def learned(self) -> Meta:
        """A copy of the best meta that validation saw; of the present one without validation."""
        found = self.meta if self.best is None else self.best.meta

        def copy(leaf: Tensor, own: Tensor) -> Tensor:
            return leaf.detach().to(own.device, copy=True).requires_grad_(own.requires_grad)

        return tree.map(copy, found, self.meta)

    def carries(self) -> list[Any]:
        """The carries of all processes, lane by lane; every process has to ask."""
        if self.ranks.number == 1 or all(lane.carry is None for lane in self.lanes):
            return [lane.carry for lane in self.lanes]
        return [self._aim.joined(self.ranks.gathered(lane.carry)) for lane in self.lanes]

    def saved(self, carries: list[Any]) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "settings": self._settings(),
            "step": self.step,
            "meta": self.meta,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler and self._scheduler.state_dict(),
            "lanes": [[lane.number, carry] for lane, carry in zip(self.lanes, carries, strict=True)],
            "best": self.best and list(self.best),
            "stale": self._stale,
            "alarms": [self.alarms, self._in_a_row, self._factor],
        }

    def restore(self, found: dict[str, Any]) -> None:
        """Go back to where ``saved`` was asked."""
        mine, theirs = self._settings(), found["settings"]
        if "validation" not in theirs:
            if found["best"]:
                raise ArgumentError(
                    "The run was begun by an earlier version of funcmeta, which validated on the training tasks and "
                    "kept the best meta by them. Begin it again in another folder."
                )
            theirs = {**theirs, "validation": mine["validation"]}
        other = [
            f"{name} {theirs.get(name)!r}, now {mine.get(name)!r}" for name in mine if theirs.get(name) != mine[name]
        ]
        if other:
            raise ArgumentError(
                f"The run was begun with other settings: {'; '.join(other)}. Resume it as it was begun, or begin "
                f"another in its own folder."
            )
        tree.check_same(self.meta, found["meta"], name="the checkpoint's meta", advice="It is of another model.")
        with torch.no_grad():
            tree.map(lambda leaf, saved: leaf.copy_(saved), self.meta, found["meta"])
        self._optimizer.load_state_dict(found["optimizer"])
        if self._scheduler:
            self._scheduler.load_state_dict(found["scheduler"])
        here = next(iter(self._learned)).device
        self.begun = True
        self.step, self._stale = found["step"], found["stale"]
        self.alarms, self._in_a_row, self._factor = found["alarms"]
        self.best = found["best"] and _Best(*found["best"])
        for lane, (number, carry) in zip(self.lanes, found["lanes"], strict=True):
            moved = tree.map(lambda leaf: leaf.to(here) if isinstance(leaf, Tensor) else leaf, carry)
            lane.number, lane.carry = number, self._aim.part_of_carry(moved, self.ranks.rank, self.ranks.number)

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self._plan.seed,
            "batch_size": self._plan.batch_size,
            "accumulate": self._plan.accumulate,
            "clip": self._plan.clip,
            "optimizer": type(self._optimizer).__name__,
            "rates": [float(group.get("initial_lr", group["lr"])) for group in self._optimizer.param_groups],
            "scheduler": self._scheduler and type(self._scheduler).__name__,
            "validation": self.validation and _what_is_best(self.validation),
        }

    def _gradients(self) -> tuple[float, float, str | None]:
        """Leave the mean meta-gradient on ``meta``. Returns mean loss, norm, and what is wrong if anything."""
        for leaf in self._learned:
            leaf.grad = None
        total = 0.0
        for place, lane in enumerate(self.lanes, 1):
            with nullcontext() if place == len(self.lanes) else self._loss.apart():
                loss, error = self._forward(lane)
                everyone = self.ranks.gathered((loss.item(), error))
                with self.ranks.together():
                    (loss / len(self.lanes)).backward()  # type: ignore[no-untyped-call]
            trouble = next((each for _, each in everyone if each), None)
            if trouble:
                self._give_up()
                return math.nan, math.nan, trouble
            total += sum(each for each, _ in everyone) / self.ranks.number / len(self.lanes)
            if lane.carry is None:
                self._next(lane)
        if all(leaf.grad is None for leaf in self._learned):
            raise detached()
        trouble = None
        norm = torch.nn.utils.clip_grad_norm_(self._learned, self._plan.clip or math.inf).item()
        if not math.isfinite(total):
            trouble = "The meta-loss is not finite."
        elif not math.isfinite(norm):
            trouble = "The meta-gradient is not finite."
        elif norm > self._plan.alarm.limit:
            trouble = f"The meta-gradient has the norm {norm:.3g}, above the limit of {self._plan.alarm.limit:g}."
        return total, norm, trouble

    def _forward(self, lane: _Lane) -> tuple[Tensor, str | None]:
        """The loss of a lane's next window, and what is not finite in it."""
        if lane.batch is None:
            self._fill(lane)
        loss, lane.carry, error = self._loss(lane.batch, lane.number, lane.carry)
        return loss, error and (f"In process {self.ranks.rank}: {error}" if self.ranks.number > 1 else error)

    def _fill(self, lane: _Lane) -> None:
        """Sample the lane's batch, and keep the part of this process."""
        whole = self._aim.sample(rng.fold(self._plan.seed, Stream.TRAINING, lane.number), self._plan.batch_size)
        rank, ranks = self.ranks.rank, self.ranks.number
        if lane.carry is None:
            lane.carry = self._aim.part_of_carry(self._aim.begin(self.meta, whole, lane.number), rank, ranks)
        share = self._plan.batch_size // ranks
        rows = slice(rank * share, (rank + 1) * share)
        lane.batch = whole if self._plan.spread == "particles" else self._aim.part_of_batch(whole, rows)

    def _give_up(self) -> None:
        """Leave the trainings that led here, in every process alike."""
        for lane in self.lanes:
            if lane.batch is not None or lane.carry is not None:
                self._next(lane)

    def _next(self, lane: _Lane) -> None:
        lane.number, lane.carry, lane.batch = lane.number + len(self.lanes), None, None

    def _update(self) -> None:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self._factor
        self._optimizer.step()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def stop_if_told(self, record: Record) -> None:
        """Raise where the alarm says stop, or has sounded in too many steps in a row."""
        if record.alarm and (self._plan.alarm.action == "stop" or self._in_a_row >= HOPELESS):
            raise DivergenceError(
                f"Outer step {self.step}: {record.alarm} It is alarm {self.alarms} of this run. Lower the outer or "
                f"inner learning rate, or clip; or pass alarm=Alarm('skip') or Alarm('lower') (--alarm) to go on "
                f"without such steps."
            )


def _what_is_best(validation: Validation) -> str:
    """What a best score is the best of: another score, of another number of tasks, does not compare with it."""
    score = validation.score
    name = "loss" if score is None else getattr(score, "__qualname__", type(score).__name__)
    which = "highest" if validation.higher_is_better else "lowest"
    return f"of {validation.number} tasks, the {which} mean of {name} is best"


def _check_held(optimizer: Optimizer, meta: Meta) -> None:
    """Raise unless the optimizer has all leaves of meta that are learned, and no tensors of another tree."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    leaves = tree.named_leaves(meta, "meta")
    advice = "Make the optimizer from what it is given, e.g. lambda meta: torch.optim.Adam(funcmeta.tree.leaves(meta))."
    others = len(held - {id(leaf) for _, leaf in leaves})
    if others:
        raise ArgumentError(
            f"The optimizer has {others} tensors that are not in meta, perhaps those of a module. {advice}"
        )
    left = [name for name, leaf in leaves if leaf.requires_grad and id(leaf) not in held]
    if left:
        raise ArgumentError(
            f"{', '.join(left[:5])}{' and others' if left[5:] else ''} would never be learned: the optimizer has not "
            f"got it. {advice} Pass meta= with requires_grad=False for what shall stay as it is."
        )
