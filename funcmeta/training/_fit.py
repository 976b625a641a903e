"""The outer loop: meta-training that can be stopped, taken up again, shared among processes and watched."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from funcmeta import rng, tree
from funcmeta._check import check_choice, check_count, check_flag, check_positive, is_function
from funcmeta._errors import ArgumentError, DivergenceError
from funcmeta._typing import Meta
from funcmeta.tasks import Sampler, Streams
from funcmeta.training._carries import Spread
from funcmeta.training._codec import encode
from funcmeta.training._evaluation import Validation, check_score
from funcmeta.training._folder import Folder, Record, Store
from funcmeta.training._objective import Objective, Stream, check_repeatable, objective
from funcmeta.training._ranks import Ranks
from funcmeta.training._run import Alarm, Optimizer, Plan, Run, Scheduler
from funcmeta.training._signals import Signals

Watch = Callable[[Record], None]


class Fitted(NamedTuple):
    """What a training left.

    Attributes:
        meta: what was learned: with a validation the best that it saw, otherwise the last.
        step: outer steps that were taken.
        ended: "steps", "patience", or the name of the signal that asked for an end.
        records: a ``Record`` for every step, those before a resumption included where a folder has them.
        alarms: steps that were left out.

    Examples:
        >>> Fitted._fields
        ('meta', 'step', 'ended', 'records', 'alarms')

    Source: this library.
    """

    meta: Meta
    step: int
    ended: str
    records: tuple[Record, ...]
    alarms: int


def fit(
    algorithm: Any,
    tasks: Sampler | Streams,
    optimizer: Callable[[Meta], Optimizer],
    *,
    steps: int,
    batch_size: int = 4,
    accumulate: int = 1,
    seed: int = 0,
    meta: Meta | None = None,
    scheduler: Callable[[Optimizer], Scheduler] | None = None,
    clip: float | None = None,
    alarm: Alarm = Alarm(),  # noqa: B008
    validation: Validation | None = None,
    folder: Folder | None = None,
    watch: Sequence[Watch] = (),
    spread: Spread = "tasks",
) -> Fitted:
    """Meta-train: outer steps of an optimizer of torch on the loss of an algorithm, batch after batch of tasks.

    meta ← meta − optimizer((1/A) Σ_a ∂L(meta, batch_a)/∂meta). For algorithms that train in windows (``l2l``,
    ``dynamic_lm``) a step is a window, whose carry goes on to the next step until the batch is done. Batch number i
    is ``tasks.sample_batch(rng.fold(seed, 0, i), batch_size)``, and i is the seed of the algorithm, so that a
    curriculum can count. All randomness follows from ``seed``: a run that is killed and taken up again ends on the
    same bytes as one that was not, if the algorithm was built with strategy "vmap" or "loop" ("auto" measures time).

    Where ``torch.distributed`` is initialized, every process calls ``fit`` with the same arguments; gradients are
    averaged by ``DistributedDataParallel``, and the first process writes. They end where one process would, on another
    number of processes too, but for draws that depend on the place in a process's part of the batch: dropout, and the
    noise of evolution strategies for tasks in a loop.

    Args:
        algorithm: what ``algorithms.<name>.build`` returned, or an ``Algorithm`` of your own.
        tasks: a sampler of tasks to train on; for a language model ``Corpus.streams(...)``.
        optimizer: meta → an optimizer of torch, e.g. ``lambda meta: torch.optim.Adam(fm.tree.leaves(meta))``;
            it has to hold every leaf that requires grad.
        steps: outer steps in all, those before a resumption included.
        batch_size: tasks in a batch, over all processes.
        accumulate: A, batches whose mean gradient makes a step.
        seed: integer from which tasks and draws follow.
        meta: where to begin; default ``algorithm.init()``, which may draw from torch's global generator. Not changed.
        scheduler: optimizer → a scheduler of torch, which takes a step after each outer step.
        clip: largest norm of the meta-gradient; a longer one is shortened to it.
        alarm: what to do about meta-gradients that are not finite or explode.
        validation: held-out tasks to be judged on, drawn by a stream of their own from ``seed``; the best meta is kept,
            and patience may end the training.
        folder: where to keep the run; None keeps nothing.
        watch: functions that are given every ``Record``.
        spread: what several processes share: the "tasks" of a batch, or the "particles" of an evolution strategy that
            was built with ``share=(rank, ranks)``.

    Returns:
        ``Fitted``. SIGTERM and SIGINT end the training after the step that runs, with a checkpoint. ``torchrun`` passes
        them on, and kills what has not ended after its ``--shutdown-timeout``, 30 seconds by itself: give it more time
        than a step takes.

    Raises:
        ArgumentError: a number is out of range, ``batch_size`` cannot be shared among the processes, ``spread`` and
            the ``share`` of the estimator do not go together, nothing is learned, the optimizer lacks a leaf that
            is learned or has other tensors, ``validation`` cannot be judged on, a sampler returns other than a stack of
            so many tasks, the folder has a run that is not to be resumed, or the run was begun with other settings or
            has taken more steps.
        DetachedError: the loss depends on nothing that is learned.
        ReplayError: the sampler gives two different batches for one seed.
        DataError: a checkpoint cannot be read, or needs a class that is not imported.
        SaveError: the system does not take a file.
        LostProcessError: another process ended, or cannot be reached.
        DivergenceError: the alarm says stop, or 100 steps in a row were left out.

    Examples:
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> algorithm = fm.maml.build(torch.nn.Linear(1, 1), loss, steps=1, lr=0.01, strategy="vmap")
        >>> def optimizer(meta):
        ...     return torch.optim.Adam(fm.tree.leaves(meta), lr=1e-3)
        >>> fitted = fit(algorithm, fm.tasks.sinusoids(), optimizer, steps=3)
        >>> [record.step for record in fitted.records]
        [1, 2, 3]

    Source: this library.
    """
    check_count("steps", steps, advice="Pass e.g. steps=1000.")
    check_count("batch_size", batch_size, advice="Pass e.g. batch_size=4.")
    check_count("accumulate", accumulate, advice="Pass e.g. accumulate=1.")
    _check_kinds(optimizer, scheduler, alarm, validation, folder, watch)
    check_choice("alarm.action", alarm.action, ("stop", "skip", "lower"))
    check_choice("spread", spread, ("tasks", "particles"))
    rng.check_seed(seed)
    if clip is not None:
        check_positive("clip", clip)
    if isinstance(alarm.limit, bool) or not isinstance(alarm.limit, int | float) or not alarm.limit > 0:
        raise ArgumentError(f"alarm.limit is {alarm.limit!r}, expected a positive number. Pass e.g. limit=100.0.")
    ranks = Ranks.here()
    if spread == "tasks" and batch_size % ranks.number:
        raise ArgumentError(
            f"batch_size is {batch_size}, which {ranks.number} processes cannot share evenly. Pass a multiple."
        )
    aim = objective(algorithm, tasks, spread)
    held_out = None if validation is None else _held_out(algorithm, validation)
    ranks.check_share(algorithm, spread)
    check_repeatable(aim, rng.fold(seed, Stream.TRAINING, 0), batch_size)
    own = _owned(algorithm.init() if meta is None else meta)
    plan = Plan(seed, batch_size, accumulate, clip, alarm, validation, spread)
    run = Run(aim, held_out, own, optimizer, scheduler, plan, ranks)
    store = None if folder is None else Store(folder)
    records = _opened(run, store, steps)
    with Signals() as signals:
        ended = _loop(run, steps, store, records, watch, signals)
    learned = run.learned()
    if store and ranks.rank == 0:
        if ended in ("steps", "patience"):
            store.finish(learned)
        store.end(ended)
    return Fitted(learned, run.step, ended, tuple(records), run.alarms)


def _opened(run: Run, store: Store | None, most: int) -> list[Record]:
    """Take up what the folder has, and its records."""
    if store is None:
        return []
    found = store.newest()
    if found is not None:
        run.restore(found)
    steps = run.ranks.gathered(found and found["step"])  # nothing is written before all have looked
    if len(set(steps)) > 1:
        raise ArgumentError(
            f"The processes found the checkpoints of the steps {steps}, in the order of their ranks. Give them one "
            f"folder that all of them can read."
        )
    if run.step > most:
        raise ArgumentError(f"steps is {most}, but the run has taken {run.step} already. Pass at least as many.")
    return [] if run.ranks.rank else store.begin_log(-1 if found is None else run.step)


def _loop(
    run: "Run", steps: int, store: Store | None, records: list[Record], watch: Sequence[Watch], signals: Signals
) -> str:
    """Steps until there are enough, or validation or a signal says so. Returns which."""

    def note(record: Record) -> None:
        records.append(record)
        if run.ranks.rank == 0:
            if store:
                store.note(record)
            for each in watch:
                each(record)

    def checkpoint() -> None:
        carries = run.carries()
        if store and run.ranks.rank == 0:
            store.save(run.step, run.saved(carries))

    if not run.begun:
        if run.validation:
            note(run.validated(Record(0, None, None, run.rate, 0.0)))
        run.begun = True
        checkpoint()
    saved = run.step
    while run.step < steps and not run.exhausted:
        record = run.advance()
        if run.validation and (run.step % run.validation.every == 0 or run.step == steps):
            record = run.validated(record)
        note(record)
        try:
            run.stop_if_told(record)
        except DivergenceError:
            if store and run.ranks.rank == 0:
                store.end("alarm")
            raise
        if run.step == 1 and store:
            encode(run.saved([lane.carry for lane in run.lanes]))
        if store and store.is_due(run.step):
            checkpoint()
            saved = run.step
        if run.ranks.any(signals.caught is not None):
            break
    if saved != run.step:
        checkpoint()
    if run.exhausted:
        return "patience"
    return "steps" if run.step >= steps else signals.caught or "a signal to another process"


def _owned(meta: Meta) -> Meta:
    """The same values in leaves of our own; those that are learned are parameters."""
    tree.check_tensors(meta, name="meta")
    own = tree.map(
        lambda leaf: torch.nn.Parameter(leaf.detach().clone()) if leaf.requires_grad else leaf.detach().clone(), meta
    )
    if not any(leaf.requires_grad for leaf in tree.leaves(own)):
        raise ArgumentError("No leaf of meta requires grad, so nothing would be learned. Call requires_grad_() on it.")
    return own


_OPTIMIZER = (
    "a function from meta to an optimizer of torch. Pass e.g. "
    "lambda meta: torch.optim.Adam(funcmeta.tree.leaves(meta), lr=1e-3)"
)


def _check_kinds(optimizer: Any, scheduler: Any, alarm: Any, validation: Any, folder: Any, watch: Any) -> None:
    """Raise unless each is of the kind that it has to be."""
    maker = is_function(optimizer) or (isinstance(optimizer, type) and issubclass(optimizer, Optimizer))
    watches = isinstance(watch, list | tuple) and all(map(callable, watch))
    for name, value, good, wanted in (
        ("optimizer", optimizer, maker, _OPTIMIZER),
        (
            "scheduler",
            scheduler,
            scheduler is None or callable(scheduler),
            "a function that makes a scheduler",
        ),
        ("alarm", alarm, isinstance(alarm, Alarm), "an Alarm"),
        ("validation", validation, isinstance(validation, Validation | None), "a Validation or None"),
        ("folder", folder, isinstance(folder, Folder | None), "a Folder or None"),
        ("watch", watch, watches, "a list of functions"),
    ):
        if not good:
            raise ArgumentError(f"{name} is {str(value)[:80]}, expected {wanted}.")


def _held_out(algorithm: Any, validation: Validation) -> Objective:
    """The objective on the tasks of a validation, whose fields can be used."""
    check_score("validation.score", validation.score)
    check_flag("validation.higher_is_better", validation.higher_is_better)
    check_count("validation.every", validation.every, advice="Pass e.g. every=50.")
    check_count("validation.number", validation.number, least=2, advice="Pass e.g. number=20.")
    check_count("validation.patience", validation.patience, or_none=True, advice="Pass e.g. patience=5.")
    found = objective(algorithm, validation.tasks, name="validation.tasks")
    found.check_judged(validation.number, validation.score)
    return found
