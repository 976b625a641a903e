"""One process among those that train together, or the only one."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from funcmeta import tree
from funcmeta._errors import ArgumentError, DetachedError, FuncmetaError, LostProcessError, NonFiniteError
from funcmeta._gradient import check_loss
from funcmeta._typing import Meta
from funcmeta.algorithms._algorithm import EstimatedLoss
from funcmeta.estimators import Truncated
from funcmeta.training._carries import Spread
from funcmeta.training._objective import Objective


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many."""

    rank: int = 0
    number: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """As ``torch.distributed`` has it; one process where it is not initialized."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gathered(flag))

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of the ranks."""
        if self.number == 1:
            return [value]
        found: list[Any] = [None] * self.number
        with self.together():
            dist.all_gather_object(found, value)
        return found

    def check_share(self, algorithm: Any, spread: Spread) -> None:
        """Raise unless the particles that an estimator runs here are those that are left to this process.

        Nothing is known about the estimator of an algorithm that is not the library's.
        """
        if not isinstance(algorithm.loss, EstimatedLoss):
            return
        estimator: Any = algorithm.loss.estimator
        while isinstance(estimator, Truncated):
            estimator = estimator.estimator
        shares = self.gathered(getattr(estimator, "share", None))
        if spread == "particles" and None in shares:
            raise ArgumentError(
                f"spread is 'particles', but {type(estimator).__name__} has none, so that all processes would do the "
                f"same. Pass spread='tasks'."
            )
        wanted = [(rank, self.number) if spread == "particles" else (0, 1) for rank in range(self.number)]
        if None not in shares and shares != wanted:
            raise ArgumentError(
                f"{type(estimator).__name__} has the shares {shares}, in the order of the ranks, where "
                f"spread={spread!r} and {self.number} processes need {wanted}. Build it with share=(rank, ranks) and "
                f"pass spread='particles', or without share for spread='tasks'."
            )

    def begin_alike(self, leaves: Sequence[Tensor]) -> None:
        """Give every process the values of the first one."""
        if self.number > 1:
            for leaf in leaves:
                values = leaf.detach().contiguous()
                with self.together():
                    dist.broadcast(values, 0)
                leaf.detach().copy_(values)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Say what it means when the processes cannot do a thing together."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, FuncmetaError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise LostProcessError(
                f"Process {self.rank} of {self.number} cannot reach the others: {str(error).splitlines()[0]} Look at "
                f"what they said last, and go on from the newest checkpoint with resume=True (--resume)."
            ) from error


class Averaged:
    """The loss of an objective whose gradients are averaged over the processes, by ``DistributedDataParallel``."""

    def __init__(self, objective: Objective, meta: Meta, ranks: Ranks) -> None:
        self._inner, self._ranks = _Loss(objective, meta), ranks
        self._outer: nn.Module = self._inner
        if ranks.number > 1:
            with ranks.together():
                self._outer = DistributedDataParallel(self._inner, find_unused_parameters=objective.may_leave_out(meta))

    def __call__(self, batch: Any, seed: int, carry: Any) -> tuple[Tensor, Any, str | None]:
        """The loss of this process's part, its carry, and what is not finite in it.

        Where something is not, the loss is 0 and has the gradient 0: the wrapper has to see a backward pass after each
        forward pass, in every process, or they wait for each other for ever.
        """
        with self._ranks.together():
            return self._outer(batch, seed, carry), self._inner.carry, self._inner.trouble

    def apart(self) -> AbstractContextManager[Any]:
        """A block whose gradients are not averaged yet, because more are to be added to them."""
        return self._outer.no_sync() if isinstance(self._outer, DistributedDataParallel) else nullcontext()


class _Loss(nn.Module):
    """The unroll lies in the forward pass, so that the wrapper finds the leaves of ``meta`` in its graph."""

    def __init__(self, objective: Objective, meta: Meta) -> None:
        super().__init__()
        self._objective, self._meta = objective, (meta,)
        self.carry: Any = None
        self.trouble: str | None = None
        self.learned = nn.ParameterList([leaf for leaf in tree.leaves(meta) if leaf.requires_grad])

    def forward(self, batch: Any, seed: int, carry: Any) -> Tensor:
        try:
            loss, self.carry = self._objective.loss(self._meta[0], batch, seed, carry)
        except NonFiniteError as error:
            self.carry, self.trouble = None, str(error)
            return torch.stack([0 * leaf.sum() for leaf in self.learned]).sum()
        self.trouble = None
        check_loss(loss, name="The loss of the algorithm")
        if not loss.requires_grad:
            raise detached()
        return loss


def detached() -> DetachedError:
    """What to raise where no leaf gets a meta-gradient."""
    return DetachedError(
        "The loss of the algorithm depends on no leaf of meta that requires grad. Compute it from meta, without "
        "detach() or torch.no_grad()."
    )
