"""MNIST-1D: classification of signals that look like digits, small enough to train on a thousand times over."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from funcmeta._check import check_count, check_device, check_floating
from funcmeta._typing import Batch
from funcmeta.tasks._task import Task

Signal = NDArray[np.float64]

SIGNALS, TRAINING, LENGTH = 5000, 4000, 40
PAD = (36, 60)  # zeros after a template, at least and at most
SHIFTS = 48  # number of shifts that a signal may take
SCALE, SHEAR = 0.4, 0.75  # widths of uniform distributions around 1 and around 0
CORRELATED, WHITE = 0.25, 0.02  # standard deviations of the noises, the first before smoothing
SMOOTHING = 2.0  # standard deviation of the smoothing, in samples
NOT_ZERO = 1e-8  # tells a template from its padding
SEED = 42

TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
"""The heights of the ten digits as one follows them with a pen."""


def mnist1d(batch_size: int = 50, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Task:
    """Training on MNIST-1D: 4,000 signals in ten classes, batch after batch, and 1,000 to judge by.

    Each signal is one of ten templates, padded, stretched, scaled, shifted, sheared and with noise; all are generated
    here, in under a second, and are those of the published file.

    Args:
        batch_size: signals a batch.
        dtype: floating-point dtype of the signals.
        device: where the signals are returned.

    Returns:
        A task whose ``support`` is a function of the step: batches in order, from the first signal again after the
        last. A batch is a pair of signals [batch_size, 40], of mean 0 and variance 1 over all, and labels [batch_size].
        The query is the test set, [1000, 40] and [1000].

    Raises:
        ArgumentError: ``batch_size`` is no count, ``dtype`` is not floating-point, or ``device`` is none.

    Examples:
        >>> task = mnist1d(batch_size=50)
        >>> x, y = task.support(0)
        >>> x.shape, y[:5].tolist(), len(task.query[1])
        (torch.Size([50, 40]), [2, 6, 4, 5, 6], 1000)

    Source:
        Greydanus 2020, "Scaling Down Deep Learning" (arXiv:2011.14439), with the settings of its package ``mnist1d``.
    """
    check_count("batch_size", batch_size)
    signals, labels = _dataset()
    x = torch.tensor(signals, dtype=check_floating(dtype), device=check_device(device))
    y = torch.tensor(labels, device=device)

    def support(step: int) -> Batch:
        rows = (torch.arange(batch_size, device=y.device) + step * batch_size) % TRAINING
        return x[rows], y[rows]

    return Task(support, (x[TRAINING:], y[TRAINING:]), "MNIST-1D")


@cache
def _dataset() -> tuple[Signal, NDArray[np.int64]]:
    """All signals [5000, 40] and labels [5000], those to train with first."""
    random = np.random.RandomState(SEED)
    templates = np.array(TEMPLATES)
    templates = templates - templates.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6
    labels = np.repeat(np.arange(len(templates)), SIGNALS // len(templates))
    drawn = [_drawn(templates[label], random) for label in labels]
    signals, correlated, white, shear = (np.array(part) for part in zip(*drawn, strict=True))
    length = signals.shape[1]
    signals = np.where(signals == 0, CORRELATED * correlated @ _smoothing(length), signals) + WHITE * white
    signals -= SHEAR * shear[:, None] * np.linspace(-0.5, 0.5, length)
    signals = signals @ np.array([_resampled(unit, LENGTH) for unit in np.eye(length)])
    order = random.permutation(SIGNALS)
    return (signals[order] - signals.mean()) / signals.std(), labels[order]


def _drawn(template: Signal, random: np.random.RandomState) -> tuple[Signal, Signal, Signal, float]:
    """A template padded, stretched, scaled and shifted, its two noises and its shear; drawn in the published order."""
    padding = PAD[0] + int(random.rand() * (PAD[1] - PAD[0] + 1))
    padded = _resampled(np.concatenate([template + NOT_ZERO, np.zeros(padding)]), len(template) + PAD[1])
    scale, shift = 1 + SCALE * (random.rand() - 0.5), random.choice(SHIFTS)
    noises = random.randn(len(padded)), random.randn(len(padded))
    return np.roll(scale * padded, shift), *noises, random.rand() - 0.5


def _resampled(signal: Signal, length: int) -> Signal:
    """Linear interpolation at so many places, the ends included."""
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)


def _smoothing(length: int) -> Signal:
    """The matrix of a convolution with a Gaussian, cut at four standard deviations and mirrored at the ends."""
    reach = int(4 * SMOOTHING)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING) ** 2)
    mirrored = np.pad(np.eye(length), ((0, 0), (reach, reach)), "symmetric")
    return np.array([np.convolve(row, weights / weights.sum(), "valid") for row in mirrored])
