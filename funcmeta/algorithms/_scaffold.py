"""Transforms around a learned optimizer that exist for its training only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._typing import Tree
from funcmeta.optim import Transform


class _Rescaled(NamedTuple):
    """The scale of each coordinate, and the state of the transform that sees scaled parameters."""

    scales: Tree
    inner: Any


def rescaled(transform: Transform, spread: float) -> Transform:
    """The transform on p = θ / c, with log c drawn evenly from [−spread, spread] by torch's generator in ``init``.

    The function p ↦ ℓ(c ⊙ p) has the gradient c ⊙ ∇ℓ, and an update of p is c times as large for θ.
    """

    def init(params: Tree) -> _Rescaled:
        scales = tree.map(lambda leaf: ((2 * torch.rand_like(leaf) - 1) * spread).exp(), params)
        return _Rescaled(scales, transform.init(tree.map(torch.div, params, scales)))

    def update(grads: Tree, state: _Rescaled, params: Tree) -> tuple[Tree, _Rescaled]:
        seen = tree.map(_times, grads, state.scales), tree.map(torch.div, params, state.scales)
        updates, inner = transform.update(seen[0], state.inner, seen[1])
        return tree.map(_times, updates, state.scales), _Rescaled(state.scales, inner)

    return Transform(init, update)


def _times(value: Tensor | None, scale: Tensor) -> Tensor | None:
    """The product; None, where there is no gradient, stays None."""
    return None if value is None else value * scale


class _Imitating(NamedTuple):
    """How far the pupil's updates were from the teacher's so far, and both states."""

    mismatch: Tensor
    pupil: Any
    teacher: Any


def imitating(pupil: Transform, teacher: Transform) -> Transform:
    """The teacher's updates; the state adds up |u − u*|² / |u*|² of the pupil's updates u and the teacher's u*."""

    def init(params: Tree) -> _Imitating:
        return _Imitating(tree.leaves(params)[0].new_zeros(()), pupil.init(params), teacher.init(params))

    def update(grads: Tree, state: _Imitating, params: Tree) -> tuple[Tree, _Imitating]:
        wanted, teaching = teacher.update(grads, state.teacher, params)
        wanted = tree.detach(wanted)
        given, learning = pupil.update(grads, state.pupil, params)
        pairs = zip(tree.leaves(given), tree.leaves(wanted), strict=True)
        both = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
        error, length = [ours - theirs for ours, theirs in both], [theirs for _, theirs in both]
        relative = tree.dot(error, error) / (tree.dot(length, length) + torch.finfo(state.mismatch.dtype).tiny)
        return wanted, _Imitating(state.mismatch + relative.to(state.mismatch.dtype), learning, teaching)

    return Transform(init, update)


def mismatch(state: Any) -> Tensor:
    """What ``imitating`` has added up, whether or not it was rescaled."""
    added: Tensor = (state.inner if isinstance(state, _Rescaled) else state).mismatch
    return added
