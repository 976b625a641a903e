"""Unroll many tasks at once, and average their meta-losses."""

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch

from funcmeta import rng, tree
from funcmeta._batching import count, stack, take
from funcmeta._errors import ArgumentError, DetachedError, FuncmetaError, GraphError, StructureError
from funcmeta._graph import inside_functorch
from funcmeta._guard import check_arguments
from funcmeta._remembered import remembered
from funcmeta._same_by_vmap import Made, Precision, difference, nudged_task, slopes_of
from funcmeta._typing import Meta
from funcmeta.estimators import Estimator, EvolutionStrategies, Particles, PersistentES, Reverse, Truncated
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
        strategy: "vmap" runs the tasks as one batched computation; "loop" one after the other, which is always right;
            "auto" takes one and two steps both ways on the first call with these shapes, and from then on the way
            that takes less time for the number of steps, where both gave the same, else the loop. It reports the
            choice in ``out.info.strategy``. "vmap" compares two steps of two tasks with the loop, on the first call.
            Estimators with perturbed copies have others for each task in a loop, which "auto" takes for them. Under a
            ``Budget`` "auto" is "loop", as trials could take more than the budget.
        estimator: as for ``unroll``.
        memory: as for ``unroll``.
        seed: as for ``unroll``. Each task draws the same by every strategy: from the seed ``fold(seed, task)``. Under
            "vmap" the functions of the problem get an ``rng.Seed`` that knows the seeds of all tasks.
        carry: as for ``unroll``, from an earlier ``unroll_batch``.

    Returns:
        ``Unrolled`` with the mean loss; state and losses have a task dimension (first in state, last in losses).

    Raises:
        ArgumentError: an unknown strategy, and as ``unroll``.
        GraphError: under "vmap" a step does what torch cannot batch, or not rightly.
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
    one_seed = rng.Seed.of(rng.check_seed(seed), lambda: tuple([rng.fold(seed, index) for index in range(number)]))
    case = _Case(problem, meta, tasks, number, estimator, one_seed, carry)
    if strategy == "auto" and isinstance(memory, Budget):
        strategy = "loop"
    if strategy == "auto" and carry is not None and carry.particles is not None:
        strategy = _made_by(carry.particles, meta)
    if strategy == "auto":
        strategy = _chosen(case, first, steps)
    elif strategy == "vmap":
        why = _objection(case, first, steps)
        if why:
            raise GraphError(_advised(why))
    if strategy == "loop":
        return case.loop(steps, memory)
    with as_one_batch():
        return case.vmap(steps, memory)


