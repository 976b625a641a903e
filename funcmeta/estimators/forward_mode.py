"""The exact meta-gradient by forward mode: for few meta-parameters and any number of steps."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from funcmeta import rng, tree
from funcmeta._check import check_count
from funcmeta._context import Autocast
from funcmeta._duals import TangentError
from funcmeta._errors import ArgumentError, CapturedTensorError, FallbackWarning
from funcmeta._exact_layers import DualLayers
from funcmeta._graph import check_declared, coarsest, inner_leaf, inside_functorch
from funcmeta._typing import Meta
from funcmeta._watch import watched
from funcmeta.estimators._attach import attach, attach_along, floats, is_float
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.estimators.reverse import Reverse
from funcmeta.memory import Memory, StoreAll, Trajectory


@dataclass(frozen=True)
class ForwardMode:
    """The exact meta-gradient, carried along with the state: dθ_{k+1}/dmeta = ∂step/∂θ · dθ_k/dmeta + ∂step/∂meta.

    Every number in ``meta`` that requires grad is one direction, and all directions are pushed forward together: memory
    is that of the state for each direction, whatever the number of steps, and nothing is kept for a backward pass, so
    the memory policy has no effect. Time grows with the directions: for a few hyper-parameters, not for initial
    parameters. The result cannot be differentiated again. ``out.state`` is attached too, and keeps its derivatives
    along all directions until it is dropped.

    The start, the first step and the meta-loss are evaluated once more, in reverse mode: to see that they depend on
    ``meta`` and the state alone, and that both modes agree along a random direction. Where they do not, or where an
    operation has no forward mode or one that is not known to be right, the whole is taken by ``Reverse`` under the
    memory policy, and a ``FallbackWarning`` says why.

    Args:
        chunk: directions that are pushed at once; None takes all. Fewer need less memory and more time, as the steps
            are taken again for each chunk.

    Raises:
        ArgumentError: ``chunk`` is not a positive integer; a carry requires grad; it is run inside ``torch.func``.
        CapturedTensorError: a tensor that requires grad is used without coming through ``meta``.

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
            raise ArgumentError("ForwardMode pushes tangents by torch.func and cannot run inside it. Use Reverse().")
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
        try:
            return self._by_forward_mode(primal, meta, moving, count)
        except (CapturedTensorError, torch.OutOfMemoryError):
            raise
        except TangentError as error:
            why = error.why
        except (RuntimeError, ArgumentError) as error:  # an operation without forward mode, or torch.func refuses it
            why = f"forward mode met this {type(error).__name__}: {str(error).splitlines()[0]}"
        outcome = Reverse()(primal, meta, memory)  # what is wrong with the problem itself is an error again
        warnings.warn(
            f"ForwardMode takes the meta-gradient by reverse mode, as Reverse does, because {why}. The result is as "
            f"exact; memory and time are those of Reverse.",
            FallbackWarning,
            stacklevel=2,
        )
        return outcome

    def _by_forward_mode(self, primal: Primal, meta: Meta, moving: list[Tensor], count: int) -> Outcome:
        """The outcome by forward mode."""
        trials: _Trials | None = _Trials(primal, meta)
        slopes: list[Tensor] = []
        ends: list[Sequence[Tensor | None]] = []
        for first in range(0, count, self.chunk or count):
            directions = _directions(moving, first, min(first + (self.chunk or count), count))
            loss, path, along, end = _pushed_run(primal, _Movable(meta), directions, trials)
            slopes.append(along)
            ends.append(end)
            trials = None
        check_declared(tree.tensors((path.state, loss)), [], primal)
        if loss is None:
            return Outcome(None, path)
        parts = torch.split(torch.cat(slopes), [leaf.numel() for leaf in moving])
        gradients = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, moving, strict=True)]
        state = attach_along(path.state, [_joined(column) for column in zip(*ends, strict=True)], moving)
        return Outcome(attach(loss, gradients, moving), path._replace(state=state))


