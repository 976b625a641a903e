"""Learned optimizers in files: weights as safetensors, the configuration as JSON beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from funcmeta._check import check_path
from funcmeta._errors import ArgumentError, DataError
from funcmeta._files import tensors_in, written
from funcmeta.learned._gates import gates
from funcmeta.learned._hierarchical import hierarchical
from funcmeta.learned._hyperparameters import _Hyperparameters
from funcmeta.learned._linear import linear
from funcmeta.learned._lstm import lstm
from funcmeta.learned._mlp import mlp
from funcmeta.learned._optimizer import LearnedOptimizer
from funcmeta.learned._rnnprop import rnnprop

VERSION = "1"

SMALL = 1000
"""An integer in a configuration that may be larger than the number of weights: no width or depth of it hurts."""

_KINDS: dict[str, Callable[..., LearnedOptimizer]] = {
    "linear": linear,
    "lstm": lstm,
    "rnnprop": rnnprop,
    "mlp": mlp,
    "gates": gates,
    "hierarchical": hierarchical,
    "hyperparameters": _Hyperparameters,
}


def save(optimizer: LearnedOptimizer, path: str | Path) -> None:
    """Write a learned optimizer to a file: its weights, and what it takes to make it again.

    The file is a safetensors file, whose metadata hold ``kind`` and ``config``. It appears whole or not at all.

    Args:
        optimizer: any learned optimizer; a class of your own needs a ``config`` that JSON can hold.
        path: where to write; an existing file is replaced.

    Raises:
        ArgumentError: ``optimizer`` is not a LearnedOptimizer, or its ``config`` cannot be written as JSON.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(linear(gradient=-0.5), f"{folder}/linear.safetensors")
        ...     load(f"{folder}/linear.safetensors")
        linear(gradient=-0.5, parameter=0.0)

    Source: the safetensors format (https://huggingface.co/docs/safetensors).
    """
    if not isinstance(optimizer, LearnedOptimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}, expected a LearnedOptimizer. Save other modules by "
            f"safetensors.torch.save_model."
        )
    try:
        config = json.dumps(optimizer.config)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"config of {type(optimizer).__name__} cannot be written as JSON: {error}. Keep numbers, strings, "
            f"booleans and lists of them in it."
        ) from error
    check_path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in optimizer.state_dict().items()}
    try:
        content = safetensors.torch.save(tensors, {"funcmeta": VERSION, "kind": optimizer.kind, "config": config})
    except RuntimeError as error:
        raise ArgumentError(
            f"{type(optimizer).__name__} has weights that safetensors does not write: "
            f"{str(error).strip().splitlines()[0]} Untie them."
        ) from error
    with written(path) as file:
        file.write(content)


def load(path: str | Path, *, make: Callable[..., LearnedOptimizer] | None = None) -> LearnedOptimizer:
    """Read a learned optimizer that ``save`` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        make: the class or function that makes optimizers of a kind of your own from their ``config``.

    Returns:
        The optimizer, with the dtype of the saved weights.

    Raises:
        DataError: the file is missing, truncated, not of this format or version, or its weights do not fit.
        ArgumentError: its kind is not one of this library, and ``make`` is not given.

    Examples:
        >>> load("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: nowhere.safetensors does not exist. Pass a file that learned.save wrote.

    Source: the safetensors format (https://huggingface.co/docs/safetensors).
    """
    path = check_path(path)
    about, tensors = tensors_in(path, advice="Pass a file that learned.save wrote.")
    if about.get("funcmeta") != VERSION:
        raise DataError(
            f"{path} is a safetensors file whose metadata have 'funcmeta': {about.get('funcmeta', '')[:20] or None!r}, "
            f"expected 'funcmeta': '{VERSION}'. Pass a file that learned.save of this version wrote."
        )
    if make is None:
        _check_fit(path, _made(path, about, tensors, None, "meta"), tensors)  # a small file allocates nothing large
    optimizer = _made(path, about, tensors, make, "cpu")
    _check_fit(path, optimizer, tensors)
    return _with_weights(path, optimizer, tensors)


def _made(
    path: Path,
    about: dict[str, str],
    tensors: dict[str, Any],
    make: Callable[..., LearnedOptimizer] | None,
    device: str,
) -> LearnedOptimizer:
    kind = about.get("kind", "")
    maker = make or _KINDS.get(kind)
    if maker is None:
        raise ArgumentError(
            f"{path} holds an optimizer of kind {kind!r}, expected one of {sorted(_KINDS)}. Pass make=, the class or "
            f"function that makes it from its config."
        )
    try:
        config = json.loads(about.get("config", ""))
        most = max(SMALL, sum(tensor.numel() for tensor in tensors.values()))
        for name, value in config.items():
            if isinstance(value, int) and value > most and make is None:  # a width, or a number of layers
                raise ValueError(f"{name} is {value}, expected at most {most} for so few weights")
        with torch.random.fork_rng(devices=[]), torch.device(device):  # the initial weights are replaced
            return maker(**config)
    except (TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OverflowError) as error:
        raise DataError(
            f"{path} has a config from which no {kind!r} can be made: {error}. The file is damaged or was written by "
            f"other code."
        ) from error


def _check_fit(path: Path, optimizer: LearnedOptimizer, tensors: dict[str, Any]) -> None:
    own = optimizer.state_dict()
    fits = own.keys() == tensors.keys() and all(
        tensors[name].shape == tensor.shape and tensors[name].dtype.is_floating_point == tensor.is_floating_point()
        for name, tensor in own.items()
    )
    if not fits or len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise DataError(
            f"{path} has weights {_shapes(tensors)}, expected {_shapes(own)}. The file is damaged or was written by "
            f"other code."
        )


def _with_weights(path: Path, optimizer: LearnedOptimizer, tensors: dict[str, Any]) -> LearnedOptimizer:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise DataError(f"{path} has weights that are NaN or infinite. Meta-training diverged before it was written.")
    optimizer.load_state_dict(tensors, assign=True)
    for parameter in optimizer.parameters():
        parameter.requires_grad_()
    return optimizer


def _shapes(tensors: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for name, each in sorted(tensors.items())
    }
