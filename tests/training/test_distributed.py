"""Several processes under torchrun end where one does, whatever they share; and they end together."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import CASES, REFUSED, train
from filelock import FileLock

STEPS = 7
HERE = Path(__file__).parent

WRAPPED = f"""
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import funcmeta as fm

sys.path.insert(0, {str(HERE)!r})
from distributed_cases import CURVES, few_shot

WAYS = {{
    "reverse": {{}},
    "segments": {{"memory": fm.Segments(2)}},
    "revolve": {{"memory": fm.Revolve(1)}},
    "mixed mode": {{"estimator": fm.MixedMode()}},
    "first order": {{"estimator": fm.FirstOrder()}},
    "evolution strategies": {{"estimator": fm.EvolutionStrategies(0.01, 4)}},
    "loop": {{"strategy": "loop"}},
}}


class MetaLoss(nn.Module):
    def __init__(self, algorithm):
        super().__init__()
        self.algorithm, self.shape = algorithm, algorithm.init()
        self.leaves = nn.ParameterList(fm.tree.leaves(self.shape))

    def forward(self, tasks):
        return self.algorithm.loss(fm.tree.like(self.shape, self.leaves), tasks)


def trained(algorithm, rows, wrapper):
    module = MetaLoss(algorithm)
    wrapped = wrapper(module)
    outer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
    for index in range(3):
        tasks = CURVES.sample_batch(index, 4)
        outer.zero_grad()
        wrapped(fm.Task(*fm.tree.map(lambda leaf: leaf[rows], tasks[:2]))).backward()
        outer.step()
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in module.leaves]


torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
for options in WAYS.values():
    algorithm = few_shot(**options)
    alone = trained(algorithm, slice(None), lambda module: module)
    for wrapper in (
        DistributedDataParallel,
        lambda module: fully_shard(module, mesh=mesh),
        lambda module: fully_shard(module, mesh=mesh, reshard_after_forward=True),
    ):
        ours = trained(algorithm, slice(2 * rank, 2 * rank + 2), wrapper)
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)
"""

WORKER = f"""
import json, os, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, {str(HERE)!r})
from distributed_cases import here, momentum, train


def doomed(meta):
    '''An optimizer whose fifth step one process does not survive.'''
    optimizer = momentum(meta)
    steps = iter(range(5))
    kill = lambda *_: None if next(steps) < 4 else os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == dist.get_world_size() - 1:
        optimizer.register_step_post_hook(kill)
    return optimizer


torch.set_num_threads(1)
dist.init_process_group("gloo")
out = Path(sys.argv[2])
for number, job in enumerate(json.loads(sys.argv[1])):
    if job.pop("killed", False):
        job["optimizer"] = doomed
    if job.pop("apart", False):
        job["folder"] += str(dist.get_rank())
    left = job.pop("left", False) and dist.get_rank()
    found = {{}} if left else train(share=here(), **job)
    torch.save(found, out / f"{{number}}.{{dist.get_rank()}}.pt")
dist.destroy_process_group()
"""


@contextmanager
def begun(ranks: int, jobs: list[dict[str, Any]], out: Path, worker: str = WORKER) -> Iterator[subprocess.Popen[str]]:
    """A torchrun of so many processes, which do one job after the other."""
    out.mkdir(parents=True, exist_ok=True)
    script = out / "worker.py"
    script.write_text(worker, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, str(script), json.dumps(jobs), str(out)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | settings, **output) as process:
        try:
            yield process
        finally:
            process.terminate()


def results(ranks: int, jobs: dict[str, dict[str, Any]], out: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process got from each job."""
    paths = {name: [out / f"{number}.{rank}.pt" for rank in range(ranks)] for number, name in enumerate(jobs)}
    return {name: [torch.load(path) for path in some if path.exists()] for name, some in paths.items()}


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["learned"], expected["learned"], rtol=1e-9, atol=1e-9)
    steps = len(found["figures"])  # a process that took up the run of others knows its own steps only
    torch.testing.assert_close(found["figures"], expected["figures"][-steps:], rtol=1e-9, atol=1e-9, equal_nan=True)
    assert found["ended"] == expected["ended"]


