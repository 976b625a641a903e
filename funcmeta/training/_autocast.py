"""Mixed precision: the inner loss in bfloat16 or float16, everything else as it is."""

import torch
from torch import Tensor

from funcmeta._errors import ArgumentError
from funcmeta._typing import Batch, Meta
from funcmeta.problem import InnerLoss, Predict


def autocast(loss_fn: InnerLoss, dtype: torch.dtype = torch.bfloat16, device_type: str = "cpu") -> InnerLoss:
    """The same inner loss with the model's matrix products and convolutions in low precision.

    Autocast surrounds the loss function alone, wherever it runs: in the inner steps, in their replays and in their
    derivatives. Parameters, gradients, the inner optimizer and its state, the meta-loss and the meta-gradient keep the
    dtype that they have. Casts are not cached: torch's cache would outlive the parameters of a step.

    Args:
        loss_fn: (meta, predict, batch) → 0-d loss.
        dtype: of the products: ``torch.bfloat16``, or ``torch.float16``, which needs losses whose gradients do not
            vanish in it: nothing is scaled here.
        device_type: kind of device that the model runs on, as for ``torch.autocast``; on any other kind nothing is
            cast.

    Returns:
        A loss function for ``inner_problem`` and all algorithms, whose loss is float32.

    Raises:
        ArgumentError: ``dtype`` is neither, or torch cannot cast on ``device_type``.

    Examples:
        >>> def loss(meta, predict, batch):
        ...     return predict(batch).square().mean()
        >>> net = torch.nn.Linear(3, 2)
        >>> problem = fm.inner_problem(net, autocast(loss), optimizer=fm.optim.sgd(0.1))
        >>> meta, batch = {"params": fm.init_params(net)}, torch.ones(4, 3)
        >>> fm.unroll(problem, meta, fm.Task(batch, batch), steps=2).loss.dtype
        torch.float32

    Source: the list of what is cast is torch's (documentation of ``torch.amp``).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentError(f"dtype is {dtype!r}, expected torch.bfloat16 or torch.float16. Pass torch.bfloat16.")
    if not _can_cast_on(device_type):
        raise ArgumentError(
            f"device_type is {device_type!r}, expected a kind of device on which torch can cast. Pass e.g. 'cpu' or "
            f"'cuda'."
        )

    def loss(meta: Meta, predict: Predict, batch: Batch) -> Tensor:
        with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
            value = loss_fn(meta, predict, batch)
        return value.float() if value.dtype == dtype else value

    return loss


def _can_cast_on(device_type: str) -> bool:
    try:
        return torch.amp.is_autocast_available(device_type)
    except (RuntimeError, TypeError):  # of a kind that it does not know
        return False
