"""What a run leaves behind: tables in the terminal, a picture, and a JSON file with every figure."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from funcmeta._files import written
from funcmeta._machine import machine
from funcmeta.cli._options import Options
from funcmeta.cli._subject import Subject
from funcmeta.cli._training import Curve
from funcmeta.compare import Comparison
from funcmeta.compare._plot import COLORS, draw_agreement, draw_cost, figure, save
from funcmeta.compare._table import lines, time_text
from funcmeta.training import Mean


class Trial(NamedTuple):
    """A score on the test tasks, and its difference, task by task, from that of the longest training from scratch."""

    name: str
    steps: int
    score: Mean
    difference: Mean | None


class Training(NamedTuple):
    """Meta-training with each estimator: on the way, and at its end beside the net trained from scratch."""

    curves: list[Curve]
    scratch: Mean
    trials: list[Trial]


@dataclass(frozen=True)
class Report:
    """Everything that a run measured."""

    options: Options
    subject: Subject
    comparison: Comparison
    training: Training | None
    seconds: float

    def show(self, console: Console) -> None:
        """Print the tables."""
        console.print(f"[bold]{self.title}[/bold]")
        console.print(self.comparison.headline, highlight=False)
        (_, *names), *rows = lines(self.comparison.rows)
        table = Table("", *[Column(name, justify="right") for name in names])
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if self.training:
            console.print(self._tests(self.training))

    @property
    def title(self) -> str:
        """What was compared on what, in one line."""
        steps = f"{self.options.steps} inner step{'s' if self.options.steps > 1 else ''}"
        return f"{self.subject.title}, {steps} of SGD at {self.options.lr:g}"

    def save(self, folder: Path) -> None:
        """Write ``compare.png`` and ``compare.json`` into the folder, each whole or not at all."""
        text, picture = json.dumps(self.to_dict(), indent=1, allow_nan=False), self._picture()
        save(picture, folder / "compare.png")
        with written(folder / "compare.json") as file:
            file.write(text.encode())

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers."""
        return {
            "options": asdict(self.options) | {"out": str(self.options.out)},
            "comparison": self.comparison.to_dict(),
            "training": self.training and self._training_dict(self.training),
            "machine": machine(),
            "seconds": self.seconds,
        }

    def _training_dict(self, training: Training) -> dict[str, Any]:
        return {
            "score": self.subject.score_name,
            "estimators": [
                {
                    "name": curve.name,
                    "seconds_per_iteration": curve.seconds_per_iteration,
                    "losses": curve.losses,
                    "validation": [{"iteration": point.iteration, **point.score._asdict()} for point in curve.points],
                }
                for curve in training.curves
            ],
            "scratch": training.scratch._asdict(),
            "test": [
                {
                    "name": trial.name,
                    "steps": trial.steps,
                    "score": trial.score._asdict(),
                    "difference": trial.difference and trial.difference._asdict(),
                }
                for trial in training.trials
            ],
        }

    def _tests(self, training: Training) -> Table:
        curves = {curve.name: curve for curve in training.curves}
        table = Table(
            "initial parameters",
            *[Column(head, justify="right") for head in ("steps", self.subject.score_name, "difference", "iteration")],
            title=f"{self.options.test_tasks} held-out tasks after {self.options.iterations} iterations of "
            f"{self.options.tasks} tasks; means and 95 % intervals",
        )
        for trial in training.trials:
            difference = "" if trial.difference is None else f"{trial.difference:+}"
            curve = curves.get(trial.name)
            seconds = "" if curve is None else time_text(curve.seconds_per_iteration)
            table.add_row(trial.name, str(trial.steps), f"{trial.score}", difference, seconds)
        return table

    def _picture(self) -> Any:
        picture = figure(12, 7.5)
        picture.suptitle(self.title, fontsize=13, fontweight="bold")
        grid = picture.add_gridspec(2, 1, height_ratios=(1, 1))
        above = grid[0].subgridspec(1, 2)
        draw_agreement([picture.add_subplot(cell) for cell in above], self.comparison.leaves, self.comparison.reference)
        below = grid[1].subgridspec(2, 2, width_ratios=(1, 1.6))
        draw_cost([picture.add_subplot(below[0, 0]), picture.add_subplot(below[1, 0])], self.comparison.rows)
        if self.training:
            self._draw_curves(picture.add_subplot(below[:, 1]), self.training)
        return picture

    def _draw_curves(self, panel: Any, training: Training) -> None:
        for index, curve in enumerate(training.curves):
            color = COLORS[index % len(COLORS)]
            iterations = [point.iteration for point in curve.points]
            values = [point.score.value for point in curve.points]
            margins = [point.score.margin for point in curve.points]
            low = [value - margin for value, margin in zip(values, margins, strict=True)]
            high = [value + margin for value, margin in zip(values, margins, strict=True)]
            panel.plot(iterations, values, color=color, marker="o", linewidth=2, label=curve.name)
            panel.fill_between(iterations, low, high, color=color, alpha=0.15, linewidth=0)
        label = f"from scratch, {training.trials[0].steps} steps"
        panel.axhline(training.scratch.value, color="0.4", linestyle="--", label=label)
        panel.set_title(f"Meta-training: {self.subject.score_name} on held-out tasks", fontsize=11)
        panel.set_xlabel(f"iterations of {self.options.tasks} tasks")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(self.subject.score_name)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9, frameon=False)
