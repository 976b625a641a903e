"""The exact meta-gradient by forward mode: for few meta-parameters and any number of steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcmeta import tree
from funcmeta._check import check_count
from funcmeta._errors import ArgumentError, GraphError
from funcmeta._exact_layers import DualLayers, wrong_in_forward_mode
from funcmeta._gradient import Gradient, Objective, exact, steered
from funcmeta._graph import check_declared, inner_leaf, inside_functorch, walk
from funcmeta._typing import Meta, Tree
from funcmeta.estimators._attach import attach
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import Memory, StoreAll, Trajectory


@dataclass(frozen=True)
class ForwardMode:
    """The exact meta-gradient, carried along with the state: dθ_{k+1}/dmeta = ∂step/∂θ · dθ_k/dmeta + ∂step/∂meta.

    Every number in ``meta`` that requires grad is one direction, and all directions are pushed forward together: memory
    is that of the state for each direction, whatever the number of steps, and nothing is kept for a backward pass, so
    the memory policy has no effect. Time grows with the directions: for a few hyper-parameters, not for initial
    parameters. The result can not be differentiated again. The first step is taken once more, with its graph, to see
    that it depends on ``meta`` and ``state`` alone.

    Args:
        chunk: directions that are pushed at once; None takes all. Fewer need less memory and more time, as the steps
            are taken again for each chunk.

    Raises:
        ArgumentError: ``chunk`` is not a positive integer; a carry requires grad; it is run inside ``torch.func``.
        CapturedTensorError: a tensor that requires grad is used without coming through ``meta``.
        GraphError: an operation has no forward mode, or torch has its second derivative wrong there.

    Examples:
        >>> ForwardMode()
        ForwardMode(chunk=None)

    Source: Franceschi et al. (2017), "Forward and Reverse Gradient-Based Hyperparameter Optimization", section 3.2.
    """

    chunk: int | None = None
    follows_memory: ClassVar[bool] = False
    unreached_advice: ClassVar[str] = (
        "Use it in the loss or the optimizer, take it out of `meta`, or set requires_grad=False on it."
    )

    def __post_init__(self) -> None:
        check_count("chunk", self.chunk, or_none=True, advice="Pass e.g. chunk=8.")

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Take the steps with tangents, once for each chunk of directions."""
        if inside_functorch():
            raise ArgumentError("ForwardMode pushes tangents by torch.func and can not run inside it. Use Reverse().")
        moving = [leaf for leaf in tree.leaves(meta) if leaf.requires_grad]
        count = sum(leaf.numel() for leaf in moving)
        if not count or not torch.is_grad_enabled():
            return Reverse()(primal, meta, StoreAll())
        fixed = tree.detach(meta)
        if any(leaf.requires_grad for leaf in tree.tensors(primal.init(fixed))):
            raise ArgumentError(
                "The initial state requires grad by itself, not through meta: ForwardMode differentiates by meta only. "
                "Pass an earlier unroll's out.carry, which is detached, or use Reverse()."
            )
        _check_captured(primal, meta)
        slopes = []
        with DualLayers(), _explained():
            for first in range(0, count, self.chunk or count):
                directions = _directions(moving, first, min(first + (self.chunk or count), count))
                loss, path, along = _pushed_run(primal, _Movable(meta), directions)
                slopes.append(along)
        check_declared(tree.tensors((path.state, loss)), [], primal)
        if loss is None:
            return Outcome(None, path)
        parts = torch.split(torch.cat(slopes), [leaf.numel() for leaf in moving])
        gradients = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, moving, strict=True)]
        return Outcome(attach(loss, gradients, moving), path)


def _check_captured(primal: Primal, meta: Meta) -> None:
    """Raise if the first step or the meta-loss, taken once with a graph, depends on a tensor that it captured."""
    inputs = tree.map(lambda leaf: inner_leaf(leaf) if leaf.requires_grad else leaf, meta)
    results = state = primal.init(inputs)
    if primal.stop > primal.start:
        results = state, _ = primal.step(inputs, state, primal.start)
    judged = None if primal.meta_loss is None else primal.meta_loss(inputs, state)
    check_declared(tree.tensors((results, judged)), tree.leaves(inputs), primal)


class _Movable:
    """``meta`` as a function of its leaves that require grad."""

    def __init__(self, meta: Meta) -> None:
        self.point = [leaf.detach() for leaf in tree.leaves(meta) if leaf.requires_grad]
        self._meta = tree.map(lambda leaf: tree.HOLE if leaf.requires_grad else leaf, meta)

    def at(self, values: Sequence[Tensor]) -> Meta:
        return tree.filled(self._meta, values)


def _directions(moving: Sequence[Tensor], first: int, stop: int) -> list[Tensor]:
    """The unit vectors ``first`` to ``stop - 1`` of the space of all numbers in these tensors, tensor by tensor."""
    sizes = [leaf.numel() for leaf in moving]
    rows = torch.arange(first, stop, device=moving[0].device)
    columns = torch.arange(sum(sizes), device=moving[0].device)
    parts = torch.split(rows[:, None] == columns, sizes, dim=1)
    return [part.reshape(len(part), *leaf.shape).to(leaf) for part, leaf in zip(parts, moving, strict=True)]


