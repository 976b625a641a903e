"""Run the inner training and return a meta-loss that carries its meta-gradient."""

import re
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import per_task
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._exact_layers import exact_layers
from funcmeta._gradient import check_loss
from funcmeta._graph import alias, inside_functorch
from funcmeta._guard import (
    check_arguments,
    check_attached,
    check_every_leaf_used,
    check_finite,
    check_has_data,
    check_replayable,
)
from funcmeta._typing import Batch, Meta
from funcmeta._watch import watched
from funcmeta.estimators import Estimator, Particles, Primal, Reverse
from funcmeta.memory import Budget, Memory, Plan, StoreAll
from funcmeta.problem import Problem, StepInfo
from funcmeta.tasks import Task


class Carry(NamedTuple):
    """Where an unroll stopped, for the next one to go on from.

    Attributes:
        state: the state after the last step; detached in ``Unrolled.carry``.
        step: the index of the next step, which batches and seeds follow.
        particles: the ``Particles`` of an estimator that has some, for the same estimator to go on with.

    Examples:
        >>> Carry(torch.tensor(1.0), 5).step
        5

    Source: this library.
    """

    state: Any
    step: int
    particles: Particles | None = None


class UnrollInfo(NamedTuple):
    """What was met during an unroll; nothing here carries a graph.

    Attributes:
        losses: inner losses before each update, [steps] or [steps, tasks].
        aux: one entry a step, ``StepInfo.aux``.
        strategy: "single", "vmap" or "loop": how tasks were run.
        memory: the ``Plan`` that was followed, of all windows under ``Truncated`` and of one task in a loop over tasks;
            None where none was: without grad mode, when nothing requires grad, and under estimators that follow no
            memory policy (``ForwardMode``, ``Reptile``, evolution strategies).

    Examples:
        >>> UnrollInfo(torch.zeros(3), (None,) * 3, "single").losses.shape
        torch.Size([3])

    Source: this library.
    """

    losses: Tensor
    aux: tuple[Any, ...]
    strategy: str
    memory: Plan | None = None


class Unrolled(NamedTuple):
    """The result of an unroll.

    Attributes:
        loss: 0-d tensor, the meta-loss; ``loss.backward()`` leaves the estimator's meta-gradient on ``meta``.
        state: the state after the last step.
        info: an ``UnrollInfo``.
        carry: a ``Carry`` with the detached state, for truncated training.

    Examples:
        >>> Unrolled(torch.tensor(0.5), None, None, None).loss
        tensor(0.5000)

    Source: this library.
    """

    loss: Tensor
    state: Any
    info: UnrollInfo
    carry: Carry


