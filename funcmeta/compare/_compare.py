"""Run estimators of the meta-gradient on the same problem, and hold them against one of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import torch

from funcmeta import rng, tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta._live_bytes import peak_bytes
from funcmeta._typing import Meta
from funcmeta.compare._agreement import agreement
from funcmeta.compare._candidate import Candidate, Gradient, Result, Setting
from funcmeta.compare._comparison import Comparison
from funcmeta.compare._measure import Counted, median_seconds
from funcmeta.compare._rows import LeafRow, Row
from funcmeta.compare._slopes import slopes
from funcmeta.estimators import Estimator, FirstOrder, Reverse
from funcmeta.memory import Memory, StoreAll
from funcmeta.problem import Problem
from funcmeta.tasks import Task

MOST_LENGTHS = 10
"""For how many numbers of inner steps the leaves are compared, at most."""

Estimators: TypeAlias = Mapping[str, Estimator | tuple[Estimator, Memory]]


def compare(
    problem: Problem,
    meta: Meta,
    task: Task,
    *,
    steps: int,
    estimators: Estimators | None = None,
    reference: str | None = None,
    directions: int = 3,
    seed: int = 0,
) -> Comparison:
    """Measure how estimators of the meta-gradient differ on one task, and what each costs.

    Each estimator's gradient g over all leaves of ``meta`` that require grad is held against the reference's r: cosine
    ⟨g, r⟩ / (‖g‖ ‖r‖), norm ratio ‖g‖ / ‖r‖ and relative error ‖g − r‖ / ‖r‖; and its slopes g·v along random normal
    directions v against central differences of the meta-loss, in the dtype of ``meta``. Leaf by leaf the same is done
    for 1, 2, ..., K inner steps (for 10 numbers evenly spaced when K is more). ``meta`` and its ``.grad`` are not
    touched.

    A leaf that an estimator cannot reach (for ``FirstOrder``, one that acts only through the inner gradient) is a
    constant for it: its gradient there is zero, and its row names the leaf. For the reference it is an error.
    An estimator whose direction is not the gradient of the loss that it returns, such as ``Reptile``, is held against
    the same reference and the same finite differences of the problem's meta-loss as all others.

    Args:
        problem: as for ``unroll``.
        meta: as for ``unroll``; at least one leaf requires grad.
        task: as for ``unroll``.
        steps: number of inner steps K, at least 1.
        estimators: name → estimator, or name → (estimator, memory policy) to compare policies; default
            ``{"second order": Reverse(), "first order": FirstOrder()}``.
        reference: the name of the estimator to hold the others against; default the first one.
        directions: number of random directions for the finite differences, at least 1.
        seed: integer from which the steps' randomness and the directions follow.

    Returns:
        A ``Comparison``: print it, or call its ``to_dict()`` and ``plot(path)``. Time is the median over interleaved
        repetitions; memory is counted on tensors as they come and go (on a GPU, by its allocator).

    Raises:
        ArgumentError: ``steps``, ``directions``, ``estimators`` or ``reference`` cannot be used, or no leaf of
            ``meta`` requires grad; and as ``unroll``.
        UnreachedLeafError: the reference gives a leaf of ``meta`` no gradient.
        DetachedError: as ``unroll``, for the reference.

    Examples:
        One step of gradient descent on a x² from a = 1, judged by the same loss, differentiated by x = 2:

        >>> def step(x, a, batch, seed):
        ...     loss, slope = fm.value_and_grad(lambda a: a * x**2)(a)
        ...     return a - slope, fm.StepInfo(loss)
        >>> problem = fm.Problem(lambda x, task, seed: torch.ones(()), step, lambda x, a, query, seed: a * x**2)
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> exact, first_order = compare(problem, x, fm.Task(torch.ones(1), None), steps=1).rows
        >>> first_order.cosine, round(first_order.norm_ratio, 4)
        (1.0, 0.4286)

    Source: this library; the first-order approximation is that of Finn et al. (2017), section 5.2.
    """
    rng.check_seed(seed)
    check_count("steps", steps, advice="Pass e.g. steps=3.")
    check_count("directions", directions, advice="Pass e.g. directions=3.")
    tree.check_tensors(meta, name="meta")
    setting = Setting(problem, meta, task, steps, seed)
    if not setting.learned:
        raise ArgumentError(
            "No leaf of meta requires grad, so there is no meta-gradient to compare. Call requires_grad_() on what "
            "is learned across tasks; init_params(module) gives such leaves."
        )
    contestants = candidates(estimators)
    if reference is None:
        reference = next(iter(contestants))
    if not isinstance(reference, str) or reference not in contestants:
        raise ArgumentError(
            f"reference is {reference!r}, expected one of the estimators' names: {', '.join(contestants)}. Pass one."
        )
    with torch.enable_grad():
        return _compare(setting, contestants, reference, directions)


def _compare(setting: Setting, contestants: Mapping[str, Candidate], reference: str, directions: int) -> Comparison:
    contestants[reference].gradient(setting)
    settled = {name: replace(each, constant=each.reached(setting).unreached) for name, each in contestants.items()}
    device = next(iter(setting.learned.values())).device
    costs = {name: _cost(each, setting, device) for name, each in settled.items()}
    seconds = median_seconds({name: partial(each.gradient, setting) for name, each in settled.items()}, device)
    exact = costs[reference].result.gradient
    measured = slopes(setting, directions)
    rows = []
    for name, (result, evaluations, peak) in costs.items():
        gradient = result.gradient
        rows.append(
            Row(
                name,
                result.loss,
                *agreement(gradient.values(), exact.values()),
                _worst(gradient, exact),
                measured.error(gradient),
                seconds[name],
                peak,
                evaluations,
                tuple(leaf for leaf in setting.learned if leaf in result.unreached),
            )
        )
    dtypes = {str(leaf.dtype).removeprefix("torch."): None for leaf in setting.learned.values()}
    return Comparison(
        rows=tuple(rows),
        leaves=tuple(_leaf_rows(setting, contestants, reference)),
        reference=reference,
        steps=setting.steps,
        directions=directions,
        fd_spread=measured.spread,
        seed=setting.seed,
        dtype=" and ".join(dtypes),
        device=str(device),
    )


class _Cost(NamedTuple):
    result: Result
    evaluations: int
    peak_bytes: int


def _cost(candidate: Candidate, setting: Setting, device: torch.device) -> _Cost:
    """The gradient, and what of the cost does not depend on the machine's mood."""
    counted = Counted(setting.problem)
    within = replace(setting, problem=counted.problem)
    results: list[Result] = []
    peak = peak_bytes(lambda: results.append(candidate.gradient(within)), device)
    return _Cost(results[0], counted.evaluations, peak)


