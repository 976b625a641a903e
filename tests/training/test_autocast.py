"""Mixed precision: products in low precision, everything that is kept in full, and the same under every policy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta.training import autocast

SEEN: list[torch.dtype] = []


def loss(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    out = predict(x)
    SEEN.append(out.dtype)
    return F.mse_loss(out.float(), y)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with fm.rng.forked(0):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randn(12, 2, generator=generator)


def gradient(inner: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model = net()
    problem = fm.inner_problem(model, inner, optimizer=fm.optim.adam(0.05))
    meta = {"params": fm.init_params(model)}
    out = fm.unroll(problem, meta, fm.Task(batch(), batch()), steps=4, **options)
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in meta["params"].items()}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_loop_with_casts_by_hand(dtype: torch.dtype) -> None:
    def low(layer_input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(layer_input.to(dtype), weight.to(dtype), bias.to(dtype))

    def inner(params: dict[str, Tensor]) -> Tensor:
        x, y = batch()
        hidden = low(x, params["0.weight"], params["0.bias"]).tanh()
        return F.mse_loss(low(hidden, params["2.weight"], params["2.bias"]).float(), y)

    meta = fm.init_params(net())
    params = meta
    for _ in range(3):
        grads = torch.autograd.grad(inner(params), list(params.values()), create_graph=True)
        params = {name: leaf - 0.1 * grad for (name, leaf), grad in zip(params.items(), grads, strict=True)}
    inner(params).backward()
    model = net()
    problem = fm.inner_problem(model, autocast(loss, dtype), optimizer=fm.optim.sgd(0.1))
    own = {"params": fm.init_params(model)}
    fm.unroll(problem, own, fm.Task(batch(), batch()), steps=3).loss.backward()
    for name, leaf in own["params"].items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, meta[name].grad, rtol=1e-6, atol=1e-7)


def test_products_are_low_and_all_else_is_full() -> None:
    SEEN.clear()
    out, found = gradient(autocast(loss))
    assert set(SEEN) == {torch.bfloat16}
    kept = fm.tree.tensors((out.state.params, out.state.opt_state, found, out.loss, out.info.losses))
    assert {leaf.dtype for leaf in kept if leaf.is_floating_point()} == {torch.float32}
    _, full = gradient(loss)
    left, right = (torch.cat([leaf.flatten() for leaf in each.values()]) for each in (found, full))
    assert 0.99 < torch.cosine_similarity(left, right, dim=0) < 1 - 1e-7


@pytest.mark.parametrize("memory", [fm.Segments(2), fm.Revolve(1), fm.Offload(fm.Segments(2))])
@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode()])
def test_replays_are_cast_as_the_first_time(estimator: Any, memory: Any) -> None:
    _, expected = gradient(autocast(loss), estimator=estimator)
    _, found = gradient(autocast(loss), estimator=estimator, memory=memory)
    for name, leaf in found.items():
        torch.testing.assert_close(leaf, expected[name], rtol=1e-6, atol=1e-8)


def test_another_dtype() -> None:
    with pytest.raises(fm.ArgumentError, match=r"dtype is torch\.float64, expected torch\.bfloat16 or torch\.float16"):
        autocast(loss, torch.float64)


def test_only_what_runs_on_this_kind_of_device_is_cast() -> None:
    SEEN.clear()
    gradient(autocast(loss, device_type="mps"))
    assert set(SEEN) == {torch.float32}


@pytest.mark.parametrize("device_type", ["meta", "gpu", "", 0])
def test_a_kind_of_device_on_which_nothing_can_be_cast(device_type: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=rf"device_type is {device_type!r}, expected .* Pass e\.g\. 'cpu'"):
        autocast(loss, device_type=device_type)
