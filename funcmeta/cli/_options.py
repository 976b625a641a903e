"""The options of ``funcmeta compare``."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    data: str
    model: str | None
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
