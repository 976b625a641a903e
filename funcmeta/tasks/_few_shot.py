"""Few-shot classification tasks from a bank of images with class labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from funcmeta import rng
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta.tasks._task import Task, seeds, unstack

ClassName = tuple[str, str]
"""Script (or alphabet) and character."""


class Bank(Protocol):
    """Classes of images, and how an example of a class comes from random numbers."""

    @property
    def names(self) -> Sequence[ClassName]:
        """The name of each class."""

    @property
    def examples(self) -> int | None:
        """How many examples a class has; None when there is no limit."""

    def noise(self, ways: int, examples: int, generator: torch.Generator) -> Tensor:
        """The random numbers [ways, examples, ...] behind so many examples of so many classes."""

    def images(self, classes: Tensor, noise: Tensor) -> Tensor:
        """Images [tasks, ways, examples, 1, size, size] of classes [tasks, ways] from the noise of these tasks."""


@dataclass(frozen=True, eq=False)
class FewShot:
    """A distribution of classification tasks: a few classes, a few examples of each.

    ``ways`` classes are drawn without replacement and labelled in random order. A batch is a pair of images
    [ways · examples, 1, size, size], ink 1 and paper 0, and int64 labels [ways · examples]. Examples are interleaved,
    labels 0, 1, ..., ways-1, 0, 1, ..., so that each stretch of ``ways`` examples holds every class once. ``spec`` is
    the tuple of the names of the classes, in the order of their labels. Without queries, ``query`` is None.

    Attributes:
        bank: the classes and their images.
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class.

    Raises:
        ArgumentError: a count is out of range, or the bank has fewer classes, or examples of a class, than asked for.

    Examples:
        >>> sampler = fm.tasks.glyphs(ways=3, shots=2, queries=4)
        >>> task = sampler.sample(seed=0)
        >>> task.support[0].shape, task.support[1].tolist()
        (torch.Size([6, 1, 28, 28]), [0, 1, 2, 0, 1, 2])
        >>> sampler.sample_batch(seed=0, tasks=7).query[0].shape
        torch.Size([7, 12, 1, 28, 28])

    Source:
        Vinyals et al. 2016 (arXiv:1606.04080), section 4.1.
    """

    bank: Bank
    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        """Refuse what the bank cannot serve."""
        check_count("shots", self.shots)
        check_count("queries", self.queries, least=0)
        available = len(self.bank.names)
        if check_count("ways", self.ways) > available:
            raise ArgumentError(
                f"ways is {self.ways}, expected at most {available}, the number of classes. "
                "Ask for fewer ways, or another split."
            )
        limit = self.bank.examples
        if limit is not None and self.shots + self.queries > limit:
            raise ArgumentError(
                f"shots + queries is {self.shots + self.queries}, expected at most {limit}, "
                "the number of examples of a class. Ask for fewer shots or queries."
            )

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """The names of all classes that a task may hold."""
        return tuple(self.bank.names)

    def sample(self, seed: int) -> Task:
        """The task of this seed."""
        return unstack(self._draw([seed]), 0)

    def sample_batch(self, seed: int, tasks: int) -> Task:
        """A stack of tasks, of which number i is ``sample(rng.fold(seed, i))``."""
        return self._draw(seeds(seed, tasks))

    def _draw(self, task_seeds: list[int]) -> Task:
        """The stack of the tasks of these seeds."""
        names = self.bank.names
        chosen, noise = [], []
        for seed in task_seeds:
            generator = rng.generator(seed)
            chosen.append(torch.randperm(len(names), generator=generator)[: self.ways])
            noise.append(self.bank.noise(self.ways, self.shots + self.queries, generator))
        classes = torch.stack(chosen)
        images = self.bank.images(classes, torch.stack(noise)).transpose(1, 2)
        spec = tuple(tuple(names[index] for index in row) for row in classes.tolist())
        query = self._batch(images[:, self.shots :]) if self.queries else None
        return Task(self._batch(images[:, : self.shots]), query, spec)

    def _batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [tasks, examples, ways, ...] and their labels, both [tasks, examples · ways, ...]."""
        tasks, examples = images.shape[:2]
        labels = torch.arange(self.ways, device=images.device).expand(tasks, examples, self.ways)
        return images.flatten(1, 2), labels.flatten(1)
