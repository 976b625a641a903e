"""The most memory that a computation needs, in a process of its own: ``python peaks.py WORKLOAD NAME ...``.

The workload's file has a function ``alone(name, settings, steps) -> Run`` that prepares the computation.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from contest import Run, Settings
from machine import use_cores
from workloads import load

from funcmeta.testing import LiveBytes

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes the GNU C library give the memory of a tensor back as soon as it is free; else it keeps about as much again."""
WARM_UP = 2
"""How many steps are taken before, so that code and threads are there."""


class Peak(NamedTuple):
    """What a process of its own needed."""

    resident_bytes: int
    """The process's peak, above what it had before the computation."""
    live_bytes: int | None
    """The most bytes of tensors alive at once; None where it was not asked for, as it takes another run."""
    seconds: float
    """Of the single run in which the process's peak was measured."""


def peak_of(workload: str, name: str, settings: Settings, steps: int, *, live: bool = False) -> Peak | None:
    """Measure it; None where the platform does not tell a process's peak."""
    if not STATUS.exists():
        return None
    command = [sys.executable, __file__, workload, name, str(steps), f"--threads={torch.get_num_threads()}"]
    command += ["--quick"] * settings.quick + ["--live"] * live
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def live_peak(run: Run) -> int:
    """The most bytes of tensors that this computation keeps alive at once."""
    with LiveBytes() as live:
        run()
    return int(live.peak)


def _resident(which: str) -> int:
    """The process's memory now (VmRSS) or at most since the last reset (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def _measured(prepare: Run, run: Run, live: bool) -> Peak:
    prepare()
    gc.collect()
    before = _resident("VmRSS")
    REFERENCES.write_text("5")
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return Peak(_resident("VmHWM") - before, live_peak(run) if live else None, seconds)


def main() -> None:
    """Measure one computation of one workload, and print what it needed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("name")
    parser.add_argument("steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--live", action="store_true")
    options = parser.parse_args()
    use_cores(options.threads)
    settings, alone = Settings(quick=options.quick), load(options.workload).alone
    runs = (alone(options.name, settings, steps) for steps in (WARM_UP, options.steps))
    print(json.dumps(_measured(*runs, options.live)._asdict()))


if __name__ == "__main__":
    main()
