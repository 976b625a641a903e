"""Run steps by a plan: forward without a graph, then back, with the graph of a part of the steps at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from funcmeta import tree
from funcmeta._context import Autocast
from funcmeta._errors import ArgumentError, UnreachedLeafError
from funcmeta._gradient import exact, steered, steering
from funcmeta._graph import OPAQUE_EDGES, alias, check_declared, inner_leaf, inside_functorch
from funcmeta._typing import Meta, Tree
from funcmeta.memory._base import Step, Trajectory, advance
from funcmeta.memory._plan import Action, Advance, Backward, Drop, Planned, Restore, Store, plan
from funcmeta.memory._witness import Witness

Gradients = list[Tensor | None]


def follow(
    memory: Planned,
    step: Step,
    meta: Meta,
    state: Any,
    start: int,
    stop: int,
    *,
    device: torch.device | str | None = None,
) -> Trajectory:
    """Take the steps ``start`` to ``stop - 1`` as the actions of ``memory`` say.

    The steps before the first ``Backward`` run without a graph inside one ``autograd.Function``, which keeps states and
    does the remaining actions in its backward pass. Those of the first ``Backward`` run with their graph, as in a plain
    loop. When the backward pass is itself to be differentiated, the Function takes its steps again in one graph.

    Args:
        memory: the policy.
        step: a pure function of its arguments.
        meta: tree of tensors.
        state: tree whose tensors are the state; other leaves are constants.
        start: first index.
        stop: index after the last.
        device: where stored states are kept; None for where they are. The initial state stays where it is.

    Returns:
        What the plain loop returns, and the plan that was followed; none where there is nothing to differentiate.

    Raises:
        ArgumentError: inside ``torch.func``, which cannot run such a Function; or actions that do not fit together.
        CapturedTensorError: in the backward pass, when a step depends on a tensor that requires grad and is not in
            ``meta`` or ``state``.
        UnreachedLeafError: in the backward pass, when a leaf of ``meta`` that requires grad is used by no step.
        ReplayError: in the backward pass, when a step does not come out as it did the first time.

    Examples:
        >>> from funcmeta.memory import Revolve
        >>> from funcmeta.problem import StepInfo
        >>> def decay(rate, a, index):
        ...     return a * rate, StepInfo(a)
        >>> rate = torch.tensor(2.0, requires_grad=True)
        >>> follow(Revolve(2), decay, rate, torch.tensor(1.0), 0, 5).state.backward()
        >>> rate.grad
        tensor(80.)

    Source: this library; states kept and steps repeated as in Griewank and Walther (2000).
    """
    followed = plan(memory, stop - start)
    repeats = followed.evaluations > followed.steps
    if repeats and inside_functorch() and torch.is_grad_enabled():
        raise ArgumentError(
            "A policy that replays steps cannot run inside torch.func. Use StoreAll() there. That holds for an unroll "
            "inside of a step or a loss too, where tasks or particles run under vmap: strategy='loop', or chunk=1, "
            "takes one after the other."
        )
    inputs = tree.tensors((meta, state))
    if not (torch.is_grad_enabled() and (inside_functorch() or any(each.requires_grad for each in inputs))):
        return advance(step, meta, state, start, stop)
    if not repeats:
        return advance(step, meta, state, start, stop)._replace(memory=followed)
    run = _Run(step, meta, state, start, followed.actions, device)
    middle, share = run.rebuilt(_Follow.apply(run, *inputs))  # type: ignore[no-untyped-call]
    last = advance(step, meta, middle, start + run.middle, stop, share=share)
    return Trajectory(last.state, last.share, run.losses + last.losses, run.aux + last.aux, followed)


def expect_use(nodes: Iterable[Node], missing: dict[Node, str], advice: str) -> bool:
    """Ask the run among ``nodes`` to raise, once it has run backward, if it does not depend on a missing leaf.

    Args:
        nodes: the graph of the loss.
        missing: nodes and names of the leaves of ``meta`` that the loss depends on through replayed steps at most.
        advice: what to do about a leaf without gradient.

    Returns:
        Whether there is such a run. When there are several, because a step unrolls something itself, none is asked.
    """
    found = [(node, run) for node in nodes if isinstance(run := getattr(node, "run", None), _Run)]
    if len(found) == 1:
        [(node, run)] = found
        leaves = [leaf for leaf, _ in node.next_functions[: run.meta_tensors]]
        run.expect({place: missing[leaf] for place, leaf in enumerate(leaves) if leaf in missing}, advice)
    return bool(found)


class _Kept:
    """A stored state, detached, on the device where it waits."""

    def __init__(self, state: Tree, device: torch.device | str | None) -> None:
        self._homes = tree.map(lambda leaf: leaf.device if isinstance(leaf, Tensor) else None, state)
        self._state = state if device is None else tree.map(lambda leaf: _moved(leaf, device), state)

    def brought_back(self) -> Tree:
        """The state where it came from."""
        return tree.map(_moved, self._state, self._homes)


def _moved(leaf: Any, device: torch.device | str) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


class _Run:
    """What the Function of one run does, and the states that wait for its backward pass."""

    def __init__(
        self,
        step: Step,
        meta: Meta,
        state: Any,
        start: int,
        actions: Sequence[Action],
        device: torch.device | str | None,
    ) -> None:
        turn = next(place for place, each in enumerate(actions) if isinstance(each, Backward))
        self._before, self._after, self.middle = actions[:turn], actions[turn + 1 :], actions[turn][0]
        self._inputs, self.meta_tensors = tree.hollow((meta, state)), len(tree.tensors(meta))
        self._step, self._start, self._device = Witness(step), start, device
        self._autocast, current = Autocast(tree.tensors((meta, state))), steering()
        self._rule = exact if current is None else current.rule
        self._stored: dict[int, _Kept] | None = None
        self._expected: dict[int, str] = {}
        self._advice = ""

    def expect(self, names: dict[int, str], advice: str) -> None:
        """Raise in the backward pass if one of these leaves of ``meta``, given by their places, gets no gradient."""
        self._expected, self._advice = names, advice

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Do what comes before the first derivative; the state and the share as tensors."""
        path, self._stored = self._go(*tree.filled(self._inputs, tensors))
        # Autograd writes onto what a Function returns: onto aliases, since a step may return the caller's own tensors.
        outputs = tree.detach((path.state, path.share))
        self.losses, self.aux, self._outputs = path.losses, path.aux, tree.hollow(outputs)
        self._shared = path.share is not None
        return tree.tensors(outputs)

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[Any, Tensor | None]:
        """The state and the share that ``forward`` returned as tensors."""
        return tree.filled(self._outputs, tensors)  # type: ignore[no-any-return]

    def backward(self, tensors: Sequence[Tensor], needed: Sequence[bool], cotangents: Gradients) -> Gradients:
        """The gradient by each tensor that needs one."""
        cotangents = [*cotangents] if self._shared else [*cotangents, None]
        differentiable = torch.is_grad_enabled()
        leaf = alias if differentiable else inner_leaf
        with torch.enable_grad(), steered(self._rule):  # a backward pass may begin inside of another unroll
            inputs = [leaf(each) if need else each for each, need in zip(tensors, needed, strict=True)]
            meta, state = tree.filled(self._inputs, inputs)
            if differentiable:
                gradients = self._pull_back(meta, state, 0, self.middle, cotangents, create_graph=True)
            else:
                gradients = self._back(meta, state, cotangents)
        self._step.compare()
        unused = [name for place, name in self._expected.items() if gradients[place] is None]
        if unused:
            raise UnreachedLeafError(unused, self._advice)
        return gradients

    def _go(self, meta: Meta, state: Any) -> tuple[Trajectory, dict[int, _Kept]]:
        """The actions before the first derivative."""
        stored: dict[int, _Kept] = {}
        path = Trajectory(state, None, [], [])
        for action in self._before:
            path = self._move(action, meta, path, stored)
        return path, stored

    def _back(self, meta: Meta, initial: Any, cotangents: Gradients) -> Gradients:
        """The actions after the first derivative."""
        stored, self._stored = self._stored, None
        if stored is None:  # an earlier backward pass has used it up
            _, stored = self._go(meta, initial)
        total: Gradients = [None] * self.meta_tensors
        path = Trajectory(initial, None, [], [])
        for action in self._after:
            if isinstance(action, Backward):
                state = tree.map(_leaf, path.state)
                gradients = self._pull_back(meta, state, *action, cotangents)
                total = [_sum(*pair) for pair in zip(total, gradients, strict=False)]
                cotangents = [*gradients[self.meta_tensors :], cotangents[-1]]
                path = _AWAY
                del state, gradients  # not to be alive beside the next state
            else:
                path = self._move(action, meta, path, stored)
        return [*total, *cotangents[:-1]]

    def _move(self, action: Action, meta: Meta, path: Trajectory, stored: dict[int, _Kept]) -> Trajectory:
        """Where an action without a derivative leads; the steps met on the way since the last state restored."""
        match action:
            case Store(step):
                stored[step] = _Kept(tree.detach(path.state), self._device if step else None)
            case Restore(step):
                return Trajectory(stored[step].brought_back(), None, [], [])
            case Drop(step):
                del stored[step]
            case Advance(start, stop):
                with torch.no_grad():
                    part = self._advance(meta, path.state, start, stop, path.share)
                return part._replace(losses=path.losses + part.losses, aux=path.aux + part.aux)
        return path

    def _pull_back(
        self, meta: Meta, state: Any, start: int, stop: int, cotangents: Gradients, *, create_graph: bool = False
    ) -> Gradients:
        """The gradients by the tensors of ``meta`` and ``state`` through some steps, taken with their graph."""
        inputs = tree.tensors((meta, state))
        path = self._advance(meta, state, start, stop, None)
        outputs = tree.tensors((path.state, path.share))
        check_declared(outputs, inputs, self._step.step)
        pairs = [
            (get_gradient_edge(out), by)
            for out, by in zip(outputs, cotangents, strict=False)
            if by is not None and out.requires_grad
        ]
        del path, outputs  # the graph is enough
        if not pairs:
            return [None] * len(inputs)
        found = torch.autograd.grad(
            [edge for edge, _ in pairs],
            [each for each in inputs if each.requires_grad],
            [by for _, by in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        following = iter(found)
        return [next(following) if each.requires_grad else None for each in inputs]

    def _advance(self, meta: Meta, state: Any, start: int, stop: int, share: Tensor | None) -> Trajectory:
        """Some steps, under the autocast of the first time."""
        with self._autocast.again():
            path = advance(self._step, meta, state, self._start + start, self._start + stop, share=share)
        self._step.arrived(self._start + stop, path.state)
        return path


_AWAY = Trajectory(None, None, [], [])
"""At no state, as after a derivative."""


def _leaf(leaf: Any) -> Any:
    return inner_leaf(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


class _Follow(torch.autograd.Function):
    """The actions of a run: in the forward pass those before its first derivative, in the backward pass the rest."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = run.forward(tensors)
        ctx.run = run
        setattr(ctx, OPAQUE_EDGES, run.meta_tensors)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*[each for each in outputs if not each.is_floating_point()])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.run.backward(ctx.saved_tensors, ctx.needs_input_grad[1:], list(cotangents)))
