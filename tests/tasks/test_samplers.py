"""What every sampler has in common: tasks are pure functions of the seed, and a batch is a stack of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import funcmeta.tasks as tasks
from funcmeta import rng, tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta.tasks import Sampler, Task

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "glyphs": lambda: tasks.glyphs(ways=3, shots=2, queries=4),
    "glyphs, other options": lambda: tasks.glyphs(7, 1, 3, "test", size=20, variation=0.5, dtype=torch.float64),
    "sinusoids": lambda: tasks.sinusoids(shots=3, queries=2),
    "sinusoids, float64": lambda: tasks.sinusoids(shots=1, queries=1, dtype=torch.float64),
    "quadratics": lambda: tasks.quadratics(dimension=4),
    "quadratics, float64": lambda: tasks.quadratics(dimension=1, dtype=torch.float64),
}

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
every = pytest.mark.parametrize("name", SAMPLERS)


def same(one: Task, other: Task) -> bool:
    left, right = tree.leaves(one), tree.leaves(other)
    equal = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True)]
    return all(equal)


@every
def test_a_seed_gives_one_task_and_other_seeds_others(name: str) -> None:
    sampler = SAMPLERS[name]()
    assert same(sampler.sample(seed=3), SAMPLERS[name]().sample(seed=3))
    assert not same(sampler.sample(seed=3), sampler.sample(seed=4))
    assert sampler.sample(seed=3).spec is None or sampler.sample(seed=3).spec != sampler.sample(seed=4).spec


@every
@pytest.mark.parametrize("count", [1, 2, 9])
def test_task_i_of_a_batch_is_the_task_of_the_folded_seed(name: str, count: int) -> None:
    sampler = SAMPLERS[name]()
    batch = sampler.sample_batch(seed=11, tasks=count)
    alone = [sampler.sample(rng.fold(11, index)) for index in range(count)]
    assert same(batch, tasks.stack(alone))
    assert all(leaf.shape[0] == count for leaf in tree.leaves(batch[:2]))
    assert batch.spec == tuple(task.spec for task in alone)


@every
def test_the_global_generator_is_neither_read_nor_written(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = SAMPLERS[name]().sample_batch(seed=0, tasks=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, SAMPLERS[name]().sample_batch(seed=0, tasks=2))


@every
@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [
        (-1, 2, "seed is -1, expected an integer from 0"),
        (0.5, 2, r"seed is 0\.5, expected an integer"),
        (0, 0, "tasks is 0, expected a positive integer"),
        (0, True, "tasks is True, expected a positive integer"),
    ],
)
def test_a_bad_seed_or_number_of_tasks_is_refused(name: str, seed: int, count: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SAMPLERS[name]().sample_batch(seed, count)
    if count == 2:
        with pytest.raises(ArgumentError, match=message):
            SAMPLERS[name]().sample(seed)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tasks.sinusoids(shots=0), "shots is 0, expected a positive integer. Pass a larger shots"),
        (lambda: tasks.sinusoids(queries=-1), "queries is -1, expected an integer of at least 0"),
        (
            lambda: tasks.sinusoids(dtype=torch.int64),
            "dtype is torch.int64, expected a floating-point dtype. Pass torch",
        ),
        (lambda: tasks.quadratics(dimension=0), "dimension is 0, expected a positive integer"),
        (lambda: tasks.quadratics(dtype="float"), "dtype is 'float', expected a floating-point dtype"),
        (lambda: tasks.glyphs(ways=0), "ways is 0, expected a positive integer"),
        (lambda: tasks.glyphs(ways=2.0), r"ways is 2\.0, expected a positive integer"),
        (lambda: tasks.glyphs(ways=5000), "ways is 5000, expected at most 3937, the number of classes. Ask for fewer"),
        (lambda: tasks.glyphs(shots=-1), "shots is -1, expected a positive integer"),
        (lambda: tasks.glyphs(queries=-1), "queries is -1, expected an integer of at least 0"),
        (lambda: tasks.glyphs(split="dev"), "split is 'dev', expected one of 'train', 'validation', 'test'. Choose"),
        (lambda: tasks.glyphs(split=["train"]), r"split is \['train'\], expected one of"),
        (lambda: tasks.glyphs(size=0), "size is 0, expected a positive integer"),
        (lambda: tasks.glyphs(dtype=torch.uint8), "dtype is torch.uint8, expected a floating-point dtype"),
        (lambda: tasks.glyphs(variation=1.5), r"variation is 1\.5, expected a number from 0 to 1. Pass 1\.0"),
        (lambda: tasks.glyphs(variation=float("nan")), "variation is nan, expected a number from 0 to 1"),
    ],
)
def test_a_bad_argument_is_refused(build: Callable[[], Sampler], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


def test_a_sinusoid_is_one() -> None:
    batch = tasks.sinusoids(shots=50, queries=30, dtype=torch.float64).sample_batch(seed=0, tasks=200)
    assert batch.query is not None
    for x, y in (batch.support, batch.query):
        amplitude, phase = torch.tensor(batch.spec, dtype=torch.float64).T[..., None, None]
        torch.testing.assert_close(y, amplitude * torch.sin(x - phase), rtol=0, atol=1e-14)
        assert -5 <= x.min() < -4.9
        assert 4.9 < x.max() <= 5
    assert batch.query[0].shape == (200, 30, 1)
    assert 0.1 <= amplitude.min() < 0.3 < 4.8 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.1 < 3.0 < phase.max() <= torch.pi


def test_a_task_without_queries_has_no_query() -> None:
    assert tasks.sinusoids(queries=0).sample(seed=0).query is None
    assert tasks.sinusoids(queries=0).sample_batch(seed=0, tasks=2).query is None


def test_a_quadratic_is_normal_and_its_own_query() -> None:
    batch = tasks.quadratics(dimension=10, dtype=torch.float64).sample_batch(seed=0, tasks=300)
    assert batch.query is not None
    matrix, target = batch.support
    assert matrix.shape == (300, 10, 10)
    assert target.shape == (300, 10)
    assert torch.equal(matrix, batch.query[0])
    assert torch.equal(target, batch.query[1])
    for part in (matrix, target):
        assert abs(part.mean()) < 0.05
        assert abs(part.std() - 1) < 0.05
    assert abs((matrix[..., 0] * target).mean()) < 0.05


@pytest.mark.parametrize("sampler", [tasks.sinusoids, tasks.quadratics, tasks.glyphs])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_the_one_asked_for(sampler: Callable[..., Sampler], dtype: torch.dtype) -> None:
    assert sampler(dtype=dtype).sample(seed=0).support[0].dtype == dtype


def test_stacking_needs_tasks() -> None:
    with pytest.raises(ArgumentError, match=r"tasks is empty, expected at least one task\. Pass a list"):
        tasks.stack([])


def test_stacking_needs_batches() -> None:
    streaming = Task(support=lambda step: torch.ones(2) * step, query=None)
    with pytest.raises(ArgumentError, match=r"tasks\[1\].support is a function of the step, expected a batch. Stack"):
        tasks.stack([Task(torch.ones(2), None), streaming])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Task(torch.ones(3), torch.ones(1)), r"float32\[3\] on cpu, expected float32\[2\] on cpu. Stack tasks of one"),
        (Task(torch.ones(2), None), r"tasks\[1\]\[:2\]\[1\] is None"),
        (Task((torch.ones(2),), torch.ones(1)), "has other keys than expected"),
    ],
)
def test_stacking_needs_tasks_of_one_shape(other: Task, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        tasks.stack([Task(torch.ones(2), torch.ones(1)), other])


@pytest.mark.parametrize("sampler", [tasks.sinusoids, tasks.quadratics, tasks.glyphs])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def test_the_device_is_the_one_asked_for(sampler: Callable[..., Sampler], device: str) -> None:
    batch = sampler(device=device).sample_batch(seed=0, tasks=2)
    assert {leaf.device.type for leaf in tree.leaves(batch[:2])} == {device}
