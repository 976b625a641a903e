"""A language model with three memories: its hidden state, its weights while it reads, and its weights for good."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcmeta import tree
from funcmeta._check import check_count, check_flag, is_function
from funcmeta._errors import ArgumentError, StructureError
from funcmeta._gradient import value_and_grad
from funcmeta._typing import Batch, Meta, Params
from funcmeta.algorithms._algorithm import EstimatedLoss
from funcmeta.algorithms._language_model import LanguageModel
from funcmeta.algorithms._static import train_static
from funcmeta.estimators import Estimator, FirstOrder
from funcmeta.learned import as_transform
from funcmeta.learned._gates import Gates
from funcmeta.learned._optimizer import LearnedOptimizer
from funcmeta.memory import Memory, StoreAll
from funcmeta.model import functionalize, init_params
from funcmeta.optim import advance
from funcmeta.problem import Problem, StepInfo
from funcmeta.tasks import Task
from funcmeta.unroll import Carry, Unrolled, unroll

__all__ = ["DynamicLanguageModel", "LanguageModel", "Reading", "ReadingState", "build", "train_static"]


class ReadingState(NamedTuple):
    """What one segment hands to the next.

    Attributes:
        params: the weights as the reading has left them, by name: the medium-term memory.
        hidden: the model's hidden state: the short-term memory.

    Examples:
        >>> ReadingState({}, ()).hidden
        ()

    Source: this library.
    """

    params: Params
    hidden: Any


class Reading(NamedTuple):
    """What reading a stream gives.

    Attributes:
        losses: for each segment the losses of its words, [words], in nats, before the segment was learned from.
        carry: where the reading stopped.

    Examples:
        >>> Reading((torch.ones(3),), None).losses[0].mean()
        tensor(1.)

    Source: this library.
    """

    losses: tuple[Tensor, ...]
    carry: Carry


class Window(Protocol):
    """The next window of a stream."""

    def __call__(self, meta: Meta, task: Task, *, carry: Carry | None = None) -> Unrolled:
        """Its mean loss, attached to ``meta``, and the carry for the window after it."""


class Read(Protocol):
    """What is left of a stream."""

    def __call__(self, meta: Meta, task: Task, *, carry: Carry | None = None) -> Reading:
        """Read it without a graph; the losses of all words, and where the reading stopped."""


class DynamicLanguageModel(NamedTuple):
    """The algorithm as three functions, and the problem that they unroll.

    Attributes:
        init: () → meta, ``{"static": ..., "gates": ...}``.
        loss: (meta, task, carry=None) → ``Unrolled``: the mean loss over the next window of the stream, and its carry.
        adapt: (meta, task, carry=None) → ``Reading``: the stream read to its end, without a graph.
        problem: for ``unroll``; one step reads one segment.

    Examples:
        >>> DynamicLanguageModel._fields
        ('init', 'loss', 'adapt', 'problem')

    Source: this library.
    """

    init: Callable[[], Meta]
    loss: Window
    adapt: Read
    problem: Problem


def build(
    module: nn.Module,
    gates: LearnedOptimizer,
    *,
    window: int = 10,
    learn_static: bool = False,
    estimator: Estimator = FirstOrder(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
) -> DynamicLanguageModel:
    """A language model whose weights are updated while it reads, by gates that are learned.

    One step reads a segment: its loss ℓ_t is computed with the weights θ_t that the segments before have left, then
    θ_{t+1} = copy · θ_t − update · ∇ℓ_t + flush · θ_static. Hidden state and weights go on from article to article.
    The meta-loss of a window is the mean of its ℓ_t, so the gates learn to make the segments to come likely.

    Args:
        module: the model: (words [words], hidden) → (scores [words, vocabulary], hidden), and ``start()`` → hidden;
            e.g. a trained ``LanguageModel``. It is read in eval mode; its parameters are where θ_static begins.
        gates: a ``funcmeta.learned.gates(...)``; its weights are where the gates begin.
        window: segments that one ``loss`` reads, at least 2, and one more where a single one would be left; a
            meta-gradient goes back no further.
        learn_static: whether θ_static is learned too.
        estimator: how the meta-gradient is computed; exact by ``Reverse()``.
        memory: what the estimator keeps of the trajectory.

    Returns:
        ``DynamicLanguageModel``. Its tasks are streams, as from ``Corpus.stream``: the support gives for each step
        words and the words that follow them, and the spec has an entry for each step.

    Raises:
        ArgumentError: ``gates``, ``learn_static``, or later the stream or its carry are none, ``window`` is below 2,
            the module cannot be made functional or has no ``start``; in ``loss``, the stream is at its end.

    Examples:
        >>> from funcmeta.learned import gates
        >>> algorithm = build(LanguageModel(vocabulary=9, width=4), gates(), window=2)
        >>> meta, words = algorithm.init(), torch.arange(9)
        >>> task = Task(lambda step: (words[:-1], words[1:]), None, spec=(0,) * 6)
        >>> out = algorithm.loss(meta, task)
        >>> out.loss.backward()
        >>> algorithm.loss(meta, task, carry=out.carry).carry.step
        4
        >>> len(algorithm.adapt(meta, task).losses)
        6

    Source: Wolf, Chaumond and Delangue (2018), "Meta-Learning a Dynamical Language Model" (arXiv:1803.10631).
    """
    if not isinstance(gates, Gates):
        raise ArgumentError(f"gates is {gates!r}, expected gates. Pass funcmeta.learned.gates(...).")
    start = getattr(module, "start", None)
    if not is_function(start):
        raise ArgumentError(
            f"module is a {type(module).__name__} without start(), which returns the hidden state before the first "
            f"word. Pass a LanguageModel, or define it."
        )
    check_flag("learn_static", learn_static)
    check_count("window", window, least=2, advice="The loss of the first segment does not depend on the gates.")
    problem = _problem(module, gates, start())

    def init() -> Meta:
        static = {name: leaf.requires_grad_(learn_static) for name, leaf in init_params(module).items()}
        own = {name: leaf.detach().clone().requires_grad_() for name, leaf in gates.named_parameters()}
        return {"static": static, "gates": own}

    def loss(meta: Meta, task: Task, *, carry: Carry | None = None) -> Unrolled:
        left = _left(task, carry)
        if left < 2:
            raise ArgumentError(
                f"the stream has {len(task.spec)} segments, of which {left} are left, expected at least 2: the loss of "
                f"one does not depend on the gates. Begin another stream, with carry=Carry(carry.state, 0) or without."
            )
        steps = left if left <= window + 1 else window
        out = unroll(problem, meta, task, steps=steps, estimator=estimator, memory=memory, carry=carry)
        return out._replace(loss=out.loss / steps)

    def adapt(meta: Meta, task: Task, *, carry: Carry | None = None) -> Reading:
        with torch.no_grad():
            out = unroll(problem, tree.detach(meta), task, steps=_left(task, carry), carry=carry)
        return Reading(out.info.aux, out.carry)

    return DynamicLanguageModel(init, EstimatedLoss(loss, estimator), adapt, problem)


def _left(task: Task, carry: Carry | None) -> int:
    """How many segments of a stream are still to be read."""
    if not isinstance(task, Task) or not isinstance(task.spec, list | tuple):
        raise ArgumentError(
            f"task is {str(task)[:100]}, expected a stream, whose spec has an entry for each segment. Pass what "
            f"Corpus.stream returns."
        )
    if carry is not None and not (isinstance(carry, Carry) and isinstance(carry.step, int)):
        raise ArgumentError(f"carry is {str(carry)[:100]}, expected a Carry or None. Pass that of an earlier window.")
    return max(len(task.spec) - (carry.step if carry else 0), 0)


def _problem(module: nn.Module, gates: Gates, hidden: Any) -> Problem:
    """Reading by segments, each learned from after it was read, from a hidden state on."""
    model, _, buffers = functionalize(module)
    start = tree.detach(hidden)

    def init(meta: Meta, task: Task, seed: int) -> ReadingState:
        for name in ("static", "gates"):
            if not isinstance(meta, Mapping) or name not in meta:
                raise StructureError(f"meta is {str(meta)[:100]}, expected '{name}' in it. Pass what init() gave.")
        return ReadingState(meta["static"], start)

    def step(meta: Meta, state: ReadingState, batch: Batch, seed: int) -> tuple[ReadingState, StepInfo]:
        words, following = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, batch)
        whole = all(isinstance(each, Tensor) and each.dtype == torch.int64 for each in (words, following))
        if not whole or words is following or words.shape != following.shape:
            raise ArgumentError(
                f"the stream gave {tree.map(tree.describe, batch)}, expected a pair of int64 [words]: words, and those "
                f"that follow them. Pass what Corpus.stream returns."
            )

        def objective(params: Params) -> tuple[Tensor, Any]:
            (scores, hidden), _ = model(params, buffers, words, state.hidden, train=False)
            losses = F.cross_entropy(scores, following, reduction="none")
            return losses.mean(), (losses, hidden)

        (loss, (losses, hidden)), grads = value_and_grad(objective, has_aux=True)(state.params)
        transform = as_transform(gates, meta["gates"])
        params, _ = advance(transform, grads, transform.init(meta["static"]), state.params)
        return ReadingState(params, hidden), StepInfo(loss, loss, losses)

    return Problem(init, step, None)
