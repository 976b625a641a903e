"""Transforms as such: their type, how they are chained, restricted to some parameters, and applied."""

from __future__ import annotations  # torch.compile does not trace tuple[...] in an inner function

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Tree


class Transform(NamedTuple):
    """An inner optimizer: a pair of pure functions.

    state₀ = init(θ₀); (u, state') = update(g, state, θ); θ' = θ + u.

    Updates are ADDED to the parameters, so a descent method returns negative multiples of the gradient. Neither
    function writes to its arguments. A gradient may be None, as ``param.grad`` is where a loss did not use the
    parameter: then the update is None too, and the parameter and what the state keeps for it stay as they are.

    Attributes:
        init: from the parameters (any tree of tensors) to the state, a NamedTuple of trees of tensors.
        update: from (gradients, state, parameters) to (updates, new state); gradients and updates are trees like the
            parameters, with the same shapes and dtypes, or None where there is no gradient.
        advance: from (gradients, state, parameters) to (new parameters, new state), when that can be done in fewer
            passes over memory than `update` followed by `apply_updates`; else None. The function `advance` uses it.

    Examples:
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> transform = fm.optim.sgd(0.5)
        >>> updates, state = transform.update({"w": torch.ones(2)}, transform.init(params), params)
        >>> fm.optim.apply_updates(params, updates)
        {'w': tensor([0.5000, 1.5000])}

    Source: the convention of optax (https://optax.readthedocs.io), which torchopt shares.
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    advance: Callable[[Tree, Any, Tree], tuple[Tree, Any]] | None = None


class ChainState(NamedTuple):
    """The states of the chained transforms, in order."""

    states: tuple[Any, ...]


class MaskedState(NamedTuple):
    """The state of the masked transform, over the selected parameters by name, and that of the other one."""

    selected: Any
    others: Any = ()


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """The parameters after one step.

    θ' = θ + u, leaf by leaf; nothing is written in place. Where the update is None the parameter stays.

    Args:
        params: any tree of tensors.
        updates: a tree like the parameters, from `Transform.update`.

    Returns:
        A new tree like the parameters.

    Raises:
        StructureError: an update differs from its parameter in shape, dtype or device.

    Examples:
        >>> fm.optim.apply_updates([torch.tensor(1.0)], [torch.tensor(-0.25)])
        [tensor(0.7500)]

    Source: optax.apply_updates (https://optax.readthedocs.io).
    """
    advice = "Pass what Transform.update returned for these parameters."
    given = tree.leaves(updates)
    if any(update is None for update in given):
        column = tree.aligned(params, updates, name="updates", advice=advice)
        pairs = list(zip(tree.leaves(params), column, strict=True))
        kept = tree.like(params, [param if update is None else update for param, update in pairs])
        tree.check_same(params, kept, name="updates", advice=advice)
        return tree.like(params, [param if update is None else param + update for param, update in pairs])
    tree.check_same(params, updates, name="updates", advice=advice)
    return tree.map(operator.add, params, updates)


def advance(transform: Transform, grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    """One step of the inner optimizer: `update`, and its result added to the parameters.

    (u, state') = update(g, state, θ); θ' = θ + u.

    Args:
        transform: any transform.
        grads: a tree like the parameters.
        state: the transform's state.
        params: any tree of tensors.

    Returns:
        The new parameters and the new state.

    Raises:
        StructureError: params, gradients or state do not fit each other, or the transform.

    Examples:
        >>> transform = fm.optim.sgd(0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> fm.optim.advance(transform, {"w": torch.ones(1)}, transform.init(params), params)[0]
        {'w': tensor([0.5000])}

    Source: optax.apply_updates (https://optax.readthedocs.io), joined with the update.
    """
    if transform.advance is not None:
        return transform.advance(grads, state, params)
    updates, state = transform.update(grads, state, params)
    return apply_updates(params, updates), state


def chain(*transforms: Transform) -> Transform:
    """One transform after the other, each fed with the updates of the one before.

    The first one receives the gradients, and what the last one returns is added to the parameters. So gradients are
    clipped before they reach SGD by `chain(clip_by_global_norm(1.0), sgd(lr))`. A chain of nothing is the identity.

    Args:
        *transforms: transforms, from the gradient's side to the parameters' side.

    Returns:
        A transform whose state holds the states of all.

    Raises:
        ArgumentError: an argument is not a Transform.

    Examples:
        >>> transform = fm.optim.chain(fm.optim.clip_by_value(1.0), fm.optim.sgd(0.5))
        >>> params = {"w": torch.tensor([3.0])}
        >>> transform.update({"w": torch.tensor([10.0])}, transform.init(params), params)[0]
        {'w': tensor([-0.5000])}

    Source: optax.chain (https://optax.readthedocs.io).
    """
    for transform in transforms:
        check_transform(transform)

    def init(params: Tree) -> ChainState:
        return ChainState(tuple(transform.init(params) for transform in transforms))

    def check(state: object) -> None:
        if not isinstance(state, ChainState) or len(state.states) != len(transforms):
            raise StructureError(
                f"state is a {type(state).__name__}, expected the ChainState of {len(transforms)} transforms. Pass "
                "what init or the latest update returned."
            )

    def update(grads: Tree, state: ChainState, params: Tree) -> tuple[Tree, ChainState]:
        check(state)
        states = []
        for transform, own in zip(transforms, state.states, strict=True):
            grads, own = transform.update(grads, own, params)
            states.append(own)
        return grads, ChainState(tuple(states))

    if not transforms:
        return Transform(init, update)
    before, last = chain(*transforms[:-1]), transforms[-1]

    def advance_last(grads: Tree, state: ChainState, params: Tree) -> tuple[Tree, ChainState]:
        check(state)
        updates, others = before.update(grads, ChainState(state.states[:-1]), params)
        moved, own = advance(last, updates, state.states[-1], params)
        return moved, ChainState((*others.states, own))

    return Transform(init, update, advance_last)


def masked(
    transform: Transform, where: Tree | Callable[[str], bool], *, otherwise: Transform | None = None
) -> Transform:
    """Apply a transform to some of the parameters only; the others stay as they are.

    The other parameters get zero updates (they are frozen, as ANIL freezes the body of a network), unless `otherwise`
    says what they go through instead: another optimizer, or `chain()`, the identity, which is what a mask inside of a
    chain wants, as in `chain(masked(add_weight_decay(0.1), is_weight, otherwise=chain()), sgd(lr))`.

    Both transforms see their share of the parameters as a flat dict by name: the key in a flat dict of parameters, the
    keys and indices joined by dots in a nested tree. A hyper-parameter that is a tree has these keys too.

    Args:
        transform: what the selected parameters go through.
        where: a tree of bools like the parameters, or a function of a parameter's name that returns a bool.
        otherwise: what the other parameters go through; None: zero updates.

    Returns:
        A transform over all parameters.

    Raises:
        ArgumentError: `transform` or `otherwise` is not a Transform.

    Examples:
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> transform = fm.optim.masked(fm.optim.sgd(0.5), lambda name: name == "head")
        >>> transform.update(params, transform.init(params), params)[0]
        {'body': tensor([0.]), 'head': tensor([-0.5000])}

    Source: optax.masked, which passes the others through unchanged; Raghu et al. 2020 (arXiv:1909.09157) for ANIL.
    """
    check_transform(transform)
    if otherwise is not None:
        check_transform(otherwise)

    def init(params: Tree) -> MaskedState:
        chosen = _selection(where, params)
        others = () if otherwise is None else otherwise.init(_pick(params, chosen, False))
        return MaskedState(transform.init(_pick(params, chosen, True)), others)

    def update(grads: Tree, state: MaskedState, params: Tree) -> tuple[Tree, MaskedState]:
        if not isinstance(state, MaskedState):
            raise StructureError(
                f"state is a {type(state).__name__}, expected a MaskedState. Pass what init or the latest update "
                "returned."
            )
        chosen = _selection(where, params)
        named = _pick(params, chosen, True), _pick(params, chosen, False)
        column = tree.aligned(params, grads, name="grads")
        inputs = dict(zip(chosen, column, strict=True))
        updates, selected = transform.update({name: inputs[name] for name in named[0]}, state.selected, named[0])
        if otherwise is None:
            rest, others = {name: _still(leaf, inputs[name]) for name, leaf in named[1].items()}, ()
        else:
            rest, others = otherwise.update({name: inputs[name] for name in named[1]}, state.others, named[1])
        every = {**updates, **rest}
        return tree.unflatten([every[name] for name in chosen], tree.flatten(params)[1]), MaskedState(selected, others)

    return Transform(init, update)


def check_transform(transform: object) -> None:
    if not isinstance(transform, Transform):
        raise ArgumentError(
            f"got {transform!r} ({type(transform).__name__}), expected a Transform. Pass what sgd(...), adam(...) or "
            "another function of funcmeta.optim returns; wrap a torchopt transform by from_torchopt."
        )


def _selection(where: Tree | Callable[[str], bool], params: Tree) -> dict[str, bool]:
    """Whether each parameter is selected, by its name and in the order of the leaves."""
    paths = [path for path, _ in pytree.tree_flatten_with_path(params)[0]]
    names = [".".join(_part(key) for key in path) for path in paths]
    if len(set(names)) != len(names):
        raise StructureError(f"two parameters have the same dotted name among {names}. Use keys without dots.")
    if isinstance(where, type):
        raise ArgumentError(f"where is {where!r}, expected bools or a function of a name. Pass one of them.")
    picks = [where(name) for name in names] if callable(where) else tree.aligned(params, where, name="where")
    for name, value in zip(names, picks, strict=True):
        if not isinstance(value, bool):
            raise ArgumentError(f"where gives {tree.describe(value)} for {name!r}, expected True or False.")
    return dict(zip(names, picks, strict=True))


def _still(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """The update of a parameter that no transform moves."""
    return None if grad is None else torch.zeros_like(param)


def _part(key: Any) -> str:
    """One key of a path: that of a dict, an index of a list or tuple, or a field of a NamedTuple."""
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def _pick(params: Tree, chosen: dict[str, bool], value: bool) -> dict[str, Tensor]:
    """The parameters whose mask has this value, by name."""
    leaves = tree.leaves(params)
    return {name: leaf for (name, mask), leaf in zip(chosen.items(), leaves, strict=True) if mask is value}
