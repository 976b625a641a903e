"""What a run of the benchmarks leaves behind: a table on the screen, and JSON, Markdown and plots in a folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from contest import Bar, Floor, Result, Row
from rich.console import Console
from rich.table import Table

PAGE, DATA = "performance.md", "benchmarks.json"


def show(result: Result, console: Console) -> None:
    """Print one workload."""
    table = Table("contestant", "ratio", "median", "spread", "runs", "peak", title=f"{result.workload} {result.title}")
    for cells in _row_cells(result.rows):
        table.add_row(*cells)
    console.print(table)
    for bar in result.bars:
        console.print(f"  {_bar_words(bar)}")
    for line in _remarks(result):
        console.print(f"  {line}", style="dim")


def save(results: Mapping[str, Result], folder: Path) -> None:
    """Add the results to the folder's JSON, and draw and write from that all tables of its page."""
    data = folder / DATA
    known = json.loads(data.read_text()) if data.exists() else {}
    known.update({name: result.to_dict() for name, result in results.items()})
    data.write_text(json.dumps(known, indent=1) + "\n")
    every = {name: Result.from_dict(known[name]) for name in sorted(known)}
    page = folder / PAGE
    text = page.read_text()
    for name, result in every.items():
        text = _between(text, name, _markdown(result))
    page.write_text(text)
    (folder / "images").mkdir(exist_ok=True)
    for name in results:
        plot(every[name], folder / "images" / f"benchmark_{name.lower()}.png")


def plot(result: Result, path: Path) -> None:
    """Draw the rows as points on logarithmic axes: time, and memory where it was measured."""
    from matplotlib.figure import Figure

    columns = {"median time, seconds": [(row.name, row.median) for row in result.rows if row.seconds]}
    columns["peak memory, MB"] = [(row.name, _peak(row) / 1e6) for row in result.rows if _peak(row)]
    shown = {label: pairs for label, pairs in columns.items() if pairs}
    figure = Figure(figsize=(5.5 * len(shown), 0.9 + 0.3 * len(result.rows)), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (label, pairs) in zip(axes, shown.items(), strict=True):
        for name, value in reversed(pairs):
            axis.plot(value, name, "o", color="tab:blue" if name.startswith("funcmeta") else "tab:gray")
            axis.annotate(f"{value:.3g}", (value, name), (6, 3), textcoords="offset points", fontsize="small")
        axis.set_xscale("log")
        axis.margins(x=0.15, y=0.15)
        axis.grid(axis="y", alpha=0.3)
        axis.xaxis.set_minor_formatter("")
        axis.set_title(f"{result.workload}: {label}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _markdown(result: Result) -> str:
    lines = [
        f"Measured on {result.machine['processor']}, "
        + ", ".join(f"{name} {version}" for name, version in result.machine["versions"].items())
        + ".",
        "",
        "| contestant | ratio to the fastest | median | spread | runs | peak memory |",
        "|---|---|---|---|---|---|",
        *[f"| {' | '.join(cells)} |" for cells in _row_cells(result.rows)],
        "",
        "| bar | ratio | limit | |",
        "|---|---|---|---|",
        *[
            f"| {bar.name} | {_number(bar.ratio)} | {_number(bar.limit)}{' (beyond)' if bar.beyond else ''} | "
            f"{bar.verdict} |"
            for bar in result.bars
        ],
        "",
        *[f"- {line}" for line in _remarks(result)],
        "",
        f"![{result.workload}](images/benchmark_{result.workload.lower()}.png)",
    ]
    return "\n".join(lines)


def _between(text: str, name: str, fragment: str) -> str:
    """The page with the fragment between the two comments that bear the workload's name."""
    begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not found.search(text):
        raise ValueError(f"{PAGE} has no place for {name}. Put the lines {begin!r} and {end!r} where it shall stand.")
    return found.sub(lambda _: f"{begin}\n\n{fragment}\n\n{end}", text)


def _row_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    least = min((row.median for row in rows if row.seconds), default=1.0)
    return [
        (
            row.name,
            f"{row.median / least:.2f}" if row.seconds else "",
            _duration(row.median) if row.seconds else "",
            f"± {row.spread:.0%}" if len(row.seconds) > 1 else "",
            str(len(row.seconds)) if row.seconds else "",
            f"{_peak(row) / 1e6:,.0f} MB" if _peak(row) else "",
        )
        for row in rows
    ]


def _peak(row: Row) -> int:
    """The process's peak where it was measured, else that of live tensors."""
    return row.resident_bytes or row.live_bytes or 0


def _remarks(result: Result) -> list[str]:
    return [*([] if result.floor is None else [_floor_words(result.floor)]), *result.notes]


def _floor_words(floor: Floor) -> str:
    return (
        f"floor: {floor.operations / 1e9:.3g} Gflop take {_duration(floor.operation_seconds)} at the measured rate of "
        f"matrix products; unfused kernels move {floor.traffic / 1e6:,.0f} MB, which take "
        f"{_duration(floor.traffic_seconds)} at the measured rate of copies"
    )


def _bar_words(bar: Bar) -> str:
    wish = " beyond" if bar.beyond else ""
    return f"{bar.name}: {_number(bar.ratio)}, at most {_number(bar.limit)}{wish}: {bar.verdict}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
