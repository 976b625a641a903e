"""The table of inner optimizers that examples are drawn from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcmeta import optim
from funcmeta.optim import Transform

Range = tuple[float, float]


class Family(NamedTuple):
    """An optimizer, the ranges of its hyper-parameters, and its options."""

    make: Callable[..., Transform]
    hypers: Mapping[str, Range]
    options: tuple[str, ...] = ()


def paired(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters as keyword arguments, beta1 and beta2 as the pair of betas."""
    plain = {name: value for name, value in hypers.items() if name not in ("beta1", "beta2")}
    return {**plain, "betas": (hypers["beta1"], hypers["beta2"])} if "beta1" in hypers else plain


def _scheduled(*, lr: Tensor, decay: Tensor) -> Transform:
    return optim.sgd(lambda step: lr / (1 + decay * step))


def _clipped(clip: Callable[[Tensor], Transform]) -> Callable[..., Transform]:
    def make(*, lr: Tensor, threshold: Tensor) -> Transform:
        return optim.chain(clip(threshold), optim.sgd(lr, momentum=0.5))

    return make


def _decayed(*, factor: Tensor, weight_decay: Tensor) -> Transform:
    return optim.chain(optim.add_weight_decay(weight_decay), optim.scale(-factor))


def _lion(*, lr: Tensor, beta: Tensor, weight_decay: Tensor, maximize: bool) -> Transform:
    """One beta for both: the second by itself would act from the second step on only, and be unreached before."""
    return optim.lion(lr, betas=(beta, beta), weight_decay=weight_decay, maximize=maximize)


def _masked(*, lr: Tensor) -> Transform:
    return optim.masked(optim.adam(lr), lambda name: name.endswith(("0", "a")), otherwise=optim.sgd(lr, momentum=0.5))


_LR: dict[str, Range] = {"lr": (0.01, 0.1)}
_DECAY: dict[str, Range] = {"weight_decay": (0.0, 0.05)}
_HEAVY: dict[str, Range] = {"momentum": (0.1, 0.8)}
_EPS: dict[str, Range] = {"eps": (1e-3, 0.5)}
_ADAM = {**_LR, "beta1": (0.5, 0.9), "beta2": (0.7, 0.99), **_EPS, **_DECAY}
_TIGHT: dict[str, Range] = {**_LR, "threshold": (0.05, 0.3)}
_LOOSE: dict[str, Range] = {**_LR, "threshold": (40.0, 60.0)}

# A maximum over time has a kink where two of its arguments are equal. While they are few, AMSGrad's averages grow when
# beta2 is near 1, and the newest gradient is Adamax's norm when beta2 is small.
FAMILIES: Mapping[str, Family] = {
    "sgd": Family(optim.sgd, _LR),
    "sgd momentum": Family(optim.sgd, {**_LR, **_HEAVY, **_DECAY}, ("nesterov", "maximize")),
    "sgd dampening": Family(optim.sgd, {**_LR, **_HEAVY, "dampening": (0.1, 0.9)}, ("maximize",)),
    "sgd schedule": Family(_scheduled, {**_LR, "decay": (0.0, 1.0)}),
    "adam": Family(optim.adam, _ADAM, ("maximize", "decoupled_weight_decay")),
    "adamw": Family(optim.adamw, _ADAM, ("maximize",)),
    "amsgrad": Family(optim.amsgrad, {**_ADAM, "beta2": (0.995, 0.999)}),
    "adamax": Family(optim.adamax, {**_ADAM, "beta2": (0.0, 0.05)}, ("maximize",)),
    "nadam": Family(optim.nadam, {**_ADAM, "momentum_decay": (0.0, 0.1)}, ("decoupled_weight_decay",)),
    "radam": Family(optim.radam, {**_ADAM, "beta2": (0.9, 0.99)}, ("decoupled_weight_decay",)),
    "rmsprop": Family(optim.rmsprop, {**_LR, "alpha": (0.7, 0.95), **_EPS, **_HEAVY}, ("centered", "maximize")),
    "adagrad": Family(
        optim.adagrad, {**_LR, "lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 1.0), **_EPS, **_DECAY}
    ),
    "adadelta": Family(optim.adadelta, {"lr": (0.1, 1.0), "rho": (0.5, 0.95), **_EPS, **_DECAY}),
    "lion": Family(_lion, {**_LR, "beta": (0.5, 0.9), **_DECAY}, ("maximize",)),
    "masked": Family(_masked, _LR),
    "scale and decay": Family(_decayed, {"factor": (0.01, 0.1), **_DECAY}),
    **{
        f"{clip.__name__} {word}": Family(_clipped(clip), hypers)
        for clip in (optim.clip_by_value, optim.clip_by_norm, optim.clip_by_global_norm)
        for word, hypers in (("tight", _TIGHT), ("loose", _LOOSE))
    },
}
