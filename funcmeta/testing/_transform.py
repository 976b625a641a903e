"""The check of an inner optimizer: pure, steady, and differentiable in all that goes into it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import over_tasks, stack, take
from funcmeta._check import check_count, is_function
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Tree
from funcmeta.optim import Transform, apply_updates
from funcmeta.testing._differences import Derivative, probes
from funcmeta.testing._failures import CheckError
from funcmeta.testing._tolerances import TOLERANCES

Named = Mapping[str, Tensor]


def check_transform(
    transform: Transform | Callable[[Tree], Transform],
    params: Tree,
    *,
    hypers: Tree = (),
    steps: int = 3,
    edges: bool = True,
    seed: int = 0,
    tolerance: float = TOLERANCES.fixed,
) -> tuple[Derivative, ...]:
    """Raise unless an inner optimizer is a pure, differentiable function of tensors.

    The transform takes some steps along random gradients, whose entries lie in ±[0.5, 1.5] and keep their sign, so that
    roots and signs stay smooth. Checked are:

    - arguments are not changed, and the same arguments give the same result to the bit;
    - updates are like the parameters, and the state keeps its keys, shapes and dtypes;
    - ``torch.func.vmap`` over stacked parameters equals a loop;
    - the derivatives by parameters, gradients and hyper-parameters, of a random combination of all updates, equal
      finite differences, and ``torch.func.grad`` gives the same;
    - leaves without entries and 0-d leaves pass, with finite results;
    - where all gradients are exactly 0, updates and their derivatives are finite.

    Args:
        transform: a ``Transform``; or with ``hypers`` a function from them to one.
        params: float64 tensors in any tree.
        hypers: float64 tensors in any tree: the hyper-parameters by which to differentiate.
        steps: how many to take, at least 1.
        edges: whether to try gradients of 0, leaves without entries and 0-d leaves; these are not possible where a
            hyper-parameter has the shapes of the parameters.
        seed: of gradients and directions.
        tolerance: the largest relative error of a derivative.

    Returns:
        The derivatives, computed and by finite differences.

    Raises:
        CheckError: one of these does not hold; the message says which.
        ArgumentError: no transform or one with ``hypers`` that it does not take, no step, or no parameter.
        StructureError: a leaf of ``params`` or ``hypers`` is not float64.

    Examples:
        >>> params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
        >>> rate = torch.tensor(0.1, dtype=torch.float64)
        >>> derivatives = check_transform(fm.optim.adagrad, params, hypers=rate)
        >>> max(each.error for each in derivatives) < 1e-6
        True

    Source: this library; the defects are those of released inner optimizers (detached betas, writes in place).
    """
    build = _builder(transform, hypers)
    _check_arguments(params, hypers, steps)
    generator = rng.generator(seed)
    slopes = [_gradients(params, generator) for _ in range(steps)]
    _check_steps(build(hypers), params, slopes)
    _check_vmap(build(hypers), params, slopes, generator)
    if edges:
        for shape in ((0,), ()):
            _check_edge(build(hypers), tree.map(lambda leaf, shape=shape: leaf.new_ones(shape), params), shape)
        _check_zero_gradients(build, params, hypers, steps)
    return _check_derivatives(build, {"params": params, "hypers": hypers, "grads": slopes}, seed, tolerance)


def _check_steps(transform: Transform, params: Tree, slopes: list[Tree]) -> None:
    """Take the steps; raise when something is changed, not repeatable, or changes its shape."""
    state = _pure("init", transform.init, params)
    for grads in slopes:
        updates, following = _pure("update", transform.update, grads, state, params)
        try:
            tree.check_same(params, updates, name="updates", advice="Return one update for each parameter.")
            tree.check_same(state, following, name="state", advice="Return the state as it came, new values apart.")
        except StructureError as error:
            raise CheckError(str(error)) from error
        params, state = apply_updates(params, updates), following


def _pure(name: str, function: Callable[..., Any], *arguments: Tree) -> Any:
    """Call twice; raise when an argument is changed or the results differ."""
    before = [(_copied(leaf), getattr(leaf, "_version", 0)) for leaf in tree.leaves(arguments)]
    result = function(*arguments)
    for (path, leaf), (copy, version) in zip(tree.named_leaves(arguments, "arguments"), before, strict=True):
        if getattr(leaf, "_version", 0) != version or not _equal(leaf, copy):
            raise CheckError(
                f"{name} writes to {path}, expected arguments that stay as they are. Compute out of place."
            )
    again = function(*arguments)
    for (path, leaf), other in zip(tree.named_leaves(result, "result"), tree.leaves(again), strict=True):
        if not _equal(leaf, other):
            raise CheckError(
                f"{name} gives another {path} when it is called again with the same arguments, expected a pure "
                f"function. Keep what changes in the state."
            )
    return result


def _check_vmap(transform: Transform, params: Tree, slopes: list[Tree], generator: torch.Generator) -> None:
    """Raise unless stacked parameters go through vmap as one by one."""

    def run(params: Tree, slopes: list[Tree]) -> Any:
        return _run(transform, params, slopes)

    others = [_gradients(params, generator) for _ in slopes]
    inputs = [(params, slopes), (tree.map(torch.add, params, others[0]), others)]
    try:
        batched = over_tasks(run, len(inputs))(*stack(inputs))
    except RuntimeError as error:
        raise CheckError(
            f"The transform does not run under torch.func.vmap: {error} Let no value of a tensor steer Python, and "
            f"create tensors by torch.zeros_like and its kin."
        ) from error
    for index, each in enumerate(inputs):
        alone, together = tree.named_leaves(run(*each), "result"), tree.leaves(take(batched, index))
        for (path, expected), got in zip(alone, together, strict=True):
            if not _close(got, expected):
                raise CheckError(
                    f"Under torch.func.vmap {path} is {got}, without it {expected}. Use operations that treat a batch "
                    f"element by element; none that torch wrongly batches."
                )


def _check_edge(transform: Transform, params: Tree, shape: tuple[int, ...]) -> None:
    """Raise unless a step works for leaves of this shape."""
    try:
        updates = _run(transform, params, [params])[0]
        tree.check_same(params, updates[0], name="updates")
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckError(
            f"A step fails when all parameters have the shape {list(shape)}: {error} Make it work for such leaves; or "
            f"pass edges=False where a hyper-parameter has the shapes of the parameters."
        ) from error
    if not all(leaf.isfinite().all() for leaf in tree.leaves(updates)):
        raise CheckError(
            f"The update is not finite when all parameters have the shape {list(shape)}, expected finite numbers. Look "
            f"for a mean or a norm over no entries."
        )


def _check_zero_gradients(build: Callable[[Tree], Transform], params: Tree, hypers: Tree, steps: int) -> None:
    """Raise unless updates and derivatives are finite where every gradient is 0, as behind a dead ReLU."""
    inputs = tree.map(
        lambda leaf: leaf.detach().requires_grad_(),
        (params, hypers, [tree.map(torch.zeros_like, params) for _ in range(steps)]),
    )
    start, made_of, slopes = inputs
    results = tree.leaves(_run(build(made_of), start, slopes)[0])
    total = torch.stack([leaf.sum() for leaf in results]).sum()
    if total.requires_grad:
        results += torch.autograd.grad(total, tree.leaves(inputs), materialize_grads=True)
    if not all(leaf.isfinite().all() for leaf in results):
        raise CheckError(
            "An update or its derivative is not finite where a gradient is exactly 0, as behind a dead ReLU. Look for "
            "a square root or a norm at 0, and give it the derivative 0 there; or pass edges=False."
        )


def _check_derivatives(
    build: Callable[[Tree], Transform], inputs: Tree, seed: int, tolerance: float
) -> tuple[Derivative, ...]:
    """Raise unless the derivatives of a random combination of the updates equal finite differences."""
    every, spec = tree.flatten(inputs)
    names = [name.replace("inputs['", "", 1).replace("']", "", 1) for name, _ in tree.named_leaves(inputs, "inputs")]
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in zip(names, every, strict=True)}
    generator = rng.generator(rng.fold(seed, 1))
    weights = [_gradients(inputs["params"], generator) for _ in inputs["grads"]]

    def combination(some: Named) -> Tensor:
        filled = [some.get(name, leaf) for name, leaf in zip(names, every, strict=True)]
        moved = tree.unflatten(filled, spec)
        return tree.dot(_run(build(moved["hypers"]), moved["params"], moved["grads"])[0], weights)

    value = combination(leaves)
    gradient = dict.fromkeys(leaves, value.new_zeros(()))
    if value.requires_grad:
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        gradient = dict(zip(leaves, grads, strict=True))
    found = probes(
        combination,
        leaves,
        gradient,
        value=float(value.detach()),
        directions=1,
        order=4,
        seed=rng.fold(seed, 2),
        tolerance=tolerance,
    )
    derivatives = tuple(probe.judge(gradient, tolerance) for probe in found)
    wrong = [each for each in derivatives if not each.error <= tolerance]
    if wrong:
        lines = "".join(f"\n  {each}" for each in wrong)
        raise CheckError(
            f"The derivatives of the updates differ from finite differences, expected relative errors up to "
            f"{tolerance:.1e}:{lines}\nLook for float(), .item(), math functions or no_grad on the way of that input, "
            f"or for a kink: choose hyper-parameters away from it."
        )
    _check_functorch(combination, tree.detach(leaves), gradient)
    return derivatives


def _check_functorch(function: Callable[[Named], Tensor], at: dict[str, Tensor], gradient: Named) -> None:
    """Raise unless torch.func.grad gives this gradient."""
    try:
        other = torch.func.grad(function)(at)
    except RuntimeError as error:
        raise CheckError(
            f"The transform does not run under torch.func.grad: {error} Use no saved-tensor hooks and no "
            f"autograd.Function without a setup_context."
        ) from error
    for name, expected in gradient.items():
        if not _close(expected, other[name]):
            raise CheckError(
                f"torch.func.grad gives another derivative by {name} than torch.autograd.grad, expected the same. Do "
                f"not detach depending on requires_grad."
            )


def _run(transform: Transform, params: Tree, slopes: list[Tree]) -> tuple[list[Tree], Any]:
    """All updates, and the last state."""
    state, every = transform.init(params), []
    for grads in slopes:
        updates, state = transform.update(grads, state, params)
        params = apply_updates(params, updates)
        every.append(updates)
    return every, state


def _gradients(params: Tree, generator: torch.Generator) -> Tree:
    """Random gradients of either sign, the same one at every step, with sizes between 0.5 and 1.5."""

    def one(leaf: Tensor) -> Tensor:
        numbers = 0.5 + torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype)
        signs = 1 - 2 * (torch.arange(leaf.numel()).reshape(leaf.shape) % 2)
        return (numbers * signs).to(leaf.device)

    return tree.map(one, params)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
    return bool(left == right)


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and left.is_floating_point():
        scale = float(right.detach().abs().max()) if right.numel() else 0.0
        return torch.allclose(left, right, rtol=0, atol=TOLERANCES.exact * scale, equal_nan=True)
    return _equal(left, right)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _builder(transform: Any, hypers: Tree) -> Callable[[Tree], Transform]:
    if isinstance(transform, Transform):
        if tree.leaves(hypers):
            raise ArgumentError("hypers came with a finished Transform. Pass the function from them to a Transform.")
        return lambda _: transform
    if not is_function(transform) or not isinstance(transform(hypers), Transform):
        raise ArgumentError(
            f"transform is {transform!r}, expected a Transform, or a function that makes one of hypers. Pass what "
            f"sgd(...) returns, or e.g. lambda hypers: sgd(hypers['lr'])."
        )
    return transform


def _check_arguments(params: Tree, hypers: Tree, steps: Any) -> None:
    check_count("steps", steps, advice="Pass e.g. steps=3.")
    if not tree.leaves(params):
        raise ArgumentError("params has no leaves. Pass at least one tensor.")
    for path, leaf in (*tree.named_leaves(params, "params"), *tree.named_leaves(hypers, "hypers")):
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.float64:
            raise StructureError(
                f"{path} is {tree.describe(leaf)}, expected a float64 tensor. Convert it by .double()."
            )
