"""Run every optimizer on the same trainings; tune those that have a learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import rng
from funcmeta._batching import count, take
from funcmeta._check import check_choice, check_count, is_function
from funcmeta._errors import ArgumentError
from funcmeta._typing import Params
from funcmeta.algorithms._start import carry_of, fresh_start
from funcmeta.estimators import Reverse
from funcmeta.evaluation._report import OptimizerEvaluation
from funcmeta.evaluation._rows import EvaluationRow, quartiles
from funcmeta.learned import LearnedOptimizer, as_transform
from funcmeta.optim import Transform, adam, rmsprop, sgd
from funcmeta.problem import InnerLoss, Problem, inner_problem
from funcmeta.tasks import Sampler, Task
from funcmeta.tasks._task import unstack
from funcmeta.unroll import Carry, run
from funcmeta.unroll_batch import as_one_batch

Tunable = Callable[[float], Transform]

BASELINES: Mapping[str, Tunable] = MappingProxyType(
    {
        "SGD": sgd,
        "momentum": lambda lr: sgd(lr, momentum=0.9),
        "RMSprop": rmsprop,
        "Adam": adam,
    }
)
"""What a learned optimizer has to beat: each a function of the learning rate, which is tuned."""

RATES = tuple(10 ** (exponent / 3) for exponent in range(-15, 4))
"""The learning rates that are tried: three in every power of ten, from 1e-5 to 10."""


class Course(NamedTuple):
    """A family of trainings: what is trained, on what, for how long.

    Attributes:
        module: the network that is trained.
        loss_fn: (meta, predict, batch) → 0-d loss; meta is empty.
        tasks: a sampler of tasks, whose support is a batch, or a function of the step, from 0 to ``steps``: the last
            is where the loss at the end is taken.
        steps: of each training.
        start: seed → initial parameters; None: those that ``reset_parameters`` of the module's layers draw.

    Examples:
        >>> Course(nn.Linear(1, 1), lambda meta, predict, batch: predict(batch).mean(), fm.tasks.sinusoids()).steps
        100

    Source: this library.
    """

    module: nn.Module
    loss_fn: InnerLoss
    tasks: Sampler
    steps: int = 100
    start: Callable[[int], Params] | None = None


def evaluate_optimizers(
    optimizers: Mapping[str, LearnedOptimizer | Transform | Tunable],
    courses: Mapping[str, Course],
    *,
    baselines: Mapping[str, Tunable] = BASELINES,
    rates: Sequence[float] = RATES,
    tasks: int = 64,
    tuning_tasks: int = 32,
    seed: int = 0,
    strategy: str = "vmap",
) -> OptimizerEvaluation:
    """Train by every optimizer from the same starts on the same held-out tasks, and compare how far each gets.

    Optimizers that are functions of a learning rate are tuned for each course by itself: the rate with the lowest
    median loss at the end, over tasks of their own, is taken; one that diverges on a task is not. All others run as
    they are. Courses with more steps, other widths or other activations than those of meta-training show how far a
    learned optimizer generalizes.

    Args:
        optimizers: what is evaluated, by name: learned optimizers, transforms, or functions lr → ``Transform``.
        courses: trainings, by name.
        baselines: further functions lr → ``Transform``, by name; ``BASELINES`` are SGD, momentum .9, RMSprop and Adam.
        rates: the learning rates that are tried.
        tasks: held-out tasks a course.
        tuning_tasks: tasks a course that the rates are tuned on.
        seed: integer from which tasks and starts follow.
        strategy: "vmap" runs the trainings of a course as one batch, "loop" one after the other, which wide
            convolutions prefer. The two draw differently, where a module draws.

    Returns:
        ``OptimizerEvaluation``: a row for each course and optimizer, and the loss after every step.

    Raises:
        ArgumentError: optimizers, courses or baselines are no dict by name; no optimizer, no course, a name that stands
            twice, something else than an optimizer, a course or a sampler in its place, an unknown strategy, or a
            count, rate or seed out of range; or every rate of a baseline diverges.

    Examples:
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> course = Course(nn.Linear(1, 1), loss, fm.tasks.sinusoids(), steps=3)
        >>> result = evaluate_optimizers(
        ...     {"linear": fm.learned.linear()}, {"lines": course}, rates=(0.01, 0.1), tasks=2, tuning_tasks=2
        ... )
        >>> [row.optimizer for row in result.rows]
        ['linear', 'SGD', 'momentum', 'RMSprop', 'Adam']

    Source: this library; tuning each baseline as Andrychowicz et al. (2016), section 3.
    """
    for what, named in (("optimizers", optimizers), ("courses", courses), ("baselines", baselines)):
        if not isinstance(named, Mapping):
            raise ArgumentError(f"{what} is a {type(named).__name__}, expected a dict by name. Pass {{'a name': ...}}.")
    entrants = {**optimizers, **baselines}
    if not optimizers or not courses or len(entrants) != len(optimizers) + len(baselines):
        raise ArgumentError(
            f"optimizers are {sorted(optimizers)}, baselines {sorted(baselines)}, courses {sorted(courses)}, expected "
            f"at least one optimizer and one course, and no name twice. Name them apart."
        )
    if not isinstance(rates, Sequence) or not (
        rates and all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates)
    ):
        raise ArgumentError(f"rates are {rates!r}, expected positive floats. Pass e.g. rates=(0.001, 0.01, 0.1).")
    check_choice("strategy", strategy, ("vmap", "loop"))
    check_count("tasks", tasks)
    check_count("tuning_tasks", tuning_tasks)
    for name, course in courses.items():
        if not isinstance(course, Course):
            raise ArgumentError(
                f"courses['{name}'] is {course!r}, expected a Course. Pass Course(module, loss_fn, tasks, steps)."
            )
        if not callable(getattr(course.tasks, "sample_batch", None)):
            raise ArgumentError(
                f"courses['{name}'].tasks is a {type(course.tasks).__name__}, expected a sampler. Pass e.g. "
                f"funcmeta.tasks.sinusoids()."
            )
        check_count(f"courses['{name}'].steps", course.steps, advice="Pass e.g. steps=100.")
    rows, curves = [], {}
    for place, (name, course) in enumerate(courses.items()):
        tuning = course.tasks.sample_batch(rng.fold(seed, place, 0), tuning_tasks)
        held_out = course.tasks.sample_batch(rng.fold(seed, place, 1), tasks)
        for entrant, optimizer in entrants.items():
            rate = None
            known = isinstance(optimizer, LearnedOptimizer | Transform)
            if not known and not is_function(optimizer):
                raise ArgumentError(
                    f"optimizers['{entrant}'] is {optimizer!r}, expected a LearnedOptimizer, a Transform, or a "
                    f"function from a learning rate to one. Pass e.g. funcmeta.optim.adam."
                )
            if isinstance(optimizer, LearnedOptimizer | Transform):
                transform = optimizer if isinstance(optimizer, Transform) else as_transform(optimizer)
            else:
                rate = _best_rate(entrant, optimizer, rates, course, tuning, rng.fold(seed, place, 2), strategy)
                transform = optimizer(rate)
            losses = losses_of(transform, course, held_out, rng.fold(seed, place, 3), strategy=strategy)
            curves[name, entrant] = losses
            low, median, high = (each.item() for each in quartiles(losses[-1]))
            diverged, at_edge = int((~losses[-1].isfinite()).sum()), rate in (min(rates), max(rates))
            rows.append(EvaluationRow(name, entrant, rate, median, low, high, diverged, at_edge))
    return OptimizerEvaluation(tuple(rows), curves, seed)


def losses_of(transform: Transform, course: Course, tasks: Task, seed: int, *, strategy: str = "vmap") -> Tensor:
    """The losses before each step and after the last, [steps + 1, tasks]; infinite from where a training diverges."""
    problem = inner_problem(course.module, course.loss_fn, optimizer=transform, trajectory_loss=True)
    begun = carry_of(problem, {}, tasks, seed, course.start or fresh_start(course.module))
    number, steps = count(begun.state), course.steps + 1
    with torch.no_grad():
        if strategy == "vmap":
            losses = _run(problem, tasks, steps, begun, seed, number)
        else:
            losses = torch.stack(
                [
                    _run(problem, unstack(tasks, index), steps, begun._replace(state=take(begun.state, index)), seed)
                    for index in range(number)
                ],
                1,
            )
    return torch.where(losses.isfinite().cummin(0).values, losses, math.inf)


def _run(problem: Problem, tasks: Task, steps: int, begun: Carry, seed: int, number: int | None = None) -> Tensor:
    """The inner losses, finite or not."""
    with as_one_batch():
        return run(
            problem, {}, tasks, steps=steps, estimator=Reverse(), seed=seed, carry=begun, tasks=number, trial=True
        ).info.losses


def _best_rate(
    name: str, optimizer: Tunable, rates: Sequence[float], course: Course, tasks: Task, seed: int, strategy: str
) -> float:
    """The rate with the lowest median loss at the end, among those that diverge on no task."""
    ends = {rate: losses_of(optimizer(rate), course, tasks, seed, strategy=strategy)[-1] for rate in rates}
    scores = {rate: last.median().item() if last.isfinite().all() else math.inf for rate, last in ends.items()}
    best = min(scores, key=lambda rate: scores[rate])
    if not math.isfinite(scores[best]):
        raise ArgumentError(f"'{name}' diverges at every rate of {list(rates)}. Pass smaller ones.")
    return best
