"""Run estimators of the meta-gradient for several numbers of inner steps and seeds."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta.compare._agreement import agreement
from funcmeta.compare._candidate import Candidate, Result, Setting
from funcmeta.compare._compare import Estimators, candidates
from funcmeta.estimators import Estimator, Reverse
from funcmeta.horizon._report import HorizonReport
from funcmeta.horizon._row import HorizonRow
from funcmeta.memory import Memory
from funcmeta.problem import Problem
from funcmeta.tasks import Task


def horizon_report(
    problem: Problem,
    meta: Meta,
    task: Task,
    *,
    horizons: Sequence[int],
    estimators: Estimators,
    reference: Estimator | tuple[Estimator, Memory] = Reverse(),  # noqa: B008
    repeats: int = 20,
    seed: int = 0,
) -> HorizonReport:
    """Measure bias and variance of estimators of the meta-gradient for several numbers of inner steps.

    For each number of steps K and each seed, an estimator's gradient g over all leaves of ``meta`` that require grad is
    held against the exact r of the same seed: bias ‖E(g − r)‖ / ‖r‖, with its standard error, and variance
    E‖g − r − E(g − r)‖² / ‖r‖². An estimator whose error is the same to the bit for the first two seeds is not run
    again; nor is the reference, when its gradient is. ``meta`` and its ``.grad`` are not touched.

    Args:
        problem: as for ``unroll``.
        meta: as for ``unroll``; at least one leaf requires grad.
        task: as for ``unroll``.
        horizons: numbers of inner steps, each at least 1.
        estimators: name → estimator, or name → (estimator, memory policy).
        reference: the exact estimator, or a pair with its memory policy.
        repeats: seeds for each estimator, at least 2.
        seed: integer from which they follow.

    Returns:
        A ``HorizonReport``: print it, or call its ``to_dict()`` and ``plot(path)``.

    Raises:
        ArgumentError: ``horizons``, ``repeats`` or ``estimators`` cannot be used, or no leaf of ``meta`` requires
            grad; and as ``unroll``.

    Examples:
        Four steps of w' = w + a, judged by w at the end: cut before the last one, a quarter of the gradient is left.

        >>> step = lambda a, w, batch, seed: (w + a, fm.StepInfo(w))
        >>> problem = fm.Problem(lambda a, task, seed: torch.zeros(()), step, lambda a, w, query, seed: w)
        >>> a, task = torch.tensor(1.0, requires_grad=True), fm.Task(torch.ones(1), None)
        >>> estimators = {"truncated": fm.Truncated(1)}
        >>> horizon_report(problem, a, task, horizons=[1, 4], estimators=estimators).rows[1].bias
        0.75

    Source: this library; the curves are those by which Vicol et al. (2021) and Metz et al. (2019) compare estimators.
    """
    rng.check_seed(seed)
    check_count("repeats", repeats, least=2, advice="Pass e.g. repeats=20.")
    if not isinstance(horizons, Sequence) or not horizons:
        raise ArgumentError(f"horizons is {horizons!r}, expected a list of numbers of steps. Pass e.g. [1, 10, 100].")
    for each in horizons:
        check_count("a horizon", each, advice="Pass e.g. horizons=[1, 10, 100].")
    tree.check_tensors(meta, name="meta")
    [exact] = candidates({"the reference": reference}).values()
    setting = Setting(problem, meta, task, 0, seed)
    learned = list(setting.learned.values())
    if not learned:
        raise ArgumentError("No leaf of meta requires grad, so there is no meta-gradient. Call requires_grad_() on it.")
    seeds = [rng.fold(seed, index) for index in range(repeats)]
    rows = []
    with torch.enable_grad():
        for horizon in horizons:
            at = _truth(exact, replace(setting, steps=horizon), seeds)
            for name, candidate in candidates(estimators).items():
                rows.append(_row(name, candidate, replace(setting, steps=horizon), seeds, at))
    dtypes = {str(leaf.dtype).removeprefix("torch."): None for leaf in learned}
    return HorizonReport(
        tuple(rows), repr(exact.estimator), repeats, seed, " and ".join(dtypes), str(learned[0].device)
    )


def _truth(exact: Candidate, setting: Setting, seeds: Sequence[int]) -> Callable[[int], Tensor]:
    """The exact gradient of each seed, one vector; computed for two seeds only when it is the same for them."""
    truth = cache(lambda seed: _vector(exact.gradient(replace(setting, seed=seed))))
    if torch.equal(truth(seeds[0]), truth(seeds[1])):
        return lambda seed: truth(seeds[0])
    return truth


def _row(
    name: str, candidate: Candidate, setting: Setting, seeds: Sequence[int], truth: Callable[[int], Tensor]
) -> HorizonRow:
    unreached = candidate.reached(replace(setting, seed=seeds[0])).unreached
    settled = replace(candidate, constant=unreached)
    errors: list[Tensor] = []
    cosines, seconds = [], []
    for seed in seeds:
        if len(errors) == 2 and torch.equal(*errors):
            break
        began = time.perf_counter()
        result = settled.gradient(replace(setting, seed=seed))
        found = _vector(result)
        seconds.append(time.perf_counter() - began)
        errors.append(found - truth(seed))
        cosines.append(agreement([found], [truth(seed)]).cosine)
    repeats = len(errors)
    size = torch.stack([truth(seed) for seed in seeds[:repeats]]).mean(0).norm()
    mean, variance = torch.stack(errors).mean(0), torch.stack(errors).var(0).sum()
    return HorizonRow(
        setting.steps,
        name,
        (mean.norm() / size).item(),
        ((variance / repeats).sqrt() / size).item(),
        (variance / size**2).item(),
        statistics.fmean(cosines),
        statistics.median(seconds),
        repeats,
        size.item(),
        tuple([leaf for leaf in setting.learned if leaf in unreached]),
    )


def _vector(result: Result) -> Tensor:
    """All coordinates of a gradient, in float64 and on the CPU, which waits for a GPU to be done."""
    return torch.cat([leaf.detach().double().flatten().cpu() for leaf in result.gradient.values()])
