"""The exact meta-gradient, whose inner gradients keep no graph."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from funcmeta._errors import FallbackWarning
from funcmeta._gradient import steered
from funcmeta._mixed import Mixed
from funcmeta._typing import Meta
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import Memory, Step
from funcmeta.problem import StepInfo


@dataclass(frozen=True)
class MixedMode:
    """The exact meta-gradient in the memory of first order: derivatives of inner gradients by forward over reverse.

    The backward pass meets each inner gradient g = ∂ℓ/∂θ with a cotangent v and needs vᵀ∂g/∂z, z being all that ℓ
    depends on. As the Hessian is symmetric, that is ∂/∂ε ∂ℓ/∂z (θ + εv): one more evaluation of the inner loss and its
    gradient with a tangent v, and no graph of the gradient. A step keeps its parameters instead of its graph, also
    under ``StoreAll``; the price is that evaluation.

    Works under every memory policy; ``create_graph=True`` takes the gradient through its graph after all. So does, for
    the rest of the unroll, an inner loss that takes gradients itself, registers hooks, runs an ``autograd.Function``,
    or an operation that is not known to be right in forward mode, and one whose slope along the cotangent is not what
    its gradient says: a ``FallbackWarning`` gives the reason, and the result is as exact.

    Examples:
        >>> MixedMode()
        MixedMode()

    Source: Kemaev et al. (2025), "Scalable Meta-Learning via Mixed-Mode Differentiation" (MixFlow-MG).
    """

    unreached_advice: ClassVar[str] = Reverse.unreached_advice

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Unroll with inner gradients that keep their inputs only."""
        return Reverse()(replace(primal, step=_with_mixed_gradients(primal.step)), meta, memory)


def _with_mixed_gradients(step: Step) -> Step:
    rule, idle = Mixed(), list[int]()

    def mixed_mode(meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        with steered(rule) as steering:
            result = step(meta, state, index)
        if not steering.taken and not idle:
            idle.append(index)
            warnings.warn(
                f"MixedMode had nothing to do in step {index}, which took no gradient through "
                f"funcmeta.value_and_grad: it was differentiated as by Reverse.",
                FallbackWarning,
                stacklevel=2,
            )
        return result

    return mixed_mode
