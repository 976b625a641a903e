"""What runs of any length take in bytes and seconds, foretold from short ones on the step itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._graph import inner_leaf
from funcmeta._live_bytes import LiveBytes, bytes_of, storage_key
from funcmeta._typing import Meta, Tree
from funcmeta.memory._base import Memory, Step, Trajectory
from funcmeta.memory._plan import Advance, Plan
from funcmeta.memory.revolve import Revolve
from funcmeta.memory.segments import Segments
from funcmeta.memory.store_all import StoreAll
from funcmeta.problem import StepInfo

Judge = Callable[[Meta, Any], Tensor]
"""The meta-loss at the end: (meta, state) -> 0-d tensor."""

_TOGETHER = 256
"""How many repeated steps are compared at once (``Witness``)."""

_ROWS = 7
"""How many numbers of the size of a step's loss the comparison of a repeated step takes: what came out the first time
and again, both as rows of one tensor, and what ``isclose`` makes of them."""


@dataclass(frozen=True)
class Run:
    """A short run, of the judged steps and their derivative, as it was counted."""

    steps: int
    peak: int
    """The most bytes alive at once."""
    kept: int
    """Bytes alive between the forward and the backward pass."""
    further: int
    """What one more step with its graph adds to both."""
    left: int
    """What is still alive after the backward pass besides the results, while the meta-loss is."""

    def longer(self, more: int) -> "Run":
        """The run with so many bytes more."""
        return replace(self, peak=self.peak + more, kept=self.kept + more)


@dataclass(frozen=True)
class Sizes:
    """Bytes and seconds of one step, and the short runs that were counted; bytes of what a run reads do not count.

    Bytes grow linearly with the steps whose graph is kept, the states that are stored and the steps that are taken,
    and what comes on top at one moment (a gradient, the meta-loss, a temporary) does not grow: it is counted in the
    short runs where it is alive. A run under a policy that replays is another one than under ``StoreAll``, whose graph
    holds only what depends on ``meta``: there every tensor of a restored state may.
    """

    meta: int
    """A gradient of ``meta``."""
    initial: int
    """The initial state, as far as the run makes it."""
    state: int
    """A state, as far as a step makes it anew."""
    notes: int
    """The loss and the aux of a step."""
    loss: int
    """The loss of a step, of which the unroll makes one tensor with all others."""
    norms: int
    """What is noted of a state at which a part of the run ends."""
    shares: bool
    """Whether a step gives a share of the meta-loss."""
    one: Run
    """``StoreAll`` over one step, whose state depends on ``meta`` as later ones do and is differentiated as theirs."""
    seconds: float
    """Time of a step without a graph."""
    graph_seconds: float
    """Time of a step with its graph, and of the derivative of that."""
    whole: Run | None = None
    """``StoreAll`` over up to 3 steps."""
    single: Run | None = None
    """``Revolve(1)`` over up to 4 steps: the graph of one step, and the initial state stored."""
    paired: Run | None = None
    """``Segments(2)`` over up to 4 steps: the graph of two, and the initial state stored."""

    def run(self, steps: int, states: int, part: int) -> Run | None:
        """A run of so many steps; None when no short one tells.

        Args:
            steps: number of steps.
            states: most states stored.
            part: most steps whose graph is kept at once.
        """
        if part == steps:
            base, more = self.whole, 0 if self.whole is None else (steps - self.whole.steps) * self.whole.further
        else:
            base = self.single if part == 1 else self.paired
            more = (states - 1) * self.state
            if base is not None:
                # What nodes of the last part hold on to after their backward pass is alive beside the earlier parts.
                more += (steps - base.steps) * self.notes + (part - min(part, 2)) * (base.further + self._left())
        if base is None:
            return None
        found = base.longer(more + steps * self.loss)
        return replace(found, peak=found.peak + (0 if part == steps else self._comparing(steps, states, part)))

    def _left(self) -> int:
        """What each step of the last part leaves behind."""
        return 0 if self.paired is None or self.single is None else max(0, self.paired.left - self.single.left)

    def _comparing(self, steps: int, states: int, part: int) -> int:
        """Bytes of the losses and norms by which repeated steps are compared."""
        repeated = min(steps * (steps - 1) // 2, _TOGETHER)  # as many as Revolve(1) repeats
        return repeated * _ROWS * self.loss + (steps + states) * self.norms

    def factor(self, plan: Plan) -> float:
        """The time of a run by a plan, over that of ``StoreAll``."""
        advanced = sum(each.stop - each.start for each in plan.actions if isinstance(each, Advance))
        return (advanced * self.seconds + plan.steps * self.graph_seconds) / (plan.steps * self.graph_seconds)


class Measure:
    """Counts short runs of the steps ``start`` to ``stop - 1``, each when it is asked for."""

    def __init__(
        self, step: Step, judge: Judge | None, meta: Meta, state: Any, start: int, stop: int, initial: int
    ) -> None:
        self._step, self._judge, self._start, self._stop = step, judge, start, stop
        self._meta, self._state = _leaves(meta), _leaves(state)
        self.sizes = self._first(initial)

    def whole(self, steps: int) -> Run:
        """Count ``StoreAll``."""
        found = self._counted(StoreAll(), min(steps, self._stop - self._start))
        self.sizes = replace(self.sizes, whole=found)
        return found

    def single(self) -> None:
        """Count ``Revolve(1)``."""
        steps = min(4, self._stop - self._start)
        self.sizes = replace(self.sizes, single=self._counted(Revolve(1), steps))

    def paired(self) -> None:
        """Count ``Segments(2)``."""
        steps = min(4, self._stop - self._start)
        self.sizes = replace(self.sizes, paired=self._counted(Segments(2), steps))

    def _first(self, initial: int) -> Sizes:
        """One step with its graph, and what it leaves."""
        moves, before = [leaf.requires_grad for leaf in tree.tensors(self._state)], list[bool]()
        while moves != before:  # as far as ``meta`` reaches in the end
            before = moves
            with LiveBytes() as live:
                path, one = self._through(StoreAll(), 1, live, moves=moves)
            after = tree.tensors(path.state)
            moves = [moving or leaf.requires_grad for moving, leaf in zip(before, after, strict=True)]
            state = sum(live.storages.get(key, 0) for key in _storages(path.state))
            notes, loss = bytes_of((path.losses, path.aux), (self._meta, self._state)), path.losses[0].nbytes
            norms = sum(leaf.element_size() for leaf in after if leaf.is_floating_point())
            shares = path.share is not None
            del path, after  # not to be alive beside the next
        device = next((leaf.device for leaf in _attached((self._meta, self._state))), torch.device("cpu"))
        return Sizes(
            meta=bytes_of(_attached(self._meta)),
            initial=initial,
            state=state,
            notes=notes,
            loss=loss,
            norms=norms,
            shares=shares,
            one=one,
            seconds=_seconds(self._plain, device),
            graph_seconds=_seconds(lambda: self._through(StoreAll(), 1, moves=moves), device),
        )

    def _plain(self) -> None:
        with torch.no_grad():
            self._step(self._meta, self._state, self._start)

    def _counted(self, memory: Memory, steps: int) -> Run:
        with LiveBytes() as live:
            return self._through(memory, steps, live)[1]

    def _through(
        self, memory: Memory, steps: int, live: LiveBytes | None = None, *, moves: list[bool] | None = None
    ) -> tuple[Trajectory, Run]:
        """Take the first steps, judge where they end, and differentiate, with all alive that an unroll returns.

        With ``moves``, these tensors of the initial state count as depending on ``meta``, and the state at the end is
        differentiated too, as it is when further steps follow.
        """
        live = live or LiveBytes()
        meta, initial = self._meta, self._state if moves is None else _moving(self._state, moves)
        entries: list[tuple[int, dict[int, int]]] = []

        def watched(meta: Meta, state: Any, index: int) -> tuple[Any, StepInfo]:
            entries.append((live.live, {key: live.storages.get(key, 0) for key in _storages(state)}))
            return self._step(meta, state, index)

        with torch.enable_grad():
            path = memory.run(watched, meta, initial, self._start, self._start + steps)
            kept = live.live
            further = kept - entries[-1][0]
            if memory.replays:  # the state before the last part was held by its frame: it is gone, but is no saving
                held = entries[-2 if isinstance(memory, Segments) else -1][1]
                further += sum(size for key, size in held.items() if key not in live.storages)
            parts = [] if path.share is None else [path.share]
            if self._judge is not None:
                parts.append(self._judge(self._meta, path.state))
            loss = torch.stack(parts).sum() if len(parts) > 1 else parts[0] if parts else None
            kept = max(kept, live.live)
            ends = _attached((loss, None if moves is None else path.state))
            if ends:
                ones = [end.new_ones(()).expand_as(end) for end in ends]  # which take no room
                torch.autograd.grad(ends, _attached((meta, initial)), ones, allow_unused=True)
        results = _storages((path.state, path.losses, path.aux, loss, path.share))
        left = live.live - sum(live.storages.get(key, 0) for key in results)
        return path, Run(steps, live.peak, kept, further, left)


def _storages(value: Tree) -> set[int]:
    return {storage_key(leaf) for leaf in tree.tensors(value) if leaf.layout is torch.strided}


def _attached(value: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.tensors(value) if leaf.requires_grad]


def _leaves(value: Tree) -> Tree:
    """The same tree, in which what depends on something is a leaf of its own."""
    return tree.map(_leaf, value)


def _leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return inner_leaf(leaf) if leaf.requires_grad else leaf.detach()


def _moving(state: Tree, moves: list[bool]) -> Tree:
    each = iter(moves)
    return tree.map(lambda leaf: inner_leaf(leaf) if isinstance(leaf, Tensor) and next(each) else leaf, state)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
