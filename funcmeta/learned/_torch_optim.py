"""A transform as an optimizer of torch, for ordinary training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import ArgumentError
from funcmeta.learned._optimizer import LearnedOptimizer, as_transform
from funcmeta.optim import Transform

_KEY = "funcmeta"


class TorchOptimizer(torch.optim.Optimizer):
    """A learned optimizer, or any ``Transform``, with the interface of ``torch.optim``.

    ``step()`` adds the updates to the parameters in place, without a graph. ``state_dict()`` holds tensors only.

    Args:
        params: the parameters of a module, or pairs of name and parameter, as ``module.named_parameters()``; with names
            the optimizer sees a dict by name, without them by position.
        optimizer: a ``LearnedOptimizer`` with the weights that it has, or a ``Transform``.

    Raises:
        ArgumentError: ``optimizer`` is neither, or ``params`` come in groups; in ``step``, a parameter has no gradient.
        StructureError: in ``load_state_dict``, the state is that of another optimizer or other parameters.

    Examples:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = TorchOptimizer(net.named_parameters(), fm.learned.linear(gradient=-0.1))
        >>> before = net.bias.item()
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> round(before - net.bias.item(), 4)
        0.1

    Source: the interface of ``torch.optim.Optimizer`` (PyTorch documentation).
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], optimizer: LearnedOptimizer | Transform
    ) -> None:
        if not isinstance(optimizer, LearnedOptimizer | Transform):
            raise ArgumentError(
                f"optimizer is a {type(optimizer).__name__}, expected a LearnedOptimizer or a Transform. Pass e.g. "
                f"funcmeta.learned.pretrained()."
            )
        super().__init__(params, {})
        if len(self.param_groups) != 1:
            raise ArgumentError(
                f"params come in {len(self.param_groups)} groups, expected one. Make one optimizer for each group."
            )
        self._transform = optimizer if isinstance(optimizer, Transform) else as_transform(optimizer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, computes loss and gradients first and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        grads = {name: _gradient(name, param) for name, param in params.items()}
        updates, state = self._transform.update(grads, self._state(), tree.detach(params))
        for name, param in params.items():
            param.add_(updates[name])
        self._kept[_KEY] = {"leaves": tree.tensors(tree.detach(state))}
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that ``state_dict()`` returned."""
        wanted = tree.tensors(self._transform.init(tree.detach(self._params())))
        given = state_dict.get("state", {}).get(_KEY, {"leaves": wanted})["leaves"]
        tree.check_same(
            wanted, given, name="state_dict['state']", advice="Load what the same optimizer saved for this module."
        )
        super().load_state_dict(state_dict)

    def _params(self) -> dict[str, Tensor]:
        group = self.param_groups[0]
        names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
        return dict(zip(names, group["params"], strict=True))

    def _state(self) -> Any:
        """The transform's state, its structure that of a fresh one."""
        fresh = self._transform.init(tree.detach(self._params()))
        return tree.filled(tree.hollow(fresh), self._kept[_KEY]["leaves"]) if _KEY in self._kept else fresh

    @property
    def _kept(self) -> dict[Any, Any]:
        """What torch saves with the optimizer."""
        return self.state


def _gradient(name: str, param: Tensor) -> Tensor:
    if param.grad is None:
        raise ArgumentError(
            f"the parameter '{name}' has no gradient. Call backward() on a loss that depends on it, or leave it out of "
            f"the optimizer."
        )
    return param.grad.detach()
