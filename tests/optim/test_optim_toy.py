"""The scalar problem f(a, x) = a x² whose meta-gradients can be written down."""

import pytest
import torch

from funcmeta import optim


def adapted(transform: optim.Transform, x: torch.Tensor) -> torch.Tensor:
    """The outer loss a₁ x² after one inner step from a₀ = 1 on a x², whose gradient is x²."""
    start = {"a": torch.tensor(1.0, dtype=torch.float64)}
    updates, _ = transform.update({"a": x**2}, transform.init(start), start)
    return optim.apply_updates(start, updates)["a"] * x**2


@pytest.mark.parametrize(("limit", "expected"), [(None, -28.0)])
def test_gradient_for_the_data(limit: float | None, expected: float) -> None:
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    adapted(optim.sgd(1.0), x).backward()
    assert x.grad is not None
    assert x.grad.item() == expected