def unroll(
    problem: Problem,
    meta: Meta,
    task: Task,
    *,
    steps: int,
    estimator: Estimator = Reverse(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    seed: int = 0,
    carry: Carry | None = None,
) -> Unrolled:
    """Take ``steps`` inner steps on a task and return the meta-loss L(meta), attached to ``meta``.

    state_0 = init(meta, task), state_{k+1} = step(meta, state_k, batch_k), L = meta_loss(meta, state_K, query) plus the
    steps' shares. ``out.loss.backward()`` then leaves dL/dmeta, exact or as the estimator defines it, on every leaf
    of ``meta`` that requires grad. Without grad mode, or when nothing requires grad, the steps run without a graph.

    Args:
        problem: ``init``, ``step`` and ``meta_loss``.
        meta: any tree of tensors; never changed.
        task: ``support`` is a batch for every step, or a function of the step index; ``query`` is for the meta-loss.
        steps: number of inner steps, 0 or more.
        estimator: how the meta-gradient is computed; default exact.
        memory: what an exact estimator keeps of the trajectory.
        seed: integer from which every step's randomness follows.
        carry: where to go on from, instead of ``init``: an earlier unroll's ``carry``, or ``Carry(out.state, step)``
            to differentiate through both.

    Returns:
        ``Unrolled(loss, state, info, carry)``.

    Raises:
        ArgumentError: no Problem, a state without data, negative steps, a bad seed or carry, a task without usable
            batches, nothing to minimize.
        StructureError: a leaf of ``meta`` is not a tensor, or the state changes structure, shape or dtype in a step.
        LossError: a loss is not a floating-point scalar.
        NonFiniteError: a loss is NaN or infinite; the message names the step.
        DetachedError: the meta-loss, or an inner loss, is cut off from what it is to be differentiated by.
        CapturedTensorError: a tensor that requires grad is used without coming through ``meta``.
        GraphError: a step takes a gradient by itself without a graph, while a meta-gradient is wanted.
        UnreachedLeafError: a leaf of ``meta`` requires grad, but the loss does not depend on it.
        ReplayError: under a policy that replays, a batch or a step does not come out the same twice.

    Examples:
        One step of gradient descent on a x² from a = 1, judged by the same loss, differentiated by x = 2:

        >>> from funcmeta.problem import value_and_grad
        >>> def init(x, task, seed):
        ...     return torch.ones(())
        >>> def step(x, a, batch, seed):
        ...     loss, slope = value_and_grad(lambda a: a * x**2)(a)
        ...     return a - slope, StepInfo(loss)
        >>> problem = Problem(init, step, lambda x, a, query, seed: a * x**2)
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> out = unroll(problem, x, Task(torch.ones(1), None), steps=1)
        >>> out.loss.backward()
        >>> x.grad
        tensor(-28.)

    Source: Finn et al. (2017), equation 1, for any differentiable inner training.
    """
    return run(problem, meta, task, steps=steps, estimator=estimator, memory=memory, seed=seed, carry=carry)


def run(
    problem: Problem,
    meta: Meta,
    task: Task,
    *,
    steps: int,
    estimator: Estimator,
    memory: Memory = StoreAll(),  # noqa: B008
    seed: int = 0,
    carry: Carry | None = None,
    tasks: int | None = None,
    trial: bool = False,
) -> Unrolled:
    """``unroll`` for one task (``tasks`` None), or for that many stacked ones under vmap.

    A ``trial`` asks neither whether losses are finite nor whether ``meta`` and every leaf of it are used.
    """
    check_arguments(problem, meta, task, steps, seed, estimator, memory)
    check_carry(carry)
    start = carry.step if carry else 0
    if memory.replays and callable(task.support) and steps:
        check_replayable(task.support, start)
    with torch.set_grad_enabled(torch.is_grad_enabled() and _requires_grad((meta, carry))):
        if isinstance(memory, Budget) and torch.is_grad_enabled() and not getattr(estimator, "follows_memory", True):
            raise ArgumentError(
                f"memory is {memory!r}, but {estimator!r} follows no memory policy, so no budget bounds it. Leave "
                f"memory out, or take an estimator that goes back through the steps, e.g. Reverse()."
            )
        own_meta, own_carry = tree.map(_own, (meta, carry))
        primal = _bind(problem, task, own_carry, start, start + steps, seed, tasks)
        loss, path, particles = estimator(primal, own_meta, memory)
        if loss is None:
            raise ArgumentError(
                "There is no meta-loss: the problem's meta_loss is None and no step gave a share. Take at least one "
                "step of a problem whose steps return StepInfo.meta_loss, or give the problem a meta_loss."
            )
        if carry is not None and carry.particles is not None and particles is None:
            raise ArgumentError(
                f"carry holds particles, which {estimator!r} does not go on with, nor any estimator without "
                f"grad mode. Pass the estimator that made the carry, or Carry(carry.state, carry.step) to leave them."
            )
        losses = torch.stack(path.losses) if path.losses else loss.new_zeros((0,) if tasks is None else (0, tasks))
        if not trial:
            check_finite(loss, losses, start)
        if torch.is_grad_enabled() and not inside_functorch() and (loss.requires_grad or not trial):
            reached = check_attached(loss, (own_meta, own_carry), problem, estimator)
            if carry is None and steps > 0 and not trial:
                check_every_leaf_used(reached, own_meta, estimator)
    info = UnrollInfo(losses.detach(), tuple(path.aux), "single" if tasks is None else "vmap", path.memory)
    return Unrolled(loss, path.state, info, Carry(tree.detach(path.state), start + steps, particles))


def check_carry(carry: Any) -> None:
    """Raise unless this is a carry or None."""
    if carry is not None and not isinstance(carry, Carry):
        raise ArgumentError(f"carry is a {type(carry).__name__}, expected a Carry. Pass an earlier unroll's out.carry.")
    if carry is not None:
        check_count("carry.step", carry.step, least=0, advice="Pass an earlier unroll's out.carry.")
        if not isinstance(carry.particles, Particles | None):
            raise ArgumentError(
                f"carry.particles is a {type(carry.particles).__name__}, expected Particles or None. Pass an earlier "
                f"unroll's out.carry."
            )
        check_has_data(carry.state, "carry.state")


def _bind(
    problem: Problem, task: Task, carry: Carry | None, start: int, stop: int, seed: int, tasks: int | None
) -> Primal:
    """The problem on this task: seeds, batches and the task dimension filled in, every result checked."""
    attached = torch.is_grad_enabled()
    over = (lambda fn: fn) if tasks is None else partial(per_task, tasks=tasks)
    take_step, judge = over(problem.step), problem.meta_loss and over(problem.meta_loss)
    shape = () if tasks is None else (tasks,)

    def init(meta: Meta) -> Any:
        if carry is not None:
            return carry.state

        def begin(meta: Meta, support: Any, query: Any, seed: int) -> Any:
            return problem.init(meta, Task(support, query, task.spec), seed)

        with _controlled(rng.fold(seed, 0)):
            state = over(begin)(meta, task.support, task.query, rng.fold(seed, 0))
        check_has_data(state, "The state that init returned, state")
        return state

    def step(meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        batch, own_seed = _batch(task.support, index), rng.fold(seed, 1, index)
        with _controlled(own_seed), watched(attached or None):
            following, info = _pair(take_step(meta, state, batch, own_seed))
        check_loss(info.loss, name=f"The inner loss of step {index}", shape=shape)
        advice = f"Step {index} changed it; let every step return the state as it came, new values apart."
        tree.check_same(state, following, name="state", advice=advice)
        if info.meta_loss is not None:
            check_loss(info.meta_loss, name=f"The meta-loss share of step {index}", shape=shape)
            info = info._replace(meta_loss=info.meta_loss.mean())
        return following, info

    def meta_loss(meta: Meta, state: Any) -> Tensor:
        assert judge is not None
        own_seed = rng.fold(seed, 2, stop)
        with _controlled(own_seed):
            loss = judge(meta, state, task.query, own_seed)
        check_loss(loss, name="The meta-loss", shape=shape)
        return loss.mean()  # type: ignore[no-any-return]

    particles = carry.particles if carry else None
    return Primal(init, step, None if problem.meta_loss is None else meta_loss, start, stop, seed, particles)


class _controlled:
    """What a problem's function may lean on: draws that follow the seed, and layers with right derivatives."""

    def __init__(self, seed: int) -> None:
        self._draws, self._layers = rng.forked(seed), exact_layers()

    def __enter__(self) -> None:
        """Enter both."""
        self._draws.__enter__()
        self._layers.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Leave both, and name what is wrong when tensors of two devices met."""
        self._layers.__exit__(kind, error, trace)
        self._draws.__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and _TWO_DEVICES.search(str(error)):
            raise StructureError(
                f"Tensors of two devices met in a function of the problem: {str(error).splitlines()[0]} Put meta, the "
                f"batches and the query on one device."
            ) from error


_TWO_DEVICES = re.compile("expected all tensors to be on the same device|is not on the expected device", re.IGNORECASE)


def _requires_grad(value: Any) -> bool:
    return any(leaf.requires_grad for leaf in tree.tensors(value))


def _own(leaf: Any) -> Any:
    """A leaf behind a node of its own, at which the walk through the graph ends."""
    return alias(leaf) if torch.is_grad_enabled() and isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _batch(support: Any, index: int) -> Batch:
    return support(index) if callable(support) else support


def _pair(result: Any) -> tuple[Any, StepInfo]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], StepInfo)):
        raise StructureError(f"step returned a {type(result).__name__}, expected the pair (state, StepInfo(loss)).")
    return result