class _Trial(NamedTuple):
    """A random direction w, a random cotangent u, and ⟨Jᵀu, w⟩ by reverse mode, for ⟨u, Jw⟩ by forward mode.

    Attributes:
        along: w, one tensor for each input; None for one that never moves.
        by: u, one tensor for each floating-point output.
        slope: ⟨Jᵀu, w⟩.
        scale: what ``slope`` is the sum of, without signs.
        eps: of the coarsest dtype that takes part.
        noise: how much of ``slope`` is rounding; asked only where the two disagree.
    """

    along: list[Tensor | None]
    by: list[Tensor]
    slope: float
    scale: float
    eps: float
    noise: Callable[[], float] = lambda: 0.0

    def widen(self, directions: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
        """The ``count`` directions and one more, the random one."""
        return [_with_row(each, more, count) for each, more in zip(directions, self.along, strict=True)]

    def compare(self, slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The slopes along the directions alone; raise when the last, random one disagrees with reverse mode."""
        pairs = zip(self.by, slopes, strict=True)
        found = [float((u * slope[-1]).sum()) for u, slope in pairs if slope is not None]
        scale = max(self.scale, sum(abs(each) for each in found))
        gap, allowed = abs(sum(found) - self.slope), self.eps**0.5 * scale
        if math.isnan(sum(found)) != math.isnan(self.slope) or (
            gap > allowed and not gap <= allowed + 16 * self.noise()
        ):
            raise TangentError(_DISAGREES)
        return [None if each is None else each[:-1] for each in slopes]


def _with_row(rows: Tensor | None, more: Tensor | None, count: int) -> Tensor | None:
    """The ``count`` rows and one more; None stands for zeros, and for all of them where nothing moves."""
    if rows is None:
        return None if more is None else torch.cat([more.new_zeros(count, *more.shape), more[None]])
    return torch.cat([rows, (torch.zeros_like(rows[0]) if more is None else more.to(rows))[None]])


class _Trials:
    """The start, the first step and the meta-loss once more, by reverse mode: what forward mode is compared with.

    These passes also see whether something depends on a tensor that it captured.
    """

    def __init__(self, primal: Primal, meta: Meta) -> None:
        self._primal = primal
        self._meta = tree.map(lambda leaf: inner_leaf(leaf) if leaf.requires_grad else leaf, meta)
        self._moving = [leaf for leaf in tree.leaves(self._meta) if leaf.requires_grad]

    def of_start(self) -> _Trial:
        """Of init, by the moving leaves of meta."""
        return self._trial(self._primal.init(self._meta), [])

    def of_step(self, state: Any) -> _Trial:
        """Of the first step, by the moving leaves of meta and what of the state ever moves."""
        own = tree.map(lambda leaf: inner_leaf(leaf) if is_float(leaf) else leaf, state)
        following, info = self._primal.step(self._meta, own, self._primal.start)
        pairs = zip(floats(own), floats(following), strict=True)
        reports = info._replace(loss=info.loss.detach(), aux=tree.detach(info.aux))  # as a compiled step returns them
        return self._trial((following, reports), [(old, old.data_ptr() != new.data_ptr()) for old, new in pairs])

    def of_meta_loss(self, state: Any, tangents: Sequence[Tensor | None]) -> _Trial:
        """Of the meta-loss, by the moving leaves of meta and what of the state has tangents.

        At its minimum the slope is nothing but rounding; a state that is a little different tells how much.
        """
        moves = [each is not None for each in tangents]
        trial = self._of_meta_loss(state, moves)
        return trial._replace(
            noise=lambda: max(
                abs(self._of_meta_loss(tree.nudged(state, units), moves).slope - trial.slope) for units in (4, -7)
            )
        )

    def _of_meta_loss(self, state: Any, moves: Sequence[bool]) -> _Trial:
        assert self._primal.meta_loss is not None
        own = tree.map(lambda leaf: inner_leaf(leaf) if is_float(leaf) else leaf, state)
        return self._trial(self._primal.meta_loss(self._meta, own), list(zip(floats(own), moves, strict=True)))

    def _trial(self, results: Any, state: Sequence[tuple[Tensor, bool]]) -> _Trial:
        declared = [*self._moving, *[leaf for leaf, _ in state]]
        check_declared(tree.tensors(results), declared, self._primal)
        generators: dict[torch.device, torch.Generator] = {}

        def drawn(like: Tensor) -> Tensor:
            seed = rng.fold(int(self._primal.seed), 4)  # one direction for all stacked tasks
            source = generators.setdefault(like.device, rng.generator(seed, like.device))
            return torch.randn(like.shape, generator=source, dtype=like.dtype, device=like.device)

        along = [drawn(leaf) for leaf in self._moving] + [drawn(leaf) if moves else None for leaf, moves in state]
        outputs = floats(results)
        by = [drawn(each) if each.requires_grad else each.new_zeros(()).expand(each.shape) for each in outputs]
        chosen = [(leaf, w) for leaf, w in zip(declared, along, strict=True) if w is not None]
        ends = [(out, u) for out, u in zip(outputs, by, strict=True) if out.requires_grad]
        tensors = [*by, *[w for w in along if w is not None]]
        dtypes = [*[each.dtype for each in tensors], *Autocast(tensors).dtypes]
        eps = max([coarsest(outputs), *[torch.finfo(each).eps for each in dtypes]])
        if not ends:
            return _Trial(along, by, 0.0, 0.0, eps)
        with watched(False):
            found = torch.autograd.grad(
                [out for out, _ in ends], [leaf for leaf, _ in chosen], [u for _, u in ends], allow_unused=True
            )
        terms = [float((g * w).sum()) for g, (_, w) in zip(found, chosen, strict=True) if g is not None]
        return _Trial(along, by, sum(terms), sum(abs(each) for each in terms), eps)


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
    primal: Primal, movable: _Movable, directions: list[Tensor], trials: _Trials | None
) -> tuple[Tensor | None, Trajectory, Tensor, list[Tensor | None]]:
    """The meta-loss, the trajectory, and along each direction the derivatives of the meta-loss and the last state.

    None stands for zeros: frozen parts of the state have no tangent, and none is made for them.
    """
    count, point = len(movable.point), movable.point
    trial = trials.of_start() if trials else None
    state, tangents = _pushed(lambda values: primal.init(movable.at(values)), point, directions, trial)
    losses, aux = [], []
    shares: list[tuple[Tensor, Tensor | None]] = []
    for index in range(primal.start, primal.stop):
        hollow = _constant(state)

        def step(values: Sequence[Tensor], hollow: Any = hollow, index: int = index) -> Any:
            return primal.step(movable.at(values[:count]), tree.filled(hollow, values[count:]), index)

        trial = trials.of_step(state) if trials and index == primal.start else None
        (state, info), along = _pushed(step, [*point, *floats(state)], [*directions, *tangents], trial)
        tangents, rest = along[: len(floats(state))], along[len(floats(state)) :]
        losses.append(info.loss)
        aux.append(info.aux)
        if info.meta_loss is not None:
            shares.append((info.meta_loss, rest[1]))
    path = Trajectory(state, None, losses, aux)
    if primal.meta_loss is not None:
        judge, hollow = primal.meta_loss, _constant(state)
        loss, (along_loss,) = _pushed(
            lambda values: judge(movable.at(values[:count]), tree.filled(hollow, values[count:])),
            [*point, *floats(state)],
            [*directions, *tangents],
            trials.of_meta_loss(state, tangents) if trials else None,
        )
        shares.append((loss, along_loss))
    if not shares:
        return None, path, torch.zeros(()), tangents
    zeros = torch.zeros_like(shares[0][0]).expand(len(directions[0]))
    slope = torch.stack([zeros if each is None else each for _, each in shares]).sum(0)
    return torch.stack([each for each, _ in shares]).sum(), path, slope, tangents


def _pushed(
    fn: Callable[[Sequence[Tensor]], Any],
    point: list[Tensor],
    directions: Sequence[Tensor | None],
    trial: _Trial | None,
) -> tuple[Any, list[Tensor | None]]:
    """The result of a function, and the derivatives of its floating-point tensors along each direction.

    Args:
        fn: takes the tensors at ``point`` and returns a tree.
        point: where.
        directions: a tangent for each of these tensors along the first dimension, None for one that does not move; the
            first one, of meta, always moves.
        trial: what the derivatives are compared with.
    """
    made: list[Any] = []
    assert directions[0] is not None
    rows = list(directions) if trial is None else trial.widen(directions, len(directions[0]))
    moving = [place for place, each in enumerate(rows) if each is not None]

    def flat(*values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        given = list(point)
        for place, value in zip(moving, values, strict=True):
            given[place] = value
        result = fn(given)
        found = floats(result)
        made[:] = [_constant(result, keep=False), [_moves(each) for each in found]]
        pushed = [each for each, moves in zip(found, made[1], strict=True) if moves]
        return pushed or [values[0]], tree.tensors(result)  # torch pushes no empty result

    at = tuple([point[place].contiguous() for place in moving])

    def along(*tangents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        _, slopes, every = torch.func.jvp(flat, at, tangents, has_aux=True)  # type: ignore[misc]
        return slopes, every

    both = torch.func.vmap(along, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
    with DualLayers() as layers:
        pushed, every = both(*[each for each in rows if each is not None])
    if layers.trouble:
        raise TangentError(layers.trouble)
    found = iter(pushed)
    slopes = [next(found) if moves else None for moves in made[1]]
    return tree.filled(made[0], every), slopes if trial is None else trial.compare(slopes)


def _moves(tensor: Tensor) -> bool:
    return unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The derivatives along all directions, from those of each chunk."""
    kept = [part for part in parts if part is not None]
    return torch.cat(kept) if kept else None


def _constant(value: Any, *, keep: bool = True) -> Any:
    """The tree with holes for its floating-point tensors, or, unless the others are kept, for all tensors."""
    return tree.map(
        lambda leaf: tree.HOLE if isinstance(leaf, Tensor) and (leaf.is_floating_point() or not keep) else leaf, value
    )


_DISAGREES = "forward and reverse mode differ for a random direction: torch computes a gradient that is no derivative"
