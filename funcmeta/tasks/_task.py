"""A task, a stack of tasks, and what it is to sample them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import Each, joined, take
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError
from funcmeta._typing import Batch


class Task(NamedTuple):
    """One learning problem: what to learn from, what to be judged on, and what it is about.

    A batch is any tree of tensors that the loss reads, usually a pair (inputs, targets). In a stack of tasks, as from
    ``sample_batch``, each tensor has a leading task dimension and ``spec`` is the tuple of the tasks' specs. ``init``
    gets its own task's spec under every strategy.

    Attributes:
        support: the batch of every inner step, or a function from the step index (from 0) to its batch.
        query: the batch of the meta-loss; None when the inner steps' losses are all of it.
        spec: anything that describes the task, such as the names of its classes; nothing is computed from it.

    Examples:
        >>> task = Task(support=(torch.zeros(4, 1), torch.ones(4, 1)), query=None)
        >>> task.support[0].shape
        torch.Size([4, 1])

    Source:
        The split in support and query set is that of Vinyals et al. 2016 (arXiv:1606.04080), section 2.2.
    """

    support: Batch | Callable[[int], Batch]
    query: Batch | None
    spec: Any = None


class Sampler(Protocol):
    """A distribution of tasks, from which a seed picks one.

    A task is a pure function of the seed: no global generator is read or written.

    Examples:
        >>> sampler: Sampler = fm.tasks.sinusoids(shots=5)
        >>> sampler.sample_batch(seed=0, tasks=3).support[0].shape
        torch.Size([3, 5, 1])

    Source: this library.
    """

    def sample(self, seed: int) -> Task:
        """The task of this seed."""

    def sample_batch(self, seed: int, tasks: int) -> Task:
        """A stack of tasks, of which number i is ``sample(rng.fold(seed, i))``."""


def stack(tasks: Sequence[Task]) -> Task:
    """Stack tasks of one shape into one, each tensor with a leading task dimension.

    Args:
        tasks: at least one task, all with the same keys, shapes and dtypes in ``support`` and in ``query``.

    Returns:
        The stack; its ``spec`` is the tuple of the tasks' specs.

    Raises:
        ArgumentError: there is no task, or something else, or a support is a function of the step.

    Examples:
        >>> sampler = fm.tasks.quadratics(dimension=2)
        >>> both = stack([sampler.sample(seed=1), sampler.sample(seed=2)])
        >>> [leaf.shape for leaf in both.support]
        [torch.Size([2, 2, 2]), torch.Size([2, 2])]

    Source: this library.
    """
    if not isinstance(tasks, list | tuple) or isinstance(tasks, Task) or not all(isinstance(x, Task) for x in tasks):
        raise ArgumentError(f"tasks is {type(tasks).__name__}, expected a list of Task. Pass [task, task].")
    if not tasks:
        raise ArgumentError("tasks is empty, expected at least one task. Pass a list of tasks.")
    first = tasks[0]
    for index, task in enumerate(tasks):
        if callable(task.support):
            raise ArgumentError(
                f"tasks[{index}].support is a function of the step, expected a batch. "
                "Stack tasks with batches only, or write one function that returns stacked batches."
            )
        tree.check_same(first[:2], task[:2], name=f"tasks[{index}][:2]", advice="Stack tasks of one shape.")
    support, query = tree.map(_stack_leaves, first[:2], *[task[:2] for task in tasks[1:]])
    return Task(support, query, tuple(task.spec for task in tasks))


def seeds(seed: int, tasks: int) -> list[int]:
    """The seed of each task of a stack."""
    return [rng.fold(seed, index) for index in range(check_count("tasks", tasks))]


def unstack(tasks: Task, index: int) -> Task:
    """One task of a stack; a function of the step becomes the function that gives this task's batches."""
    support, query = take(tuple(tasks[:2]), index)
    return Task(support, query, tasks.spec[index] if isinstance(tasks.spec, tuple) else tasks.spec)


def _stack_leaves(first: Any, *rest: Any) -> Any:
    """The stack of tensors; what is no tensor is kept for each, unless all have the same, such as an absent query."""
    return torch.stack([first, *rest]) if isinstance(first, Tensor) else joined([first, *rest])


class SpecRead(BaseException):
    """The spec of one of some stacked tasks was asked for, while they ran as one batch and have no common one."""


class WithoutSpec(Task):
    """A task among stacked ones that run as one batch: whoever looks at its spec gets ``SpecRead``."""

    __slots__ = ()

    @property
    def spec(self) -> Any:
        """Not here."""
        raise SpecRead

    def __iter__(self) -> Iterator[Any]:
        """Not here."""
        raise SpecRead

    def __getitem__(self, index: Any) -> Any:
        """The support and the query."""
        if index in (0, 1):
            return super().__getitem__(index)
        raise SpecRead


def as_one(support: Any, query: Any, spec: Any) -> Task:
    """A task among stacked ones that run as one batch, with the spec that all have, or none that can be read."""
    if not isinstance(spec, tuple) or not spec:
        return Task(support, query, spec)
    common = joined(spec)
    return WithoutSpec(support, query) if isinstance(common, Each) else Task(support, query, common)