@contextmanager
def as_one_batch() -> Iterator[None]:
    """Name what ``vmap`` cannot run, and the way around it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FuncmetaError) or not _OF_VMAP.search(str(error)):
            raise
        raise GraphError(_advised(_not_run(error))) from error


_OF_VMAP = re.compile(r"vmap|functorch|torch\.func\b|[Bb]atching rule|BatchedTensor")


def _not_run(error: Exception) -> str:
    """What went wrong under vmap, in words."""
    if isinstance(error, FuncmetaError) and "strategy='loop'" in str(error):
        return str(error)
    return f"The tasks cannot run as one batch: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _advised(why: str) -> str:
    return why if "strategy='loop'" in why else f"{why} Pass strategy='loop'."


class _Case(NamedTuple):
    """Stacked tasks and how they are to be unrolled, whichever way."""

    problem: Problem
    meta: Meta
    tasks: Task
    number: int
    estimator: Estimator
    seed: rng.Seed
    carry: Carry | None

    def vmap(self, steps: int, memory: Memory = StoreAll(), *, trial: bool = False) -> Unrolled:  # noqa: B008
        """All as one batch."""
        return run(
            self.problem,
            self.meta,
            self.tasks,
            steps=steps,
            estimator=self.estimator,
            memory=memory,
            seed=self.seed,
            carry=self.carry,
            tasks=self.number,
            trial=trial,
        )

    def loop(self, steps: int, memory: Memory = StoreAll(), *, trial: bool = False) -> Unrolled:  # noqa: B008
        """One after the other."""
        return _loop(self, steps, memory, trial=trial)

    def some(self) -> "_Case":
        """The first and the last task: a wrong batching rule may be right for the first."""
        rows = sorted({0, self.number - 1})
        support, query = take(tuple(self.tasks[:2]), rows)
        spec = self.tasks.spec
        spec = tuple([spec[row] for row in rows]) if isinstance(spec, tuple) else spec
        carry = self.carry and self.carry._replace(state=take(self.carry.state, rows), particles=None)
        seed = rng.Seed.of(self.seed, lambda: tuple([self.seed.each[row] for row in rows]))
        return self._replace(tasks=Task(support, query, spec), number=len(rows), seed=seed, carry=carry)

    def nudged(self, units: int) -> "_Case":
        """The same with numbers that are a little different."""
        carry = self.carry and self.carry._replace(state=tree.nudged(self.carry.state, units))
        return self._replace(meta=tree.nudged(self.meta, units), tasks=nudged_task(self.tasks, units), carry=carry)

    def made(self, out: Unrolled) -> Made:
        """What is compared of an unroll."""
        slopes = slopes_of(out.loss, self.meta)
        return Made(out.loss.detach(), out.info.losses, tree.detach(out.state), out.info.aux, slopes)


def _loop(case: _Case, steps: int, memory: Memory, *, trial: bool) -> Unrolled:
    if isinstance(memory, Budget):
        memory = memory.among(case.number)
    carry, seeds = case.carry, case.seed.each
    outs = [
        run(
            case.problem,
            case.meta,
            unstack(case.tasks, index),
            steps=steps,
            estimator=case.estimator,
            memory=memory,
            seed=seeds[index],
            carry=None if carry is None else carry._replace(**take(_stacked(carry), index)),
            trial=trial,
        )
        for index in range(case.number)
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
    made: Made | None = None
    coarsest: float = 0.0
    why: str = ""

    def of(self, steps: int) -> float:
        return self.one + (steps - 1) * self.further


class _Known(NamedTuple):
    """Why vmap cannot be used, if it cannot, and what either strategy costs where that was measured."""

    why: str
    costs: dict[Strategy, _Cost]


_known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _key(case: _Case, first: Any, steps: int) -> tuple[Any, ...]:
    """What else decides whether vmap is right and what it costs."""
    leaves = tree.tensors((case.meta, first, case.tasks.query))
    return (
        case.estimator,
        min(steps, 2),
        torch.is_grad_enabled(),
        case.carry is None,
        torch.is_autocast_enabled(),
        *[(leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) for leaf in leaves],
    )


def _objection(case: _Case, first: Any, steps: int) -> str:
    """Why the tasks cannot run as one batch, or nothing; found out once for each problem and kind of arguments."""
    if inside_functorch():
        return ""  # no gradient can be taken here, so nothing can be compared
    known = remembered(_known, case.problem)
    key = _key(case, first, steps)
    if key not in known and ("vmap", *key) not in known:
        known["vmap", *key] = _Known(_compared(case, min(steps, 2)), {})
    found: _Known = known[key if key in known else ("vmap", *key)]
    return found.why


def _compared(case: _Case, steps: int) -> str:
    """Take the first steps of two tasks both ways."""
    plain: Any = [getattr(fn, "as_written", fn) for fn in case.problem]
    case = case.some()._replace(problem=Problem(*plain))
    alike = not _perturbs(case.estimator)
    if not alike:  # its particles are others under vmap: compare the run without perturbation
        case = case._replace(estimator=Reverse())
    with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled() and alike):
        warnings.simplefilter("ignore")  # the unroll itself will say it
        lost: DetachedError | None = None
        try:
            with Precision() as precision:
                alone = case.made(case.loop(steps, trial=True))
        except DetachedError as error:  # where torch.func has the derivative, vmap is the one that is right
            lost = error
        try:
            together = case.made(case.vmap(steps, trial=True))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of vmap, where each task could be run by itself
            if lost is not None:
                raise lost from error
            return _not_run(error)
        if lost is not None:
            return ""
        return _said(difference(alone, together, precision.coarsest, lambda units: _nudged(case, steps, units)))


def _nudged(case: _Case, steps: int, units: int) -> Made:
    case = case.nudged(units)
    return case.made(case.loop(steps, trial=True))


def _said(differing: str) -> str:
    return differing and (
        f"The tasks do not give as one batch what they give one by one: {differing}. A step depends on something that "
        f"vmap hides or batches wrongly."
    )


def _perturbs(estimator: Estimator) -> bool:
    """Whether the estimator runs perturbed copies, which are others for each task in a loop."""
    if isinstance(estimator, Truncated):
        return _perturbs(estimator.estimator)
    return isinstance(estimator, EvolutionStrategies | PersistentES)


def _chosen(case: _Case, first: Any, steps: int) -> Strategy:
    """vmap where it gives the same as the loop and, as measured once for shapes and device, takes less time."""
    if inside_functorch() or _perturbs(case.estimator):
        return "loop"
    if not steps:
        return "loop" if _objection(case, first, steps) else "vmap"
    known, key = remembered(_known, case.problem), _key(case, first, steps)
    if key not in known:
        known[key] = _measured_both(case, steps)
    costs = known[key].costs
    return "loop" if known[key].why else min(costs, key=lambda each: costs[each].of(steps))


def _measured_both(case: _Case, steps: int) -> _Known:
    ways: tuple[Strategy, ...] = ("vmap", "loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unroll itself says it
        costs = {each: _measured(each, case, steps) for each in ways}
    alone, together = costs["loop"].made, costs["vmap"].made
    why = costs["vmap"].why
    if alone is not None and together is not None:
        why = _said(
            difference(alone, together, costs["loop"].coarsest, lambda units: _nudged(case, min(steps, 2), units))
        )
    return _Known(why, {each: cost._replace(made=None) for each, cost in costs.items()})


def _measured(strategy: Strategy, case: _Case, most: int) -> _Cost:
    """What a strategy costs, when it is run for the second time; infinite when vmap cannot run the step.

    One step alone would not tell: all tasks begin at the same parameters, which makes the first step a cheaper one.
    """
    way = case.vmap if strategy == "vmap" else case.loop

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        loss = way(steps, trial=True).loss
        slopes_of(loss, case.meta)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        return time.perf_counter() - began

    try:
        with Precision() as precision:
            made = case.made(way(min(most, 2), trial=True))
        if most == 1:
            return _Cost(seconds(1), 0.0, made, precision.coarsest)
        one, two = (min(seconds(steps) for _ in range(2)) for steps in (1, 2))
        return _Cost(one, max(two - one, 0.0), made, precision.coarsest)
    except Exception as error:
        if strategy == "vmap":  # what is wrong with the step itself, the loop will say
            return _Cost(float("inf"), 0.0, why=_not_run(error))
        raise
