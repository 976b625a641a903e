"""Minimization of random quadratic functions."""

from dataclasses import dataclass

import torch

from funcmeta import rng
from funcmeta._check import check_count, check_device, check_floating
from funcmeta.tasks._task import Sampler, Task, seeds, stack


def quadratics(
    dimension: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sampler:
    """Minimization of f(θ) = ‖W θ - y‖² with random W and y.

    The entries of W and y are standard normal. A batch holds the function itself, so support and query are the same.

    Args:
        dimension: entries of θ, and of y.
        dtype: floating-point dtype of W and y.
        device: where W and y are returned.

    Returns:
        A sampler of tasks with batches (W, y), [dimension, dimension] and [dimension].

    Raises:
        ArgumentError: ``dimension`` is no count, ``dtype`` is not floating-point, or ``device`` is none.

    Examples:
        >>> W, y = quadratics(dimension=3).sample(seed=0).support
        >>> theta = torch.zeros(3)
        >>> bool(((W @ theta - y) ** 2).sum() == (y**2).sum())
        True

    Source:
        Andrychowicz et al. 2016 (arXiv:1606.04474), section 3.1.
    """
    return _Quadratics(check_count("dimension", dimension), check_floating(dtype), check_device(device))


@dataclass(frozen=True)
class _Quadratics:
    """The sampler of ``quadratics``."""

    dimension: int
    dtype: torch.dtype
    device: torch.device | str

    def sample(self, seed: int) -> Task:
        """The task of this seed."""
        size = (self.dimension, self.dimension + 1)
        numbers = torch.randn(size, generator=rng.generator(seed), dtype=torch.float64).to(self.device, self.dtype)
        function = (numbers[:, :-1].contiguous(), numbers[:, -1].contiguous())
        return Task(function, function)

    def sample_batch(self, seed: int, tasks: int) -> Task:
        """A stack of tasks, of which number i is ``sample(rng.fold(seed, i))``."""
        return stack([self.sample(each) for each in seeds(seed, tasks)])
