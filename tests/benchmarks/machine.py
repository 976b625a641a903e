"""The machine: its name, how fast it multiplies and copies, and what a computation asks of it."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contest import Floor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ("torch", "jax", "torchopt", "higher")


def use_cores(count: int) -> None:
    """Give the process so many cores, and torch as many threads; before JAX is imported, which counts them then."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def describe() -> dict[str, Any]:
    """The machine in words and numbers, without its name."""
    size, threads = 1024, torch.get_num_threads()
    left, right = torch.randn(2, size, size)
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    return {
        "processor": f"{threads} {'core' if threads == 1 else 'cores'} of an {_model()}",
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "operations_per_second": 2 * size**3 / _seconds(lambda: left @ right),
        "bytes_per_second": 2 * 4 * source.numel() / _seconds(lambda: target.copy_(source)),
    }


def floor(run: Callable[[], Any], machine: Mapping[str, Any]) -> Floor:
    """What a computation in torch asks of the machine: the operations of its matrix products and convolutions, and
    the bytes that its kernels read and write. A compiler that fuses kernels needs fewer bytes, not fewer operations.
    """
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        run()
    operations = flops.get_total_flops()
    return Floor(
        operations,
        traffic.bytes,
        operations / machine["operations_per_second"],
        traffic.bytes / machine["bytes_per_second"],
    )


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that kernels read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in tensors)
        return result


def _seconds(run: Callable[[], Any], repetitions: int = 9) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _model() -> str:
    """The processor's model and clock, where the platform tells them."""
    known = Path("/proc/cpuinfo")
    if not known.exists():
        return platform.processor() or platform.machine()
    pairs = dict(line.split(":", 1) for line in known.read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs.items()}
    name = fields.get("model name", platform.machine()).replace("(R)", "")
    return f"{name} at {float(fields['cpu MHz']) / 1000:.1f} GHz" if "cpu MHz" in fields else name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
