"""A run on one page for the browser."""

import json
import math
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmeta._errors import DataError
from funcmeta._machine import machine
from funcmeta.training import _curves, _page, _tree_file
from funcmeta.training._evaluation import Evaluation, Mean
from funcmeta.training._folder import Log, Record, read_log

SHOWN = 10
"""Of a long table so many of the first and of the last rows are shown."""

Row = tuple[str, ...]


def report(folder: str | Path) -> Path:
    """Write ``report.html``, a page for the browser with everything that the folder of a run knows.

    It has the result, how the run ended, the alarms, curves over the outer steps, the settings if there is a
    ``config.toml``, the scores of held-out tasks if there is an ``evaluation.json``, and the machine on which it is
    written. The page is one file: it asks for nothing from elsewhere and runs no script. A run that is not at its end
    can be reported on, too.

    Args:
        folder: the folder of a run, as given to ``Folder``.

    Returns:
        The path of the page.

    Raises:
        DataError: the folder has no log, or one of its files is damaged.
        MissingExtraError: matplotlib is not installed.
        SaveError: the system does not take the file.

    Examples:
        >>> report("nowhere")
        Traceback (most recent call last):
        ...
        funcmeta._errors.DataError: nowhere has no log.jsonl. Pass the folder of a run.

    Source: this library.
    """
    folder = Path(folder)
    records, ended = _log(folder)
    config, judged = _config(folder / "config.toml"), _judged(folder / "evaluation.json")
    best = next((each for each in reversed(records) if each.best), None)
    steps = config["steps"] if type(config.get("steps")) is int else records[-1].step
    name = _name(config) or folder.name
    written = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    parts = [
        _tiles(records, steps, best, judged),
        *_alarms(records),
        _page.section("Training", _page.columns(_charts(records, best))),
        *([] if judged is None else [_tasks(judged, judged.step != records[-1].step)]),
        *([] if not config else [_page.section("Settings", _page.pairs(_texts(config)))]),
        _page.section("Machine", _page.paragraph("Where this page was written."), _page.pairs(_texts(machine()))),
    ]
    path = folder / "report.html"
    content = _page.page(name, f"{_ending(records[-1].step, steps, ended)} Folder {folder}, written {written}.", parts)
    _tree_file.put(path, content.encode(errors="replace"))
    return path


class _Judged(NamedTuple):
    """What ``evaluation.json`` says."""

    part: str
    score: str
    higher_is_better: bool
    step: int
    difference: Mean
    found: Evaluation
    before: Evaluation

    @property
    def kind(self) -> str:
        """Whether it is "good", "bad" or neither, as far as the interval of the difference tells."""
        gain = self.difference.value if self.higher_is_better else -self.difference.value
        return "good" if gain > self.difference.margin else "bad" if -gain > self.difference.margin else ""


def _log(folder: Path) -> Log:
    path = folder / "log.jsonl"
    if not path.exists():
        raise DataError(f"{folder} has no log.jsonl. Pass the folder of a run.")
    log = read_log(path)
    if not log.records:
        raise DataError(f"{path} has no step yet. Report on the run when it has taken one.")
    return log


def _ending(step: int, steps: int, ended: str | None) -> str:
    """How a run ended that is at a step and was to take so many."""
    at = f"step {step} of {steps}" if step < steps else f"step {step}"
    if ended is None or (ended == "steps" and step < steps):
        return f"At {at}, without an end in its log: the run goes on, failed, or was killed."
    if ended == "steps":
        return f"Ended at {at}, the last one."
    if ended == "patience":
        return f"Ended at {at}, as validation got no better."
    return f"Stopped at {at} by {'an alarm' if ended == 'alarm' else ended}."


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as TOML: {error}. Restore it, or remove it.") from error


def _judged(path: Path) -> _Judged | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        first, difference, higher = found["at_first"], found["difference"], found["higher_is_better"]
        if not isinstance(higher, bool):
            raise TypeError(f"higher_is_better is {higher!r}")
        scores, earlier = _scores(found["scores"]), _scores(found.get("scores_at_first", []))
        if len(earlier) not in (0, len(scores)):
            raise ValueError(f"scores_at_first are {len(earlier)}, but scores {len(scores)}")
        return _Judged(
            str(found["split"]),
            str(found["score"]),
            higher,
            int(found["step"]),
            Mean(float(difference["value"]), float(difference["margin"])),
            Evaluation(scores, Mean(float(found["mean"]), float(found["margin"]))),
            Evaluation(earlier, Mean(float(first["value"]), float(first["margin"]))),
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path} is not what funcmeta evaluate writes: {type(error).__name__}: {error}. Run it again, or remove "
            f"the file."
        ) from error


def _scores(found: Any) -> Tensor:
    return torch.tensor([float(each) for each in found], dtype=torch.float64)


def _tiles(records: Sequence[Record], steps: int, best: Record | None, judged: _Judged | None) -> str:
    alarms, step = sum(each.alarm is not None for each in records), records[-1].step
    losses = [each.loss for each in records if each.loss is not None]
    entries = [
        ("outer steps", f"{step} of {steps}" if step < steps else f"{step}", ""),
        ("time in outer steps", _duration(sum(each.seconds for each in records)), ""),
    ]
    if losses:
        over = _curves.median_over(len(losses))
        entries.append((f"median loss, last {min(over, len(losses))} steps", f"{_median(losses[-over:]):.4g}", ""))
    if best is not None:
        entries.append((f"best validation, step {best.step}", f"{best.validation}", "good"))
    entries.append(("steps left out", f"{alarms}" if alarms else "none", "bad" if alarms else ""))
    if judged is not None and judged.step == step:
        entries.append((f"{judged.score}, {judged.part} tasks", f"{judged.found.mean}", judged.kind))
    return _page.tiles(entries)


