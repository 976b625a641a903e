"""The one table of optimizers that all shared tests go through, and the small problem they are run on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta import optim
from funcmeta.optim import Transform


class Case(NamedTuple):
    """An optimizer at a point where every hyper-parameter matters."""

    make: Callable[..., Transform]
    hypers: dict[str, float]
    options: dict[str, bool] = {}  # noqa: RUF012
    namesake: Callable[..., torch.optim.Optimizer] | None = None
    flat: frozenset[str] = frozenset()

    def build(self, **changed: Any) -> Transform:
        """The transform, with some hyper-parameters replaced; beta1 and beta2 make the pair betas."""
        return self.make(**arguments({**self.hypers, **changed}), **self.options)

    def torch_optimizer(self, params: list[Tensor], **changed: Any) -> torch.optim.Optimizer:
        assert self.namesake is not None
        return self.namesake(params, **arguments({**self.hypers, **changed}), **self.options)


def arguments(hypers: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in hypers.items() if name not in ("beta1", "beta2")}
    return {**plain, "betas": (hypers["beta1"], hypers["beta2"])} if "beta1" in hypers else plain


def torch_amsgrad(params: list[Tensor], **keywords: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, amsgrad=True, **keywords)


BETAS = {"beta1": 0.7, "beta2": 0.8}
ADAM = {"lr": 0.05, **BETAS, "eps": 0.02}
DECAY = {"weight_decay": 0.3}
UP, DECOUPLED = {"maximize": True}, {"decoupled_weight_decay": True}
NADAM = {**ADAM, "momentum_decay": 0.1}
RADAM = {**ADAM, "beta2": 0.9}
RMS = {"lr": 0.05, "alpha": 0.8, "eps": 0.02}
HEAVY = {"momentum": 0.6}

CASES = {
    "sgd": Case(optim.sgd, {"lr": 0.2}, {}, torch.optim.SGD),
    "sgd decay up": Case(optim.sgd, {"lr": 0.1, **DECAY}, UP, torch.optim.SGD),
    "sgd momentum": Case(optim.sgd, {"lr": 0.1, **HEAVY}, {}, torch.optim.SGD),
    "sgd dampening": Case(optim.sgd, {"lr": 0.1, **HEAVY, "dampening": 0.4, **DECAY}, {}, torch.optim.SGD),
    "sgd nesterov": Case(optim.sgd, {"lr": 0.1, **HEAVY, **DECAY}, {"nesterov": True}, torch.optim.SGD),
    "adam": Case(optim.adam, ADAM, {}, torch.optim.Adam),
    "adam decay up": Case(optim.adam, {**ADAM, **DECAY}, UP, torch.optim.Adam),
    "adam decoupled": Case(optim.adam, {**ADAM, **DECAY}, DECOUPLED, torch.optim.Adam),
    "adam amsgrad": Case(optim.adam, {**ADAM, **DECAY}, {"amsgrad": True, **UP}, torch.optim.Adam),
    "adamw": Case(optim.adamw, {**ADAM, **DECAY}, {}, torch.optim.AdamW),
    "adamw amsgrad up": Case(optim.adamw, {**ADAM, **DECAY}, {"amsgrad": True, **UP}, torch.optim.AdamW),
    "amsgrad": Case(optim.amsgrad, ADAM, {}, torch_amsgrad),
    "amsgrad decay up": Case(optim.amsgrad, {**ADAM, **DECAY}, UP, torch_amsgrad),
    "adamax": Case(optim.adamax, ADAM, {}, torch.optim.Adamax),
    "adamax decay up": Case(optim.adamax, {**ADAM, **DECAY}, UP, torch.optim.Adamax),
    "nadam": Case(optim.nadam, NADAM, {}, torch.optim.NAdam),
    "nadam decay up": Case(optim.nadam, {**NADAM, **DECAY}, UP, torch.optim.NAdam),
    "nadam decoupled": Case(optim.nadam, {**NADAM, **DECAY}, DECOUPLED, torch.optim.NAdam),
    "radam": Case(optim.radam, RADAM, {}, torch.optim.RAdam),
    "radam decay up": Case(optim.radam, {**RADAM, **DECAY}, UP, torch.optim.RAdam),
    "radam decoupled": Case(optim.radam, {**RADAM, **DECAY}, DECOUPLED, torch.optim.RAdam),
    "rmsprop": Case(optim.rmsprop, RMS, {}, torch.optim.RMSprop),
    "rmsprop decay up": Case(optim.rmsprop, {**RMS, **DECAY}, UP, torch.optim.RMSprop),
    "rmsprop momentum": Case(optim.rmsprop, {**RMS, **HEAVY}, {}, torch.optim.RMSprop),
    "rmsprop centered": Case(optim.rmsprop, {**RMS, **DECAY}, {"centered": True}, torch.optim.RMSprop),
    "rmsprop both": Case(optim.rmsprop, {**RMS, **HEAVY, **DECAY}, {"centered": True}, torch.optim.RMSprop),
    "adagrad": Case(
        optim.adagrad,
        {"lr": 0.2, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.02},
        {},
        torch.optim.Adagrad,
    ),
    "adagrad decay up": Case(optim.adagrad, {"lr": 0.1, "eps": 0.02, **DECAY}, UP, torch.optim.Adagrad),
    "adadelta": Case(optim.adadelta, {"lr": 0.5, "rho": 0.7, "eps": 0.02}, {}, torch.optim.Adadelta),
    "adadelta decay up": Case(optim.adadelta, {"lr": 0.5, "rho": 0.7, "eps": 0.02, **DECAY}, UP, torch.optim.Adadelta),
    "lion": Case(optim.lion, {"lr": 0.05, **BETAS, **DECAY}, {}, None, frozenset({"beta1", "beta2"})),
    "lion up": Case(optim.lion, {"lr": 0.05, **BETAS}, UP, None, frozenset({"beta1", "beta2"})),
    "clip by value": Case(lambda limit: optim.chain(optim.clip_by_value(limit), optim.sgd(0.3)), {"limit": 0.4}),
    "clip by norm": Case(lambda max_norm: optim.chain(optim.clip_by_norm(max_norm), optim.sgd(0.3)), {"max_norm": 0.4}),
    "clip by global norm": Case(
        lambda max_norm: optim.chain(optim.clip_by_global_norm(max_norm), optim.sgd(0.3)), {"max_norm": 0.5}
    ),
    "scale": Case(optim.scale, {"factor": -0.2}),
    "weight decay": Case(lambda weight_decay: optim.chain(optim.add_weight_decay(weight_decay), optim.sgd(0.2)), DECAY),
    "masked": Case(
        lambda lr: optim.masked(optim.adam(lr, eps=0.02), lambda name: name == "w", otherwise=optim.sgd(0.1)),
        {"lr": 0.1},
    ),
}
"""By name: each optimizer with each option on its own and with others, and the transforms of gradients before SGD."""

MAIN = {name: case for name, case in CASES.items() if not name.endswith(" up")}
"""Without those that differ from another case by a sign only, for tests that take long."""

TORCH_CASES = {name: case for name, case in CASES.items() if case.namesake}

WHOLE = frozenset({"clip by global norm"})
"""The cases whose hyper-parameter is one for all parameters, so that it cannot be a tree."""


def start(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parameters: a vector whose last entry no loss sees, a matrix and a 0-d tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (4,), "m": (2, 3), "b": ()}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def loss(params: Mapping[str, Tensor], step: int) -> Tensor:
    """Smooth, with bounded gradients, another one at each step; w[3] is dead, so its gradient is exactly zero."""
    w, m, b = params["w"], params["m"], params["b"]
    mixed = torch.tanh(m @ w[:3] + b) + 0.3 * step
    return (mixed**2).sum() + torch.log1p(w[:3] ** 2).sum() + torch.cos(b + step)


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The gradient of the loss, with a graph, so that second derivatives are part of every test."""
    tracked = {name: leaf if leaf.requires_grad else leaf.requires_grad_() for name, leaf in params.items()}
    found = torch.autograd.grad(loss(tracked, step), list(tracked.values()), create_graph=True)
    return dict(zip(tracked, found, strict=True))


def run(transform: Transform, params: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """The parameters after some steps, attached to all that went in."""
    state = transform.init(params)
    for step in range(steps):
        updates, state = transform.update(gradients(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params


def outer(params: Mapping[str, Tensor]) -> Tensor:
    """A meta-loss that sees every entry, the dead one too."""
    return sum(((leaf - 0.1) ** 2).sum() + leaf.sin().sum() for leaf in params.values())  # type: ignore[return-value]
