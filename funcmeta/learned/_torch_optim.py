"""A transform as an optimizer of torch, for ordinary training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta.learned._optimizer import LearnedOptimizer, as_transform
from funcmeta.optim import Transform

_KEY = "funcmeta"


class TorchOptimizer(torch.optim.Optimizer):
    """A learned optimizer, or any ``Transform``, with the interface of ``torch.optim``.

    ``step()`` adds the updates to the parameters in place, without a graph; a parameter without a gradient stays, as
    does what is kept for it. ``state_dict()`` holds tensors only.

    Args:
        params: the parameters of a module, or pairs of name and parameter, as ``module.named_parameters()``; with names
            the optimizer sees a dict by name, without them by position.
        optimizer: a ``LearnedOptimizer`` with the weights that it has, or a ``Transform``.

    Raises:
        ArgumentError: ``optimizer`` is neither, its state holds other things than tensors, or ``params`` come in groups
            or with options; in ``step``, a parameter has a sparse gradient.
        StructureError: in ``load_state_dict``, the state is one of another kind, or of other parameters.

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
        try:
            super().__init__(params, {})
        except ArgumentError:
            raise
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"params cannot be optimized: {error}. Pass module.parameters() or module.named_parameters()."
            ) from error
        options = self.param_groups[0].keys() - {"params", "param_names"}
        if options:
            raise ArgumentError(
                f"params come with the options {sorted(options)}, which nothing would read. Pass parameters alone; "
                f"hyper-parameters are arguments of the transform."
            )
        self._transform = optimizer if isinstance(optimizer, Transform) else as_transform(optimizer)
        others = [leaf for leaf in tree.leaves(self._fresh()) if not isinstance(leaf, Tensor)]
        if others:
            raise ArgumentError(
                f"the optimizer's state holds {others[:3]}, expected tensors alone. Keep counters as 0-d tensors."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of parameters; there can be no second."""
        if self.param_groups:
            raise ArgumentError("params come in several groups, expected one. Make one optimizer for each group.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of."""
        return {**super().__getstate__(), "_transform": self._transform}

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
        self._kept[_KEY] = {"leaves": [leaf.detach().clone() for leaf in tree.leaves(state)]}
        for name, param in params.items():
            if updates[name] is not None:
                param.add_(updates[name])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that ``state_dict()`` returned."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        sizes = [len(self.param_groups[0]["params"])]
        if not isinstance(groups, list) or [_size(each) for each in groups] != sizes:
            raise StructureError(
                f"state_dict has not the param_groups of {sizes[0]} parameters. Load what the same optimizer "
                f"saved for this module."
            )
        wanted, kept = tree.leaves(self._fresh()), state_dict.get("state")
        saved = kept.get(_KEY) if isinstance(kept, Mapping) else None
        given = saved.get("leaves") if isinstance(saved, Mapping) else None
        if kept != {} and not (isinstance(given, list) and all(isinstance(leaf, Tensor) for leaf in given)):
            raise StructureError(
                f"state_dict['state'] is {_shown(kept)}, expected '{_KEY}' with a list of tensors. "
                f"Load what the same optimizer saved for this module."
            )
        if given is not None:
            moved = [leaf.to(like.device) for leaf, like in zip(given, wanted, strict=False)] + given[len(wanted) :]
            tree.check_same(
                wanted, moved, name="state_dict['state']", advice="Load what the same optimizer saved for this module."
            )
            state_dict = {**state_dict, "state": {_KEY: {"leaves": moved}}}
        super().load_state_dict(state_dict)

    def _params(self) -> dict[str, Tensor]:
        group = self.param_groups[0]
        names = group.get("param_names") or [str(index) for index in range(len(group["params"]))]
        return dict(zip(names, group["params"], strict=True))

    def _state(self) -> Any:
        """The transform's state, its structure that of a fresh one."""
        fresh = self._fresh()
        return tree.like(fresh, self._kept[_KEY]["leaves"]) if _KEY in self._kept else fresh

    def _fresh(self) -> Any:
        """The transform's state before the first step."""
        return self._transform.init(tree.detach(self._params()))

    @property
    def _kept(self) -> dict[Any, Any]:
        """What torch saves with the optimizer."""
        return self.state


def _size(group: Any) -> int | None:
    """How many parameters a saved group has."""
    params = group.get("params") if isinstance(group, Mapping) else None
    return len(params) if isinstance(params, list) else None


def _shown(kept: Any) -> str:
    """What a saved state is, in a few words."""
    return f"a dict with the keys {list(kept)[:5]}" if isinstance(kept, Mapping) else repr(kept)


def _gradient(name: str, param: Tensor) -> Tensor | None:
    if param.grad is None:
        return None
    if param.grad.layout is not torch.strided:
        raise ArgumentError(
            f"the gradient of '{name}' is {param.grad.layout}, expected a dense one. Use sparse=False in the embedding."
        )
    return param.grad.detach()
