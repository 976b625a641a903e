"""Carries of stacked tasks in parts, one for each of several processes, and put together again."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta.estimators import Particles
from funcmeta.unroll import Carry

Spread = Literal["tasks", "particles"]


def part(carry: Carry, spread: Spread, rank: int, ranks: int) -> Carry:
    """What one of several processes, which divide the tasks or the pairs of particles, goes on with."""

    def rows(value: Any, dim: int) -> Any:
        def own(leaf: Tensor) -> Tensor:
            share = leaf.shape[dim] // ranks
            return leaf.narrow(dim, rank * share, share)

        return _of_tensors(own, value)

    particles = carry.particles
    if spread == "tasks":
        if particles:
            where = _particle_dim(particles)
            sums = rows(particles.sums, 0) if where else particles.sums
            particles = Particles(rows(particles.states, 1 - where), sums)
        return carry._replace(state=rows(carry.state, 0), particles=particles)
    if particles:
        where = _particle_dim(particles)
        states = _one_row(rows(_both_signs(particles.states, where), where + 1), where)
        particles = Particles(states, rows(particles.sums, where))
    return carry._replace(particles=particles)


def joined(carries: list[Carry], spread: Spread) -> Carry:
    """The carry of all from those of the processes, in the order of their ranks."""

    def cat(values: list[Any], dim: int) -> Any:
        return tree.map(lambda *each: torch.cat(each, dim) if isinstance(each[0], Tensor) else each[0], *values)

    first, particles = carries[0], [each.particles for each in carries if each.particles]
    states, sums = [each.states for each in particles], [each.sums for each in particles]
    where = _particle_dim(particles[0]) if particles else 0
    both = None
    if spread == "tasks":
        if particles:
            both = Particles(cat(states, 1 - where), cat(sums, 0) if where else sums[0])
        return first._replace(state=cat([each.state for each in carries], 0), particles=both)
    if particles:
        signs = cat([_both_signs(each, where) for each in states], where + 1)
        both = Particles(_one_row(signs, where), cat(sums, where))
    return first._replace(particles=both)


def _particle_dim(particles: Particles) -> int:
    """Where the particles are: before the tasks when these ran as one batch, after them when they ran in a loop."""
    first = particles.sums[0].shape[0]
    return int(any(leaf.shape[0] == first for leaf in tree.tensors(particles.states)))


def _both_signs(states: Any, where: int) -> Any:
    """[..., 2 · pairs, ...] as [..., 2, pairs, ...]."""
    return _of_tensors(lambda leaf: leaf.reshape(*leaf.shape[:where], 2, -1, *leaf.shape[where + 1 :]), states)


def _one_row(states: Any, where: int) -> Any:
    """[..., 2, pairs, ...] as [..., 2 · pairs, ...]."""
    return _of_tensors(lambda leaf: leaf.flatten(where, where + 1), states)


def _of_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tree.map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, value)
