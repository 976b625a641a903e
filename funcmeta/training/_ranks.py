"""One process among those that train together, or the only one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmeta._errors import LostProcessError


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
        with self._together():
            dist.all_gather_object(found, value)
        return found

    def begin_alike(self, leaves: Sequence[Tensor]) -> None:
        """Give every process the values of the first one."""
        if self.number > 1:
            for leaf in leaves:
                values = leaf.detach().contiguous()
                with self._together():
                    dist.broadcast(values, 0)
                leaf.detach().copy_(values)

    def average(self, leaves: Sequence[Tensor]) -> None:
        """Leave the mean of the processes' gradients on every leaf that any of them reached.

        Every inner step reads meta, so no gradient of it is complete before the backward pass is: there is nothing that
        ``DistributedDataParallel`` could send earlier.
        """
        if self.number == 1:
            return
        reached = zip(*self.gathered([leaf.grad is not None for leaf in leaves]), strict=True)
        for leaf, flags in zip(leaves, reached, strict=True):
            if any(flags):
                mean = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / self.number
                leaf.grad = mean.contiguous()
                with self._together():
                    dist.all_reduce(leaf.grad)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say what it means when the processes can not do a thing together."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Process {self.rank} of {self.number} can not reach the others: {str(error).splitlines()[0]} Look at "
                f"what they said last, and go on from the newest checkpoint with resume=True (--resume)."
            ) from error
