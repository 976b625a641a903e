"""The one inner gradient: every estimator steers it, every step takes its gradients from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from funcmeta import tree
from funcmeta._batching import Level, task_level
from funcmeta._check import check_flag
from funcmeta._duals import TangentError, has_tangent, obstacle, pushing
from funcmeta._errors import DetachedError, GraphError, LossError, StructureError
from funcmeta._exact_layers import dual_layers
from funcmeta._graph import alias, check_differentiable_again, inner_leaf, inside_functorch, retire, walk
from funcmeta._lost_order import tried_here, trying
from funcmeta._typing import Tree
from funcmeta._watch import watched

Objective = Callable[[Tree], tuple[Tensor, Any]]


class Gradient(NamedTuple):
    """The value of an objective, its further output, and its gradient: None for a parameter that it does not use."""

    value: Tensor
    aux: Any
    grads: Tree


Rule = Callable[[Objective, Tree], Gradient]
"""How an inner gradient is taken. A rule is a function of (objective, params); objective(params) -> (loss, aux)."""


def value_and_grad(
    fn: Callable[..., Any], *, has_aux: bool = False, materialize_grads: bool = True
) -> Callable[..., tuple[Any, Tree]]:
    """A function that returns the loss and its gradient by the first argument: p ↦ (ℓ(p, …), ∂ℓ/∂p).

    This is the only way a step should take an inner gradient, because estimators steer it: ``FirstOrder`` makes the
    gradients constants, others exchange how their derivative is computed. The gradient is partial: a tensor that is
    both (part of) the first argument and used elsewhere counts as a constant there. Inside ``vmap``, ``torch.func``
    and ``torch.compile`` it is ``torch.func.grad``, elsewhere ``torch.autograd.grad``; a graph of the gradient is
    built only when grad mode is on.

    Args:
        fn: a function of (params, *args, **kwargs) that returns a scalar loss, or (loss, aux) with ``has_aux``.
        has_aux: whether ``fn`` returns a pair, whose second part is passed through.
        materialize_grads: whether a parameter that the loss does not use gets a zero gradient; otherwise it gets None,
            as after ``loss.backward()`` in torch, and a ``Transform`` leaves it alone.

    Returns:
        A function of the same arguments that returns (loss, grads), or ((loss, aux), grads) with ``has_aux``; grads
        is a tree like the first argument.

    Raises:
        LossError: the loss is not a scalar floating-point tensor.
        DetachedError: the loss depends on no parameter.
        StructureError: a leaf of the first argument is not a floating-point tensor.

    Examples:
        >>> square = value_and_grad(lambda p: (p["x"] ** 2).sum())
        >>> square({"x": torch.tensor([1.0, 2.0])})
        (tensor(5.), {'x': tensor([2., 4.])})

    Source: this library; the name and the order of the results are those of ``jax.value_and_grad``.
    """

    check_flag("has_aux", has_aux)
    check_flag("materialize_grads", materialize_grads)

    def gradient(params: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        current = _steering.get()
        rule = current.rule if current else exact
        if current:
            current.begin()

        def objective(inputs: Tree) -> tuple[Tensor, Any]:
            with nullcontext() if rule is exact else steered(exact):  # a gradient inside the loss is part of its value
                out = fn(inputs, *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            check_loss(value, name="The inner loss")
            return value, aux

        with torch._C.DisableTorchFunction():
            _check_params(params)
        value, aux, grads = rule(objective, params)
        if current:
            current.taken += 1
        if materialize_grads and any(grad is None for grad in tree.leaves(grads)):
            with torch._C.DisableTorchFunction():
                grads = tree.map(_filled, params, grads)
        return ((value, aux) if has_aux else value), grads

    return gradient


def exact(objective: Objective, params: Tree) -> Gradient:
    """The rule that holds unless an estimator sets another: the gradient with its graph, when grad mode is on."""
    return _reverse(objective, params, differentiable=torch.is_grad_enabled())


def constant(objective: Objective, params: Tree) -> Gradient:
    """The rule of first order: the gradient as a constant, without the graph that would differentiate it."""
    value, aux, grads = _reverse(objective, params, differentiable=False)
    return Gradient(value, aux, tree.detach(grads))


class Steering:
    """The rule in force, and how many gradients were taken by it and, inside of losses, by others.

    ``begun`` says whether one was so much as begun, in the block or in one inside of it.
    """

    def __init__(self, rule: Rule, outer: "Steering | None" = None) -> None:
        self.rule, self.taken, self.nested, self.begun, self._outer = rule, 0, 0, False, outer

    def begin(self) -> None:
        """A gradient is about to be taken here."""
        self.begun = True
        if self._outer is not None:
            self._outer.begin()


@contextmanager
def steered(rule: Rule) -> Iterator[Steering]:
    """Let ``value_and_grad`` take its gradients by ``rule`` inside the block."""
    outer = _steering.get()
    inner = Steering(rule, outer)
    token = _steering.set(inner)
    try:
        yield inner
    finally:
        _steering.reset(token)
        if outer is not None:
            outer.nested += inner.taken + inner.nested


def steering() -> Steering | None:
    """What steers ``value_and_grad`` here."""
    return _steering.get()


def check_loss(value: Any, *, name: str, shape: tuple[int, ...] = ()) -> None:
    """Raise ``LossError`` unless ``value`` is a floating-point tensor of the given shape."""
    if not isinstance(value, Tensor):
        raise LossError(f"{name} is a {type(value).__name__}, expected a 0-d tensor. Return the loss itself.")
    if tuple(value.shape) != shape:
        raise LossError(f"{name} has shape {list(value.shape)}, expected {list(shape)}. Reduce it by mean() or sum().")
    if not value.is_floating_point():
        raise LossError(f"{name} is {value.dtype}, expected a floating-point tensor. Convert it before reducing.")
    if value.is_meta:
        raise LossError(f"{name} is on the device 'meta', where tensors have no data. Compute it on 'cpu' or 'cuda'.")


_steering: ContextVar[Steering | None] = ContextVar("funcmeta_inner_gradient", default=None)


def _reverse(objective: Objective, params: Tree, *, differentiable: bool) -> Gradient:
    tasks = task_level()
    if torch.compiler.is_compiling() or (inside_functorch() and tasks is None):
        return _by_functorch(objective, params, differentiable)
    attached = torch.is_grad_enabled()
    with torch.enable_grad():
        with left(tasks, tree.leaves(params)) as whole:
            _check_no_tangent(whole)
            leaves = [alias(leaf) if attached and leaf.requires_grad else inner_leaf(leaf) for leaf in whole]
        inputs = tree.like(params, leaves if tasks is None else [tasks.lift(leaf) for leaf in leaves])
        with trying(tried_here()) as tried:
            value, aux = objective(inputs)
        with left(tasks, tree.tensors((value, aux) if attached else value)) as results:
            _check_no_tangent(results)
            total = results[0] if tasks is None else results[0].sum()
            check_depends(total.requires_grad)
            attached = attached and _has_graph_beyond(results, whole, leaves)
            doubts, again = None, differentiable and attached
            if again:
                foreign = check_differentiable_again(total, leaves)
                if not isinstance(total, FakeTensor):  # a recording has no numbers; it is compared with this function
                    doubts = tried.doubts(foreign, leaves)
            with watched(False):
                if doubts:
                    found = doubts.gradient(total, leaves)
                else:
                    found = torch.autograd.grad(
                        total, leaves, create_graph=again, retain_graph=attached, allow_unused=True
                    )
            check_depends(any(grad is not None for grad in found))
            if attached:
                retire(leaves)
        if doubts:
            with trying(tried):
                doubts.settle(lambda: objective(inputs), lambda: left(tasks, []))
    if tasks is not None:
        found = tuple([None if grad is None else tasks.lift(grad) for grad in found])
    if not attached:
        value, aux = tree.detach((value, aux))
    return Gradient(value, aux, tree.like(params, found))


def _filled(param: Tensor, grad: Tensor | None) -> Tensor:
    """The gradient, zeros in place of None."""
    return torch.zeros_like(param) if grad is None else grad


def _has_graph_beyond(results: list[Tensor], given: list[Tensor], leaves: list[Tensor]) -> bool:
    """Whether what was computed depends on more that requires grad than the leaves made for this one gradient."""
    return any(tensor.requires_grad for tensor in given) or bool(walk(results, leaves, everywhere=True).leaves)


class left:
    """Leave the level of the tasks, if there is one, with some tensors; the library's own work, which no mode sees."""

    def __init__(self, tasks: Level | None, tensors: list[Tensor]) -> None:
        self._lowered = tensors if tasks is None else [tasks.lower(tensor) for tensor in tensors]
        self._blind, self._level = torch._C.DisableTorchFunction(), None if tasks is None else tasks.left()

    def __enter__(self) -> list[Tensor]:
        """The tensors with their task dimension."""
        self._blind.__enter__()
        if self._level is not None:
            self._level.__enter__()
        return self._lowered

    def __exit__(self, *error: Any) -> None:
        """Go back to the level."""
        if self._level is not None:
            self._level.__exit__(*error)
        self._blind.__exit__(*error)


