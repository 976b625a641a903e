"""Gradients from perturbed copies of the inner training, side by side and in pairs of opposite perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import Each, joined, over_tasks, stack, take
from funcmeta._check import check_count, check_positive
from funcmeta._errors import ArgumentError, FuncmetaError, NonFiniteError
from funcmeta._graph import inside_functorch
from funcmeta._typing import Meta
from funcmeta._watch import watched
from funcmeta.estimators._attach import attach, refuse
from funcmeta.estimators._base import Outcome, Particles, Primal
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import StoreAll, advance


@dataclass(frozen=True)
class Search:
    """g = 1/(2nσ²) Σ_w Σ_i ξ_iw (L_w⁺ᵢ − L_w⁻ᵢ), where ξ_iw sums the perturbations of pair i in the windows up to w.

    One of several processes runs its share of the pairs only, and n is their number: the mean of the processes' g is
    that of all pairs.
    """

    name: str
    sigma: float
    pairs: int
    chunk: int | None
    share: tuple[int, int] = (0, 1)

    def check(self) -> None:
        """Raise unless the numbers can be used."""
        check_positive("sigma", self.sigma)
        check_count("pairs", self.pairs, advice="Pass e.g. pairs=50.")
        check_count("chunk", self.chunk, or_none=True, advice="Pass e.g. chunk=100.")
        self._check_share()

    @property
    def own(self) -> int:
        """The number of pairs that run here."""
        return self.pairs // self.share[1]

    def __call__(self, primal: Primal, meta: Meta, length: int) -> Outcome:
        """Windows of ``length`` steps, each with new perturbations; the loss is that of the unperturbed run."""
        if inside_functorch():
            raise ArgumentError(
                f"{self.name} runs its particles by torch.func.vmap and attaches what it finds, so it cannot run "
                f"inside torch.func. Use Reverse() there."
            )
        moving = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
        if not moving or not torch.is_grad_enabled():
            return Reverse()(primal, meta, StoreAll())
        plain = self._unperturbed(primal, tree.detach(meta))
        if plain.loss is None:
            return plain
        learned = [leaf.detach() for leaf in moving]
        states, sums = primal.particles or (None, tuple([torch.zeros_like(leaf) for leaf in learned]))
        gradients = [torch.zeros_like(leaf) for leaf in learned]
        cuts = [*range(primal.start, primal.stop, length), primal.stop]
        with torch.no_grad(), watched(False):
            for part in [primal.within(*ends) for ends in pairwise(cuts)] or [primal]:
                noise = self._noise(part, learned)
                sums = tuple([before + each for before, each in zip(sums, noise, strict=True)])
                metas = [torch.cat([leaf + each, leaf - each]) for leaf, each in zip(learned, noise, strict=True)]
                pairs = [each.chunk(2) for each in metas if each.numel()]
                if pairs and all(torch.equal(*pair) for pair in pairs):
                    raise ArgumentError(
                        f"sigma is {self.sigma}, which is lost where it is added to meta: all particles are alike. "
                        f"Pass a larger one, or meta in double precision."
                    )
                losses, states = self._trained(part, meta, metas, states)
                if losses is not None:
                    differences = (losses[: self.own] - losses[self.own :]).double()
                    weights = differences / (2 * self.own * self.sigma) / self.sigma  # the square of σ may be 0
                    found = [torch.tensordot(weights.to(each), each, 1) for each in sums]
                    gradients = [before + each for before, each in zip(gradients, found, strict=True)]
        path = plain.path._replace(state=refuse(plain.path.state, self.name, meta))
        return Outcome(attach(plain.loss, gradients, moving), path, Particles(states, sums))

    def _unperturbed(self, primal: Primal, fixed: Meta) -> Outcome:
        """The run at ``meta`` itself; what still requires grad in it was captured, which unroll refuses."""
        if any(leaf.requires_grad for leaf in tree.tensors(primal.init(fixed))):
            raise ArgumentError(
                f"The initial state requires grad by itself, not through meta: {self.name} estimates the gradient by "
                f"meta only. Pass an earlier unroll's out.carry, which is detached, or use Reverse()."
            )
        with watched(False):
            return Reverse()(primal, fixed, StoreAll())

    def _noise(self, primal: Primal, learned: Sequence[Tensor]) -> list[Tensor]:
        """Normal noise of deviation σ for each pair; it follows from the seed and the first step of the window.

        The noise of all pairs is drawn, whoever runs them.
        """
        made, rows = [], slice(self.share[0] * self.own, (self.share[0] + 1) * self.own)
        for place, leaf in enumerate(learned):
            source = rng.generator(int(rng.fold(primal.seed, 3, primal.start, place)), leaf.device)
            shape = (self.pairs, *leaf.shape)
            drawn = torch.randn(shape, generator=source, dtype=leaf.dtype, device=leaf.device)
            made.append(self.sigma * drawn[rows])
        return made

    def _trained(self, primal: Primal, meta: Meta, metas: Sequence[Tensor], states: Any) -> tuple[Tensor | None, Any]:
        """The meta-loss and the state of each particle at the end of a window."""
        hollow = tree.map(lambda leaf: tree.HOLE if leaf.requires_grad else leaf, meta)

        def train(values: Sequence[Tensor], state: Any) -> tuple[Tensor | None, Any, list[Tensor]]:
            own = tree.filled(hollow, values)
            begun = primal.init(own) if state is None else state
            path = advance(primal.step, own, begun, primal.start, primal.stop)
            return primal.total(own, path), path.state, path.losses

        def together(some: tuple[Sequence[Tensor], Any]) -> Any:
            number = len(some[0][0])
            if self.chunk == 1:
                return stack([train(*take(some, 0))])
            try:
                return over_tasks(train, number, randomness="same")(*some)
            except FuncmetaError:
                raise
            except (RuntimeError, ValueError) as error:
                raise ArgumentError(
                    f"{number} particles of {self.name} cannot run at once under vmap; torch said: "
                    f"{str(error).splitlines()[0]} Pass chunk=1, which runs one after the other."
                ) from error

        parts = _split((metas, states), 2 * self.own, self.chunk or 2 * self.own)
        total, states, losses = _joined([together(part) for part in parts], [len(part[0][0]) for part in parts])
        self._check_finite(total, losses, primal.start)
        return total, states

    def _check_share(self) -> None:
        """Raise unless the share is a rank and a number of ranks, which divides the pairs."""
        share: Any = self.share
        if not (isinstance(share, tuple) and [type(each) for each in share] == [int, int] and 0 <= share[0] < share[1]):
            raise ArgumentError(
                f"share is {share!r}, expected (rank, ranks) with 0 <= rank < ranks. Pass e.g. "
                f"share=(torch.distributed.get_rank(), torch.distributed.get_world_size())."
            )
        if self.pairs % share[1]:
            raise ArgumentError(
                f"pairs is {self.pairs}, which {share[1]} processes cannot share evenly. Pass a multiple."
            )

    def _check_finite(self, total: Tensor | None, losses: Sequence[Tensor], start: int) -> None:
        """Raise when a particle has a loss that is NaN or infinite, and name the first step where one has."""
        reported = [(f"inner loss of step {start + index}", loss) for index, loss in enumerate(losses)]
        for what, loss in [*reported, *([] if total is None else [("meta-loss", total)])]:
            good = loss.isfinite().flatten(1).all(1) if loss.dim() > 1 else loss.isfinite()
            if not good.all():
                raise NonFiniteError(
                    f"The {what} is NaN or infinite for {int((~good).sum())} of {len(good)} particles of {self.name}. "
                    f"Lower sigma, or make the inner training stable around meta."
                )


def _split(stacked: Any, number: int, size: int) -> list[Any]:
    """Trees of at most ``size`` particles each."""
    return [stacked] if size >= number else [take(stacked, slice(at, at + size)) for at in range(0, number, size)]


def _joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The tree of all particles again; a value of Python that differs between them is kept for each."""

    def column(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor):
            return torch.cat(leaves)
        values: list[Any] = []
        for leaf, size in zip(leaves, sizes, strict=True):
            values += leaf if isinstance(leaf, Each) else [leaf] * size
        return joined(values)

    return tree.map(column, *parts)
