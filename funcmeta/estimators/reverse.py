"""The exact meta-gradient, by reverse mode through every step."""

from dataclasses import dataclass
from typing import ClassVar

from funcmeta._typing import Meta
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.memory import Budget, Memory
from funcmeta.memory._account import Account


@dataclass(frozen=True)
class Reverse:
    """The exact (second-order) meta-gradient dL/dmeta = Σ_k ∂L/∂θ_k · dθ_k/dmeta, derivatives of gradients included.

    Works under every memory policy, and can be differentiated again (``create_graph=True``).

    Examples:
        >>> Reverse()
        Reverse()

    Source: reverse-mode differentiation of the unrolled training, as in Maclaurin et al. (2015).
    """

    unreached_advice: ClassVar[str] = (
        "Use it in the loss or the optimizer, take it out of `meta`, or set requires_grad=False on it."
    )

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Unroll with the graph that the memory policy keeps."""
        if isinstance(memory, Budget):
            memory = memory.judged(primal.meta_loss)
        state = memory.begun(primal.init, meta) if isinstance(memory, Account) else primal.init(meta)
        path = memory.run(primal.step, meta, state, primal.start, primal.stop)
        return Outcome(primal.total(meta, path), path)
