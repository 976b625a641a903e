"""What an estimator is: a way to turn the repeated step into a loss that carries a meta-gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funcmeta._typing import Meta
from funcmeta.memory import Memory, Step, Trajectory


class Particles(NamedTuple):
    """Perturbed copies of an inner training that go on from call to call, in pairs of opposite perturbations.

    Attributes:
        states: the states as one tree, whose tensors have a leading dimension of 2 · pairs: first all with +, then
            their partners with −.
        sums: for each leaf of ``meta`` that is learned, the sum of the perturbations of + so far, [pairs, *leaf.shape].

    Examples:
        >>> Particles(torch.zeros(6, 2), (torch.zeros(3),)).sums[0].shape
        torch.Size([3])

    Source: Vicol et al. (2021), algorithm 2: the inner states s and the accumulators ξ.
    """

    states: Any
    sums: tuple[Tensor, ...]


@dataclass(frozen=True)
class Primal:
    """The problem with its task and seed bound, and the range of steps to take.

    All functions are pure. With several tasks in one batch, states and inner losses have a leading task dimension, and
    ``meta_loss`` and the steps' shares are means over it.

    Attributes:
        init: meta → state.
        step: (meta, state, index) → (state, info).
        meta_loss: (meta, state) → 0-d tensor, or None when the steps' shares are all of the meta-loss.
        start: index of the first step.
        stop: index after the last step.
        seed: integer from which an estimator's own draws follow.
        particles: those that go on from an earlier call, if any.

    Examples:
        >>> primal = Primal(lambda meta: meta, lambda meta, state, index: (state, None), None, 0, 3)
        >>> primal.stop - primal.start
        3

    Source: this library.
    """

    init: Callable[[Meta], Any]
    step: Step
    meta_loss: Callable[[Meta, Any], Tensor] | None
    start: int
    stop: int
    seed: int = 0
    particles: Particles | None = None

    def within(self, start: int, stop: int) -> "Primal":
        """The steps ``start`` to ``stop - 1`` alone; what is judged at the end belongs to the last ones."""
        return replace(self, start=start, stop=stop, meta_loss=self.meta_loss if stop == self.stop else None)

    def begun_at(self, state: Any) -> "Primal":
        """The same steps from another state, whatever ``meta`` is."""
        return replace(self, init=lambda meta: state)

    def total(self, meta: Meta, path: Trajectory) -> Tensor | None:
        """The meta-loss of a trajectory: the steps' shares and the loss at its end; None when there is neither."""
        parts = [] if path.share is None else [path.share]
        if self.meta_loss is not None:
            parts.append(self.meta_loss(meta, path.state))
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0] if parts else None


class Outcome(NamedTuple):
    """The meta-loss, attached to ``meta``, and where the trajectory ended.

    Attributes:
        loss: 0-d tensor, or None when the problem has no meta-loss at all.
        path: the ``Trajectory``.
        particles: those that the next call has to go on with, if any.

    Examples:
        >>> Outcome(None, Trajectory(None, None, [], [])).loss is None
        True

    Source: this library.
    """

    loss: Tensor | None
    path: Trajectory
    particles: Particles | None = None


class Estimator(Protocol):
    """How the meta-gradient is computed: ``outcome.loss.backward()`` must leave it on the leaves of ``meta``.

    An estimator gets the primal functions and the memory policy as arguments, so a new one is one new file.

    Attributes:
        unreached_advice: what to do when a leaf of ``meta`` gets no gradient under this estimator.

    Examples:
        >>> from funcmeta.estimators import Reverse
        >>> estimator: Estimator = Reverse()

    Source: this library; the plug-in idea is that of the adjoints of Optimistix (Rader, Lyons and Kidger 2024).
    """

    @property
    def unreached_advice(self) -> str:
        """What to do when a leaf of ``meta`` gets no gradient under this estimator."""

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Take the steps of ``primal`` and return the loss."""
