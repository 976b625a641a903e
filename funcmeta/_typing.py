"""Names for the shapes of things that travel through the library."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Tree: TypeAlias = Any
"""Any nesting of dicts, lists, tuples and NamedTuples whose leaves are tensors (torch's pytrees)."""

Params: TypeAlias = dict[str, Tensor]
"""Trainable tensors of a module, by their ``named_parameters`` name; a tied weight appears once."""

Buffers: TypeAlias = dict[str, Tensor]
"""What else a module needs to run: its buffers and its frozen parameters."""

Batch: TypeAlias = Any
"""What a loss reads: usually a pair (inputs, targets)."""

Meta: TypeAlias = Any
"""Whatever is learned across tasks: a tree of tensors, always passed as an argument."""

Schedule: TypeAlias = Callable[[Tensor], Tensor | float]
"""A hyper-parameter as a function of the 0-d tensor that counts the optimizer's steps from 0."""

Hyper: TypeAlias = float | Tensor | Tree | Schedule
"""A hyper-parameter: a number, a tensor, a tree like the parameters, or a function of the step."""
