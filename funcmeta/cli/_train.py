"""The run of ``funcmeta train``, and of ``funcmeta evaluate`` on what it left."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from funcmeta import rng, training, tree
from funcmeta._errors import ArgumentError, DataError
from funcmeta.cli._recipe import STATIC, Recipe, recipe
from funcmeta.cli._settings import Settings, check_resumed, read, settings, text
from funcmeta.training import (
    Alarm,
    Evaluation,
    Fitted,
    Folder,
    Mean,
    Validation,
    _tree_file,
    evaluate,
    fit,
    load,
    progress,
    report,
)
from funcmeta.training._folder import read_log
from funcmeta.training._ranks import Ranks

CONFIG, RESULT = "config.toml", "evaluation.json"


def train(
    given: dict[str, Any], config: Path | None, out: Path, *, resume: bool, damaged: str, tensorboard: bool
) -> int:
    """Train as told. Returns the exit status: 0, or 128 and the number of the signal that ended it.

    Raises:
        FuncmetaError: as ``settings``, ``recipe`` and ``fit``.
    """
    began, kept = time.perf_counter(), out / CONFIG
    if damaged != "raise" and not resume:
        raise ArgumentError(f"damaged is {damaged!r}, which is read only by --resume. Pass both, or leave it out.")
    resumed = resume and kept.exists()
    if resume and not resumed and config is None and "algorithm" not in given:
        raise ArgumentError(f"{out} has no {CONFIG}, so no run of funcmeta train to go on with. Name an algorithm.")
    told = settings({**({} if config is None else read(config)), **given}, kept if resumed else None)
    if resumed:
        check_resumed(told, settings({}, kept))
    with _processes() as ranks, ExitStack() as watching:
        first = ranks.rank == 0
        curves = [watching.enter_context(training.tensorboard(out / "tensorboard"))] if tensorboard and first else []
        console = Console(quiet=ranks.rank > 0)
        torch.set_num_threads(told.threads)
        if first:
            _check_folder(out, resume, told.steps)
            if not resumed:
                (out / STATIC).unlink(missing_ok=True)
        ranks.gathered(None)
        made = recipe(told, out, ranks)
        if first:
            _tree_file.put(kept, text(told).encode())
        ranks.gathered(None)
        console.print(f"[bold]{made.title}[/bold], {told.steps} steps, in {out}", highlight=False, soft_wrap=True)
        bar = [watching.enter_context(progress(told.steps))] if first else []
        fitted = fit(
            made.algorithm,
            made.tasks("train"),
            lambda meta: torch.optim.Adam([leaf for leaf in tree.leaves(meta) if leaf.requires_grad], lr=told.meta_lr),
            steps=told.steps,
            batch_size=told.batch_size,
            accumulate=told.accumulate,
            seed=told.seed,
            scheduler=_cosine(told.steps) if told.schedule == "cosine" else None,
            clip=told.clip or None,
            alarm=Alarm(told.alarm, told.limit or float("inf")),  # type: ignore[arg-type]
            validation=_validation(told, made),
            folder=Folder(out, every=told.checkpoint_every, resume=resume, damaged=damaged),  # type: ignore[arg-type]
            watch=[*bar, *curves],
            spread=made.spread,
        )
        watching.close()
        if first and fitted.ended in ("steps", "patience"):
            report(out)
        return _told(fitted, out, console, time.perf_counter() - began, max if made.higher_is_better else min)


def _check_folder(out: Path, resume: bool, steps: int) -> None:
    """Raise unless a run may begin, or go on to so many steps, in this folder."""
    log = out / "log.jsonl"
    if not log.exists():
        return
    if not resume:
        raise ArgumentError(f"{out} has a run in it. Pass --resume to go on with it, or another --out.")
    taken = max((record.step for record in read_log(log).records), default=0)
    if taken > steps:
        raise ArgumentError(f"steps is {steps}, but the run has taken {taken} already. Pass at least as many.")


def judge(folder: Path, *, part: str, number: int, seed: int | None) -> None:
    """Judge what a run learned on held-out tasks, beside what it began with; print and write it.

    Raises:
        ArgumentError: a seed is given that the algorithm does not read.
        FuncmetaError: as ``settings``, ``recipe`` and ``evaluate``.
    """
    if not (folder / CONFIG).exists():
        raise DataError(f"{folder} has no {CONFIG}. Pass the folder of a run of funcmeta train.")
    told = settings({}, folder / CONFIG)
    if seed is not None and told.algorithm == "dynamic_lm":
        raise ArgumentError(f"seed is {seed}, which dynamic_lm does not read: it is judged on articles. Leave it out.")
    seed = seed or 0
    torch.set_num_threads(told.threads)
    made = recipe(told, folder, Ranks())
    algorithm, tasks = made.algorithm, made.tasks(part)
    with rng.forked(told.seed):
        first = algorithm.init()
    meta = load(folder / "meta.safetensors")
    tree.check_same(first, meta, name="meta.safetensors", advice="It is of another run.")
    count = made.number(part, number)
    found, before = (
        evaluate(algorithm, each, tasks, number=count, score=made.score, seed=seed) for each in (meta, first)
    )
    console = Console()
    console.print(f"[bold]{made.title}[/bold], {count} tasks of the {part} part", highlight=False)
    difference = Mean.of(found.scores - before.scores)
    lines = [
        ("learned", f"{found.mean}, {_middle(found, made)}"),
        ("at first", f"{before.mean}, {_middle(before, made)}"),
        ("difference", f"{difference:+}"),
    ]
    for name, line in lines:
        console.print(f"{made.score_name}, {name + ':':12} {line}", highlight=False)
    worse = found.worse(before, higher_is_better=made.higher_is_better)
    console.print(f"Worse than at first: {worse} of {count} tasks.", highlight=False)
    content = {
        "split": part,
        "score": made.score_name,
        "higher_is_better": made.higher_is_better,
        "step": read_log(folder / "log.jsonl").records[-1].step,
        "mean": found.mean.value,
        "margin": found.mean.margin,
        "at_first": before.mean._asdict(),
        "difference": difference._asdict(),
        "scores": found.scores.tolist(),
        "scores_at_first": before.scores.tolist(),
        "seed": seed,
        "number": count,
    }
    _tree_file.put(folder / RESULT, json.dumps(content, indent=1).encode())
    page = report(folder)
    console.print(f"Wrote {folder / RESULT} and {page}.", highlight=False, soft_wrap=True)


def _middle(found: Evaluation, made: Recipe) -> str:
    low, median, high = found.quartiles(higher_is_better=made.higher_is_better)
    return f"median {median:.4g} ({low:.4g} to {high:.4g})"


def _validation(told: Settings, made: Recipe) -> Validation | None:
    if not told.validate_every:
        return None
    return Validation(
        made.tasks("validation"),
        every=told.validate_every,
        number=made.number("validation", told.validation_tasks),
        score=made.score,
        higher_is_better=made.higher_is_better,
        patience=told.patience or None,
    )


def _cosine(steps: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _told(fitted: Fitted, out: Path, console: Console, seconds: float, choose: Callable[..., Mean]) -> int:
    """Say how it ended."""
    done = f"after step {fitted.step} and {seconds:.0f} s"
    if fitted.ended not in ("steps", "patience"):
        line = f"Stopped by {fitted.ended} {done}. To go on: funcmeta train --out {out} --resume"
        console.print(line, highlight=False, soft_wrap=True)
        return 128 + getattr(signal, fitted.ended, signal.SIGTERM)
    means = [record.validation for record in fitted.records if record.validation]
    best = f" Validation: {means[0]} at first, {choose(means)} at its best." if means else ""
    alarms = f" {fitted.alarms} step{'s were' if fitted.alarms > 1 else ' was'} left out." if fitted.alarms else ""
    why = "Validation got no better, so it ended" if fitted.ended == "patience" else "Ended"
    wrote = f"Wrote {out / 'meta.safetensors'} and {out / 'report.html'}."
    console.print(f"{why} {done}.{best}{alarms} {wrote}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _processes() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=timedelta(hours=12))  # one of them may train a model first
    try:
        yield Ranks.here()
    finally:
        dist.destroy_process_group()
