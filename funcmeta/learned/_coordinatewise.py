"""One network for every coordinate of every tensor, run as one batch."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._typing import Tree
from funcmeta.learned._optimizer import LearnedOptimizer
from funcmeta.optim._rule import check_missed


class CoordinatewiseState(NamedTuple):
    """What a coordinate-wise optimizer keeps.

    Attributes:
        step: 0-d int64 tensor, the number of steps taken.
        slots: for each parameter, in their order, what its features are made of.
        hidden: the network's memory of all coordinates, tensors with coordinates in their last dimension; or with
            parameters there, where it keeps one entry for each.
        missed: int64 tensor [parameters], in how many of the steps each had no gradient.
    """

    step: Tensor
    slots: tuple[Any, ...]
    hidden: Any
    missed: Any = ()


class Coordinatewise(LearnedOptimizer):
    """A learned optimizer in three parts, of which subclasses define the second, and the others where they need to.

    1. ``observe``: the features of one tensor, [features, *shape], and what it remembers of its gradients;
    2. ``decide``: the network, from the features of all coordinates to outputs, both with coordinates last;
    3. ``act``: the update from the outputs of one tensor.

    Whatever the dtype of the parameters, all of it is computed in that of the network's weights. A parameter whose
    gradient is None takes no part in a step: none of the three sees it, and what is kept for it stays.

    Examples:
        Descent along a learned function of the gradient:

        >>> class Cubic(Coordinatewise):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.tensor([-0.1, -0.01]))
        ...     def observe(self, param, grad, slots, step):
        ...         return torch.stack([grad, grad**3]), slots
        ...     def decide(self, features, hidden, sizes):
        ...         return self.weight[None] @ features, hidden
        >>> params = {"w": torch.ones(2, 3), "b": torch.ones(3)}
        >>> transform = fm.as_transform(Cubic())
        >>> updates, state = transform.update(params, transform.init(params), params)
        >>> updates["b"].detach()
        tensor([-0.1100, -0.1100, -0.1100])

    Source: the sharing over coordinates is that of Andrychowicz et al. (2016), section 2.1.
    """

    whole: ClassVar[bool] = True

    def init_state(self, param: Tree) -> CoordinatewiseState:
        """The state before the first step, for a tensor or a tree of them."""
        leaves, dtype = tree.leaves(param), self._dtype()
        slots = tuple([self.slots(torch.empty_like(leaf, dtype=dtype)) for leaf in leaves])
        sizes, device = [leaf.numel() for leaf in leaves], leaves[0].device if leaves else None
        hidden = self.memory(torch.empty((0, sum(sizes)), dtype=dtype, device=device), sizes)
        step = torch.zeros((), dtype=torch.int64, device=device)
        return CoordinatewiseState(step, slots, hidden, step.new_zeros(len(leaves)))

    def forward(self, param: Tree, grad: Tree, state: CoordinatewiseState) -> tuple[Tree, CoordinatewiseState]:
        """The updates and the next state, for a tensor or a tree of them."""
        dtype, params, grads = self._dtype(), tree.leaves(param), tree.leaves(grad)
        absent = [each is None for each in grads]
        missed = check_missed(state.missed, len(params), not any(absent))
        steps = [state.step] * len(params) if isinstance(missed, tuple) else (state.step - missed).unbind()
        used = [place for place, gone in enumerate(absent) if not gone]
        following = state._replace(step=state.step + 1)
        if len(used) < len(params):
            following = following._replace(missed=missed + missed.new_tensor(absent))
        if not used:
            return tree.like(param, grads), following
        slots: list[Any] = list(state.slots)
        updates: list[Any] = [None] * len(params)
        features = []
        for place in used:
            row = params[place].to(dtype), grads[place].to(dtype), slots[place], steps[place]
            seen, slots[place] = self.observe(*row)
            features.append(seen.flatten(1) if seen.dim() > 1 else seen[:, None])
        sizes = [leaf.numel() for leaf in params]
        chosen = [sizes[place] for place in used]
        if len(used) == len(params):
            outputs, hidden = self.decide(torch.cat(features, 1), state.hidden, sizes)
        else:
            given = tree.map(lambda old: _columns(old, sizes, used), state.hidden)
            outputs, fresh = self.decide(torch.cat(features, 1), given, chosen)
            hidden = tree.map(lambda old, new: _put_back(old, new, sizes, used), state.hidden, fresh)
        for place, part in zip(used, torch.split(outputs, chosen, 1), strict=True):
            leaf = params[place].to(dtype)
            updates[place] = self.act(part.reshape(part.shape[0], *leaf.shape), leaf)
        return tree.like(param, updates), following._replace(slots=tuple(slots), hidden=hidden)

    def _dtype(self) -> torch.dtype:
        """Of the weights; torch's default where there are none."""
        return next((weight.dtype for weight in self.parameters()), torch.get_default_dtype())

    def slots(self, param: Tensor) -> Any:
        """What one tensor remembers before the first step; only the shape, dtype and device of ``param`` count."""
        return ()

    def memory(self, like: Tensor, sizes: Sequence[int]) -> Any:
        """The network's memory before the first step, for as many coordinates as ``like`` [0, coordinates] has."""
        return ()

    def observe(self, param: Tensor, grad: Tensor, slots: Any, step: Tensor) -> tuple[Tensor, Any]:
        """The features of one tensor, [features, *shape], and its next slots."""
        return torch.stack([grad]), slots

    @abstractmethod
    def decide(self, features: Tensor, hidden: Any, sizes: Sequence[int]) -> tuple[Tensor, Any]:
        """From [features, coordinates] to [outputs, coordinates], and the next memory; tensors have these sizes."""

    def act(self, outputs: Tensor, param: Tensor) -> Tensor:
        """The update of one tensor from the network's outputs for it, [outputs, *shape]."""
        return outputs[0]


