"""The exact estimator on problems whose meta-gradient can be written down or had from another library call."""

from typing import Any

import pytest
import torch
from torch import Tensor

import funcmeta as fm

ONE = fm.Task(torch.ones(1), None)


def descent(loss: Any) -> fm.Problem:
    """Gradient descent at rate meta["lr"] from meta["w"], judged by Σ w³."""

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        value, slope = fm.value_and_grad(lambda w: loss(meta, w))(w)
        return w - meta["lr"] * slope, fm.StepInfo(value)

    return fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, w, query, seed: (w**3).sum())


def point(**more: Tensor) -> dict[str, Tensor]:
    meta = {"w": torch.tensor([0.4, -0.9, 1.3]), "lr": torch.tensor(0.2), **more}
    return {name: leaf.double().requires_grad_() for name, leaf in meta.items()}


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_quadratic_in_closed_form(steps: int, memory: Any) -> None:
    """ℓ = w² / 2: w_K = (1 - lr)^K w, so L = Σ (1 - lr)^3K w³."""
    meta = point()
    out = fm.unroll(descent(lambda meta, w: (w**2).sum() / 2), meta, ONE, steps=steps, memory=memory)
    out.loss.backward()
    w, shrink = meta["w"].detach(), (1 - meta["lr"]).detach()
    close = lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)  # noqa: E731
    close(meta["w"].grad, 3 * shrink ** (3 * steps) * w**2)
    close(meta["lr"].grad, -3 * steps * shrink ** (3 * steps - 1) * (w**3).sum())


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_a_loop_by_hand(memory: Any) -> None:
    """The same training written with torch.func.grad only, differentiated by torch.func.grad."""
    loss = lambda meta, w: (torch.sin(meta["a"] * w) ** 2).sum()  # noqa: E731
    meta = point(a=torch.tensor([0.7, 1.9, -1.1]))

    def by_hand(meta: Any) -> Tensor:
        w = meta["w"]
        for _ in range(4):
            w = w - meta["lr"] * torch.func.grad(lambda w: loss(meta, w))(w)
        return (w**3).sum()

    fm.unroll(descent(loss), meta, ONE, steps=4, memory=memory).loss.backward()
    expected = torch.func.grad(by_hand)({name: leaf.detach() for name, leaf in meta.items()})
    for name, leaf in meta.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-13)


def test_estimators_compare_and_print() -> None:
    assert fm.Reverse() == fm.Reverse() != fm.FirstOrder()
    assert [repr(each) for each in (fm.Reverse(), fm.FirstOrder(), fm.Reptile())] == [
        "Reverse()",
        "FirstOrder()",
        "Reptile()",
    ]
