"""The commands and their options."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from funcmeta._check import check_choice
from funcmeta._errors import FuncmetaError
from funcmeta.cli._options import options
from funcmeta.cli._run import run
from funcmeta.cli._settings import ALGORITHMS, Settings, default

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
    ways: Annotated[int | None, typer.Option(min=2, help="Classes a task. Default: 5.")] = None,
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
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side of an image. Default: 16.")] = None,
    filters: Annotated[int | None, typer.Option(min=1, help="Channels of each block of conv4. Default: 32.")] = None,
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
    given = {**locals(), "dtype": dtype.value}
    console = Console()
    with _errors():
        report = run(options(given), console)
        report.show(console)
        report.save(out)
    written = f"Wrote {out / 'compare.png'} and {out / 'compare.json'} after {report.seconds:.0f} s."
    console.print(written, highlight=False, soft_wrap=True)


def _setting(name: str, text: str) -> Any:
    """The option of a setting, whose help says what is taken if it is left out."""
    return typer.Option(help=f"{text} {default(name)}")


@app.command()
def train(
    algorithm: Annotated[str | None, typer.Argument(help=f"One of {', '.join(ALGORITHMS)}.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("run"),
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with settings; options come before it. Default: none.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder, if any.")] = False,
    damaged: Annotated[
        str, typer.Option(help="If the newest checkpoint cannot be read: raise, or take the previous one.")
    ] = "raise",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard, too.")] = False,
    tasks: Annotated[
        str | None,
        _setting(
            "tasks",
            "glyphs, omniglot:PATH or sinusoids; quadratics for l2l; pydoc, wikipedia[:DUMP] or wikitext:FOLDER for "
            "dynamic_lm. The folder has valid.txt and test.txt, or wiki.valid.tokens and wiki.test.tokens, or "
            "wiki.valid.raw and wiki.test.raw.",
        ),
    ] = None,
    model: Annotated[str | None, _setting("model", "conv4 or mlp.")] = None,
    ways: Annotated[int | None, _setting("ways", "Classes a task; not for sinusoids.")] = None,
    shots: Annotated[int | None, _setting("shots", "Support examples a class.")] = None,
    queries: Annotated[int | None, _setting("queries", "Query examples a class.")] = None,
    size: Annotated[int | None, _setting("size", "Pixels a side of an image.")] = None,
    filters: Annotated[int | None, _setting("filters", "Channels of each block of conv4.")] = None,
    inner_steps: Annotated[int | None, _setting("inner_steps", "Steps of the inner training.")] = None,
    inner_lr: Annotated[float | None, _setting("inner_lr", "Learning rate of the inner training (SGD).")] = None,
    estimator: Annotated[
        str | None, _setting("estimator", "second, first, mixed, truncated:STEPS, es:SIGMA:PAIRS or pes:SIGMA:PAIRS.")
    ] = None,
    memory: Annotated[str | None, _setting("memory", "store, segments[:LENGTH] or revolve:SNAPSHOTS.")] = None,
    strategy: Annotated[str | None, _setting("strategy", "How the tasks of a batch are run: vmap or loop.")] = None,
    optimizer: Annotated[str | None, _setting("optimizer", "l2l: linear, lstm, rnnprop, mlp or hierarchical.")] = None,
    window: Annotated[int | None, _setting("window", "l2l, dynamic_lm, pes: steps of a window.")] = None,
    vocabulary: Annotated[int | None, _setting("vocabulary", "dynamic_lm: words at most.")] = None,
    width: Annotated[int | None, _setting("width", "dynamic_lm: units of the language model.")] = None,
    segment: Annotated[int | None, _setting("segment", "dynamic_lm: words of a step.")] = None,
    static_epochs: Annotated[int | None, _setting("static_epochs", "dynamic_lm: epochs of the static model.")] = None,
    steps: Annotated[int | None, _setting("steps", "Outer steps in all.")] = None,
    batch_size: Annotated[int | None, _setting("batch_size", "Tasks a batch, over all processes.")] = None,
    accumulate: Annotated[int | None, _setting("accumulate", "Batches whose mean gradient makes a step.")] = None,
    meta_lr: Annotated[float | None, _setting("meta_lr", "Outer learning rate (Adam).")] = None,
    schedule: Annotated[str | None, _setting("schedule", "Outer learning rate: constant or cosine.")] = None,
    clip: Annotated[float | None, _setting("clip", "Largest norm of a meta-gradient; 0: any.")] = None,
    alarm: Annotated[
        str | None, _setting("alarm", "At a meta-gradient that is not finite or explodes: stop, skip or lower.")
    ] = None,
    limit: Annotated[float | None, _setting("limit", "Norm above which one explodes; 0: any is good.")] = None,
    validate_every: Annotated[int | None, _setting("validate_every", "Steps between validations; 0: none.")] = None,
    validation_tasks: Annotated[
        int | None, _setting("validation_tasks", "Held-out tasks of a validation; dynamic_lm: at most all articles.")
    ] = None,
    patience: Annotated[
        int | None, _setting("patience", "End after so many validations that are no best; 0: never.")
    ] = None,
    checkpoint_every: Annotated[int | None, _setting("checkpoint_every", "Steps between checkpoints.")] = None,
    seed: Annotated[int | None, _setting("seed", "Everything random follows from it.")] = None,
    dtype: Annotated[
        str | None, _setting("dtype", "float32, float64, or bfloat16: autocast in the inner loss.")
    ] = None,
    threads: Annotated[int | None, _setting("threads", "Threads of PyTorch in each process.")] = None,
) -> None:
    """Meta-train, resumably: settings, checkpoints, a log and what was learned go into a folder. An option that the
    algorithm does not read is an error, which names those that it reads.

    Started by torchrun (python -m torch.distributed.run --nproc-per-node N -m funcmeta train ...), the processes share
    the tasks of each batch. SIGTERM and Ctrl-C end the run after its step, with a checkpoint.
    """
    from funcmeta.cli import _train

    given = {name: value for name, value in locals().items() if name in _SETTINGS and value is not None}
    with _errors():
        status = _train.train(given, config, out, resume=resume, damaged=damaged, tensorboard=tensorboard)
    if status:
        raise typer.Exit(status)


_SETTINGS = frozenset(each.name for each in fields(Settings))


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    part: Annotated[str, typer.Option(help="Which tasks: train, validation or test.")] = "test",
    number: Annotated[int, typer.Option(min=2, help="How many; dynamic_lm: at most all articles.")] = 200,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="The tasks follow from it; not read for dynamic_lm, which reads articles. Default: 0."
        ),
    ] = None,
) -> None:
    """Judge what a run learned on held-out tasks, beside what it began with. Writes evaluation.json and report.html."""
    from funcmeta.cli import _train

    with _errors():
        check_choice("part", part, ("train", "validation", "test"))
        _train.judge(folder, part=part, number=number, seed=seed)


@contextmanager
def _errors() -> Iterator[None]:
    """Say an error of the library in a line, and leave with status 2."""
    try:
        yield
    except FuncmetaError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
