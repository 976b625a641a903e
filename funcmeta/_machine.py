"""Where and with what figures are measured."""

import os
import platform
from typing import Any

import numpy
import torch


def machine() -> dict[str, Any]:
    """Processors, threads, load, system, and the versions that compute here."""
    return {
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
