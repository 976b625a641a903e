"""The scalar problem f(a, x) = a x² whose meta-gradients can be written down."""

import pytest
import torch

from funcmeta import optim
from funcmeta.optim import Transform


def adapted(transform: Transform, x: torch.Tensor) -> torch.Tensor:
    """The outer loss a₁ x² after one inner step from a₀ = 1 on a x², whose gradient is x²."""
    start = {"a": torch.tensor(1.0, dtype=torch.float64)}
    updates, _ = transform.update({"a": x**2}, transform.init(start), start)
    return optim.apply_updates(start, updates)["a"] * x**2


CLIPS = [optim.clip_by_norm, optim.clip_by_global_norm, optim.clip_by_value]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (optim.sgd(1.0), -28.0),
        *[(optim.chain(clip(2.0), optim.sgd(1.0)), -4.0) for clip in CLIPS],
        *[(optim.chain(clip(5.0), optim.sgd(1.0)), -28.0) for clip in CLIPS],
    ],
)
def test_gradient_for_the_data(transform: Transform, expected: float) -> None:
    """A clip whose norm counts as a constant would give -12 in place of -4."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    adapted(transform, x).backward()
    assert x.grad is not None
    assert x.grad.item() == expected


@pytest.mark.parametrize("clip", CLIPS)
def test_gradient_for_the_limit(clip: type) -> None:
    """a₁ = 1 - limit, so that the loss has the derivative -x² = -4."""
    limit = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    adapted(optim.chain(clip(limit), optim.sgd(1.0)), torch.tensor(2.0, dtype=torch.float64)).backward()
    assert limit.grad is not None
    assert limit.grad.item() == -4.0
