"""Carries in parts and together again, whoever shares what."""

from typing import Any

import pytest
import torch
from distributed_cases import CASES, optimizer

import funcmeta as fm
from funcmeta.training import _carries
from funcmeta.training._objective import objective

TASKS = fm.tasks.quadratics(3, dtype=torch.float64).sample_batch(seed=0, tasks=8)
PAIRS = 4


def carry_of(made: str, share: tuple[int, int] = (0, 1), tasks: fm.Task = TASKS, start: Any = None) -> fm.Carry:
    """After two windows, without particles, or with those of stacked tasks or of tasks one after the other."""
    strategy = "loop" if made == "loop" else "vmap"
    estimator = fm.FirstOrder() if made == "none" else fm.PersistentES(0.01, PAIRS, 2, share=share)
    algorithm = optimizer(steps=9, estimator=estimator, strategy=strategy)
    meta = algorithm.init()
    carry = algorithm.begin(meta, tasks, seed=1) if start is None else start
    for _ in range(2):
        _, carry = algorithm.window(meta, tasks, seed=1, carry=carry)
    assert carry is not None
    return carry


def same(got: Any, expected: Any, tolerance: float = 0.0) -> None:
    fm.tree.check_same(expected, got, name="the carry")
    for one, other in zip(fm.tree.leaves(got), fm.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("spread", ["tasks", "particles"])
@pytest.mark.parametrize("made", ["none", "vmap", "loop"])
def test_the_parts_make_the_whole(made: str, spread: Any, ranks: int) -> None:
    carry = carry_of(made)
    parts = [_carries.part(carry, spread, rank, ranks) for rank in range(ranks)]
    same(_carries.joined(parts, spread), carry)
    again = [_carries.part(_carries.joined(parts, spread), spread, rank, ranks) for rank in range(ranks)]
    same(again, parts)


@pytest.mark.parametrize("made", ["vmap", "loop"])
def test_a_part_is_what_one_process_would_have_had(made: str) -> None:
    whole = carry_of(made)
    for rank in range(2):
        same(_carries.part(whole, "particles", rank, 2), carry_of(made, share=(rank, 2)), 1e-12)


def test_a_part_of_the_tasks_is_what_one_process_would_have_had() -> None:
    """Under vmap; in a loop the noise of a task follows its place in the batch."""
    algorithm = optimizer(steps=9)
    begun = algorithm.begin(algorithm.init(), TASKS, seed=1)
    assert begun is not None
    whole = carry_of("vmap")
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        some = fm.Task(*fm.tree.map(lambda leaf: leaf[rows], TASKS[:2]))  # noqa: B023
        alone = carry_of("vmap", tasks=some, start=_carries.part(begun, "tasks", rank, 2))
        same(_carries.part(whole, "tasks", rank, 2), alone, 1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_streams(ranks: int) -> None:
    case = CASES["reading"]((0, 1))
    aim, meta = objective(case.algorithm, case.tasks), case.algorithm.init()
    _, carry = aim.loss(meta, aim.sample(0, 4), 0, None)
    parts = [aim.part_of_carry(carry, rank, ranks) for rank in range(ranks)]
    assert [len(part) for part in parts] == [4 // ranks] * ranks
    same(aim.joined(parts), carry)


@pytest.mark.parametrize("name", ["reverse", "windows", "reading"])
def test_no_carry_stays_none(name: str) -> None:
    case = CASES[name]((0, 1))
    aim = objective(case.algorithm, case.tasks)
    assert aim.part_of_carry(None, 1, 2) is None
    assert aim.joined([None, None]) is None
