"""A step under watch: it may lean on nothing but its arguments, and comes out the same when it is taken again."""

from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import ReplayError
from funcmeta._graph import check_declared, inner_leaf
from funcmeta._typing import Meta
from funcmeta.memory._base import Step
from funcmeta.problem import StepInfo

_TOGETHER = 256
"""How many steps are compared at once: on a GPU each comparison waits for the device."""


class Witness:
    """A step that remembers what came out the first time."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._first: dict[int, list[Tensor]] = {}
        self._again: list[tuple[int, list[Tensor]]] = []
        self._norms: dict[int, list[Tensor]] = {}
        self._repeated = False

    def __call__(self, meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        """Take the step, the very first one with its graph for a moment; note its loss and share of the meta-loss."""
        state, info = (self.step if self._first else self._attached)(meta, state, index)
        given = [each.detach() for each in (info.loss, info.meta_loss) if each is not None]
        if index in self._first:
            self._repeated = True
            self._again.append((index, given))
        else:
            self._first[index] = given
        if len(self._again) >= _TOGETHER:
            self.compare()
        return state, info

    def _attached(self, meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        """Take the step with its graph, and raise if it depends on a tensor that it captured."""
        with torch.enable_grad():
            inputs = tree.map(lambda leaf: inner_leaf(leaf) if _requires_grad(leaf) else leaf, (meta, state))
            results = self.step(inputs[0], inputs[1], index)
            check_declared(filter(_requires_grad, tree.leaves(results)), tree.tensors(inputs), self.step)
        return tree.detach(results)  # type: ignore[no-any-return]

    def arrived(self, index: int, state: Any) -> None:
        """Note the state before step ``index`` until a step is repeated; from then on raise if it is another one."""
        if index in self._norms:
            self.compare()
            if not all(_close(*pair) for pair in zip(self._norms[index], _norms(state), strict=True)):
                raise ReplayError(
                    f"The steps before step {index} were run again and ended in another state, though their losses "
                    f"were the same. Make the optimizer and what else follows the loss a function of (step, seed) "
                    f"alone. Or use StoreAll()."
                )
        elif not self._repeated:
            self._norms[index] = _norms(state)

    def compare(self) -> None:
        """Raise if a step that was repeated since the last time gave something else than at first."""
        again, self._again = self._again, []
        for place, name in enumerate(("loss", "share of the meta-loss")):
            rows = [(index, self._first[index][place], given[place]) for index, given in again if len(given) > place]
            if not rows:
                continue
            before, after = (torch.stack(column) for column in ([row[1] for row in rows], [row[2] for row in rows]))
            same = _close(before, after)
            if not same.all():
                worst = int((~same).reshape(len(rows), -1).any(1).nonzero()[0])
                raise ReplayError(
                    f"Step {rows[worst][0]} was run again and gave the {name} {after[worst].tolist()}, the first time "
                    f"{before[worst].tolist()}. Make batches, loss and model functions of (step, seed) alone: no "
                    f"iterators, no generators, no counters outside the state. Or use StoreAll()."
                )


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _norms(state: Any) -> list[Tensor]:
    """The norm of each floating-point tensor: enough to tell one run from another."""
    return [torch.linalg.vector_norm(leaf.detach()) for leaf in tree.tensors(state) if leaf.is_floating_point()]


def _close(before: Tensor, after: Tensor) -> Tensor:
    eps = torch.finfo(before.dtype).eps
    return torch.isclose(before, after, rtol=eps**0.5, atol=eps, equal_nan=True)
