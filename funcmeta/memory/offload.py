"""Keep stored states on another device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from funcmeta._check import check_device
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._follow import follow
from funcmeta.memory._plan import Action, Planned


@dataclass(frozen=True)
class Offload:
    """Do what ``inner`` does, but let stored states wait on ``device``; they come back to the bit, to where they were.

    On a GPU, memory is then the graph of one part of the steps, whatever their number, for two copies of a state each
    time one is stored. The initial state stays where it is, because it is usually (part of) ``meta``.

    Args:
        inner: a policy that stores states: ``Segments`` or ``Revolve``.
        device: where they wait.

    Raises:
        ArgumentError: ``inner`` stores no states, or has no plan before it runs; ``device`` is none, or "meta".

    Examples:
        >>> from funcmeta.memory import Segments, plan
        >>> plan(Offload(Segments(length=25)), 100).peak_states
        3

    Source: this library; ``torch.autograd.graph.save_on_cpu`` does the like for whole graphs.
    """

    inner: Planned
    device: torch.device | str = "cpu"
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not hasattr(self.inner, "actions") or not self.inner.replays:
            raise ArgumentError(
                f"inner is {self.inner!r}, expected a policy that stores states by a plan: StoreAll() stores none, and "
                f"budget(...) plans when it runs. Pass e.g. Segments() or Revolve(10)."
            )
        if check_device(self.device).type == "meta":
            raise ArgumentError(f"device is {self.device!r}, expected one that keeps tensors. Pass e.g. 'cpu'.")

    def actions(self, steps: int) -> Iterable[Action]:
        """Those of ``inner``."""
        return self.inner.actions(steps)

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Take the steps as ``inner`` does."""
        return follow(self, step, meta, state, start, stop, device=self.device)
