"""One network for every coordinate of every tensor, run as one batch."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._typing import Tree
from funcmeta.learned._optimizer import LearnedOptimizer


class CoordinatewiseState(NamedTuple):
    """What a coordinate-wise optimizer keeps.

    Attributes:
        step: 0-d int64 tensor, the number of steps taken.
        slots: for each parameter, in their order, what its features are made of.
        hidden: the network's memory of all coordinates, tensors with coordinates in their last dimension.
    """

    step: Tensor
    slots: tuple[Any, ...]
    hidden: Any


class Coordinatewise(LearnedOptimizer):
    """A learned optimizer in three parts, of which subclasses define the second, and the others where they need to.

    1. ``observe``: the features of one tensor, [features, *shape], and what it remembers of its gradients;
    2. ``decide``: the network, from the features of all coordinates to outputs, both with coordinates last;
    3. ``act``: the update from the outputs of one tensor.

    Whatever the dtype of the parameters, all of it is computed in that of the network's weights.

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
        return CoordinatewiseState(torch.zeros((), dtype=torch.int64, device=device), slots, hidden)

    def forward(self, param: Tree, grad: Tree, state: CoordinatewiseState) -> tuple[Tree, CoordinatewiseState]:
        """The updates and the next state, for a tensor or a tree of them."""
        dtype = self._dtype()
        params = [leaf.to(dtype) for leaf in tree.leaves(param)]
        grads = [leaf.to(dtype) for leaf in tree.leaves(grad)]
        rows = zip(params, grads, state.slots, strict=True)
        seen = [self.observe(*row, state.step) for row in rows]
        sizes = [leaf.numel() for leaf in params]
        if not seen:
            return param, state._replace(step=state.step + 1)
        features = torch.cat([each.flatten(1) if each.dim() > 1 else each[:, None] for each, _ in seen], 1)
        outputs, hidden = self.decide(features, state.hidden, sizes)
        parts = torch.split(outputs, sizes, 1)
        updates = [
            self.act(part.reshape(part.shape[0], *leaf.shape), leaf) for part, leaf in zip(parts, params, strict=True)
        ]
        following = CoordinatewiseState(state.step + 1, tuple([slots for _, slots in seen]), hidden)
        return tree.like(param, updates), following

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