@pytest.fixture(scope="module")
def expected() -> Any:
    """What one process gets."""
    known: dict[str, dict[str, Any]] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = train(name, STEPS)
        return known[name]

    return result


RESUMED = ("watched", "exact windows", "persistent particles", "reading")
FEW = ("reverse", "learned start", "evolution strategies", "particles of all tasks", "skipping one of two")
"""What four processes are asked for, beside those that are resumed."""
KILLED = "exact windows"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of pytest-xdist, so that not each of them starts the processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "said by four").exists():
            of_two(root)
            of_four(root)
    return root


def jobs_of_two(root: Path) -> dict[str, dict[str, Any]]:
    """All cases; the first steps of some, for others to go on; what is refused; a SIGTERM, and one that leaves."""
    jobs: dict[str, dict[str, Any]] = {name: {"name": name, "steps": STEPS} for name in {**CASES, **REFUSED}}
    for name in RESUMED:
        for number in ("one", "four"):
            folder = str(root / f"two for {number}" / name)
            jobs[f"{name}, for {number}"] = {"name": name, "steps": 4, "folder": folder}
        jobs[f"{name}, of one"] = {"name": name, "steps": STEPS, "folder": str(root / "one" / name)}
    jobs["odd"] = {"name": "reverse", "steps": 1, "batch_size": 3}
    jobs["apart"] = {"name": "reverse", "steps": 4, "folder": str(root / "one" / "process "), "apart": True}
    jobs["ended"] = {"name": "exact windows", "steps": 100_000, "folder": str(root / "ended")}
    jobs["left"] = {"name": "reverse", "steps": 4, "left": True}
    return jobs


def jobs_of_four(root: Path) -> dict[str, dict[str, Any]]:
    """Some cases, what two have begun, and a process that dies."""
    jobs: dict[str, dict[str, Any]] = {name: {"name": name, "steps": STEPS} for name in FEW}
    for name in RESUMED:
        jobs[f"{name}, of two"] = {"name": name, "steps": STEPS, "folder": str(root / "two for four" / name)}
    jobs["killed"] = {"name": KILLED, "steps": STEPS, "folder": str(root / "killed"), "killed": True}
    return jobs


def of_two(root: Path) -> None:
    for name in RESUMED:
        train(name, 4, folder=root / "one" / name)
    train("reverse", 4, folder=root / "one" / "process 0")
    log = root / "ended" / "log.jsonl"
    with begun(2, list(jobs_of_two(root).values()), root / "of two") as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.05)
        process.terminate()
        (root / "said by two").write_text(process.communicate(timeout=120)[0])


def of_four(root: Path) -> None:
    with begun(4, list(jobs_of_four(root).values()), root / "of four") as process:
        said, _ = process.communicate(timeout=300)
    (root / "said by four").write_text(f"{said}\nstatus {process.returncode}")


@pytest.fixture(scope="module")
def two(folders: Path) -> dict[str, list[dict[str, Any]]]:
    found = results(2, jobs_of_two(folders), folders / "of two")
    assert all(len(each) == 2 for each in found.values()), (folders / "said by two").read_text()
    return found


@pytest.fixture(scope="module")
def four(folders: Path) -> dict[str, list[dict[str, Any]]]:
    found = results(4, jobs_of_four(folders), folders / "of four")
    found.pop("killed")
    assert all(len(each) == 4 for each in found.values()), (folders / "said by four").read_text()
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_end_where_one_does(name: str, two: Any, expected: Any) -> None:
    first, second = two[name]
    alike(first, expected(name))
    assert all(torch.equal(leaf, second["learned"][path]) for path, leaf in first["learned"].items())


@pytest.mark.parametrize("name", FEW)
def test_four_processes_end_where_one_does(name: str, four: Any, expected: Any) -> None:
    alike(four[name][0], expected(name))


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_with_the_run_of_two(name: str, two: Any, folders: Path, expected: Any) -> None:
    alike(train(name, STEPS, folder=folders / "two for one" / name), expected(name))


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_with_the_run_of_one(name: str, two: Any, expected: Any) -> None:
    alike(two[f"{name}, of one"][0], expected(name))


