"""Transforms of gradients, to be chained before an optimizer: clips, scaling, weight decay."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

import math

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import StructureError
from funcmeta._typing import Hyper, Tree
from funcmeta.optim._hyper import Hypers, Value, Values, check_reachable, double
from funcmeta.optim._rule import StepState, check_floating_leaves, check_gradients, check_state, per_tensor, step_zero
from funcmeta.optim._transform import Transform


def clip_by_value(limit: Hyper) -> Transform:
    """Clip each entry to [-limit, limit].

    u = min(max(g, -limit), limit), differentiable in g where it is not clipped, and in the limit where it is.

    Args:
        limit: at least 0, in units of the gradient, infinite to clip nothing; a number, a tensor, a tree like the
            parameters or a callable of the step.

    Returns:
        A transform of gradients, to be chained before an optimizer.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.clip_by_value(1.0)
        >>> grads = {"w": torch.tensor([3.0, -0.5])}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor([ 1.0000, -0.5000])}

    Source: torch.nn.utils.clip_grad_value_.
    """

    def rule(values: Values, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        limit = values["limit"]
        if not isinstance(limit, Tensor) and limit > torch.finfo(grad.dtype).max:
            return (grad,)  # torch cannot clamp at what the dtype does not reach
        return (grad.clamp(-limit, limit),)

    return per_tensor(Hypers(limit=limit), rule, counted=False)


def clip_by_norm(max_norm: Hyper) -> Transform:
    """Shrink each tensor whose Euclidean norm exceeds `max_norm` to that norm.

    u = g · min(1, max_norm / ‖g‖) for each tensor by itself; the derivative of the norm is part of the meta-gradient,
    and a zero gradient passes through with derivative 1.

    Args:
        max_norm: at least 0, in units of the gradient, infinite to clip nothing; a number, a 0-d tensor, a tree of
            these like the parameters or a callable of the step.

    Returns:
        A transform of gradients, to be chained before an optimizer.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.clip_by_norm(1.0)
        >>> grads = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}

    Source: Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1, for each tensor by itself.
    """

    def rule(values: Values, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad * _shrinkage(_wide(grad).square().sum(), values["max_norm"]),)

    return per_tensor(Hypers(max_norm=max_norm), rule, counted=False)


def clip_by_global_norm(max_norm: Hyper) -> Transform:
    """Shrink all gradients by one factor when their common Euclidean norm exceeds `max_norm`.

    u = g · min(1, max_norm / ‖g‖), where ‖g‖² sums the squares over all tensors but gradients that are None; the
    derivative of the norm is part of the meta-gradient, and a zero gradient passes through with derivative 1.

    Args:
        max_norm: at least 0, in units of the gradient, infinite to clip nothing; a number, a 0-d tensor or a callable
            of the step.

    Returns:
        A transform of gradients, to be chained before an optimizer.

    Raises:
        ArgumentError: ``max_norm`` is none, or a number below 0.
        StructureError: in its update, the gradients are on several devices, or ``max_norm`` on another one.

    Examples:
        >>> transform = fm.optim.clip_by_global_norm(1.0)
        >>> grads = {"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor([0.6000]), 'b': tensor([0.8000])}

    Source: Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1; torch.nn.utils.clip_grad_norm_ without its 1e-6.
    """
    hypers = Hypers(max_norm=max_norm)

    def init(params: Tree) -> StepState:
        check_floating_leaves(params, name="params")
        return StepState(step_zero(tree.leaves(params))) if hypers.scheduled else StepState()

    def update(grads: Tree, state: StepState, params: Tree) -> tuple[Tree, StepState]:
        column = tree.aligned(params, grads, name="grads")
        check_gradients(column, tree.leaves(params))
        check_state(state, StepState, counted=hypers.scheduled)
        given = [grad for grad in column if grad is not None]
        devices = {grad.device for grad in given}
        if len(devices) > 1:
            raise StructureError(
                f"the gradients are on {', '.join(sorted(map(str, devices)))}, but their common norm is computed on "
                "one device. Use clip_by_norm, or move the parameters to one device."
            )
        wide = [_wide(grad) for grad in given]
        square, most = tree.dot(wide, wide), hypers.single("max_norm", state.step)
        for leaf in tree.leaves(params)[:1]:
            check_reachable("max_norm", most, leaf)
        factor = _shrinkage(square, most)
        clipped = [None if grad is None else (grad * factor).to(grad.dtype) for grad in column]
        return tree.like(params, clipped), StepState(state.step + 1 if hypers.scheduled else ())

    return Transform(init, update)


def scale(factor: Hyper) -> Transform:
    """Multiply by a factor.

    u = c · g. The last link of a chain that descends has a negative factor: `chain(clip_by_value(1.0), scale(-0.1))`.

    Args:
        factor: c, of either sign; a number, a tensor, a tree like the parameters or a callable of the step.

    Returns:
        A transform.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.scale(-0.5)
        >>> grads = {"w": torch.tensor([2.0])}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor([-1.])}

    Source: optax.scale (https://optax.readthedocs.io).
    """

    def rule(values: Values, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad * values["factor"],)

    return per_tensor(Hypers(factor=factor), rule, counted=False)


def add_weight_decay(weight_decay: Hyper) -> Transform:
    """Add a multiple of the parameters.

    u = g + λθ, the gradient of ½λ‖θ‖² added to that of the loss. Before `sgd` in a chain it acts as its argument of the
    same name; with `masked` it can leave out biases and scales.

    Args:
        weight_decay: λ, at least 0; a number, a tensor, a tree like the parameters or a callable of the step.

    Returns:
        A transform of gradients, to be chained before an optimizer.

    Raises:
        ArgumentError: a hyper-parameter is none, or a number out of its range.
        StructureError: a tensor among them is not dense and floating-point, or does not fit the parameters; params,
            gradients or state do not fit each other.

    Examples:
        >>> transform = fm.optim.add_weight_decay(0.5)
        >>> params = {"w": torch.tensor([2.0])}
        >>> transform.update({"w": torch.tensor([1.0])}, transform.init(params), params)[0]
        {'w': tensor([2.])}

    Source: optax.add_decayed_weights (https://optax.readthedocs.io).
    """

    def rule(values: Values, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad,)

    return per_tensor(Hypers(weight_decay=weight_decay), rule, counted=False)


def _shrinkage(square: Tensor, max_norm: Value) -> Tensor:
    """min(1, max_norm / norm) for a squared norm; 1, with derivative 0, at norm 0 and where max_norm is infinite."""
    limit = double(max_norm)
    free = (square == 0) | (limit == math.inf)
    norm = square.masked_fill(free, 1.0).sqrt()
    return (torch.minimum(norm, limit) / norm).masked_fill(free, 1.0)


def _wide(grad: Tensor) -> Tensor:
    """The gradient in a precision in which its square is not infinite."""
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
