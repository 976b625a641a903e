"""The options of ``funcmeta compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funcmeta._errors import ArgumentError

_IMAGES = {"ways": 5, "size": 16, "filters": 32}
"""Options that not every data or model reads, and what they are if nobody says."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    data: str
    model: str
    estimators: str
    ways: int
    shots: int
    queries: int
    steps: int
    lr: float
    meta_lr: float
    tasks: int
    iterations: int
    test_tasks: int
    size: int
    filters: int
    dtype: str
    seed: int
    threads: int
    out: Path


def options(given: dict[str, Any]) -> Options:
    """What is given; None stands for the default.

    Raises:
        ArgumentError: an option is given that the data or the model do not read.
    """
    points = given["data"] == "sinusoids"
    model = given["model"] or ("mlp" if points else "conv4")
    for name in _IMAGES:
        reader = model if name == "filters" else given["data"]
        if given[name] is not None and reader in ("sinusoids", "mlp"):
            raise ArgumentError(f"{name} is {given[name]}, which {reader} does not read. Leave --{name} out.")
    defaults = {**_IMAGES, "model": model, "lr": 0.01 if points else 0.1}
    known: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return Options(**known)
