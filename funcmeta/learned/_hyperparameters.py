"""Learned hyper-parameters of momentum SGD: one for each tensor, layer or coordinate."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._check import check_choice, check_fraction, check_positive
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Params
from funcmeta.learned._optimizer import LearnedOptimizer

PER = ("all", "layer", "tensor", "coordinate")


def hyperparameters(params: Params, *, lr: float = 0.1, momentum: float = 0.0, per: str = "tensor") -> LearnedOptimizer:
    """Momentum SGD whose learning rates and momenta are learned, for all parameters or for parts of them.

    m' = μ m + g, u = −η m', with η = exp(a) and μ = σ(b), a and b learned: η stays positive, μ in (0, 1).

    Args:
        params: the parameters that it will optimize, by name; only names and shapes count.
        lr: η before meta-training.
        momentum: μ before meta-training; 0 for none, which is not learned.
        per: what has an η and a μ of its own: "all" the parameters together, a "layer" (the parameters whose names
            agree up to the last dot), a "tensor" or a "coordinate".

    Returns:
        A ``LearnedOptimizer`` for parameters of these names and shapes.

    Raises:
        ArgumentError: ``params`` is not a dict of tensors, ``lr`` is not positive, ``momentum`` lies outside [0, 1), or
            ``per`` is not known.
        StructureError: it is used on other parameters.

    Examples:
        >>> params = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "2.weight": torch.ones(1, 3)}
        >>> {per: hyperparameters(params, per=per).log_lr.numel() for per in ("all", "layer", "tensor", "coordinate")}
        {'all': 1, 'layer': 2, 'tensor': 3, 'coordinate': 12}

    Source: Li et al. (2017), "Meta-SGD"; Antoniou et al. (2019), "How to train your MAML", for rates by layer.
    """
    if not isinstance(params, Mapping) or not all(isinstance(leaf, Tensor) for leaf in params.values()):
        raise ArgumentError(
            f"params is {tree.describe(params)}, expected a dict of tensors. Pass init_params(module), or "
            f"dict(module.named_parameters())."
        )
    return _Hyperparameters({name: list(leaf.shape) for name, leaf in params.items()}, lr, momentum, per)


class _Momenta(NamedTuple):
    """Accumulated gradients, like the parameters; empty without momentum."""

    momentum: Any


class _Hyperparameters(LearnedOptimizer):
    """The module behind ``hyperparameters``."""

    whole: ClassVar[bool] = True

    def __init__(self, shapes: dict[str, list[int]], lr: float, momentum: float, per: str) -> None:
        super().__init__()
        check_positive("lr", lr)
        check_fraction("momentum", momentum)
        check_choice("per", per, PER)
        self.kind = "hyperparameters"
        self.config = {"shapes": shapes, "lr": lr, "momentum": momentum, "per": per}
        self._shapes, self._per = shapes, per
        groups = {name: _group(name, per) for name in shapes}
        self._places = list(dict.fromkeys(groups.values()))
        self._groups = [self._places.index(group) for group in groups.values()]
        count = sum(math.prod(shape) for shape in shapes.values()) if per == "coordinate" else len(self._places)
        self.log_lr = nn.Parameter(torch.full((count,), math.log(lr)))
        if momentum:
            self.logit_momentum = nn.Parameter(torch.full((count,), math.log(momentum / (1 - momentum))))

    def init_state(self, param: Params) -> _Momenta:
        """Zeros, or nothing."""
        self._check(param)
        return _Momenta(tree.map(torch.zeros_like, param) if self.config["momentum"] else ())

    def forward(self, param: Params, grad: Params, state: _Momenta) -> tuple[Params, _Momenta]:
        """One step of momentum SGD with own factors."""
        self._check(param)
        directions = {name: each for name, each in grad.items() if each is not None}
        if self.config["momentum"]:
            factors = self._spread(self.logit_momentum.sigmoid())
            directions = {
                name: (factors[name] * state.momentum[name] + each).to(each.dtype) for name, each in directions.items()
            }
            state = _Momenta({**state.momentum, **directions})
        rates = self._spread(self.log_lr.exp())
        updates: dict[str, Any] = dict.fromkeys(grad)
        updates.update({name: -rates[name] * direction for name, direction in directions.items()})
        return updates, state

    def _spread(self, values: Tensor) -> dict[str, Tensor]:
        """The value of each parameter's group, or of each coordinate, to be multiplied with the parameter."""
        if self._per != "coordinate":
            return {name: values[place] for name, place in zip(self._shapes, self._groups, strict=True)}
        parts = torch.split(values, [math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _check(self, params: Any) -> None:
        shapes = {name: list(leaf.shape) for name, leaf in params.items()} if isinstance(params, Mapping) else params
        if shapes != self._shapes:
            raise StructureError(
                f"the parameters have shapes {shapes}, but the hyper-parameters were made for {self._shapes}. Make "
                f"them from the parameters that they shall optimize."
            )


def _group(name: str, per: str) -> str:
    return {"all": "", "layer": name.rpartition(".")[0]}.get(per, name)
