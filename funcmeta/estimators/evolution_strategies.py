"""The gradient of a smoothed meta-loss, from losses alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

from funcmeta._typing import Meta
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators._particles import Search
from funcmeta.memory import Memory


@dataclass(frozen=True)
class EvolutionStrategies:
    """An estimate of the gradient of the smoothed meta-loss E L(meta + ε), ε ~ N(0, σ²), from 2·pairs trainings.

    g = 1/(2nσ²) Σ_i ε_i (L(meta + ε_i) − L(meta − ε_i)). Every leaf of ``meta`` that requires grad is perturbed. Both
    of a pair get the same batches and draws. Nothing is differentiated, so the meta-loss may have steps and its
    landscape may be wild: the noise in g grows with the number of learned coordinates instead. g is unbiased for the
    smoothed loss, and so for L itself where L is quadratic. ``loss``, ``state`` and ``info`` are those without
    perturbation. The memory policy has no effect.

    Args:
        sigma: standard deviation of the perturbations, in the unit of ``meta``.
        pairs: number n of pairs.
        chunk: particles that run at once under ``vmap``; None takes all, 1 runs each by itself, without ``vmap``.
        share: (rank, ranks): run the pairs of this one among several processes only. The mean of the processes'
            gradients is that of all pairs.

    Raises:
        ArgumentError: a number is not positive; ``share`` is none, or does not divide the pairs; a carry requires grad;
            it is run inside ``torch.func``; or the training cannot run under ``vmap``.
        NonFiniteError: a loss of a particle is NaN or infinite; the message names the step.
        CapturedTensorError: a tensor that requires grad is used without coming through ``meta``.

    Examples:
        >>> EvolutionStrategies(sigma=0.1, pairs=50)
        EvolutionStrategies(sigma=0.1, pairs=50, chunk=None, share=(0, 1))

    Source: Salimans et al. (2017), "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"; for
    learned optimizers Metz et al. (2019), section 3.
    """

    sigma: float
    pairs: int
    chunk: int | None = None
    share: tuple[int, int] = (0, 1)
    follows_memory: ClassVar[bool] = False
    unreached_advice: ClassVar[str] = "Set requires_grad=False on it."

    def __post_init__(self) -> None:
        self._search.check()

    @property
    def _search(self) -> Search:
        return Search(type(self).__name__, self.sigma, self.pairs, self.chunk, self.share)

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Train with and without perturbations, and attach what follows from the losses."""
        window = max(1, primal.stop - primal.start)
        return self._search(replace(primal, particles=None), meta, window)._replace(particles=None)