def _alarms(records: Sequence[Record]) -> list[str]:
    found: list[Row] = [(str(each.step), each.alarm) for each in records if each.alarm]
    if not found:
        return []
    first, last, left_out = _ends(found)
    text = _page.paragraph(f"{len(found)} step{'s were' if len(found) > 1 else ' was'} left out.{left_out}")
    parts = [("The first alarms" if last else "All alarms", first), ("The last alarms", last)]
    return [
        _page.section("Alarms", text, *(_page.table(name, ("step#", "reason"), part) for name, part in parts if part))
    ]


def _charts(records: Sequence[Record], best: Record | None) -> list[str]:
    stepped = [each for each in records if each.step]
    steps = [each.step for each in stepped]
    over = _curves.median_over(len(steps))
    noisy = f"Each step, and the median over {over} steps." if len(steps) > 2 else "Each step."
    marked = f"{noisy} Triangles: steps left out." if any(each.alarm for each in records) else noisy
    found = []
    if stepped:
        loss = _curves.curve("loss", "Loss over the outer steps", steps, [each.loss for each in stepped])
        norm = _curves.curve("norm", "Norm of the meta-gradient", steps, [each.norm for each in stepped], log=True)
        rate = _curves.plain("rate", "Learning rate", steps, [each.rate for each in stepped])
        seconds = _curves.curve("seconds", "Seconds a step", steps, [each.seconds for each in stepped])
        _curves.mark_alarms(loss, stepped)
        found = [
            _page.chart("Loss", marked, loss.svg()),
            _page.chart("Norm of the meta-gradient", f"Before clipping. {noisy}", norm.svg()),
            _page.chart("Learning rate", "Of the outer optimizer's first group.", rate.svg()),
            _page.chart("Seconds per step", f"Without validations. {noisy}", seconds.svg()),
        ]
    known = [each for each in records if each.validation]
    if known:
        place = None if best is None else known.index(best)
        panel = _curves.means(
            "validation",
            "Validation over the outer steps",
            [each.step for each in known],
            [each.validation for each in known if each.validation],
            place,
        )
        text = "Mean on held-out tasks with its 95 % interval. Ring: the best."
        found.insert(1, _page.chart("Validation", text, panel.svg()))
    return found


def _tasks(judged: _Judged, stale: bool) -> str:
    sign, found, before = -1 if judged.higher_is_better else 1, judged.found, judged.before
    order = sorted(enumerate(found.scores.tolist()), key=lambda each: (math.isnan(each[1]), sign * each[1]))
    rows = [(str(place), str(task), f"{score:.4g}") for place, (task, score) in enumerate(order, 1)]
    first, last, left_out = _ends(rows)
    parts = [("The best tasks" if last else "All tasks", first), ("The worst tasks", last)]
    summary = _page.table(
        "Means with their 95 % intervals, medians with their quartiles",
        ("meta", f"{judged.score}#"),
        [
            ("learned", f"{found.mean}"),
            ("at first", f"{before.mean}"),
            ("difference, task by task", f"{judged.difference:+}"),
            ("learned, median", _spread(found, judged.higher_is_better)),
            ("at first, median", _spread(before, judged.higher_is_better)),
        ],
    )
    picture, outside = _curves.histogram("scores", "Scores of the tasks", found, before.mean)
    text = f"{judged.score} of {len(rows)} tasks. Line: the mean; dashed: the mean at first.{outside}"
    note = "The run went on after this was written: run funcmeta evaluate again when it is at its end."
    worse = "?" if len(before.scores) == 0 else found.worse(before, higher_is_better=judged.higher_is_better)
    return _page.section(
        f"Held-out tasks, {judged.part}",
        *([_page.paragraph(note)] if stale else []),
        _page.columns([_page.chart("Scores", text, picture.svg()), summary]),
        _page.paragraph(
            f"The tasks from the best to the worst. Worse than at first: {worse} of {len(rows)}.{left_out}"
        ),
        _page.columns(_page.table(name, ("place#", "task#", f"{judged.score}#"), part) for name, part in parts if part),
    )


def _spread(evaluation: Evaluation, higher_is_better: bool) -> str:
    if len(evaluation.scores) == 0:  # earlier versions did not write all of them
        return "?"
    low, median, high = evaluation.quartiles(higher_is_better=higher_is_better)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _ends(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row], str]:
    """The first and the last rows, and how many are neither, in words; all are the first if they are few."""
    hidden = len(rows) - 2 * SHOWN
    if hidden <= 0:
        return rows, [], ""
    return rows[:SHOWN], rows[-SHOWN:], f" The first and the last {SHOWN} are shown, {hidden} are not."


def _name(config: dict[str, Any]) -> str:
    """What was trained on what, without the path of the data; nothing if the settings do not say."""
    algorithm, tasks = config.get("algorithm"), config.get("tasks")
    return f"{algorithm} on {str(tasks).partition(':')[0]}" if algorithm and tasks else ""


def _texts(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, f"{value:.2f}" if name == "load" and value is not None else str(value)) for name, value in found.items()
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
