"""Evolution strategies over windows of a long training, without the bias of truncation."""

from dataclasses import dataclass
from typing import ClassVar

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators._particles import Search
from funcmeta.memory import Memory


@dataclass(frozen=True)
class PersistentES:
    """Evolution strategies whose particles go on from window to window, so that no influence is cut off.

    In each window w of ``length`` steps particle i draws a new ε_iw ~ N(0, σ²), trains on from its own state at
    meta + ε_iw and adds it to ξ_iw = Σ_{v≤w} ε_iv; its partner does so with −ε_iw. Then
    g = 1/(2nσ²) Σ_w Σ_i ξ_iw (L_w(+) − L_w(−)), where L_w is what the window gives to the meta-loss: the shares of its
    steps, and at the end of the call the loss there. It is unbiased for the meta-loss over all windows, smoothed by a
    perturbation of its own for each window; its variance grows with their number.

    ``out.carry`` holds the particles. Pass it on to update ``meta`` after each window, and pass ``carry=None`` where a
    new inner training begins. ``loss``, ``state`` and ``info`` are those of the run without perturbation. The memory
    policy has no effect.

    Args:
        sigma: standard deviation of the perturbations, in the unit of ``meta``.
        pairs: number n of pairs.
        length: steps in a window; the last window of a call may be shorter.
        chunk: particles that run at once under ``vmap``; None takes all, 1 runs each by itself, without ``vmap``.
        share: (rank, ranks): run the pairs of this one among several processes only. The mean of the processes'
            gradients is that of all pairs.

    Raises:
        ArgumentError: a number is not positive; ``share`` is none, or does not divide the pairs; a carry has no
            particles, or other ones; and as ``EvolutionStrategies``.
        NonFiniteError: a loss of a particle is NaN or infinite; the message names the step.
        CapturedTensorError: a tensor that requires grad is used without coming through ``meta``.

    Examples:
        >>> PersistentES(sigma=0.1, pairs=50, length=10)
        PersistentES(sigma=0.1, pairs=50, length=10, chunk=None, share=(0, 1))

    Source: Vicol et al. (2021), "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
    Strategies", algorithm 2 and equation 8.
    """

    sigma: float
    pairs: int
    length: int
    chunk: int | None = None
    share: tuple[int, int] = (0, 1)
    follows_memory: ClassVar[bool] = False
    unreached_advice: ClassVar[str] = "Set requires_grad=False on it."

    def __post_init__(self) -> None:
        self._search.check()
        check_count("length", self.length, advice="Pass e.g. length=20.")

    @property
    def _search(self) -> Search:
        return Search(type(self).__name__, self.sigma, self.pairs, self.chunk, self.share)

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Train the particles window by window, and attach what follows from their losses."""
        self._check_particles(primal, meta)
        return self._search(primal, meta, self.length)

    def _check_particles(self, primal: Primal, meta: Meta) -> None:
        """Raise when the particles of the carry are missing, or are not those of this estimator."""
        if primal.particles is None:
            if primal.start:
                raise ArgumentError(
                    f"carry is at step {primal.start} and holds no particles, which PersistentES goes on with. Pass "
                    f"the out.carry of an unroll by PersistentES, or carry=None to begin."
                )
            return
        wanted = [(self._search.own, *leaf.shape) for leaf in tree.leaves(meta) if leaf.requires_grad]
        found = [tuple(each.shape) for each in primal.particles.sums]
        if found != wanted:
            raise ArgumentError(
                f"The particles in carry have perturbations of shapes {found}, expected {wanted}. Go on with the same "
                f"pairs and share, the same learned leaves of meta, and one strategy for stacked tasks ('vmap' or "
                f"'loop')."
            )
