"""A run of steps without a graph that is run again, with one, when its derivative is needed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from funcmeta import tree
from funcmeta._errors import ArgumentError, ReplayError, UnreachedLeafError
from funcmeta._graph import OPAQUE_EDGES, alias, check_declared, inner_leaf, inside_functorch
from funcmeta._typing import Meta, Tree
from funcmeta.memory._base import Step, Trajectory, advance
from funcmeta.problem import StepInfo


class Use:
    """Which leaves of ``meta`` the segments of one run have to depend on, and have not shown to yet."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.missing: dict[int, str] = {}
        self.advice = ""


def expect_use(nodes: Iterable[Node], missing: dict[int, str], advice: str) -> bool:
    """Ask the segments among ``nodes`` to raise, once all have run backward, if none depends on a missing leaf.

    Args:
        nodes: the graph of the loss.
        missing: position in ``meta`` and name of the leaves that the loss depends on through segments at most.
        advice: what to do about a leaf without gradient.

    Returns:
        Whether there is such a segment.
    """
    runs = [run for run in (getattr(node, "run", None) for node in nodes) if isinstance(run, _Run)]
    for run in runs:
        run.use.missing, run.use.advice = dict(missing), advice
    return bool(runs)


def replay(step: Step, meta: Meta, state: Any, start: int, stop: int, use: Use) -> Trajectory:
    """Take the steps ``start`` to ``stop - 1`` and keep only ``meta`` and ``state`` for the backward pass.

    Args:
        step: a pure function of its arguments.
        meta: tree of tensors.
        state: tree whose tensors are the state; other leaves are constants.
        start: first index.
        stop: index after the last.
        use: shared by the segments of a run. The segment that begins it takes its first step with its graph for a
            moment, to find tensors that ``step`` captured.

    Returns:
        What the plain loop returns.

    Raises:
        ArgumentError: inside ``torch.func``, which can not run such a function.
        CapturedTensorError: a step depends on a tensor that requires grad and is not in ``meta`` or ``state``.
        UnreachedLeafError: in the backward pass, when no segment depends on a leaf that ``use`` misses.
        ReplayError: in the backward pass, when a step's loss comes out otherwise than the first time.
    """
    if inside_functorch():
        raise ArgumentError("A policy that replays steps can not run inside torch.func. Use StoreAll() there.")
    inputs = _Parts.of((meta, state))
    run = _Run(step, inputs, start, stop, use, len(_Parts.of(meta).tensors))
    tensors = _Replay.apply(run, *inputs.tensors)  # type: ignore[no-untyped-call]
    assert run.outputs is not None
    state, share = run.outputs.rebuilt(tensors)
    return Trajectory(state, share, run.losses, run.aux)


