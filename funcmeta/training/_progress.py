"""A bar in the terminal that follows a training."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from funcmeta._check import check_count
from funcmeta._errors import MissingExtraError
from funcmeta.training._evaluation import Mean
from funcmeta.training._fit import Watch
from funcmeta.training._folder import Record
from funcmeta.training._ranks import Ranks

KEPT = 0.9
"""The part of the smoothed loss that a step leaves as it is."""


@contextmanager
def progress(steps: int) -> Iterator[Watch]:
    """A progress bar on stderr while the block runs.

    It shows the loss (ℓ ← 0.9 · ℓ + 0.1 · loss, without steps that were left out), the norm of the last meta-gradient,
    the last validation, the number of steps that were left out if there are any, steps per second, and time. A resumed
    run begins where it is taken up.
    What is no terminal gets the last state only, when the block ends. Of several processes the first one draws.

    Args:
        steps: outer steps in all, as for ``fit``.

    Returns:
        A context with the function for ``fit(..., watch=[...])``.

    Raises:
        ArgumentError: ``steps`` is no positive integer.
        MissingExtraError: rich is not installed.

    Examples:
        >>> with progress(200) as watch:
        ...     watch(Record(1, 0.7, 2.0, 0.001, 0.1))

    Source: this library.
    """
    check_count("steps", steps, advice="Pass e.g. steps=1000.")
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.text import Text
    except ImportError as error:
        raise MissingExtraError(
            'The progress bar needs rich, which the extra demo brings. Run pip install ".[demo]" in a checkout.'
        ) from error
    if Ranks.here().rank:
        yield lambda record: None
        return
    console, text = Console(stderr=True, force_terminal=sys.stderr.isatty()), TextColumn  # whatever FORCE_COLOR says
    columns = (MofNCompleteColumn(), BarColumn(None), text("{task.fields[rate]}"), TimeElapsedColumn(), text("elapsed"))
    period = math.inf  # steps may take longer than the 30 seconds that rich looks back otherwise
    bar = Progress(*columns, Remaining(), text("left"), console=console, expand=True, speed_estimate_period=period)
    task = bar.add_task("", total=steps, rate="")
    loss: float | None = None
    validation: Mean | None = None

    with Live(bar, console=console, refresh_per_second=4) as live:

        def watch(record: Record) -> None:
            nonlocal loss, validation
            if record.loss is not None and record.alarm is None:
                loss = record.loss if loss is None else KEPT * loss + (1 - KEPT) * record.loss
            validation = record.validation or validation
            bar.update(task, completed=record.step)
            speed = bar.tasks[task].speed
            bar.update(task, rate="" if speed is None else f"{speed:.3g} steps/s")
            shown = [
                *([] if loss is None else [f"loss {loss:.4g}"]),
                *([] if record.norm is None else [f"norm {record.norm:.3g}"]),
                *([] if validation is None else [f"validation {validation}"]),
            ]
            line = Text("   ".join(shown))
            if record.alarms:
                line.append(f"   {record.alarms} alarm{'s' if record.alarms > 1 else ''}", style="bold red")
            live.update(Group(bar, line))

        yield watch
    if not console.is_terminal:
        console.print()  # rich ends the last line of a terminal only
