"""The folder of a run: checkpoints, a line for every step, and what was learned."""

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from funcmeta._check import check_choice, check_count
from funcmeta._errors import ArgumentError, DataError
from funcmeta.training import _tree_file
from funcmeta.training._evaluation import Mean


class Folder(NamedTuple):
    """Where a run is kept, and how it is taken up again.

    ``checkpoints/step-*.safetensors`` hold all that a run needs to go on, ``log.jsonl`` has a line for every step, and
    ``meta.safetensors`` is what was learned. Each file is there whole or not at all, but for
    the log, to which lines are added.

    Attributes:
        path: the folder; it is made.
        every: outer steps between two checkpoints; there is one at the end, too.
        keep: how many of the newest checkpoints are kept.
        resume: go on from the newest checkpoint, or begin when there is none; without it a folder with a run in it
            is refused.
        damaged: when the newest checkpoint can not be read: "raise", or go back to the "previous" one that can.

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


class Store:
    """The files of a folder."""

    def __init__(self, folder: Folder) -> None:
        check_count("every", folder.every, advice="Pass e.g. every=100.")
        check_count("keep", folder.keep, advice="Pass e.g. keep=2.")
        check_choice("damaged", folder.damaged, ("raise", "previous"))
        self._folder, self.path = folder, Path(folder.path)
        self._checkpoints, self._log = self.path / "checkpoints", self.path / "log.jsonl"

    def newest(self) -> Any | None:
        """The newest checkpoint, or None when the run begins here.

        Raises:
            ArgumentError: there is a run in the folder, which is not to be taken up.
            DataError: the checkpoint can not be read.
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
        found = read_log(self._log) if self._log.exists() else []
        records = [each for each in found if each is not None and each.step <= step]
        _tree_file.put(self._log, "".join(_line(each) for each in records).encode())
        return records

    def note(self, record: Record) -> None:
        """Add a line to the log."""
        _tree_file.append(self._log, _line(record).encode())

    def _found(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*.safetensors"), reverse=True)


def _line(record: Record) -> str:
    return json.dumps(record._asdict() | {"validation": record.validation and record.validation._asdict()}) + "\n"


def read_log(path: Path) -> list[Record | None]:
    """The record of each line of a log; None for a line that is none, as the half one that a killed process leaves.

    Raises:
        DataError: the file can not be read as text.
    """
    try:
        return [_record(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can not be read: {error}. Pass the folder of a run, with a whole log.jsonl."
        ) from error


def _record(line: str) -> Record | None:
    """The record of a line; None for what is none, as the half line that a killed process left."""
    try:
        found = json.loads(line)
        record = Record(**found | {"validation": found["validation"] and Mean(**found["validation"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = (record.rate, record.seconds, record.loss or 0, record.norm or 0, *(record.validation or ()))
    whole = type(record.step) is int and all(isinstance(each, int | float) for each in numbers)
    return record if whole and isinstance(record.alarm, str | None) else None


def finite(value: float) -> float | None:
    """The number, or None where it is none that JSON knows."""
    return value if math.isfinite(value) else None