class _Parts:
    """A tree taken apart into its tensors, which go through autograd, and the rest."""

    def __init__(self, tensors: list[Tensor], rest: list[Any], spec: tree.Spec) -> None:
        self.tensors, self._rest, self._spec = tensors, rest, spec

    @classmethod
    def of(cls, value: Tree) -> "_Parts":
        leaves, spec = tree.flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(tensors, [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def rebuilt(self, tensors: Sequence[Tensor]) -> Tree:
        """The tree with other tensors in it."""
        following = iter(tensors)
        return tree.unflatten([next(following) if leaf is _HOLE else leaf for leaf in self._rest], self._spec)

    def without_tensors(self) -> "_Parts":
        return _Parts([], self._rest, self._spec)


_HOLE = object()


class _Run:
    """The steps of one segment, from tensors to tensors; remembers the losses of the first time."""

    def __init__(self, step: Step, inputs: _Parts, start: int, stop: int, use: Use, meta_tensors: int) -> None:
        self._step, self._inputs, self._start, self._stop = step, inputs.without_tensors(), start, stop
        self.use = use
        self.meta_tensors = meta_tensors
        self.outputs: _Parts | None = None
        self.losses: list[Tensor] = []
        self.aux: list[Any] = []

    def first(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        """Take the steps without a graph."""
        meta, state = self._inputs.rebuilt(tensors)
        self._needed = needed
        self._autocast = _autocast_state(tensors)
        step = self._probing if any(needed) and self._start == self.use.start else self._step
        path = advance(step, meta, state, self._start, self._stop)
        parts = _Parts.of((path.state, path.share))
        self.outputs, self.losses, self.aux = parts.without_tensors(), path.losses, path.aux
        self._sizes = _sizes(parts.tensors)
        return parts.tensors

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the steps with their graph, and raise if they differ from the first time."""
        meta, state = self._inputs.rebuilt(tensors)
        with ExitStack() as stack:
            for options in self._autocast:
                stack.enter_context(torch.autocast(**options))
            path = advance(self._step, meta, state, self._start, self._stop)
        self._check_same_losses(path.losses)
        results = _Parts.of((path.state, path.share)).tensors
        self._check_same_sizes(results)
        check_declared(results, tensors, self._step)
        return results

    def note_use(self, gradients: Sequence[Tensor | None]) -> None:
        """Take note of the leaves that got a gradient; after the last segment, raise for those that got none."""
        self.use.missing = {index: name for index, name in self.use.missing.items() if gradients[index] is None}
        if self.use.missing and self._start == self.use.start:
            raise UnreachedLeafError(self.use.missing.values(), self.use.advice)

    def _probing(self, meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
        if index != self._start:
            return self._step(meta, state, index)
        with torch.enable_grad():
            parts = _Parts.of((meta, state))
            inputs = [
                inner_leaf(each) if need else each for each, need in zip(parts.tensors, self._needed, strict=True)
            ]
            meta, state = parts.rebuilt(inputs)
            state, info = self._step(meta, state, index)
            check_declared(_Parts.of((state, info)).tensors, inputs, self._step)
        return tree.detach((state, info))  # type: ignore[no-any-return]

    def _check_same_losses(self, losses: list[Tensor]) -> None:
        before, after = torch.stack(self.losses), torch.stack(losses)
        same = _close(before, after)
        if not same.all():
            index = int((~same).reshape(len(losses), -1).any(1).nonzero()[0])
            raise ReplayError(
                f"Step {self._start + index} was run again and gave the loss {after[index].tolist()}, the first time "
                f"{before[index].tolist()}. Make batches, loss and model functions of (step, seed) alone: no "
                f"iterators, no generators, no counters outside the state. Or use StoreAll()."
            )

    def _check_same_sizes(self, results: Sequence[Tensor]) -> None:
        if not all(_close(*pair).all() for pair in zip(self._sizes, _sizes(results), strict=True)):
            raise ReplayError(
                f"Steps {self._start} to {self._stop - 1} were run again and ended in another state, though their "
                f"losses were the same. Make the optimizer and what else follows the loss a function of (step, seed) "
                f"alone. Or use StoreAll()."
            )


def _sizes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The norm of each floating-point tensor: enough to tell one run from another."""
    return [torch.linalg.vector_norm(each.detach()) for each in tensors if each.is_floating_point()]


def _close(before: Tensor, after: Tensor) -> Tensor:
    return torch.isclose(before, after, rtol=torch.finfo(before.dtype).eps ** 0.5, atol=0.0, equal_nan=True)


def _autocast_state(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    """What to hand to ``torch.autocast``, for each kind of device, to have it as it is now."""
    return [
        {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        for kind in {tensor.device.type for tensor in tensors}
    ]


class _Replay(torch.autograd.Function):
    """Forward: the steps without a graph. Backward: the steps again, from aliases of the inputs, and their vjp."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = run.first(tensors, ctx.needs_input_grad[1:])
        ctx.run = run
        setattr(ctx, OPAQUE_EDGES, run.meta_tensors)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*[each for each in outputs if not each.is_floating_point()])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        again_differentiable = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [
                tensor if not need else alias(tensor) if again_differentiable else inner_leaf(tensor)
                for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.run.again(inputs)
            pairs = [
                (out, by) for out, by in zip(outputs, cotangents, strict=True) if by is not None and out.requires_grad
            ]
            wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
            grads: Iterator[Tensor | None] = iter([None] * len(wanted))
            if pairs:
                grads = iter(
                    torch.autograd.grad(
                        [out for out, _ in pairs],
                        wanted,
                        [by for _, by in pairs],
                        create_graph=again_differentiable,
                        allow_unused=True,
                    )
                )
        gradients = [next(grads) if need else None for need in needed]
        ctx.run.note_use(gradients)
        return (None, *gradients)
