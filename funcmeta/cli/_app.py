"""The commands and their options."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from funcmeta._errors import FuncmetaError
from funcmeta.cli._options import Options
from funcmeta.cli._run import run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Precision(StrEnum):
    """The dtypes that a comparison can run in."""

    float32 = "float32"
    float64 = "float64"


@app.callback()
def commands() -> None:
    """Functional meta-learning in PyTorch."""


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="glyphs, omniglot:PATH or sinusoids.")] = "glyphs",
    model: Annotated[str | None, typer.Option(help="conv4 or mlp. Default: conv4; mlp for sinusoids.")] = None,
    estimators: Annotated[
        str, typer.Option(help="Of second, first and reptile, with commas between; the first is the reference.")
    ] = "second,first",
    ways: Annotated[int, typer.Option(min=2, help="Classes a task.")] = 5,
    shots: Annotated[int, typer.Option(min=1, help="Support examples a class.")] = 1,
    queries: Annotated[int, typer.Option(min=1, help="Query examples a class.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Inner steps.")] = 5,
    lr: Annotated[
        float | None, typer.Option(help="Inner learning rate (SGD). Default: 0.1; 0.01 for sinusoids.")
    ] = None,
    meta_lr: Annotated[float, typer.Option(help="Outer learning rate (Adam).")] = 0.01,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks a meta-batch.")] = 4,
    iterations: Annotated[int, typer.Option(min=0, help="Meta-training iterations of each estimator; 0: none.")] = 60,
    test_tasks: Annotated[int, typer.Option(min=2, help="Held-out tasks for the final test.")] = 80,
    size: Annotated[int, typer.Option(min=1, help="Pixels a side of an image.")] = 16,
    filters: Annotated[int, typer.Option(min=1, help="Channels of each block of conv4.")] = 32,
    dtype: Annotated[Precision, typer.Option(help="Of the comparison; meta-training is in float32.")] = (
        Precision.float32
    ),
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch; for nets this small one is best.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for compare.png and compare.json.")] = Path("compare"),
) -> None:
    """Compare meta-gradients of first and second order on real tasks: direction, size, time, memory, and what the
    difference costs in meta-training. Writes a picture and a JSON file with all figures.
    """
    given = locals()
    default = 0.01 if data == "sinusoids" else 0.1
    options = Options(**{**given, "dtype": dtype.value, "lr": default if lr is None else lr})
    console = Console()
    try:
        report = run(options, console)
        report.show(console)
        report.save(out)
    except FuncmetaError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    written = f"Wrote {out / 'compare.png'} and {out / 'compare.json'} after {report.seconds:.0f} s."
    console.print(written, highlight=False, soft_wrap=True)
