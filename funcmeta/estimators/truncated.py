"""The meta-gradient through the last steps only, or through windows of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta._graph import inner_leaf, walk
from funcmeta._typing import Meta
from funcmeta._watch import watched
from funcmeta.estimators._base import Estimator, Outcome, Primal
from funcmeta.estimators.evolution_strategies import EvolutionStrategies
from funcmeta.estimators.forward_mode import ForwardMode
from funcmeta.estimators.reptile import Reptile
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import Budget, Memory, Plan, Trajectory
from funcmeta.memory._plan import joined


@dataclass(frozen=True)
class Truncated:
    """The meta-gradient with the graph cut every ``length`` steps: Σ_w dL_w/dmeta, the window's first state a constant.

    Windows are aligned to the end; the first may be shorter. L_w are the shares of the meta-loss in window w, and in
    the last one also the loss at the end: with that alone, the last ``length`` steps count. Initial parameters get a
    gradient through the first window only. With ``length`` of at least all steps nothing is cut. The result is biased
    towards what acts at once, and memory does not grow with the number of windows that give no share.

    Args:
        length: steps between two cuts.
        estimator: how each window is differentiated; ``FirstOrder()`` for learned optimizers as in the paper.

    Raises:
        ArgumentError: ``length`` is not a positive integer; ``estimator`` has the wrong type, is ``Reptile``, or has
            particles.

    Examples:
        >>> Truncated(20)
        Truncated(length=20, estimator=Reverse())

    Source: truncated backpropagation through time (Williams and Peng 1990); for learned optimizers Andrychowicz et
    al. (2016), section 2.1.
    """

    length: int
    estimator: Estimator = Reverse()  # noqa: RUF009

    def __post_init__(self) -> None:
        check_count("length", self.length, advice="Pass e.g. length=20.")
        if isinstance(self.estimator, type) or not hasattr(self.estimator, "unreached_advice"):
            raise ArgumentError(f"estimator is {self.estimator!r}, expected an estimator. Pass e.g. FirstOrder().")
        if isinstance(self.estimator, Reptile):
            raise ArgumentError(
                "Truncated was given Reptile(), whose way back is that of a whole training and of no window. Use "
                "Reptile() by itself, or call unroll window by window with carry=out.carry."
            )

    @property
    def follows_memory(self) -> bool:
        """Whether the memory policy has an effect: as it has in a window."""
        return bool(getattr(self.estimator, "follows_memory", True))

    @property
    def unreached_advice(self) -> str:
        """What to do when a leaf of ``meta`` gets no gradient under this estimator."""
        return (
            f"Truncated(length={self.length}) goes back to the cut before a share of the meta-loss, and to the initial "
            f"state in the first window only: take a length of at least all steps, or give every step a share "
            f"(trajectory_loss). {self.estimator.unreached_advice}"
        )

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Take the windows one after the other, each from a detached state."""
        cuts = [primal.start, *range(primal.stop, primal.start, -self.length)[::-1]]
        windows = list(pairwise(cuts))
        if isinstance(memory, Budget):
            if isinstance(self.estimator, Truncated):
                raise ArgumentError(
                    f"memory is {memory!r}, which cannot be planned for windows within windows. Use "
                    f"Truncated({self.estimator.length}) by itself, or a policy such as Segments()."
                )
            memory = memory.judged(primal.meta_loss).over(windows)
        shares, losses, aux, plans = [], [], list[Any](), list[tuple[Plan | None, bool]]()
        path = None
        for part in [primal.within(*ends) for ends in windows] or [primal]:
            begun = part if path is None else part.begun_at(tree.detach(path.state))
            own = meta
            if (
                path is not None
                and isinstance(self.estimator, ForwardMode | EvolutionStrategies)
                and torch.is_grad_enabled()
            ):
                own = _used(begun, meta)  # these attach a gradient, of zero or noise, to what has none
            loss, path, particles = self.estimator(begun, own, memory)
            if particles is not None:
                raise ArgumentError(
                    f"Truncated was given {self.estimator!r}, which has windows of its own. Use that one by itself."
                )
            shares += [] if loss is None else [loss]
            losses += path.losses
            aux += path.aux
            plans.append((path.memory, loss is not None))
            if part.stop < primal.stop:  # a window without a share is not to be alive beside the next
                path = Trajectory(tree.detach(path.state), None, [], [])
            del loss, begun
        assert path is not None
        total = torch.stack(shares).sum() if len(shares) > 1 else shares[0] if shares else None
        return Outcome(total, Trajectory(path.state, None, losses, aux, joined(plans)))


def _used(primal: Primal, meta: Meta) -> Meta:
    """``meta``, in which the leaves that no step and no loss of this window uses are constants."""
    inputs = tree.map(lambda leaf: inner_leaf(leaf) if leaf.requires_grad else leaf, meta)
    missing = {id(leaf): leaf for leaf in tree.leaves(inputs) if leaf.requires_grad}
    state, index = primal.init(inputs), primal.start
    with torch.enable_grad(), watched(False), _Touched(missing):
        while missing and index < primal.stop:
            state, info = primal.step(inputs, state, index)
            _remove(missing, tree.tensors((state, info.meta_loss)))
            state, index = tree.detach(state), index + 1
        if missing and primal.meta_loss is not None:
            _remove(missing, [primal.meta_loss(inputs, state)])
    return tree.map(lambda leaf, own: leaf.detach() if id(own) in missing else leaf, meta, inputs)


def _remove(missing: dict[int, Tensor], results: list[Tensor]) -> None:
    """Take out of the leaves those that some results are attached to."""
    for leaf in walk(results).leaves:
        missing.pop(id(leaf), None)


class _Touched(TorchFunctionMode):
    """Inside this mode leaves that a function of torch gets are taken out: their way may have no derivative."""

    def __init__(self, missing: dict[int, Tensor]) -> None:
        super().__init__()
        self._missing = missing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._missing and getattr(func, "__name__", "") != "__get__":  # a shape or a dtype is no value
            for leaf in tree.tensors((tuple(args), kwargs or {})):
                self._missing.pop(id(leaf), None)
        return func(*args, **(kwargs or {}))
