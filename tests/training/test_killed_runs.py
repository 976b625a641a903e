"""A run that is killed at any moment and resumed ends on the bytes of one that was not."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import KINDS, adam

from funcmeta import _files
from funcmeta.training import Folder, fit

STEPS, KILLS = 12, 20

Kill = Callable[[], None]


def train(kind: str, path: Path, kill: Kill = lambda: None, **options: Any) -> None:
    """The run of a kind, with a checkpoint after every step."""
    torch.set_num_threads(1)
    kill()
    case = KINDS[kind]()
    fit(case.algorithm, case.tasks, adam, steps=STEPS, folder=Folder(path, every=1, resume=True), **case.options)


def child(kind: str, path: Path, kill: Kill = lambda: None) -> Any:
    """The same in a process of its own, which has all modules already."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(kind, path, kill))
    process.start()
    return process


def learned(path: Path) -> bytes:
    return (path / "meta.safetensors").read_bytes()


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """What the run ends on when nothing happens to it, and how long it takes."""
    path = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    process = child(kind, path)
    process.join()
    assert process.exitcode == 0
    return learned(path), time.perf_counter() - began


def test_killed_at_random_moments(kind: str, whole: tuple[bytes, float], tmp_path: Path) -> None:
    expected, seconds = whole
    draw, kills, runs = random.Random(kind), 0, 0
    while kills < KILLS:
        path = tmp_path / str(runs)
        process = child(kind, path)
        process.join(draw.uniform(0.05, 0.8) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:  # the next run begins anew
            assert learned(path) == expected
            runs += 1
    process = child(kind, tmp_path / str(runs))
    process.join()
    assert learned(tmp_path / str(runs)) == expected


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_the_middle_of_a_write() -> None:
    write, left = _files.os.fsync, [4]

    def fsync(number: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.ftruncate(number, 100)
            _die()
        write(number)

    _files.os.fsync = fsync


def _before_the_file_takes_its_place() -> None:
    replace, left = _files.os.replace, [5]

    def dying(*paths: Any) -> None:
        left[0] -= 1
        if not left[0]:
            _die()
        replace(*paths)

    _files.os.replace = dying


def _after_the_file_took_its_place() -> None:
    replace, left = _files.os.replace, [5]

    def dying(*paths: Any) -> None:
        replace(*paths)
        left[0] -= 1
        if not left[0]:
            _die()

    _files.os.replace = dying


@pytest.mark.parametrize(
    "kill", [_in_the_middle_of_a_write, _before_the_file_takes_its_place, _after_the_file_took_its_place]
)
def test_killed_during_a_checkpoint(kind: str, whole: tuple[bytes, float], kill: Kill, tmp_path: Path) -> None:
    process = child(kind, tmp_path, kill)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "meta.safetensors").exists()
    process = child(kind, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert learned(tmp_path) == whole[0]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_half_written_line_of_the_log_is_dropped(kind: str, whole: tuple[bytes, float], tmp_path: Path) -> None:
    process = child(kind, tmp_path, _before_the_file_takes_its_place)
    process.join()
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 9, "lo')
    process = child(kind, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert [line for line in log.read_text().splitlines() if not line.endswith("}")] == []
    assert learned(tmp_path) == whole[0]
