"""Meta-train with an estimator, and judge what was learned on tasks that were held out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import count, over_tasks
from funcmeta._typing import Params
from funcmeta.algorithms import maml
from funcmeta.cli._subject import PARTS, Subject
from funcmeta.estimators import Estimator
from funcmeta.model import functionalize
from funcmeta.optim import sgd
from funcmeta.problem import InnerState, inner_problem
from funcmeta.tasks import Task
from funcmeta.training import Mean
from funcmeta.unroll_batch import unroll_batch

CHUNK = 20
"""Tasks that are judged at once."""

VALIDATION_TASKS = 20

POINTS = 6
"""How often the score is validated during meta-training, besides at its end."""


class Point(NamedTuple):
    """The score on the validation tasks after so many iterations."""

    iteration: int
    score: Mean


class Curve(NamedTuple):
    """The meta-training with one estimator: what it gave, and what it met on the way."""

    name: str
    params: Params
    points: list[Point]
    losses: list[float]
    seconds_per_iteration: float


@dataclass(frozen=True)
class Plan:
    """How to meta-train: the same tasks, seeds and initial parameters for every estimator."""

    subject: Subject
    steps: int
    lr: float
    meta_lr: float
    tasks: int
    iterations: int
    seed: int

    def train(self, name: str, estimator: Estimator, progress: Callable[[], None]) -> Curve:
        """MAML with this estimator; Adam outside."""
        algorithm = maml.build(self.subject.net, self.subject.loss, steps=self.steps, lr=self.lr, estimator=estimator)
        meta = algorithm.init()
        params = meta["params"]
        optimizer = torch.optim.Adam(params.values(), lr=self.meta_lr)
        sampler = self.subject.sampler("train", torch.float32)
        points, losses, seconds = [], [], 0.0
        stops = {round(part * self.iterations / POINTS) for part in range(POINTS)}
        for iteration in range(self.iterations):
            if iteration in stops:
                points.append(Point(iteration, self.validate(params, self.steps)))
            began = time.perf_counter()
            optimizer.zero_grad()
            batch = sampler.sample_batch(rng.fold(self.seed, 10, iteration), self.tasks)
            loss = algorithm.loss(meta, batch, seed=rng.fold(self.seed, 11, iteration))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seconds += time.perf_counter() - began
            losses.append(loss.item())
            progress()
        points.append(Point(self.iterations, self.validate(params, self.steps)))
        return Curve(name, params, points, losses, seconds / self.iterations)

    def validate(self, params: Params, steps: int) -> Mean:
        """The score on the validation tasks, always the same."""
        return Mean.of(self.scores(params, "validation", VALIDATION_TASKS, steps))

    def scores(self, params: Params, split: str, tasks: int, steps: int) -> Tensor:
        """The score after adaptation on each of some tasks of a split: [tasks]."""
        sampler = self.subject.sampler(split, torch.float32)
        number = PARTS.index(split)
        sizes = [min(CHUNK, tasks - first) for first in range(0, tasks, CHUNK)]
        chunks = [
            sampler.sample_batch(rng.fold(self.seed, 12, number, index), size) for index, size in enumerate(sizes)
        ]
        return torch.cat([self._adapted_scores(params, chunk, steps) for chunk in chunks])

    def _adapted_scores(self, params: Params, tasks: Task, steps: int) -> Tensor:
        model, _, _ = functionalize(self.subject.net)
        problem = inner_problem(self.subject.net, self.subject.loss, optimizer=sgd(self.lr))

        def judge(state: InnerState, query: tuple[Tensor, Tensor]) -> Tensor:
            out, _ = model(state.params, state.buffers, query[0])
            return self.subject.score(out, query[1])

        with torch.no_grad():
            meta = {"params": tree.detach(params)}
            state = unroll_batch(problem, meta, tasks, steps=steps, strategy="vmap").state
            return over_tasks(judge, count(tasks.query))(state, tasks.query)  # type: ignore[no-any-return]
