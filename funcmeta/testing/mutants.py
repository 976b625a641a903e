"""Negative controls: problems with the values of the true one, whose derivative is wrong in a way that real bugs are.

A check of a meta-gradient that accepts one of them shows nothing. Each is a function from a problem to a problem.
"""

from typing import Any

from torch import Tensor

from funcmeta import tree
from funcmeta._errors import ArgumentError
from funcmeta._gradient import Gradient, Objective, exact, steered
from funcmeta._typing import Batch, Meta, Tree
from funcmeta.problem import Problem, StepInfo

__all__ = ["MUTANTS", "detached", "dropped_moment", "half_detached", "off_by_one"]


def detached(problem: Problem) -> Problem:
    """Make the inner gradients constants, so that the meta-gradient is of first order.

    dg/dmeta counts as 0. That differs from the truth where an inner gradient depends on ``meta``, through the inner
    parameters or directly. An optimizer that divides gradients by their size can hide it in the first step.

    Args:
        problem: its steps take their gradients by ``value_and_grad``.

    Returns:
        A problem with the same values.

    Examples:
        >>> net = torch.nn.Linear(2, 1).double()
        >>> heavy = fm.optim.sgd(0.1, momentum=0.9)
        >>> problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).cos().sum(), optimizer=heavy)
        >>> meta, x = {"params": fm.init_params(net)}, torch.tensor([[1.0, 2.0]]).double()
        >>> mutant = detached(problem)
        >>> fm.testing.check_meta_grad(mutant, meta, fm.Task(x, x), steps=2)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        MetaGradientMismatch: ...

    Source: this library.
    """
    return _partly_detached(problem, 1.0)


def half_detached(problem: Problem) -> Problem:
    """Lose half of the derivative of the inner gradients.

    dg/dmeta counts half, as when one of two equal terms of a loss is detached. That differs from the truth wherever
    ``detached`` does, by half as much.

    Args:
        problem: its steps take their gradients by ``value_and_grad``.

    Returns:
        A problem with the same values.

    Examples:
        >>> net = torch.nn.Linear(2, 1).double()
        >>> heavy = fm.optim.sgd(0.1, momentum=0.9)
        >>> problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).cos().sum(), optimizer=heavy)
        >>> meta, x = {"params": fm.init_params(net)}, torch.tensor([[1.0, 2.0]]).double()
        >>> mutant = half_detached(problem)
        >>> fm.testing.check_meta_grad(mutant, meta, fm.Task(x, x), steps=2)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        MetaGradientMismatch: ...

    Source: this library.
    """
    return _partly_detached(problem, 0.5)


def dropped_moment(problem: Problem) -> Problem:
    """Take what the optimizer remembers as a constant.

    d(opt_state)/dmeta counts as 0 at the start of each step. That differs from the truth from the second step on, when
    the optimizer has a memory; and in the first one when its initial state depends on ``meta``.

    Args:
        problem: its states have a field ``opt_state``.

    Returns:
        A problem with the same values.

    Raises:
        ArgumentError: a state has no such field.

    Examples:
        >>> net = torch.nn.Linear(2, 1).double()
        >>> heavy = fm.optim.sgd(0.1, momentum=0.9)
        >>> problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).cos().sum(), optimizer=heavy)
        >>> meta, x = {"params": fm.init_params(net)}, torch.tensor([[1.0, 2.0]]).double()
        >>> mutant = dropped_moment(problem)
        >>> fm.testing.check_meta_grad(mutant, meta, fm.Task(x, x), steps=2)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        MetaGradientMismatch: ...

    Source: this library.
    """

    def step(meta: Meta, state: Any, batch: Batch, seed: int) -> tuple[Any, StepInfo]:
        if not hasattr(state, "opt_state"):
            raise ArgumentError(
                f"dropped_moment detaches state.opt_state, but the state is a {type(state).__name__}. Let init return "
                f"an InnerState."
            )
        return problem.step(meta, state._replace(opt_state=tree.detach(state.opt_state)), batch, seed)

    return problem._replace(step=step)


def off_by_one(problem: Problem) -> Problem:
    """Differentiate each step where the next one begins.

    The Jacobian of step k is taken at state k + 1, as when a trajectory is replayed from the wrong snapshots. That
    differs from the truth where the gradient changes along the trajectory.

    Args:
        problem: any problem; each step is taken twice.

    Returns:
        A problem with the same values.

    Examples:
        >>> net = torch.nn.Linear(2, 1).double()
        >>> heavy = fm.optim.sgd(0.1, momentum=0.9)
        >>> problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).cos().sum(), optimizer=heavy)
        >>> meta, x = {"params": fm.init_params(net)}, torch.tensor([[1.0, 2.0]]).double()
        >>> mutant = off_by_one(problem)
        >>> fm.testing.check_meta_grad(mutant, meta, fm.Task(x, x), steps=1)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        MetaGradientMismatch: ...

    Source: this library.
    """

    def step(meta: Meta, state: Any, batch: Batch, seed: int) -> tuple[Any, StepInfo]:
        result = problem.step(meta, state, batch, seed)
        late = problem.step(meta, tree.map(_value_of, result[0], state), batch, seed)
        return tree.map(_value_of, result, late)  # type: ignore[no-any-return]

    return problem._replace(step=step)


MUTANTS = {
    "detached": detached,
    "half detached": half_detached,
    "dropped moment": dropped_moment,
    "off by one": off_by_one,
}
"""All of them, by what they do."""


def _partly_detached(problem: Problem, share: float) -> Problem:
    """The problem whose inner gradients lose a share of their derivative."""

    def rule(objective: Objective, params: Tree) -> Gradient:
        value, aux, grads = exact(objective, params)

        def lose(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else (1 - share) * grad + share * grad.detach()

        return Gradient(value, aux, tree.map(lose, grads))

    def step(meta: Meta, state: Any, batch: Batch, seed: int) -> tuple[Any, StepInfo]:
        with steered(rule):
            return problem.step(meta, state, batch, seed)

    return problem._replace(step=step)


def _value_of(value: Any, derivative: Any) -> Any:
    """A tensor with the value of one and the derivative of another; what carries no derivative passes."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return derivative + (value - derivative).detach()
    return value
