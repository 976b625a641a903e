"""What one step takes in bytes and seconds, measured on the step itself."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from funcmeta import tree
from funcmeta._graph import inner_leaf
from funcmeta._live_bytes import LiveBytes, bytes_of, storage_key
from funcmeta._typing import Meta, Tree
from funcmeta.memory._base import Step, Trajectory, advance
from funcmeta.memory._plan import Advance, Backward, Estimate, Plan

_COMPARISONS = 1 << 14
"""Bytes for the losses and norms by which repeated steps are compared."""


class Sizes(NamedTuple):
    """The bytes and seconds of one step; bytes of what it reads do not count."""

    meta: int
    """A gradient of ``meta``."""
    initial: int
    """The initial state, as far as it is not ``meta``."""
    state: int
    """A state, as far as a step makes it anew."""
    notes: int
    """The loss and the aux of a step."""
    loss: int
    """The loss of a step, of which the unroll makes one tensor with all others."""
    graph: int
    """What the graph of a step keeps, and its notes."""
    seam: int
    """What the graphs of two steps in a row both keep: (part of) the state between them."""
    plain: int
    """The most while a step runs without a graph, above the state that it makes."""
    forward: int
    """The most while a step runs with its graph, above what it leaves."""
    backward: int
    """The most while a graph is differentiated, above the graph: the gradients by meta and state among it."""
    seconds: float
    """Time of a step without a graph."""
    graph_seconds: float
    """Time of a step with its graph, and of the derivative of that."""

    def peak(self, steps: int, states: int, part: int, judge: int) -> int:
        """The most bytes alive at once in a run.

        Args:
            steps: number of steps.
            states: most states stored.
            part: most steps whose graph is kept at once.
            judge: the most while the meta-loss is computed and differentiated.
        """
        always = self.initial + self.state + (steps - part) * self.notes  # the state at the end is the unroll's result
        kept = part * self.graph - (part - 1) * self.seam
        last = kept + max(self.forward, judge, self.backward + self.meta, steps * self.loss)
        if part == steps:
            return always + last
        waiting = self.meta + self.state  # gradients that the steps further back add to
        waiting += 0 if judge else self.graph  # the last update is in the result, but no share of a step reads it
        back = kept + max(self.forward, self.backward + self.meta) + waiting
        alone = self.state + self.plain + waiting
        return always + states * self.state + max(last, back, alone) + _COMPARISONS

    def estimate(self, plan: Plan, judge: int) -> Estimate:
        """What a run by a plan takes."""
        advanced = sum(each.stop - each.start for each in plan.actions if isinstance(each, Advance))
        parts = [each.stop - each.start for each in plan.actions if isinstance(each, Backward)]
        seconds = advanced * self.seconds + sum(parts) * self.graph_seconds
        return Estimate(
            self.peak(plan.steps, plan.peak_states, max(parts), judge), seconds / (plan.steps * self.graph_seconds)
        )


def measured(step: Step, meta: Meta, state: Any, start: int, stop: int) -> Sizes:
    """The sizes of the second step, whose state depends on ``meta`` as later ones do, by five evaluations."""
    initial = bytes_of(state, meta)
    meta, index = _leaves(meta), min(start + 1, stop - 1)
    with torch.enable_grad():
        state = _leaves(step(meta, _leaves(state), start)[0])
    wanted = _attached((meta, state))

    def plain() -> Trajectory:
        with torch.no_grad():
            return advance(step, meta, state, index, index + 1)

    def graph() -> tuple[Tree, Trajectory]:
        """A step with its graph, from a state that is no leaf, as in a run."""
        with torch.enable_grad():
            before = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)
            return before, advance(step, meta, before, index, index + 1)

    def differentiate(edges: list[GradientEdge], ones: list[Tensor]) -> None:
        torch.autograd.grad(edges, wanted, ones, allow_unused=True)

    with LiveBytes() as live:
        path = plain()
        state_bytes, notes = bytes_of(path.state, (meta, state)), bytes_of((path.losses, path.aux), (meta, state))
        plain_peak, loss = live.peak - state_bytes, path.losses[0].nbytes
    del path
    with LiveBytes() as live:
        before, path = graph()
        forward = live.peak
        edges, ones = _edges(path)
        between = [
            set(map(storage_key, pair)) for pair in zip(tree.tensors(before), tree.tensors(path.state), strict=True)
        ]
        del before, path
        kept = live.live - bytes_of(ones) + notes
        seam = sum(live.storages[max(pair)] for pair in between if len(pair) == 2 and pair <= live.storages.keys())
        live.peak = derived = live.live
        differentiate(edges, ones)
        backward = live.peak - derived
    device = next((leaf.device for leaf in wanted), torch.device("cpu"))
    return Sizes(
        meta=bytes_of(_attached(meta)),
        initial=initial,
        state=state_bytes,
        notes=notes,
        loss=loss,
        graph=kept,
        seam=seam,
        plain=plain_peak,
        forward=forward - kept,
        backward=backward,
        seconds=_seconds(plain, device),
        graph_seconds=_seconds(lambda: differentiate(*_edges(graph()[1])), device),
    )


def judging(judge: Callable[[Meta, Any], Tensor], meta: Meta, state: Any) -> int:
    """The most bytes alive while a meta-loss and its derivative are computed."""
    meta, state = _leaves(meta), tree.map(lambda leaf: _inner(leaf, True), state)
    wanted = _attached((meta, state))
    with torch.enable_grad(), LiveBytes() as live:
        loss = judge(meta, state)
        if loss.requires_grad:
            torch.autograd.grad(loss, wanted, allow_unused=True)
    return int(live.peak)


def _edges(path: Trajectory) -> tuple[list[GradientEdge], list[Tensor]]:
    """The graph of a trajectory without its results, and cotangents."""
    ends = _attached((path.state, path.share))
    return [get_gradient_edge(end) for end in ends], [torch.ones_like(end) for end in ends]


def _attached(value: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.tensors(value) if leaf.requires_grad]


def _leaves(value: Tree) -> Tree:
    """The same tree, in which what depends on something is a leaf of its own."""
    return tree.map(lambda leaf: _inner(leaf, False), value)


def _inner(leaf: Any, every: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return inner_leaf(leaf) if leaf.requires_grad or (every and leaf.is_floating_point()) else leaf.detach()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
