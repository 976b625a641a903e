"""What a learned optimizer is, and how it becomes an inner optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from funcmeta import tree
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._typing import Params, Tree
from funcmeta.optim import Transform
from funcmeta.optim._rule import check_gradients


class LearnedOptimizer(nn.Module, ABC):
    """A module that is an inner optimizer: a pure function of (parameter, gradient, state) → (update, state).

    u, state' = forward(θ, g, state); θ' = θ + u. Its own parameters are what meta-training learns; their number does
    not depend on the parameters that it optimizes. Neither function may write to its arguments.

    Subclasses define ``init_state`` and ``forward`` for one tensor. Those that set ``whole`` get a tree of tensors
    at once (of which one tensor is the simplest case), and may compute across tensors. A gradient in that tree is None
    where the loss did not use the parameter: return None for its update, and what the state keeps for it as it was.

    Attributes:
        kind: name by which a saved optimizer is recognized.
        config: arguments that make the same optimizer again, numbers, strings, booleans and lists of them.
        whole: whether ``init_state`` and ``forward`` take a whole tree of tensors.

    Examples:
        Gradient descent with a learned rate:

        >>> class Descent(LearnedOptimizer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lr = nn.Parameter(torch.tensor(0.5))
        ...     def init_state(self, param):
        ...         return ()
        ...     def forward(self, param, grad, state):
        ...         return -self.lr * grad, state
        >>> transform = as_transform(Descent())
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)
        >>> updates["w"].detach()
        tensor([-1.])

    Source: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent", equation 1.
    """

    whole: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.kind = type(self).__name__
        self.config: dict[str, Any] = {}

    @abstractmethod
    def init_state(self, param: Any) -> Any:
        """The state before the first step, a tree of tensors."""

    @abstractmethod
    def forward(self, param: Any, grad: Any, state: Any) -> tuple[Any, Any]:
        """The update, which is added to the parameter, and the next state."""

    def _get_name(self) -> str:
        """The name in what ``repr`` gives."""
        return self.kind

    def extra_repr(self) -> str:
        """The arguments it was made with."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())


class EachState(NamedTuple):
    """The states of the tensors, each by itself, in the order of the parameters."""

    states: tuple[Any, ...]


def as_transform(optimizer: LearnedOptimizer, theta: Params | None = None) -> Transform:
    """A learned optimizer as a ``Transform`` over any tree of parameters.

    u, state' = optimizer_θ(params, g, state), with the weights θ given from outside, so that a meta-gradient reaches
    them: ``inner_problem(..., optimizer=lambda meta: as_transform(optimizer, meta["optimizer"]))``.

    Args:
        optimizer: the module; nothing is written to it.
        theta: its parameters by their ``named_parameters`` names, of any floating-point dtype; None: its own.

    Returns:
        A transform. Updates have the shapes and dtypes of the parameters.

    Raises:
        ArgumentError: ``optimizer`` is not a LearnedOptimizer.
        StructureError: names or shapes in ``theta`` are not the module's; a gradient does not fit its parameter, or an
            update does not.

    Examples:
        >>> transform = as_transform(fm.learned.linear(gradient=-0.5))
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = transform.update({"w": torch.ones(2)}, transform.init(params), params)
        >>> updates["w"].detach()
        tensor([-0.5000, -0.5000])

    Source: this library; the pair of functions is that of optax (https://optax.readthedocs.io).
    """
    if not isinstance(optimizer, LearnedOptimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}, expected a LearnedOptimizer. Pass what a function of "
            f"funcmeta.learned returns, such as lstm(), or subclass LearnedOptimizer."
        )
    weights = {**dict(optimizer.named_parameters()), **dict(optimizer.named_buffers())}
    if theta is not None:
        _check_theta(dict(optimizer.named_parameters()), theta)
        weights.update(theta)

    def one(param: Any, grad: Any, state: Any) -> tuple[Any, Any]:
        update, state = functional_call(optimizer, weights, (param, grad, state))
        return update, state

    def init(params: Tree) -> Any:
        tree.check_tensors(params, name="params")
        first = _First(optimizer)
        own = {f"optimizer.{name}": weight for name, weight in weights.items()}
        if optimizer.whole:
            return functional_call(first, own, (params,))
        return EachState(tuple([functional_call(first, own, (leaf,)) for leaf in tree.leaves(params)]))

    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        leaves, given = tree.leaves(params), tree.aligned(params, grads, name="grads")
        complete = check_gradients(given, leaves)
        if optimizer.whole:
            with _told_of_none(optimizer, complete):
                updates, state = one(params, tree.like(params, given), state)
            changes = tree.aligned(params, updates, name="updates")
        else:
            rows = zip(leaves, given, state.states, strict=True)
            pairs = [(None, row[2]) if row[1] is None else one(*row) for row in rows]
            changes, state = [change for change, _ in pairs], EachState(tuple([own for _, own in pairs]))
        return tree.like(params, [_fitting(*row) for row in zip(changes, leaves, given, strict=True)]), state

    return Transform(init, update)


class _First(nn.Module):
    """The state before the first step, as a function of the weights."""

    def __init__(self, optimizer: LearnedOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer

    def forward(self, param: Any) -> Any:
        return self.optimizer.init_state(param)


@contextmanager
def _told_of_none(optimizer: LearnedOptimizer, complete: bool) -> Iterator[None]:
    """Say what is wrong when an optimizer of whole trees computes with a gradient that is None."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if complete:
            raise
        raise StructureError(
            f"{optimizer.kind} takes whole trees and failed on a gradient that is None: {error}. Let forward return "
            f"None as the update of such a parameter and keep its state, or let the inner loss use every parameter."
        ) from error


def _fitting(update: Any, param: Tensor, grad: Tensor | None) -> Tensor | None:
    if update is None and grad is None:
        return None
    if grad is None:
        raise StructureError(
            f"the learned optimizer's update is {tree.describe(update)} for a parameter without a gradient, expected "
            f"None. Return None from forward where the gradient is None."
        )
    if not isinstance(update, Tensor) or update.shape != param.shape:
        raise StructureError(
            f"the learned optimizer's update is {tree.describe(update)}, but its parameter is {tree.describe(param)}. "
            f"Return one update of the parameter's shape from forward."
        )
    return update.to(param.dtype)


def _check_theta(own: Mapping[str, Tensor], theta: Any) -> None:
    if not isinstance(theta, Mapping) or theta.keys() != own.keys():
        names = sorted(theta) if isinstance(theta, Mapping) else type(theta).__name__
        raise StructureError(
            f"theta has {names}, expected {sorted(own)}, the optimizer's parameters by name. Pass e.g. "
            f"init_params(optimizer), or what was trained from it."
        )
    for name, tensor in theta.items():
        if not isinstance(tensor, Tensor) or tensor.shape != own[name].shape or not tensor.is_floating_point():
            raise StructureError(
                f"theta['{name}'] is {tree.describe(tensor)}, expected a floating-point tensor of shape "
                f"{list(own[name].shape)}. Pass e.g. init_params(optimizer), or what was trained from it."
            )
