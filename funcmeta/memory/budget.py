"""Pick the memory policy that takes the least time within a number of bytes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError, MemoryBudgetError
from funcmeta._graph import inside_functorch
from funcmeta._typing import Meta
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._plan import Plan, plan
from funcmeta.memory._sizes import Sizes, judging, measured
from funcmeta.memory.revolve import Revolve
from funcmeta.memory.segments import Segments
from funcmeta.memory.store_all import StoreAll


@dataclass(frozen=True)
class Budget:
    """Follow the policy with the fewest evaluations whose peak stays within some bytes, by measured sizes.

    Each run measures one step first: it takes steps five times more, and needs the memory of one step with its graph.
    It then looks among ``StoreAll``, ``Segments`` of every length and ``Revolve`` of every number of snapshots, and
    says what it follows, with expected bytes and time, in ``out.info.memory``. Sizes are taken to be the same in each
    step. With ``create_graph=True`` the graph of all steps is built whatever was chosen.

    Attributes:
        bytes: most bytes of tensors alive at once, in forward and backward pass, above those before the unroll. What
            kernels take for themselves, and the ``.grad`` of leaves, comes on top.
        reserved: most bytes while the meta-loss is computed and differentiated; ``unroll`` measures and fills it in.

    Raises:
        ArgumentError: ``bytes`` is not a positive integer, or it runs inside ``torch.func``.
        MemoryBudgetError: no policy stays within the budget; the message names the smallest one that would do.

    Examples:
        >>> Budget(300_000_000)
        Budget(bytes=300000000, reserved=0)

    Source: this library.
    """

    bytes: int
    reserved: int = 0
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("bytes", self.bytes, advice="Pass bytes, e.g. 300 * 10**6 for 300 MB.")

    def reserving(self, judge: Callable[[Meta, Any], Tensor], meta: Meta, state: Any) -> "Budget":
        """The same budget, which allows for a meta-loss (meta, state) → 0-d tensor."""
        _check_outside_functorch()
        return replace(self, reserved=judging(judge, meta, state))

    def among(self, runs: int) -> "Budget":
        """The part of the budget that one of several runs has whose graphs are alive at once."""
        return replace(self, bytes=max(1, self.bytes // runs))

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Measure a step, choose, and take the steps."""
        _check_outside_functorch()
        attached = any(leaf.requires_grad for leaf in tree.tensors((meta, state)))
        if stop == start or not (attached and torch.is_grad_enabled()):
            return StoreAll().run(step, meta, state, start, stop)
        chosen = self._choose(measured(step, meta, state, start, stop), stop - start)
        return chosen.memory.run(step, meta, state, start, stop)._replace(memory=chosen)  # type: ignore[no-any-return]

    def _choose(self, sizes: Sizes, steps: int) -> Plan:
        """The plan with the fewest evaluations that fits; among equals the simpler one."""

        def fits(states: int, part: int) -> bool:
            return sizes.peak(steps, states, part, self.reserved) <= self.bytes

        counts = range(steps - 1, 0, -1)  # the more the fewer evaluations
        best: list[Any] = [
            StoreAll() if fits(0, steps) else None,
            next((Segments(length) for length in counts if fits(-(-steps // length) - 1, length)), None),
            next((Revolve(snapshots) for snapshots in counts if fits(snapshots, 1)), None),
        ]
        plans = [plan(each, steps) for each in best if each is not None]
        if not plans:
            raise MemoryBudgetError(
                self.bytes, min(sizes.peak(steps, *each, self.reserved) for each in ((0, steps), (1, 1)))
            )
        chosen = min(plans, key=lambda each: each.evaluations)
        return replace(chosen, estimate=sizes.estimate(chosen, self.reserved))


def _check_outside_functorch() -> None:
    if inside_functorch():
        raise ArgumentError("budget(...) can not measure steps inside torch.func. Use StoreAll() there.")


def budget(bytes: int) -> Budget:
    """The memory policy that takes the fewest evaluations within a number of bytes.

    Args:
        bytes: most bytes of tensors alive at once during an unroll and its backward pass, above those before it.

    Returns:
        A ``Budget``, to be passed as ``memory``. What it followed stands in ``out.info.memory``.

    Raises:
        ArgumentError: ``bytes`` is not a positive integer.
        MemoryBudgetError: in a run, no policy stays within the budget.

    Examples:
        >>> budget(300 * 10**6)
        Budget(bytes=300000000, reserved=0)

    Source: this library.
    """
    return Budget(bytes)
