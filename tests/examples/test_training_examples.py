"""The outer loop under Lightning, Accelerate and FSDP2 ends where a plain one does."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("extra", ["lightning", "accelerate"])
def test_the_loop_of_a_framework(extra: str, example: Load, tmp_path: Path) -> None:
    pytest.importorskip(extra, reason=f"needs the extra {extra}")
    example(f"training/with_{extra}.py").main(quick=True, out=tmp_path)
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert figures["difference"] <= 1e-12
    first, last = sum(figures["losses"][:20]), sum(figures["losses"][-20:])
    assert last < first
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_sharded_meta_parameters(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, str(EXAMPLES / "training" / "fsdp2.py")]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--quick", "--out", str(tmp_path)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert figures["difference"] <= 1e-12
    shard, whole = figures["rows"].values()
    for name in ("meta", "its gradient", "Adam"):
        assert shard[name] == pytest.approx(whole[name] / 2, rel=0.02)
    assert shard["gathered"] == whole["meta"]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
