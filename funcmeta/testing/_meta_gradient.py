"""The check of a meta-gradient against finite differences."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError, GraphError, StructureError, UnreachedLeafError
from funcmeta._typing import Meta
from funcmeta.estimators import Estimator, FirstOrder, Reverse
from funcmeta.memory import Memory, StoreAll
from funcmeta.problem import Problem
from funcmeta.tasks import Task
from funcmeta.testing._differences import Derivative, Probe, check_order, probes
from funcmeta.testing._failures import MetaGradientMismatch, VacuousCheckWarning
from funcmeta.testing._tolerances import TOLERANCES
from funcmeta.unroll import unroll
from funcmeta.unroll_batch import Strategy, unroll_batch

Leaves = Mapping[str, Tensor]


class MetaGradientCheck(NamedTuple):
    """The figures of a check that holds.

    Attributes:
        loss: the meta-loss.
        derivatives: one ``Derivative`` for each direction: those of all leaves together, then those of each leaf.
        vacuous: whether the first-order meta-gradient passes as well, so that nothing was shown about second order.
        probes: the directions and the finite differences along them.
        seed: the seed of the training that was checked.

    Examples:
        >>> MetaGradientCheck(0.5, (Derivative("meta", 1.0, 1.0, 0.0),), False).worst.error
        0.0

    Source: this library.
    """

    loss: float
    derivatives: tuple[Derivative, ...]
    vacuous: bool
    probes: tuple[Probe, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        """One line a direction, the worst first."""
        lines = [f"meta-loss {self.loss:.6g}" + (", vacuous: first order passes too" if self.vacuous else "")]
        lines += [f"  {each}" for each in sorted(self.derivatives, key=lambda each: -each.error)]
        return "\n".join(lines)

    @property
    def worst(self) -> Derivative:
        """The derivative with the largest error."""
        return max(self.derivatives, key=lambda each: each.error)


def check_meta_grad(
    problem: Problem,
    meta: Meta,
    task: Task,
    *,
    steps: int,
    estimator: Estimator = Reverse(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    strategy: Strategy | None = None,
    seed: int = 0,
    directions: int | None = None,
    tolerance: float = TOLERANCES.fixed,
    order: int | None = None,
    allow_vacuous: bool = False,
    reference: MetaGradientCheck | None = None,
) -> MetaGradientCheck:
    """Raise unless the meta-gradient equals finite differences of the meta-loss.

    Along random directions d, gradient · d is compared with the central difference of t ↦ L(meta + t · d): for all
    leaves of ``meta`` together, and for each leaf by itself, so that a learning rate cannot hide behind the
    parameters. An error is relative to the derivative; a derivative that rounding hides counts as zero. The
    differences run without a graph. Losses, models and optimizers must be smooth: no kink (ReLU, a clip at its
    threshold, Adam without ``eps`` at a zero gradient) may lie within a relative distance of about 1e-3.

    Args:
        problem: as for ``unroll``.
        meta: as for ``unroll``; every leaf that requires grad is checked, in float64. It is not changed.
        task: as for ``unroll``; with a ``strategy``, stacked tasks.
        steps: number of inner steps.
        estimator: what claims to be exact.
        memory: what the estimator keeps; the differences do not depend on it.
        strategy: None for ``unroll``; "vmap", "loop" or "auto" for ``unroll_batch``.
        seed: as for ``unroll``; the directions follow from it too.
        directions: random directions for all leaves together, and as many for each leaf; None for 1, or for those of
            the reference.
        tolerance: the largest relative error that counts as agreement.
        order: of the differences: 2, 4 or 6 meta-losses for each direction; None for 4, or for that of the reference.
        allow_vacuous: whether not to warn (``VacuousCheckWarning``) where the first-order meta-gradient would pass too.
        reference: a check of the same problem, meta, task, steps and seed, whose finite differences are used again;
            for several estimators, memories or strategies. It has its own ``directions`` and ``order``.

    Returns:
        The figures.

    Raises:
        MetaGradientMismatch: an error exceeds the tolerance; the message names leaves and figures.
        StructureError: a leaf is no tensor, or one that requires grad is not float64, or the meta-loss is not.
        ArgumentError: no leaf requires grad, or ``directions`` or ``tolerance`` is not positive,
            there is no difference of this ``order``; ``reference`` is no check or has another seed, or ``directions``
            or ``order`` is given beside it.

    Examples:
        >>> def step(meta, a, x, seed):
        ...     loss, slope = fm.value_and_grad(lambda a: torch.cos(a * x))(a)
        ...     return a - meta["lr"] * slope, fm.StepInfo(loss)
        >>> problem = fm.Problem(lambda meta, task, seed: meta["a"], step, lambda meta, a, x, seed: torch.cos(a * x))
        >>> x, a, lr = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
        >>> meta = {"a": a.requires_grad_(), "lr": lr.requires_grad_()}
        >>> check = check_meta_grad(problem, meta, fm.Task(x, x), steps=3)
        >>> check.worst.error < 1e-8, check.vacuous
        (True, False)

    Source:
        Gradient checking as in ``torch.autograd.gradcheck``, along random directions as in its fast mode; the
        first-order control is this library's.
    """
    _check_reference(reference, directions, order, seed)
    directions, order = 1 if directions is None else directions, 4 if order is None else order
    _check_arguments(directions, tolerance)
    check_order(order)
    tree.check_tensors(meta, name="meta")

    def run(meta: Meta, estimator: Estimator, memory: Memory) -> Tensor:
        if strategy is None:
            return unroll(problem, meta, task, steps=steps, estimator=estimator, memory=memory, seed=seed).loss
        return unroll_batch(
            problem, meta, task, steps=steps, strategy=strategy, estimator=estimator, memory=memory, seed=seed
        ).loss

    own = tree.map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), meta)
    names = [name for name, _ in tree.named_leaves(own, "meta")]
    every, spec = tree.flatten(own)
    wanted = {name: leaf for name, leaf in zip(names, every, strict=True) if leaf.requires_grad}
    _check_double(wanted)

    def loss_of(leaves: Leaves, estimator: Estimator = Reverse(), memory: Memory = StoreAll()) -> Tensor:  # noqa: B008
        filled = [leaves.get(name, leaf.detach()) for name, leaf in zip(names, every, strict=True)]
        wanted_here = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in filled)
        with torch.set_grad_enabled(wanted_here):  # a difference needs no graph, nor a look for captured tensors
            return run(tree.unflatten(filled, spec), estimator, memory)

    loss, gradient = _gradient(lambda leaves: loss_of(leaves, estimator, memory), wanted)
    if loss.dtype != torch.float64:
        raise StructureError(
            f"The meta-loss is {tree.describe(loss)}, expected float64: finite differences of anything shorter can "
            f"not be told from rounding. Convert module, meta and task by .double()."
        )
    value = float(loss.detach())
    if reference:
        found = reference.probes
    else:
        found = probes(
            loss_of,
            wanted,
            gradient,
            value=value,
            directions=directions,
            order=order,
            seed=seed,
            tolerance=tolerance,
        )
    derivatives = tuple(probe.judge(gradient, tolerance) for probe in found)
    wrong = [each for each in derivatives if not each.error <= tolerance]
    if wrong:
        raise MetaGradientMismatch(_mismatch(wrong, derivatives, steps, estimator, memory, tolerance))
    vacuous = _is_vacuous(found, loss_of, wanted, tolerance)
    if vacuous and not allow_vacuous:
        message = (
            f"Over {steps} steps the first-order meta-gradient agrees with finite differences within {tolerance:.1e} "
            f"too, so the check shows nothing about second order. Take more steps, a larger inner learning rate (or "
            f"eps, for Adam and its kin), or a lower tolerance; or pass allow_vacuous=True."
        )
        warnings.warn(message, VacuousCheckWarning, stacklevel=2)
    return MetaGradientCheck(value, derivatives, vacuous, found, seed)


def _gradient(loss_of: Callable[[Leaves], Tensor], leaves: Leaves) -> tuple[Tensor, Leaves]:
    """A loss and its gradient by name."""
    with torch.enable_grad():
        loss = loss_of(leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return loss, dict(zip(leaves, grads, strict=True))


def _is_vacuous(found: tuple[Probe, ...], loss_of: Callable[..., Tensor], leaves: Leaves, tolerance: float) -> bool:
    """Whether the first-order gradient passes; where there is none, whether every derivative drowns in rounding."""
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    reached = dict(leaves)
    control = zero
    while True:
        try:
            control = {**zero, **_gradient(lambda some: loss_of(some, FirstOrder()), reached)[1]}
            break
        except UnreachedLeafError as error:
            reached = {name: leaf for name, leaf in reached.items() if name not in error.leaves}
        except GraphError:
            break
    return all(probe.judge(control, tolerance).error <= tolerance for probe in found)


def _mismatch(
    wrong: list[Derivative],
    derivatives: tuple[Derivative, ...],
    steps: int,
    estimator: Estimator,
    memory: Memory,
    tolerance: float,
) -> str:
    lines = "".join(f"\n  {each}" for each in wrong)
    return (
        f"The meta-gradient of {steps} steps under {estimator} and {memory} differs from finite differences along "
        f"{len(wrong)} of {len(derivatives)} directions, expected relative errors up to {tolerance:.1e}:{lines}\n"
        f"Look for a tensor that is detached on the way, an inner gradient that was not taken by value_and_grad, an "
        f"estimator that is not exact, or a kink in the loss."
    )


def _check_reference(reference: Any, directions: Any, order: Any, seed: Any) -> None:
    if reference is None:
        return
    if not isinstance(reference, MetaGradientCheck):
        raise ArgumentError(
            f"reference is {reference!r}, expected a MetaGradientCheck. Pass what an earlier check returned."
        )
    for name, value in (("directions", directions), ("order", order)):
        if value is not None:
            raise ArgumentError(
                f"{name} is {value!r} beside a reference, whose finite differences are used as they are. Leave it out, "
                f"or pass no reference."
            )
    if seed != reference.seed:
        raise ArgumentError(
            f"seed is {seed!r}, but the reference is a check of the training with seed {reference.seed}. Pass that "
            f"seed, or no reference."
        )


def _check_arguments(directions: Any, tolerance: Any) -> None:
    check_count("directions", directions, advice="Pass e.g. directions=2.")
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance is {tolerance!r}, expected a number between 0 and 1. Pass e.g. tolerance=1e-6.")


def _check_double(wanted: Leaves) -> None:
    if not wanted:
        raise ArgumentError(
            "No leaf of meta requires grad, so there is nothing to check. Call requires_grad_() on some."
        )
    for name, leaf in wanted.items():
        if leaf.dtype != torch.float64:
            raise StructureError(
                f"{name} is {tree.describe(leaf)}, expected float64: finite differences of anything shorter cannot "
                f"be told from rounding. Convert module, meta and task by .double()."
            )
