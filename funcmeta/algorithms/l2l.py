"""Learning to learn by gradient descent by gradient descent: an optimizer trained through the training of others."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from funcmeta import rng, tree
from funcmeta._check import check_choice, check_count, check_flag, is_function
from funcmeta._errors import ArgumentError, NonFiniteError, NonFiniteWarning, StructureError
from funcmeta._typing import Meta, Params
from funcmeta.algorithms._algorithm import Adapt, EstimatedLoss, MetaLoss
from funcmeta.algorithms._scaffold import imitating, mismatch, rescaled
from funcmeta.algorithms._start import carry_of, fresh_start
from funcmeta.estimators import Estimator, FirstOrder
from funcmeta.learned import LearnedOptimizer, as_transform
from funcmeta.memory import Memory, StoreAll
from funcmeta.model import functionalize, init_params
from funcmeta.optim import Transform
from funcmeta.problem import InnerLoss, Predict, Problem, inner_problem
from funcmeta.tasks import Task
from funcmeta.unroll import Carry, unroll
from funcmeta.unroll_batch import Strategy, unroll_batch

__all__ = ["L2L", "build"]

Steps = int | tuple[int, int] | Callable[[int], int]
"""A number of steps; its bounds, between which it is drawn; or a function of the seed, for a curriculum."""


class Begin(Protocol):
    """Where the trainings of stacked tasks begin."""

    def __call__(self, meta: Meta, tasks: Task, *, seed: int = 0) -> Carry | None:
        """The carry before the first window; None where ``meta`` holds the initial parameters."""


class Window(Protocol):
    """One window of a training, and where to go on."""

    def __call__(
        self, meta: Meta, tasks: Task, *, seed: int = 0, carry: Carry | None = None
    ) -> tuple[Tensor, Carry | None]:
        """0-d loss, attached to ``meta``, and the carry of the next window; None after the last."""


class Windows(Protocol):
    """The meta-losses of one training of the optimizees, window after window."""

    def __call__(self, meta: Meta, tasks: Task, *, seed: int = 0) -> Iterator[Tensor]:
        """0-d losses, each attached to ``meta``, which may be changed between one and the next."""


class L2L(NamedTuple):
    """A learned optimizer in training, as an ``Algorithm`` with fields more.

    Attributes:
        init: () → meta, ``{"optimizer": weights}``, fresh leaves that require grad.
        loss: (meta, tasks, seed=0) → 0-d loss of a whole training: the sum of what ``windows`` gives.
        adapt: (meta, task, seed=0, evaluate=False) → predict, a fresh module trained by the learned optimizer.
        windows: (meta, tasks, seed=0) → the losses of the windows of a training, one by one, for a step of the outer
            optimizer after each.
        begin: (meta, tasks, seed=0) → the carry before the first window.
        window: (meta, tasks, seed=0, carry=None) → the loss of one window, and the carry of the next or None after the
            last; what ``windows`` repeats, for those who keep the carry themselves.
        imitation: (meta, tasks, seed=0) → 0-d loss, how far the updates are from the teacher's in one window.
        problem: the training as a ``Problem``, for ``unroll``, ``check_meta_grad`` or ``horizon_report``.

    Examples:
        >>> L2L._fields
        ('init', 'loss', 'adapt', 'windows', 'begin', 'window', 'imitation', 'problem')

    Source: this library.
    """

    init: Callable[[], Meta]
    loss: MetaLoss
    adapt: Adapt
    windows: Windows
    begin: Begin
    window: Window
    imitation: MetaLoss
    problem: Problem


def build(
    optimizer: LearnedOptimizer,
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    steps: Steps,
    window: int = 20,
    start: Callable[[int], Params] | None = None,
    learn_start: bool = False,
    teacher: Transform | None = None,
    scaling: float = 0.0,
    nonfinite: Literal["raise", "skip"] = "raise",
    estimator: Estimator = FirstOrder(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    strategy: Strategy = "auto",
    train: bool | None = None,
) -> L2L:
    """L2L: min over φ of Σ_k ℓ(θ_k), θ_{k+1} = θ_k + u_k, u_k, h_{k+1} = optimizer_φ(θ_k, ∇ℓ(θ_k), h_k).

    A training of ``steps`` steps is cut in windows: state is carried from one to the next, gradients are not. The loss
    of a window is the sum of the inner losses in it, plus the loss on the query at its end where tasks have a query.
    Where they have none, a window has two steps at least, as the first loss does not depend on the optimizer: a single
    step that is left over goes to the window before.

    Args:
        optimizer: what is trained; its weights are where meta-training begins.
        module: the optimizee.
        loss_fn: (meta, predict, batch) → 0-d loss of the optimizee.
        steps: of one training: a number; bounds (low, high), between which its logarithm is drawn evenly by the seed;
            or a function seed → number, for a curriculum where seeds count outer iterations.
        window: steps between two cuts of the graph.
        start: seed → initial parameters of the optimizee; default: those that ``reset_parameters`` of its layers draw.
        learn_start: learn the initial parameters too, as ``meta["params"]``, in place of ``start``.
        teacher: whose updates ``imitation`` compares with.
        scaling: s > 0 trains c ⊙ θ in place of θ, with log c drawn evenly from [−s, s] for every coordinate.
        nonfinite: what ``windows`` does when an inner loss is NaN or infinite: "raise" ``NonFiniteError``, which names
            the step, or "skip" the rest of that training with a ``NonFiniteWarning``.
        estimator: of each window; ``FirstOrder()`` as in the paper, ``Reverse()`` for the exact meta-gradient.
        memory: what an exact estimator keeps of a window.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``L2L``; its meta is ``{"optimizer": ...}``, with "params" where the start is learned.

    Raises:
        ArgumentError: ``optimizer`` is no LearnedOptimizer, ``teacher`` no Transform or ``start`` no function; steps,
            window or scaling out of range; a module without ``reset_parameters`` and no ``start``.

    Examples:
        >>> class Point(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.theta = nn.Parameter(torch.zeros(10))
        >>> def loss(meta, predict, batch):
        ...     W, y = batch
        ...     return ((W @ predict.params["theta"] - y) ** 2).sum()
        >>> def start(seed):
        ...     return {"theta": torch.randn(10, generator=torch.Generator().manual_seed(seed))}
        >>> algorithm = build(fm.learned.lstm(), Point(), loss, steps=100, start=start)
        >>> meta = algorithm.init()
        >>> outer = torch.optim.Adam(meta["optimizer"].values(), lr=1e-3)
        >>> for value in algorithm.windows(meta, fm.tasks.quadratics().sample_batch(seed=0, tasks=8), seed=0):
        ...     outer.zero_grad()
        ...     value.backward()
        ...     outer.step()

    Source: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent"; random scaling: Lv
    et al. (2017), section 4.1; imitation and curriculum: Chen et al. (2020), "Training stronger baselines for
    learning to optimize"; random horizons: Metz et al. (2019), section 3.3.
    """
    check_count("window", window, advice="Pass e.g. window=20.")
    check_flag("learn_start", learn_start)
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 <= scaling < 20:
        raise ArgumentError(f"scaling is {scaling!r}, expected a number in [0, 20). Pass e.g. scaling=3.0.")
    if not isinstance(optimizer, LearnedOptimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}, expected a LearnedOptimizer. Pass funcmeta.learned.lstm()."
        )
    if start is not None and not is_function(start):
        raise ArgumentError(f"start is {start!r}, expected a function from a seed to parameters. Pass one, or None.")
    if not isinstance(teacher, Transform | None):
        raise ArgumentError(f"teacher is {teacher!r}, expected a Transform or None. Pass e.g. funcmeta.optim.adam().")
    model, _, _ = functionalize(module)
    length_of = _length(steps)
    drawn = None if learn_start else start or fresh_start(module)
    names = {"optimizer", "params"} if learn_start else {"optimizer"}

    def problem_of(
        transform: Callable[[Meta], Transform], *, judged: bool, trajectory: bool = True, rescale: bool = True
    ) -> Problem:
        scaled = (lambda meta: rescaled(transform(meta), scaling)) if scaling and rescale else transform
        made = inner_problem(module, loss_fn, optimizer=scaled, trajectory_loss=trajectory, train=train)
        judge = inner_problem(module, loss_fn, optimizer=scaled, train=train).meta_loss if judged else None

        def init(meta: Meta, task: Task, seed: int) -> object:
            given = meta if drawn is None or "params" in meta else {**meta, "params": drawn(seed)}
            return made.init(given, task, seed)

        return Problem(init, made.step, judge)

    def learned(meta: Meta) -> Transform:
        return as_transform(optimizer, meta["optimizer"])

    judged, unjudged = problem_of(learned, judged=True), problem_of(learned, judged=False)
    plain = problem_of(learned, judged=False, rescale=False)
    imitated = None
    if teacher is not None:
        taught = problem_of(lambda meta: imitating(learned(meta), teacher), judged=False, trajectory=False)
        imitated = taught._replace(meta_loss=lambda meta, state, query, seed: mismatch(state.opt_state))

    def fresh(problem: Problem, meta: Meta, tasks: Task, seed: int) -> Carry | None:
        return None if drawn is None else carry_of(problem, meta, tasks, seed, drawn)

    def check_meta(meta: Meta) -> None:
        if not isinstance(meta, Mapping) or meta.keys() != names:
            got = sorted(meta) if isinstance(meta, Mapping) else type(meta).__name__
            raise StructureError(f"meta has {got}, expected {sorted(names)}. Pass what init() returned.")

    def init() -> Meta:
        return {"optimizer": init_params(optimizer), **({"params": init_params(module)} if learn_start else {})}

    def loss(meta: Meta, tasks: Task, *, seed: int = 0) -> Tensor:
        losses = list(windows(meta, tasks, seed=seed))
        if not losses:
            raise NonFiniteError(f"The first window of the training of seed {seed} is not finite. Lower the updates.")
        return torch.stack(losses).sum()

    def begin(meta: Meta, tasks: Task, *, seed: int = 0) -> Carry | None:
        check_meta(meta)
        return fresh(unjudged, meta, tasks, seed)

    def window_of(meta: Meta, tasks: Task, *, seed: int = 0, carry: Carry | None = None) -> tuple[Tensor, Carry | None]:
        check_meta(meta)
        judge = tasks.query is not None
        ends = list(accumulate(_parts(length_of(seed), window, least=1 if judge else 2)))
        begun = carry.step if carry else 0
        if begun not in (0, *ends[:-1]):
            raise ArgumentError(
                f"carry is at step {begun} of the training of seed {seed}, whose windows begin at {[0, *ends[:-1]]}. "
                f"Pass what window or begin returned for the same seed."
            )
        end = next(each for each in ends if each > begun)
        out = unroll_batch(
            judged if judge else unjudged,
            meta,
            tasks,
            steps=end - begun,
            strategy=strategy,
            estimator=estimator,
            memory=memory,
            seed=seed,
            carry=carry,
        )
        return out.loss, out.carry if end < ends[-1] else None

    def windows(meta: Meta, tasks: Task, *, seed: int = 0) -> Iterator[Tensor]:
        carry, going_on = begin(meta, tasks, seed=seed), True
        while going_on:
            try:
                value, carry = window_of(meta, tasks, seed=seed, carry=carry)
            except NonFiniteError as error:
                if nonfinite == "raise":
                    raise
                warnings.warn(f"The rest of the training of seed {seed} is skipped: {error}", NonFiniteWarning, 2)
                return
            going_on = carry is not None
            yield value

    def imitation(meta: Meta, tasks: Task, *, seed: int = 0) -> Tensor:
        if imitated is None:
            raise ArgumentError("There is no teacher to imitate. Pass build(..., teacher=funcmeta.optim.adam(0.01)).")
        check_meta(meta)
        return unroll_batch(
            imitated,
            meta,
            tasks,
            steps=window,
            strategy=strategy,
            estimator=estimator,
            memory=memory,
            seed=seed,
            carry=fresh(imitated, meta, tasks, seed),
        ).loss

    def adapt(meta: Meta, task: Task, *, seed: int = 0, evaluate: bool = False) -> Predict:
        with torch.no_grad():
            state = unroll(plain, tree.detach(meta), task, steps=length_of(seed), seed=seed).state
        return Predict(model, state.params, state.buffers, train=False if evaluate else train)

    return L2L(init, EstimatedLoss(loss, estimator), adapt, windows, begin, window_of, imitation, unjudged)


def _parts(steps: int, window: int, *, least: int) -> list[int]:
    """The lengths of the windows, none of which is shorter than ``least``."""
    if min(steps, window) < least:
        raise ArgumentError(
            f"a window has {min(steps, window)} step, expected at least {least} where tasks have no query: its only "
            f"loss does not depend on the optimizer. Take longer windows, or give the tasks a query."
        )
    parts = [min(window, steps - begun) for begun in range(0, steps, window)]
    return [*parts[:-2], parts[-2] + parts[-1]] if parts[-1] < least else parts


def _length(steps: Steps) -> Callable[[int], int]:
    """seed → the number of steps of this seed's training."""
    if isinstance(steps, tuple) and len(steps) == 2:
        low, high = (check_count("steps", each, advice="Pass e.g. steps=(20, 200).") for each in steps)
        if low > high:
            raise ArgumentError(f"steps is {steps!r}, expected bounds (low, high). Exchange them.")
        return lambda seed: _drawn(low, high, seed)
    if is_function(steps):
        return lambda seed: int(check_count("steps(seed)", steps(seed), advice="Return a positive integer."))
    fixed: int = check_count("steps", steps, advice="Pass e.g. steps=100, bounds, or a function of the seed.")
    return lambda seed: fixed


def _drawn(low: int, high: int, seed: int) -> int:
    part = torch.rand((), generator=rng.generator(rng.fold(seed, 3)), dtype=torch.float64).item()
    return min(high, round(low * (high / low) ** part))
