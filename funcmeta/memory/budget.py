"""Pick the memory policy that takes the least time within a number of bytes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from funcmeta._check import check_count
from funcmeta._typing import Meta
from funcmeta.memory._account import Account
from funcmeta.memory._base import Step, Trajectory
from funcmeta.memory._sizes import Judge


@dataclass(frozen=True)
class Budget:
    """Follow the policy with the fewest evaluations whose peak stays within some bytes, by measured sizes.

    Each run first counts short ones, of the steps as the estimator takes them and the meta-loss: with room for
    ``StoreAll`` that takes 6 to 8 evaluations, with less up to 24, within the budget unless it ends in an error. It
    then looks among ``StoreAll``, ``Segments`` of every length and ``Revolve`` of every number of snapshots, and says
    what it follows, with expected bytes and time, in ``out.info.memory``. Sizes are taken to be the same in each step.
    With ``create_graph=True`` the graph of all steps is built whatever was chosen.

    Attributes:
        bytes: most bytes of tensors alive at once, in forward and backward pass, above those before the unroll. What
            kernels take for themselves, and the ``.grad`` of leaves, comes on top.

    Raises:
        ArgumentError: ``bytes`` is not a positive integer, it runs inside ``torch.func``, or under an estimator that
            follows no memory policy.
        MemoryBudgetError: no policy stays within the budget; the message names the smallest one that would do.

    Examples:
        >>> Budget(300_000_000)
        Budget(bytes=300000000)

    Source: this library.
    """

    bytes: int
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("bytes", self.bytes, advice="Pass bytes, e.g. 300 * 10**6 for 300 MB.")

    def among(self, runs: int) -> "Budget":
        """The part of the budget that one of several runs has whose graphs are alive at once, and results stacked."""
        return _Part(self.bytes, runs)

    def judged(self, judge: Judge | None) -> "Account":
        """The budget of one run with this meta-loss at its end."""
        return Account(self.bytes, judge)

    def run(self, step: Step, meta: Meta, state: Any, start: int, stop: int) -> Trajectory:
        """Measure, choose, and take the steps."""
        return self.judged(None).run(step, meta, state, start, stop)


@dataclass(frozen=True)
class _Part(Budget):
    """The budget of one task among several."""

    runs: int = 1

    def judged(self, judge: Judge | None) -> "Account":
        """The budget of one run with this meta-loss at its end."""
        return Account(self.bytes, judge, runs=self.runs)


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
        Budget(bytes=300000000)

    Source: this library.
    """
    return Budget(bytes)