def _widths(memory: Tensor, sizes: Sequence[int]) -> Sequence[int]:
    """How many entries of the last dimension each parameter has: its coordinates, or one; none in any other memory."""
    last = memory.shape[-1] if memory.dim() else 0
    return sizes if last == sum(sizes) else [1] * len(sizes) if last == len(sizes) else ()


def _columns(memory: Tensor, sizes: Sequence[int], used: Sequence[int]) -> Tensor:
    """The memory of some of the parameters."""
    widths = _widths(memory, sizes)
    parts = torch.split(memory, list(widths), -1) if widths else ()
    return torch.cat([parts[place] for place in used], -1) if widths else memory


def _put_back(memory: Tensor, fresh: Tensor, sizes: Sequence[int], used: Sequence[int]) -> Tensor:
    """The memory of all parameters, with what is new of some of them."""
    widths = _widths(memory, sizes)
    if not widths:
        return fresh
    parts = list(torch.split(memory, list(widths), -1))
    for place, part in zip(used, torch.split(fresh, [widths[place] for place in used], -1), strict=True):
        parts[place] = part
    return torch.cat(parts, -1)


class Dense(nn.Module):
    """The affine map W x + b of the first dimension of x [inputs, coordinates]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[inputs, coordinates] → [outputs, coordinates]."""
        return torch.addmm(self.bias[:, None], self.weight, x)


class LSTMCell(nn.Module):
    """One step of an LSTM with coordinates last; the memory is the pair (output, cell)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gates = Dense(inputs + hidden, 4 * hidden)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next memory."""
        out, cell = memory
        enter, forget, new, leave = self.gates(torch.cat([x, out])).chunk(4)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell


class StackedLSTM(nn.Module):
    """Layers of LSTM cells; the memory is a tuple of their memories."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self._hidden = hidden
        self.cells = nn.ModuleList([LSTMCell(inputs if layer == 0 else hidden, hidden) for layer in range(layers)])

    def memory(self, like: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Zeros, for as many coordinates as ``like`` [0, coordinates] has."""
        zero = like.new_zeros((self._hidden, like.shape[1]))
        return tuple([(zero, zero) for _ in self.cells])

    def forward(self, x: Tensor, memory: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Any]:
        """The output of the last layer, and the next memory."""
        following = []
        for cell, own in zip(self.cells, memory, strict=True):
            following.append(cell(x, own))
            x = following[-1][0]
        return x, tuple(following)