@pytest.mark.parametrize("name", RESUMED)
def test_four_processes_go_on_with_the_run_of_two(name: str, four: Any, expected: Any) -> None:
    alike(four[f"{name}, of two"][0], expected(name))


def test_all_stop_where_one_process_has_no_finite_loss(two: Any) -> None:
    first, second = two["stopping"]
    assert first["error"].startswith("DivergenceError: Outer step 2: In process 1: The inner loss of step 0, task 1 is")
    assert first == second


def test_a_loss_of_nothing_that_is_learned_is_the_error_of_one_process(two: Any) -> None:
    alone = train("detached", STEPS)
    assert alone["error"].startswith("DetachedError: The loss of the algorithm depends on no leaf of meta")
    assert two["detached"] == [alone] * 2


@pytest.mark.parametrize(
    ("name", "spread", "shares", "wanted"),
    [
        ("parts of particles for parts of tasks", "tasks", "[(0, 2), (1, 2)]", "[(0, 1), (0, 1)]"),
        ("all particles for all tasks", "particles", "[(0, 1), (0, 1)]", "[(0, 2), (1, 2)]"),
    ],
)
def test_a_share_that_does_not_go_with_the_spread(name: str, spread: str, shares: str, wanted: str, two: Any) -> None:
    says = (
        f"ArgumentError: PersistentES has the shares {shares}, in the order of the ranks, where spread='{spread}' and "
        f"2 processes need {wanted}. "
    )
    assert [each["error"][: len(says)] for each in two[name]] == [says] * 2


def test_a_batch_that_the_processes_can_not_share(two: Any) -> None:
    says = "ArgumentError: batch_size is 3, which 2 processes cannot share evenly. Pass a multiple."
    assert two["odd"] == [{"error": says}] * 2


def test_processes_that_do_not_see_one_folder(two: Any) -> None:
    says = (
        "ArgumentError: The processes found the checkpoints of the steps [4, None], in the order of their ranks. Give"
    )
    assert [each["error"][: len(says)] for each in two["apart"]] == [says] * 2


def test_a_process_that_is_left_alone_says_so(two: Any) -> None:
    assert two["left"][0]["error"].startswith("LostProcessError: Process 0 of 2 cannot reach the others: ")
    assert two["left"][0]["error"].endswith("go on from the newest checkpoint with resume=True (--resume).")


def test_a_process_that_dies_ends_the_run(four: Any, folders: Path, expected: Any) -> None:
    """And the run goes on from its last checkpoint, in one process."""
    said, folder = (folders / "said by four").read_text(), folders / "killed"
    assert "status 0" not in said
    assert "Signal 9 (SIGKILL) received" in said.split("Root Cause")[1]
    assert "rank      : 3 (local_rank: 3)" in said.split("Root Cause")[1]
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] >= 4  # and no end
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000000.safetensors",
        "step-00000003.safetensors",
    ]
    alike(train(KILLED, STEPS, folder=folder), expected(KILLED))


def test_sigterm_ends_all_processes_after_one_step(two: Any, folders: Path) -> None:
    first, second = two["ended"]
    ended, step = first["ended"]
    assert ended == "SIGTERM"
    assert second["ended"] == first["ended"]
    last, end = map(json.loads, (folders / "ended" / "log.jsonl").read_text().splitlines()[-2:])
    assert (last["step"], end) == (step, {"ended": "SIGTERM"})
    assert (folders / "ended" / "checkpoints" / f"step-{step:08d}.safetensors").exists()
    assert not (folders / "ended" / "meta.safetensors").exists()


@pytest.mark.slow
def test_modules_wrapped_by_torch(tmp_path: Path) -> None:
    """``DistributedDataParallel`` and ``fully_shard``, where the whole unroll lies in the forward pass."""
    with begun(2, [], tmp_path, WRAPPED) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
