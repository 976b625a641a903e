"""The run of ``funcmeta compare``: compare, meta-train, test."""

import math
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from funcmeta._errors import ArgumentError
from funcmeta.cli._options import Options
from funcmeta.cli._report import Report, Training, Trial
from funcmeta.cli._subject import Subject, subject
from funcmeta.cli._training import Plan
from funcmeta.compare import Comparison, compare
from funcmeta.compare._plot import figure
from funcmeta.estimators import Estimator, FirstOrder, Reptile, Reverse
from funcmeta.model import init_params
from funcmeta.optim import sgd
from funcmeta.problem import inner_problem
from funcmeta.training import Mean

ESTIMATORS: dict[str, tuple[str, Estimator]] = {
    "second": ("second order", Reverse()),
    "first": ("first order", FirstOrder()),
    "reptile": ("Reptile", Reptile()),
}
"""What the option calls them, what the report calls them, and what they are."""

LONGER = 4
"""How many times more steps the net gets that is trained from scratch: enough for it to fit the support."""


def run(options: Options, console: Console) -> Report:
    """Measure everything that the options ask for.

    Raises:
        ArgumentError: an option has a value that cannot be used.
        DataError: the data are not there.
    """
    began = time.perf_counter()
    estimators = chosen(options.estimators)
    for name, rate in (("lr", options.lr), ("meta-lr", options.meta_lr)):
        if not 0 < rate < math.inf:
            raise ArgumentError(f"{name} is {rate}, expected a positive number. Pass e.g. --{name} 0.1.")
    topic = subject(
        options.data,
        options.model,
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        size=options.size,
        filters=options.filters,
        seed=options.seed,
    )
    check_folder(options.out)
    figure(1, 1)  # a missing matplotlib shall not cost a run
    torch.set_num_threads(options.threads)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        job = progress.add_task("Meta-gradients on one task", total=1)
        comparison = compared(topic, options, estimators)
        progress.advance(job)
        training = trained(topic, options, estimators, progress) if options.iterations else None
    return Report(options, topic, comparison, training, time.perf_counter() - began)


def chosen(names: str) -> dict[str, Estimator]:
    """The estimators that an option lists, by the name the report gives them."""
    listed = [name.strip() for name in names.split(",")]
    unknown = [name for name in listed if name not in ESTIMATORS]
    if unknown or len(set(listed)) < len(listed):
        raise ArgumentError(
            f"estimators is '{names}', expected some of {', '.join(ESTIMATORS)}, each once, with commas between. "
            "Pass e.g. --estimators second,first."
        )
    return dict(ESTIMATORS[name] for name in listed)


def check_folder(path: Path) -> None:
    """Make the output folder now, so that a bad path costs no run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"out is '{path}', which cannot be a folder ({error.strerror}). Pass another.") from error
    if not os.access(path, os.W_OK):
        raise ArgumentError(f"out is '{path}', a folder that cannot be written to. Pass another.")


def compared(topic: Subject, options: Options, estimators: dict[str, Estimator]) -> Comparison:
    """The meta-gradients at the initial parameters, on the first training task."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    params = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in init_params(topic.net).items()}
    problem = inner_problem(topic.net.to(dtype), topic.loss, optimizer=sgd(options.lr))
    topic.net.to(torch.float32)
    return compare(
        problem,
        {"params": params},
        topic.sampler("train", dtype).sample(options.seed),
        steps=options.steps,
        estimators=estimators,
        seed=options.seed,
    )


def trained(topic: Subject, options: Options, estimators: dict[str, Estimator], progress: Progress) -> Training:
    """Meta-train with each estimator, and test what came of it beside the net trained from scratch."""
    plan = Plan(
        topic,
        options.steps,
        options.lr,
        options.meta_lr,
        options.tasks,
        options.iterations,
        options.seed,
    )
    curves = []
    for name, estimator in estimators.items():
        job = progress.add_task(f"Meta-training, {name}", total=options.iterations)
        curves.append(plan.train(name, estimator, lambda job=job: progress.advance(job)))  # type: ignore[misc]
    job = progress.add_task("Test on held-out tasks", total=len(curves) + 2)
    initial = init_params(topic.net)
    longer = LONGER * options.steps
    line = plan.validate(initial, longer)
    scratch = plan.scores(initial, "test", options.test_tasks, longer)
    entrants = [("random", initial), *[(curve.name, curve.params) for curve in curves]]
    trials = [Trial("random", longer, Mean.of(scratch), None)]
    progress.advance(job)
    for name, params in entrants:
        scores = plan.scores(params, "test", options.test_tasks, options.steps)
        trials.append(Trial(name, options.steps, Mean.of(scores), Mean.of(scores - scratch)))
        progress.advance(job)
    return Training(curves, line, trials)