def _pushed_run(
    primal: Primal, movable: _Movable, directions: list[Tensor]
) -> tuple[Tensor | None, Trajectory, Tensor]:
    """The meta-loss, the trajectory, and the derivative of the meta-loss along each direction."""
    count = len(movable.point)
    state, slopes = _pushed(lambda values: primal.init(movable.at(values)), movable.point, directions)
    losses, aux, shares = [], [], []
    for index in range(primal.start, primal.stop):
        hollow, moved, tangents = _moving(state, slopes)

        def step(values: Sequence[Tensor], hollow: Any = hollow, index: int = index) -> Any:
            with steered(_checked):
                return primal.step(movable.at(values[:count]), tree.filled(hollow, values[count:]), index)

        (state, info), along = _pushed(step, [*movable.point, *moved], [*directions, *tangents])
        slopes, rest = along[: len(_floats(state))], along[len(_floats(state)) :]
        losses.append(info.loss)
        aux.append(info.aux)
        if info.meta_loss is not None:
            shares.append((info.meta_loss, _or_zeros(rest[1], info.meta_loss, directions)))
    path = Trajectory(state, None, losses, aux)
    if primal.meta_loss is not None:
        judge, (hollow, moved, tangents) = primal.meta_loss, _moving(state, slopes)
        loss, (along_loss,) = _pushed(
            lambda values: judge(movable.at(values[:count]), tree.filled(hollow, values[count:])),
            [*movable.point, *moved],
            [*directions, *tangents],
        )
        shares.append((loss, _or_zeros(along_loss, loss, directions)))
    if not shares:
        return None, path, torch.zeros(())
    return torch.stack([each for each, _ in shares]).sum(), path, torch.stack([each for _, each in shares]).sum(0)


def _pushed(
    fn: Callable[[Sequence[Tensor]], Any], point: list[Tensor], directions: list[Tensor]
) -> tuple[Any, list[Tensor | None]]:
    """The result of a function, and the derivatives of its floating-point tensors along each direction.

    A tensor that does not move has None: a frozen backbone in the state is not copied for every direction.
    """
    made: list[Any] = []

    def flat(*values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        result = fn(values)
        moves = [_tangent(leaf) is not None for leaf in _floats(result)]
        made[:] = [_constant(result, keep=False), moves]
        floats = [leaf for leaf, moving in zip(_floats(result), moves, strict=True) if moving]
        return floats or [values[0]], tree.tensors(result)  # torch pushes no empty result

    at = tuple([each.contiguous() for each in point])

    def along(*tangents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        _, slopes, every = torch.func.jvp(flat, at, tangents, has_aux=True)  # type: ignore[misc]
        return slopes, every

    both = torch.func.vmap(along, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
    slopes, every = both(*directions)
    found = iter(slopes)
    return tree.filled(made[0], every), [next(found) if moving else None for moving in made[1]]


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call, no-any-return]


def _moving(state: Any, tangents: Sequence[Tensor | None]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The state with holes for the tensors that have a tangent, these, and their tangents."""
    moves = [tangent is not None for tangent in tangents]
    each = iter(moves)

    def opened(leaf: Any) -> Any:
        return tree.HOLE if isinstance(leaf, Tensor) and leaf.is_floating_point() and next(each) else leaf

    moved = [leaf for leaf, moving in zip(_floats(state), moves, strict=True) if moving]
    return tree.map(opened, state), moved, [tangent for tangent in tangents if tangent is not None]


def _or_zeros(slope: Tensor | None, loss: Tensor, directions: Sequence[Tensor]) -> Tensor:
    return loss.new_zeros(len(directions[0])) if slope is None else slope


def _checked(objective: Objective, params: Tree) -> Gradient:
    """The exact gradient, by formulas that can be differentiated, where torch has these right in forward mode."""

    def looked_at(inputs: Tree) -> tuple[Tensor, Any]:
        value, aux = objective(inputs)
        wrong = wrong_in_forward_mode(walk([value]).nodes)
        if wrong:
            raise GraphError(
                f"The inner loss runs {wrong}, whose gradient torch differentiates wrongly in forward mode. Use "
                f"Reverse() or MixedMode()."
            )
        return value, aux

    with torch.enable_grad():
        return exact(looked_at, params)


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do when torch has no forward mode for an operation."""
    try:
        yield
    except NotImplementedError as error:
        raise GraphError(
            f"ForwardMode met an operation without forward mode; torch said: {str(error).splitlines()[0]} "
            f"Use Reverse() or MixedMode()."
        ) from error


def _floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tensors(value) if leaf.is_floating_point()]


def _constant(value: Any, *, keep: bool = True) -> Any:
    """The tree with holes for its floating-point tensors, or, unless the others are kept, for all tensors."""
    return tree.map(
        lambda leaf: tree.HOLE if isinstance(leaf, Tensor) and (leaf.is_floating_point() or not keep) else leaf, value
    )
