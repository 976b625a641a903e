"""Curves for TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from funcmeta._errors import MissingExtraError
from funcmeta.training import _tree_file
from funcmeta.training._fit import Watch
from funcmeta.training._folder import Record

FLUSH = 10
"""Seconds after which what was noted is on the disk."""


@contextmanager
def tensorboard(folder: str | Path) -> Iterator[Watch]:
    """Write the curves of a training for TensorBoard while the block runs.

    They are ``train/loss``, ``train/gradient_norm``, ``train/learning_rate``, ``train/alarms`` (how many steps were
    left out so far), ``train/seconds_per_step``, ``validation/mean`` and ``validation/margin``. A loss or norm that is
    not finite is left out. A resumed run goes on in the same folder: what was noted beyond the step where it is taken
    up is hidden.

    Args:
        folder: where the event files go; it is made. ``tensorboard --logdir FOLDER`` shows them.

    Returns:
        A context with the function for ``fit(..., watch=[...])``.

    Raises:
        MissingExtraError: tensorboard is not installed.
        SaveError: the folder cannot be written to; raised at the first record.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, tensorboard(folder) as watch:
        ...     watch(Record(1, 0.7, 2.0, 0.001, 0.1))

    Source: ``torch.utils.tensorboard.SummaryWriter`` (documentation of torch), with its ``purge_step``.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "Curves for TensorBoard need tensorboard, which the extra tensorboard brings. Run "
            'pip install ".[tensorboard]" in a checkout.'
        ) from error
    path, writer = Path(folder), None

    def watch(record: Record) -> None:
        nonlocal writer
        if writer is None:
            with _tree_file.reported(path):
                made: Any = SummaryWriter
                writer = made(path, purge_step=record.step, flush_secs=FLUSH)
        for name, value in _scalars(record).items():
            if value is not None:
                writer.add_scalar(name, value, record.step)

    try:
        yield watch
    finally:
        if writer is not None:
            writer.close()


def _scalars(record: Record) -> dict[str, float | None]:
    stepped = record.step > 0
    return {
        "train/loss": record.loss,
        "train/gradient_norm": record.norm,
        "train/learning_rate": record.rate,
        "train/alarms": record.alarms,
        "train/seconds_per_step": record.seconds if stepped else None,
        "validation/mean": record.validation and record.validation.value,
        "validation/margin": record.validation and record.validation.margin,
    }
