"""The progress bar: what it shows, where it begins, and that it is silent where nobody looks on."""

import io
import re
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_cases import adam, few_shot

import funcmeta as fm
from funcmeta.training import Folder, Mean, Record, fit, progress


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def last(self) -> str:
        """The last state that was drawn, without what moves the cursor and colours."""
        plain = re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())
        *_, start = re.finditer(r"\d+/\d+ ", plain)
        return " ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", " ", plain[start.start() :]).split())


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def record(step: int, loss: float | None = 1.0, **others: object) -> Record:
    return Record(step, loss, 2.5, 0.1, 0.01)._replace(**others)


def test_it_shows_what_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with progress(40) as watch:
        watch(Record(0, None, None, 0.1, 0.0, None, Mean(0.25, 0.125)))
        watch(record(1, 1.0))
        watch(record(2, 2.0))
    assert "2/40" in terminal.getvalue()
    assert re.search(r"[\d.e+]+ steps/s 0:00:00 elapsed 0:00:0\d left", terminal.last)
    assert "loss 1.1 norm 2.5 validation 0.250 ± 0.125" in terminal.last
    assert "alarm" not in terminal.getvalue()


def test_alarms_are_counted_and_leave_the_loss_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with progress(4) as watch:
        watch(record(1, 3.0))
        watch(record(2, None, norm=None, alarm="The meta-gradient is not finite.", alarms=1))
        while "1 alarm" not in terminal.getvalue():  # it is drawn four times a second
            time.sleep(0.05)
        watch(record(3, None, norm=None, alarm="The meta-gradient is not finite.", alarms=2))
    assert "loss 3 2 alarms" in terminal.last


def test_a_resumed_run_begins_where_it_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, case = opened(monkeypatch), few_shot()
    fit(case.algorithm, case.tasks, adam, steps=2, folder=Folder(tmp_path))
    with progress(5) as watch:
        fit(case.algorithm, case.tasks, adam, steps=5, folder=Folder(tmp_path, resume=True), watch=[watch])
    assert "5/5" in terminal.getvalue()
    assert "1/5" not in terminal.getvalue()


def test_speed_counts_only_what_was_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    with progress(2_000_000) as watch:
        watch(record(1_000_000))
        time.sleep(0.1)
        watch(record(1_000_001))
    speed = re.search(r"1000001/2000000 [━╸]+ ([\d.]+) steps/s", terminal.last)
    assert speed
    assert 0 < float(speed[1]) <= 10


def test_slow_steps_have_a_speed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = opened(monkeypatch), iter(range(0, 10**9, 7200))
    monkeypatch.setattr("rich.console.monotonic", lambda: float(next(clock)))  # hours at each look
    with progress(100) as watch:
        for step in range(1, 9):
            watch(record(step))
    assert re.search(r"8/100 [━╸]+ \d\S* steps/s", terminal.last)
    assert "-:--:-- left" not in terminal.last


@pytest.mark.parametrize("forced", [False, True])
def test_a_file_gets_the_last_state_only(forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
        if forced:
            monkeypatch.setenv(name, "1")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress(3) as watch:
        for step in range(1, 4):
            watch(record(step))
        assert file.getvalue() == ""
    assert len(file.getvalue().splitlines()) == 2
    assert "\x1b" not in file.getvalue()
    assert "3/3" in file.getvalue()


def test_of_several_processes_the_first_one_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    for rank in (1, 0):
        assert terminal.getvalue() == ""
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            with progress(3) as watch:
                watch(record(3))
        finally:
            dist.destroy_process_group()
    assert "3/3" in terminal.last


def test_an_error_in_the_block_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    error = fm.DivergenceError("stop")
    with pytest.raises(fm.DivergenceError, match="stop"), progress(3):
        raise error
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is there again


def test_steps_are_checked() -> None:
    with pytest.raises(fm.ArgumentError, match="steps is 0, expected a positive integer"), progress(0):
        pass


def test_rich_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.live", None)
    with (
        pytest.raises(fm.MissingExtraError, match=r'needs rich, which the extra demo brings.*"\.\[demo\]"'),
        progress(3),
    ):
        pass
