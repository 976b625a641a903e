"""One process among those that train together, or the only one."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from funcmeta import tree
from funcmeta._typing import Meta
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
        dist.all_gather_object(found, value)
        return found


class Averaged:
    """The loss of an objective whose gradients are averaged over the processes, by ``DistributedDataParallel``."""

    def __init__(self, objective: Objective, meta: Meta, ranks: Ranks) -> None:
        self._inner = _Loss(objective, meta)
        self._outer: nn.Module = DistributedDataParallel(self._inner) if ranks.number > 1 else self._inner

    def __call__(self, batch: Any, seed: int, carry: Any) -> tuple[Tensor, Any]:
        """The loss of this process's part, and its carry."""
        return self._outer(batch, seed, carry), self._inner.carry

    def apart(self, alone: bool) -> AbstractContextManager[Any]:
        """A block whose gradients are not averaged yet, because more are to be added to them."""
        if alone and isinstance(self._outer, DistributedDataParallel):
            return self._outer.no_sync()
        return nullcontext()


class _Loss(nn.Module):
    """The unroll lies in the forward pass, so that the hooks of the wrapper find the leaves of ``meta``."""

    def __init__(self, objective: Objective, meta: Meta) -> None:
        super().__init__()
        self._objective, self._meta, self.carry = objective, (meta,), None
        self.learned = nn.ParameterList([leaf for leaf in tree.leaves(meta) if leaf.requires_grad])

    def forward(self, batch: Any, seed: int, carry: Any) -> Tensor:
        loss, self.carry = self._objective.loss(self._meta[0], batch, seed, carry)
        return loss
