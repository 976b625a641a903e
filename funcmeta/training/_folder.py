"""The folder of a run: checkpoints, a line for every step, and what was learned."""

import json
import math
import signal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from funcmeta._check import check_choice, check_count, check_flag
from funcmeta._errors import ArgumentError, DataError
from funcmeta.training import _tree_file
from funcmeta.training._evaluation import Mean

ENDS = ("steps", "patience", "alarm")
"""How a run ends, but for the names of signals."""

COUNTED = 2**53
"""Steps, alarms and seconds are fewer: the integers that a float64 counts."""


class Folder(NamedTuple):
    """Where a run is kept, and how it is taken up again.

    ``checkpoints/step-*.safetensors`` hold all that a run needs to go on, ``log.jsonl`` has a line for every step and
    one for how the run ended, and ``meta.safetensors`` is what was learned. Each file is there whole or not at all, but
    for the log, to which lines are added.

    Attributes:
        path: the folder; it is made.
        every: outer steps between two checkpoints; there is one at the end, too.
        keep: how many of the newest checkpoints are kept.
        resume: go on from the newest checkpoint, or begin when there is none; without it a folder with a run in it
            is refused.
        damaged: when the newest checkpoint cannot be read: "raise", or go back to the "previous" one that can.

    Examples:
        >>> Folder("runs/maml", every=500).keep
        2

    Source: this library.
    """

    path: str | Path
    every: int = 100
    keep: int = 2
    resume: bool = False
    damaged: Literal["raise", "previous"] = "raise"


class Record(NamedTuple):
    """What was met in one outer step.

    Attributes:
        step: outer steps taken, from 0, where only a validation is noted.
        loss: mean meta-loss of the step's batches; None where it was not finite.
        norm: norm of the meta-gradient before it was clipped; None where it was not finite.
        rate: learning rate of the outer optimizer's first group.
        seconds: time that the step took.
        alarm: why the step was left out, or None.
        validation: the ``Mean`` on held-out tasks after the step, or None.
        best: whether that is the best so far.
        alarms: steps that were left out so far, this one included.

    Examples:
        >>> Record(1, 0.7, 2.0, 0.001, 0.1).alarm is None
        True

    Source: this library.
    """

    step: int
    loss: float | None
    norm: float | None
    rate: float
    seconds: float
    alarm: str | None = None
    validation: Mean | None = None
    best: bool = False
    alarms: int = 0


class Log(NamedTuple):
    """What a log says: the steps, and how the run ended, or None while it runs and after it was killed."""

    records: list[Record]
    ended: str | None


class Store:
    """The files of a folder."""

    def __init__(self, folder: Folder) -> None:
        check_count("every", folder.every, advice="Pass e.g. every=100.")
        check_count("keep", folder.keep, advice="Pass e.g. keep=2.")
        check_flag("resume", folder.resume)
        check_choice("damaged", folder.damaged, ("raise", "previous"))
        self._folder, self.path = folder, Path(folder.path)
        self._checkpoints, self._log = self.path / "checkpoints", self.path / "log.jsonl"

    def newest(self) -> Any | None:
        """The newest checkpoint, or None when the run begins here.

        Raises:
            ArgumentError: there is a run in the folder, which is not to be taken up.
            DataError: the checkpoint cannot be read.
        """
        found = self._found()
        if not self._folder.resume:
            if found or self._log.exists():
                raise ArgumentError(
                    f"{self.path} has a run in it. Pass resume=True (--resume) to go on with it, or another folder."
                )
            return None
        for place, path in enumerate(found):
            try:
                return _tree_file.read(path, "checkpoint")
            except DataError as error:
                if self._folder.damaged == "raise" or place + 1 == len(found):
                    older = f" {found[place + 1].name} is older: pass damaged='previous'." if found[place + 1 :] else ""
                    raise DataError(f"{error}{older}") from error
        return None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return step % self._folder.every == 0

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint and remove those that are too many."""
        _tree_file.write(self._checkpoints / f"step-{step:08d}.safetensors", "checkpoint", tree)
        half = list(self._checkpoints.glob(".step-*"))  # what a killed process left
        with _tree_file.reported(self._checkpoints):
            for path in [*half, *self._found()[self._folder.keep :]]:
                path.unlink(missing_ok=True)

    def finish(self, meta: Any) -> None:
        """Write what was learned."""
        _tree_file.write(self.path / "meta.safetensors", "meta", meta)

    def begin_log(self, step: int) -> list[Record]:
        """Keep the lines up to a step, as records; what a killed process noted after it is dropped."""
        found = read_log(self._log).records if self._log.exists() else []
        records = [each for each in found if each.step <= step]
        _tree_file.put(self._log, "".join(_line(each) for each in records).encode())
        return records

    def note(self, record: Record) -> None:
        """Add a line to the log."""
        _tree_file.append(self._log, _line(record).encode())

    def end(self, ended: str) -> None:
        """Add the last line to the log: how the run ended."""
        _tree_file.append(self._log, f"{json.dumps({'ended': ended})}\n".encode())

    def _found(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*.safetensors"), reverse=True)


def _line(record: Record) -> str:
    return json.dumps(record._asdict() | {"validation": record.validation and record.validation._asdict()}) + "\n"


def read_log(path: Path) -> Log:
    """What a log says. Half a line at its end, which a killed process left, is dropped.

    Raises:
        DataError: the file cannot be read as text, or a line of it is none that ``Store`` writes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Pass the folder of a run, with a whole log.jsonl.") from error
    log, lines = Log([], None), text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        try:
            log = _with_line(log, json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise DataError(
                f"Line {number} of {path} is no record of a step: {error}. The file is damaged: restore it, or remove "
                f"the line."
            ) from error
    return log


def _with_line(log: Log, found: Any) -> Log:
    """The log with one more line, if it is one that can come next."""
    if not isinstance(found, dict):
        raise TypeError(f"it is a {type(found).__name__}")
    if log.ended is not None:
        raise ValueError("the run ended before")
    if found.keys() == {"ended"} and (found["ended"] in ENDS or found["ended"] in signal.Signals.__members__):
        return log._replace(ended=found["ended"])
    record = Record(**found)
    if record.validation is not None:
        record = record._replace(validation=Mean(**found["validation"]))
    last = log.records[-1].step if log.records else -1
    good = {
        "step": type(record.step) is int and last < record.step < COUNTED,
        "loss": record.loss is None or _is_finite(record.loss),
        "norm": record.norm is None or _is_finite(record.norm),
        "rate": type(record.rate) is float,
        "seconds": _is_finite(record.seconds) and 0 <= record.seconds < COUNTED,
        "alarm": isinstance(record.alarm, str | None),
        "validation": record.validation is None
        or (_is_finite(record.validation.value) and type(record.validation.margin) is float),
        "best": type(record.best) is bool and not (record.best and record.validation is None),
        "alarms": type(record.alarms) is int and 0 <= record.alarms < COUNTED,
    }
    for name, value in record._asdict().items():
        if not good[name]:
            after = f" after {last}" if name == "step" and log.records else ""
            raise ValueError(f"its {name} is {value!r:.40}{after}")
    log.records.append(record)
    return log


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def finite(value: float) -> float | None:
    """The number, or None where it is none that JSON knows."""
    return value if math.isfinite(value) else None
