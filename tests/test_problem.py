"""The usual inner problem, made from a module and a loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import check_meta_grad


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(x), y)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def task() -> fm.Task:
    return fm.Task(
        (torch.randn(5, 3).double(), torch.randn(5, 2).double()),
        (torch.randn(6, 3).double(), torch.randn(6, 2).double()),
    )


def test_one_step_is_one_step_of_torch_optim() -> None:
    module, data = net(), task()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1, momentum=0.9))
    state = problem.init({}, data, 0)
    assert int(state.step) == 0
    outer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for number in range(1, 4):
        state, info = problem.step({}, state, data.support, 0)
        loss = F.mse_loss(module(data.support[0]), data.support[1])
        outer.zero_grad()
        loss.backward()
        outer.step()
        torch.testing.assert_close(info.loss, loss.detach(), rtol=1e-12, atol=0.0)
        assert int(state.step) == number
        assert state.step.dtype == torch.int64
        assert info.meta_loss is None
        for name, tensor in module.named_parameters():
            torch.testing.assert_close(state.params[name], tensor.detach(), rtol=1e-10, atol=1e-12)


def test_the_initial_point_is_that_of_meta_or_the_modules_own() -> None:
    module, data = net(), task()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    other = fm.init_params(net())
    for meta in ({}, {"lr": torch.ones(1)}, torch.ones(1)):
        state = problem.init(meta, data, 0)
        assert all(torch.equal(state.params[name], tensor) for name, tensor in module.named_parameters())
    state = problem.init({"params": other}, data, 0)
    assert all(state.params[name] is other[name] for name in other)


def test_own_parameters_are_those_at_the_time_of_the_making() -> None:
    module = net()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1))
    before = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(problem.init({}, task(), 0).params["0.weight"], before)


def test_the_optimizer_may_read_meta() -> None:
    module, data = net(), task()
    fixed = fm.inner_problem(module, mse, optimizer=optim.sgd(0.3))
    read = fm.inner_problem(module, mse, optimizer=lambda meta: optim.sgd(meta["lr"]))
    meta = {"lr": torch.tensor(0.3, dtype=torch.float64)}
    losses = [fm.unroll(each, meta, data, steps=3).loss for each in (fixed, read)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0.0)


def test_the_loss_sees_parameters_meta_and_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    seen: list[Any] = []

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        before = predict.buffers["1.num_batches_tracked"]
        out = predict(batch)
        seen.append((sorted(predict.params), int(before), int(predict.buffers["1.num_batches_tracked"])))
        return out.square().mean() + meta["decay"] * sum(each.square().sum() for each in predict.params.values())

    problem = fm.inner_problem(module, loss, optimizer=optim.sgd(0.1))
    batch = torch.randn(4, 2)
    meta = {"decay": torch.tensor(0.1, requires_grad=True)}
    fm.unroll(problem, meta, fm.Task(batch, batch), steps=2).loss.backward()
    names = ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert seen == [(names, 0, 1), (names, 1, 2), (names, 2, 3)]
    assert meta["decay"].grad is not None


# ---- the meta-loss


def run(**options: Any) -> Any:
    with fm.rng.forked(0):
        module, data = net(), task()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.2), **options)
    return fm.unroll(problem, {"params": fm.init_params(module)}, data, steps=3)


def twice(meta: Any, predict: Any, batch: Any) -> Tensor:
    return 2 * mse(meta, predict, batch)


def test_meta_losses() -> None:
    """The last loss; the sum of the inner losses; a weighted sum; a sum of both when both are asked for."""
    plain = run()
    losses = plain.info.losses
    weights = torch.tensor([0.0, 1.0, 2.0]).double()

    def close(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0)

    close(run(meta_loss_fn=twice).loss, 2 * plain.loss)
    close(run(trajectory_loss=True).loss.detach(), losses.sum())
    close(run(trajectory_loss=lambda step: step).loss.detach(), losses @ weights)
    close(run(trajectory_loss=lambda step: 0.5).loss.detach(), losses.sum() / 2)
    close(run(trajectory_loss=True, meta_loss_fn=twice).loss, losses.sum() + 2 * plain.loss)
    assert fm.inner_problem(net(), mse, optimizer=optim.sgd(0.1), trajectory_loss=True).meta_loss is None


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1), fm.Segments(2)], ids=repr)
@pytest.mark.parametrize("meta_loss_fn", [None, twice])
@pytest.mark.parametrize("trajectory_loss", [True, lambda step: 0.5**step], ids=["sum", "weights"])
def test_trajectory_losses_are_differentiated(trajectory_loss: Any, meta_loss_fn: Any, memory: Any) -> None:
    module = net()
    problem = fm.inner_problem(
        module,
        mse,
        optimizer=lambda meta: optim.sgd(meta["lr"]),
        trajectory_loss=trajectory_loss,
        meta_loss_fn=meta_loss_fn,
    )
    meta = {"params": fm.init_params(module), "lr": torch.tensor(0.3).double().requires_grad_()}
    check_meta_grad(problem, meta, task(), steps=3, memory=memory)


def test_a_trajectory_loss_needs_no_query() -> None:
    data = task()._replace(query=None)
    problem = fm.inner_problem(net(), mse, optimizer=optim.sgd(0.1), trajectory_loss=True)
    assert fm.unroll(problem, {}, data, steps=2).loss.isfinite()
    problem = fm.inner_problem(net(), mse, optimizer=optim.sgd(0.1))
    with pytest.raises(fm.ArgumentError, match=r"has no query, which the meta-loss reads. Give the task a query"):
        fm.unroll(problem, {}, data, steps=2)


# ---- adapt


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_adapt_trains_some_parameters_and_differentiates_all(memory: Any) -> None:
    module, data = net(), task()
    problem = fm.inner_problem(
        module, mse, optimizer=lambda meta: optim.adam(meta["lr"], eps=0.1), adapt=lambda name: name.startswith("2.")
    )
    meta = {"params": fm.init_params(module), "lr": torch.tensor(0.1).double().requires_grad_()}
    out = fm.unroll(problem, meta, data, steps=3, memory=memory)
    assert sorted(out.state.params) == ["2.bias", "2.weight"]
    assert not torch.equal(out.state.params["2.weight"], meta["params"]["2.weight"])
    check_meta_grad(problem, meta, data, steps=3, memory=memory)


def test_adapt_keeps_the_rest_of_the_modules_own_parameters() -> None:
    module, data = net(), task()
    problem = fm.inner_problem(module, mse, optimizer=optim.sgd(0.1), adapt=lambda name: name == "2.bias")
    out = fm.unroll(problem, {}, data, steps=2)
    with torch.no_grad():
        module[2].bias.copy_(out.state.params["2.bias"])
    torch.testing.assert_close(out.loss, F.mse_loss(module(data.query[0]), data.query[1]).detach())


# ---- draws


def test_draws_of_the_loss_follow_the_seed_of_the_step() -> None:
    """Noise that the loss draws: the same for the same seed, other noise in every step, no trace outside."""
    drawn: list[float] = []

    def noisy(meta: Any, predict: Any, batch: Any) -> Tensor:
        drawn.append(float(torch.rand(())))
        return mse(meta, predict, batch)

    problem = fm.inner_problem(net(), noisy, optimizer=optim.sgd(0.1))
    data, before = task(), torch.get_rng_state()
    for seed in (7, 7, 8):
        fm.unroll(problem, {}, data, steps=3, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, third = drawn[:4], drawn[4:8], drawn[8:]
    assert first == second
    assert len({*first, *third}) == 8
    fm.unroll(problem, {}, data, steps=2, seed=7)
    assert drawn[12:14] == first[:2]
    assert drawn[14] not in first


def test_options_are_named() -> None:
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        fm.inner_problem(nn.Linear(1, 1), lambda meta, predict, batch: predict(batch).sum(), fm.optim.sgd(0.1))  # type: ignore[misc]