def _by_functorch(objective: Objective, params: Tree, differentiable: bool) -> Gradient:
    """The gradient inside ``torch.func``, whose auxiliary outputs can only be tensors.

    ``vjp`` opens the level. Its own derivative would give zeros to what the loss does not use, so the gradient is taken
    inside the level, and is one of the auxiliary outputs.
    """
    other: list[Any] = []
    pushed = not torch.compiler.is_compiling() and pushing()

    def tensors_only(inputs: Tree) -> tuple[Tensor, list[Tensor]]:
        with dual_layers() if pushed else nullcontext() as layers:
            value, aux = objective(inputs)
        leaves = tree.leaves(inputs)
        if not torch.compiler.is_compiling():
            check_depends(value.requires_grad)
            with torch._C.DisableTorchFunction():
                if differentiable:
                    check_differentiable_again(value, leaves)
                if layers is not None:
                    why = layers.trouble or obstacle(walk([value], leaves).nodes)
                    if why:
                        raise TangentError(why)
        with left(None, []), watched(False):
            found = torch.autograd.grad(value, leaves, create_graph=differentiable, allow_unused=True)
        check_depends(any(grad is not None for grad in found))
        rest, spec = tree.flatten(aux)
        other[:] = [rest, spec, [grad is not None for grad in found]]
        return value, [grad for grad in found if grad is not None] + tree.tensors(rest)

    value, _, tensors = torch.func.vjp(tensors_only, params, has_aux=True)  # type: ignore[misc]
    rest, spec, used = other
    following = iter(tensors)
    grads = tree.like(params, [next(following) if each else None for each in used])
    aux = tree.unflatten([next(following) if isinstance(leaf, Tensor) else leaf for leaf in rest], spec)
    if pushed and not torch.is_grad_enabled():  # forward mode does not heed torch.no_grad by itself
        value, aux, grads = tree.detach((value, aux, grads))
    return Gradient(value, aux, grads)


def _check_no_tangent(tensors: list[Tensor]) -> None:
    """Raise where a tangent of ``torch.autograd.forward_ad`` would get lost."""
    if has_tangent(tensors):
        raise GraphError(
            "A tensor that an inner gradient depends on carries a tangent of torch.autograd.forward_ad, which the "
            "gradient would drop. Use torch.func.jvp, or unroll with estimator=ForwardMode()."
        )


def check_depends(dependent: bool) -> None:
    if not dependent:
        raise DetachedError(
            "The inner loss does not depend on the parameters: it was detached, computed under no_grad, or never used "
            "them. Compute it from the parameters that the function receives."
        )


def _check_params(params: Tree) -> None:
    for index, leaf in enumerate(tree.leaves(params)):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            path = tree.named_leaves(params, "params")[index][0]
            raise StructureError(
                f"{path} is {tree.describe(leaf)}, expected a floating-point tensor. "
                f"Keep what is not trained out of the parameters."
            )
        if leaf.layout is not torch.strided:
            path = tree.named_leaves(params, "params")[index][0]
            raise StructureError(f"{path} is {tree.describe(leaf)}, expected a dense tensor. Convert it by to_dense().")
