"""Regression of sine waves."""

import math
from dataclasses import dataclass

import torch

from funcmeta import rng
from funcmeta._check import check_count, check_device, check_floating
from funcmeta.tasks._task import Sampler, Task, seeds, stack


def sinusoids(
    shots: int = 10,
    queries: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sampler:
    """Regression of sine waves of different amplitude and phase.

    y = a · sin(x - φ) with a uniform in [0.1, 5], φ in [0, π] and x in [-5, 5]. ``spec`` holds the amplitude and the
    phase of the task.

    Args:
        shots: support points a task.
        queries: query points a task; 0 for tasks without a query.
        dtype: floating-point dtype of the points.
        device: where the points are returned.

    Returns:
        A sampler of tasks with batches (x, y), both [points, 1].

    Raises:
        ArgumentError: ``shots`` or ``queries`` is no count, ``dtype`` is not floating-point, or ``device`` is none.

    Examples:
        >>> task = sinusoids(shots=3).sample(seed=0)
        >>> x, y = task.support
        >>> amplitude, phase = task.spec
        >>> torch.allclose(y, amplitude * torch.sin(x - phase))
        True

    Source:
        Finn, Abbeel and Levine 2017 (arXiv:1703.03400), section 5.1.
    """
    check_count("shots", shots)
    check_count("queries", queries, least=0)
    return _Sinusoids(shots, queries, check_floating(dtype), check_device(device))


@dataclass(frozen=True)
class _Sinusoids:
    """The sampler of ``sinusoids``."""

    shots: int
    queries: int
    dtype: torch.dtype
    device: torch.device | str

    def sample(self, seed: int) -> Task:
        """The task of this seed."""
        numbers = torch.rand(2 + self.shots + self.queries, generator=rng.generator(seed), dtype=torch.float64)
        amplitude, phase = 0.1 + 4.9 * numbers[0], math.pi * numbers[1]
        x = 10 * numbers[2:, None] - 5
        points = torch.stack([x, amplitude * torch.sin(x - phase)]).to(self.device, self.dtype)
        support, query = points[:, : self.shots], points[:, self.shots :]
        return Task(tuple(support), tuple(query) if self.queries else None, (amplitude.item(), phase.item()))

    def sample_batch(self, seed: int, tasks: int) -> Task:
        """A stack of tasks, of which number i is ``sample(rng.fold(seed, i))``."""
        return stack([self.sample(each) for each in seeds(seed, tasks)])