def _leaf_rows(setting: Setting, contestants: Mapping[str, Candidate], reference: str) -> Iterator[LeafRow]:
    """Agreement of each leaf, and of all together, after fewer steps."""
    for steps in _lengths(setting.steps):
        shorter = replace(setting, steps=steps)
        gradients = {name: each.reached(shorter).gradient for name, each in contestants.items()}
        exact = gradients[reference]
        for name, gradient in gradients.items():
            groups = {"meta": list(gradient)} | {leaf: [leaf] for leaf in gradient}
            for leaf, members in groups.items():
                tensors = [gradient[each] for each in members]
                cosine, norm_ratio, _ = agreement(tensors, [exact[each] for each in members])
                yield LeafRow(name, leaf, sum(each.numel() for each in tensors), steps, cosine, norm_ratio)


def _lengths(steps: int) -> list[int]:
    """Numbers of inner steps from 1 to ``steps``: all, or evenly spaced ones."""
    many = min(steps, MOST_LENGTHS)
    return sorted({round(1 + index * (steps - 1) / max(1, many - 1)) for index in range(many)})


def _worst(gradient: Gradient, exact: Gradient) -> tuple[str, float]:
    cosines = {leaf: agreement([gradient[leaf]], [exact[leaf]]).cosine for leaf in exact}
    known = {leaf: cosine for leaf, cosine in cosines.items() if not math.isnan(cosine)}
    return min(known.items(), key=lambda pair: pair[1]) if known else ("", math.nan)


def candidates(estimators: Estimators | None) -> dict[str, Candidate]:
    """The estimators by name, checked; the default ones for None."""
    if estimators is None:
        estimators = {"second order": Reverse(), "first order": FirstOrder()}
    if not isinstance(estimators, Mapping) or not estimators:
        raise ArgumentError(
            f"estimators is {estimators!r}, expected a dict of at least one name and estimator. "
            'Pass e.g. {"exact": Reverse(), "first order": FirstOrder()}.'
        )
    found = {}
    for name, value in estimators.items():
        parts = value if isinstance(value, tuple) else (value, StoreAll())
        good = len(parts) == 2 and callable(parts[0]) and hasattr(parts[1], "run")
        if not isinstance(name, str) or not good or any(isinstance(each, type) for each in parts):
            raise ArgumentError(
                f"estimators[{name!r}] is {value!r}, expected a name and an estimator, or a pair of estimator and "
                "memory policy. Pass e.g. Reverse() or (Reverse(), Segments())."
            )
        found[name] = Candidate(*parts)
    return found
