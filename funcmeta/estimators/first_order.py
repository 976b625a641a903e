"""The meta-gradient that takes the inner gradients as constants."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from funcmeta._errors import GraphError
from funcmeta._gradient import constant, steered
from funcmeta._typing import Meta
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import Memory, Step
from funcmeta.problem import StepInfo


@dataclass(frozen=True)
class FirstOrder:
    """The first-order meta-gradient: every inner gradient g_k counts as a constant, all else is differentiated.

    For SGD, dθ_K/dθ_0 becomes the identity and dθ_K/dlr becomes −Σ_k g_k. A leaf of ``meta`` that acts only through
    the inner gradient (the weights of a learned loss) has no first-order gradient: unroll says so and raises.

    Raises:
        GraphError: a step took no gradient through ``value_and_grad``, so there is nothing to hold constant.

    Examples:
        >>> FirstOrder()
        FirstOrder()

    Source: Finn et al. (2017), section 5.2, "first-order approximation".
    """

    unreached_advice: ClassVar[str] = (
        "Under FirstOrder a way through the inner gradient does not count: use Reverse(), or set requires_grad=False "
        "on it."
    )

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Unroll with constant inner gradients."""
        return Reverse()(replace(primal, step=_with_constant_gradients(primal.step)), meta, memory)


def _with_constant_gradients(step: Step) -> Step:
    def first_order(meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        with steered(constant) as steering:
            result = step(meta, state, index)
        if not steering.taken:
            raise GraphError(
                f"FirstOrder cannot hold the inner gradient of step {index} constant: the step took none through "
                f"funcmeta.value_and_grad. Use it in place of torch.autograd.grad or torch.func.grad."
            )
        return result

    return first_order
