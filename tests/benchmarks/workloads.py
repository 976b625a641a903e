"""The workloads by name: one file each, with a function ``measure(settings, machine) -> Result``."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

WORKLOADS = {path.stem[:2].upper(): path.stem for path in sorted(Path(__file__).parent.glob("w[0-9]_*.py"))}


def load(name: str) -> ModuleType:
    """The file of a workload."""
    return import_module(WORKLOADS[name])
