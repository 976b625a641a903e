"""Unroll many tasks at once, and average their meta-losses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch

from funcmeta import rng, tree
from funcmeta._batching import count, stack, take
from funcmeta._errors import ArgumentError, FuncmetaError, GraphError, StructureError
from funcmeta._guard import check_arguments
from funcmeta._typing import Meta
from funcmeta.estimators import Estimator, Particles, Reverse
from funcmeta.memory import Budget, Memory, StoreAll
from funcmeta.problem import Problem
from funcmeta.tasks import Task
from funcmeta.tasks._task import unstack
from funcmeta.unroll import Carry, Unrolled, UnrollInfo, check_carry, run

Strategy = Literal["auto", "vmap", "loop"]


def unroll_batch(
    problem: Problem,
    meta: Meta,
    tasks: Task,
    *,
    steps: int,
    strategy: Strategy = "auto",
    estimator: Estimator = Reverse(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    seed: int = 0,
    carry: Carry | None = None,
) -> Unrolled:
    """``unroll`` over stacked tasks: L(meta) = (1/T) Σ_t L_t(meta), one graph, one backward pass.

    Args:
        problem: as for ``unroll``.
        meta: as for ``unroll``; shared by all tasks.
        tasks: one ``Task`` whose tensors have a leading task dimension T, or whose support is a function of the step
            that returns such a batch.
        steps: number of inner steps, 0 or more.
        strategy: "vmap" runs the tasks as one batched computation; "loop" one after the other; "auto" takes one and
            two steps both ways on the first call with these shapes, keeps in mind what they took, chooses by that for
            the number of steps, and reports the choice in ``out.info.strategy``. Under a ``Budget`` it is "loop",
            as the trial steps could take more than the budget.
        estimator: as for ``unroll``.
        memory: as for ``unroll``.
        seed: as for ``unroll``. With dropout or other draws, "vmap" and "loop" draw differently from one seed.
        carry: as for ``unroll``, from an earlier ``unroll_batch``.

    Returns:
        ``Unrolled`` with the mean loss; state and losses have a task dimension (first in state, last in losses).

    Raises:
        ArgumentError: an unknown strategy, and as ``unroll``.
        GraphError: under "vmap" a step does what torch can not batch.
        StructureError: the tensors of ``tasks`` share no leading dimension, and as ``unroll``.

    Examples:
        >>> from funcmeta.problem import StepInfo, value_and_grad
        >>> def step(meta, a, x, seed):
        ...     loss, slope = value_and_grad(lambda a: (a - x) ** 2)(a)
        ...     return a - meta * slope, StepInfo(loss)
        >>> problem = Problem(lambda meta, task, seed: torch.zeros(()), step, lambda meta, a, x, seed: (a - x) ** 2)
        >>> targets = torch.tensor([1.0, 3.0])
        >>> rate = torch.tensor(0.25, requires_grad=True)
        >>> unroll_batch(problem, rate, Task(targets, targets), steps=1, strategy="vmap").loss
        tensor(1.2500, grad_fn=<MeanBackward0>)

    Source: the sum over tasks of Finn et al. (2017), equation 1; batching by ``torch.func.vmap``.
    """
    if not isinstance(strategy, str) or strategy not in ("auto", "vmap", "loop"):
        raise ArgumentError(f"strategy is {strategy!r}, expected 'auto', 'vmap' or 'loop'. Pass one of them.")
    if not isinstance(tasks, Task):
        raise ArgumentError(f"tasks is a {type(tasks).__name__}, expected one Task with stacked tensors. Stack them.")
    check_arguments(problem, meta, tasks, steps, seed, estimator, memory)
    check_carry(carry)
    start = carry.step if carry else 0
    first = tasks.support(start) if callable(tasks.support) else tasks.support
    number = count((first, tasks.query))
    if isinstance(tasks.spec, tuple) and len(tasks.spec) != number:
        raise StructureError(
            f"tasks.spec is a tuple of {len(tasks.spec)}, but the tensors have a leading dimension of {number}: this "
            f"looks like one task, or like tasks that were stacked by hand. Use unroll for one task; stack several by "
            f"tasks.stack([...]) or sample_batch(seed, tasks)."
        )
    if strategy == "auto" and isinstance(memory, Budget):
        strategy = "loop"  # trial runs both ways would take memory of their own
    if strategy == "auto" and not steps:
        strategy = "vmap"
    if strategy == "auto" and carry is not None and carry.particles is not None:
        strategy = _made_by(carry.particles, meta)
    if strategy == "auto":
        strategy = _faster(problem, meta, tasks, first, number, estimator, steps, seed, carry)
    if strategy == "loop":
        return _loop(problem, meta, tasks, number, steps, estimator, memory, seed, carry)
    with as_one_batch():
        return run(
            problem, meta, tasks, steps=steps, estimator=estimator, memory=memory, seed=seed, carry=carry, tasks=number
        )


@contextmanager
def as_one_batch() -> Iterator[None]:
    """Name what ``vmap`` can not run, and the way around it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FuncmetaError) or not str(error).startswith("vmap"):
            raise
        raise GraphError(
            f"The tasks can not run as one batch: {str(error).splitlines()[0]} Pass strategy='loop'."
        ) from error


