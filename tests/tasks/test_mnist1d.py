"""MNIST-1D: the signals of the published file, and the batches made of them."""

import numpy as np
import pytest
import torch

import funcmeta.tasks as tasks
from funcmeta._errors import ArgumentError


def test_the_signals_are_those_of_the_published_file() -> None:
    """What was computed from mnist1d_data.pkl of github.com/greydanus/mnist1d; each sum tells one signal's change."""
    task = tasks.mnist1d(batch_size=4000, dtype=torch.float64)
    assert task.query is not None
    x, y = (torch.cat(parts).numpy() for parts in zip(task.support(0), task.query, strict=True))
    first = [-0.33200567, -0.47191037, -0.77869708, -1.00974083, -0.88235257, 0.10393481]
    np.testing.assert_allclose(x[0, :6], first, atol=1e-8)
    np.testing.assert_allclose(x[4999, -3:], [0.65987565, 0.87773435, 1.19315184], atol=1e-8)
    assert y[:20].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9, 4, 3, 4, 5, 1, 9, 0, 3]
    assert y[4000:4020].tolist() == [2, 6, 3, 9, 4, 3, 1, 9, 5, 2, 0, 7, 7, 1, 4, 6, 1, 4, 3, 9]
    assert np.bincount(y).tolist() == [500] * 10
    assert (x.ravel() * np.sin(np.arange(1, x.size + 1))).sum() == pytest.approx(566.2612241409743, abs=1e-9)
    assert (x**3).sum() == pytest.approx(-13126.103828802174, abs=1e-8)
    assert (y * np.sin(np.arange(1, 5001))).sum() == pytest.approx(483.5904518121164, abs=1e-9)


def test_batches_follow_each_other_and_begin_again() -> None:
    task = tasks.mnist1d(batch_size=1500)
    x, y = tasks.mnist1d(batch_size=4000).support(0)
    rows = [*range(3000, 4000), *range(500)]
    assert torch.equal(task.support(2)[0], x[rows])
    assert torch.equal(task.support(2)[1], y[rows])
    assert torch.equal(tasks.mnist1d(batch_size=50).support(83)[0], x[150:200])


def test_a_task_shares_no_memory_with_another() -> None:
    one, other = (tasks.mnist1d(dtype=torch.float64) for _ in range(2))
    assert one.query is not None
    assert other.query is not None
    before = other.query[0].clone()
    one.query[0].zero_()
    assert torch.equal(other.query[0], before)


def test_a_bad_argument_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"batch_size is 0, expected a positive integer. Pass a larger batch_size"):
        tasks.mnist1d(batch_size=0)
    with pytest.raises(ArgumentError, match=r"dtype is torch.int64, expected a floating-point dtype. Pass torch"):
        tasks.mnist1d(dtype=torch.int64)
