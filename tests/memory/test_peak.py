"""Memory as it is measured: bytes of tensors, the resident size of a process, and where stored states wait."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from memory_cases import Setting, close, gradient, setting, wanted

import funcmeta as fm
from funcmeta.memory import _follow
from funcmeta.testing import LiveBytes


def peak(case: Setting, steps: int, memory: Any) -> int:
    with LiveBytes() as live:
        torch.autograd.grad(fm.unroll(*case, steps=steps, memory=memory).loss, wanted(case.meta))
    return live.peak


def test_the_peak_of_each_policy_grows_as_its_plan_says() -> None:
    case = setting("adam")
    support = tuple(leaf.repeat(40, 1) for leaf in case.task.support)
    case = case._replace(task=fm.Task(support, support))
    few, many = (
        {str(each): peak(case, steps, each) for each in (fm.StoreAll(), fm.Segments(10), fm.Segments(), fm.Revolve(5))}
        for steps in (25, 100)
    )
    grown = {name: many[name] / few[name] for name in few}
    assert grown["StoreAll()"] > 3.5
    assert grown["Segments(length=10)"] < 1.2  # states are small beside the graph of a segment
    assert 1.5 < grown["Segments(length=None)"] < 2.5
    assert grown["Revolve(snapshots=5)"] < 1.1
    assert many["Revolve(snapshots=5)"] < many["Segments(length=None)"] / 3 < many["StoreAll()"] / 15


SCRIPT = """
import json, resource, sys
import torch
import torch.nn.functional as F
from torch import nn
import funcmeta as fm

torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
problem = fm.inner_problem(
    net,
    lambda meta, predict, batch: F.cross_entropy(predict(batch[0]), batch[1]),
    optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["momentum"]),
)
meta = {"params": fm.init_params(net), "lr": torch.tensor(0.05), "momentum": torch.tensor(0.9)}
meta = fm.tree.map(lambda leaf: leaf.detach().requires_grad_(), meta)
batch = torch.randn(128, 784), torch.randint(10, (128,))
task, sizes = fm.Task(batch, batch), []
memory = eval(sys.argv[1])
for steps in (4, int(sys.argv[2])):
    fm.unroll(problem, meta, task, steps=steps, memory=memory).loss.backward()
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(sizes[1] - sizes[0]))
"""


def resident(memory: str, steps: int) -> int:
    """How far the resident size of a process rises above that of four steps, in the workload W4."""
    command = [sys.executable, "-c", SCRIPT, memory, str(steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc leaves holes up to twice as large
    return int(json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))


@pytest.mark.slow
def test_the_resident_size_of_a_process() -> None:
    everything = resident("fm.StoreAll()", 300)
    assert everything > 400e6
    assert resident("fm.Segments()", 300) < everything / 6
    assert resident("fm.Revolve(12)", 300) < everything / 15
    assert resident("fm.budget(100_000_000)", 300) < 110e6


# ---- Offload


@pytest.mark.parametrize("memory", [fm.Segments(2), fm.Revolve(3)], ids=repr)
def test_offload_moves_each_stored_state_but_the_first(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str | None] = []

    def counted(leaf: Any, device: Any) -> Any:
        moves.append(device if isinstance(device, str) else None)
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    monkeypatch.setattr(_follow, "_moved", counted)
    out = fm.unroll(*setting(), steps=12, memory=fm.Offload(memory, device="cpu"))
    out.loss.backward()
    assert out.info.memory is not None
    actions = out.info.memory.actions
    stored = sum(isinstance(each, fm.memory.Store) and each.step > 0 for each in actions)
    restored = sum(isinstance(each, fm.memory.Restore) for each in actions)
    leaves = len(fm.tree.leaves(out.state))
    assert moves.count("cpu") == leaves * stored > 0  # the name that was given
    assert len(moves) - moves.count("cpu") == leaves * restored  # devices, on the way back


def test_offloaded_gradients_are_the_same_to_the_bit() -> None:
    for kind in ("batch norm", "adam"):
        case = setting(kind)
        ours, theirs = (gradient(case, each) for each in (fm.Offload(fm.Revolve(2)), fm.Revolve(2)))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_from_a_gpu() -> None:
    case = setting("batch norm")
    meta, data = fm.tree.map(lambda leaf: leaf.detach().cuda().requires_grad_(), case.meta), case.task[:2]
    case = case._replace(meta=meta, task=fm.Task(*fm.tree.map(lambda leaf: leaf.cuda(), data)))
    close(gradient(case, fm.Offload(fm.Segments(2))), gradient(case, fm.StoreAll()))
    out = fm.unroll(*case, steps=6, memory=fm.Offload(fm.Segments(2)))
    assert all(leaf.is_cuda for leaf in fm.tree.leaves(out.state))