def _loop(
    problem: Problem,
    meta: Meta,
    tasks: Task,
    number: int,
    steps: int,
    estimator: Estimator,
    memory: Memory,
    seed: int,
    carry: Carry | None,
    *,
    trial: bool = False,
) -> Unrolled:
    if isinstance(memory, Budget):
        memory = memory.among(number)
    outs = [
        run(
            problem,
            meta,
            unstack(tasks, index),
            steps=steps,
            estimator=estimator,
            memory=memory,
            seed=rng.fold(seed, index),
            carry=None if carry is None else carry._replace(**take(_stacked(carry), index)),
            trial=trial,
        )
        for index in range(number)
    ]
    info = UnrollInfo(
        torch.stack([out.info.losses for out in outs], dim=1),
        tuple(stack(column) for column in zip(*[out.info.aux for out in outs], strict=True)),
        "loop",
        outs[0].info.memory,
    )
    loss = torch.stack([out.loss for out in outs]).mean()
    going_on = outs[0].carry._replace(**stack([_stacked(out.carry) for out in outs]))
    return Unrolled(loss, stack([out.state for out in outs]), info, going_on)


def _stacked(carry: Carry) -> dict[str, Any]:
    """What of a carry has a task dimension when there are several tasks."""
    return {"state": carry.state, "particles": carry.particles}


def _made_by(particles: Particles, meta: Meta) -> Strategy:
    """The strategy whose particles these are: each task has its own in a loop, and under vmap all have the same."""
    learned = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
    return "loop" if learned and particles.sums[0].dim() == learned[0].dim() + 2 else "vmap"


class _Cost(NamedTuple):
    """Seconds of an unroll of one step and its meta-gradient, and of each further step."""

    one: float
    further: float

    def of(self, steps: int) -> float:
        return self.one + (steps - 1) * self.further


_known: WeakKeyDictionary[Any, dict[Any, dict[Strategy, _Cost]]] = WeakKeyDictionary()


def _faster(
    problem: Problem,
    meta: Meta,
    tasks: Task,
    first: Any,
    number: int,
    estimator: Estimator,
    steps: int,
    seed: int,
    carry: Carry | None,
) -> Strategy:
    """The strategy that takes less time for so many steps here, measured once per shapes and device."""
    leaves = tree.tensors((meta, first, tasks.query))
    shapes = [(leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) for leaf in leaves]
    key = (estimator, steps == 1, torch.is_grad_enabled(), carry is None, *shapes)
    known = _known.setdefault(getattr(problem.step, "__func__", problem.step), {})
    if key not in known:
        ways: tuple[Strategy, ...] = ("vmap", "loop")
        known[key] = {
            each: _measured(each, problem, meta, tasks, number, estimator, steps, seed, carry) for each in ways
        }
    costs = known[key]
    return min(costs, key=lambda each: costs[each].of(steps))


def _measured(
    strategy: Strategy,
    problem: Problem,
    meta: Meta,
    tasks: Task,
    number: int,
    estimator: Estimator,
    most: int,
    seed: int,
    carry: Carry | None,
) -> _Cost:
    """What a strategy costs, when it is run for the second time; infinite when vmap can not run the step.

    One step alone would not tell: all tasks begin at the same parameters, which makes the first step a cheaper one.
    """

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        if strategy == "vmap":
            loss = run(
                problem, meta, tasks, steps=steps, estimator=estimator, seed=seed, carry=carry, tasks=number, trial=True
            ).loss
        else:
            loss = _loop(problem, meta, tasks, number, steps, estimator, StoreAll(), seed, carry, trial=True).loss
        wanted = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
        if loss.requires_grad:
            torch.autograd.grad(loss, wanted, materialize_grads=True)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        return time.perf_counter() - began

    try:
        if most == 1:
            seconds(1)
            return _Cost(seconds(1), 0.0)
        seconds(2)
        one, two = (min(seconds(steps) for _ in range(2)) for steps in (1, 2))
        return _Cost(one, max(two - one, 0.0))
    except FuncmetaError:
        raise
    except RuntimeError:
        if strategy == "vmap":
            return _Cost(float("inf"), 0.0)
        raise
