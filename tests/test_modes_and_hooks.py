"""Train and eval modes of support and query, and hooks on parameters."""

from typing import Any

import pytest
import torch
from test_module_state import LR, TASK, Base, by_torch, by_us, mse
from torch import nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import check_meta_grad

# ---- modes


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def trained(net: nn.Module, train: Any, query: Any) -> tuple[list[float], float]:
    """Losses by torch.optim; None leaves the modes as they are."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=LR), []
    if train is not None:
        net.train(train)
    for _ in range(3):
        optimizer.zero_grad()
        loss = mse(None, net, TASK.support)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if callable(query):
        query()
    elif query is not None:
        net.train(query)
    return losses, mse(None, net, TASK.query).item()


@pytest.mark.parametrize("own", ["train", "eval", "mixed"])
@pytest.mark.parametrize(
    ("options", "train", "query"),
    [
        ({}, None, None),
        ({"train": False}, False, None),
        ({"query_train": False}, None, False),
        ({"train": False, "query_train": True}, False, True),
        ({"train": True, "query_train": False}, True, False),
    ],
    ids=str,
)
def test_modes_are_those_of_torch(own: str, options: dict[str, Any], train: Any, query: Any) -> None:
    net = normalized()
    if own == "eval":
        net.eval()
    elif own == "mixed":
        net[1].eval()
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR), **options)
    out = fm.unroll(problem, {"params": fm.init_params(net)}, TASK, steps=3)
    losses, judged = trained(net, train, query)
    assert out.info.losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert out.loss.item() == pytest.approx(judged, rel=1e-12)


def test_the_query_in_each_submodules_own_mode() -> None:
    net = normalized()
    net[3].eval()
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR), train=True, query_train=None)
    out = fm.unroll(problem, {"params": fm.init_params(net)}, TASK, steps=3)
    same = fm.inner_problem(net, mse, optimizer=optim.sgd(LR), train=True)
    assert out.loss.item() != fm.unroll(same, {"params": fm.init_params(net)}, TASK, steps=3).loss.item()
    assert out.loss.item() == pytest.approx(trained(net, True, net[3].eval)[1], rel=1e-12)


def test_a_train_method_of_its_own_is_heard() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[1].eval()
            return self

    net = Frozen(*normalized())
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR), train=True)
    out = fm.unroll(problem, {"params": fm.init_params(net)}, TASK, steps=3)
    assert out.info.losses.tolist() == pytest.approx(trained(net, True, None)[0], rel=1e-12)


@pytest.mark.parametrize("given", ["eval", 1, "nonsense"])
def test_a_query_mode_that_is_none(given: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"query_train is .*, expected True, False, None or 'same'. Pass one"):
        fm.inner_problem(Base(), mse, optimizer=optim.sgd(LR), query_train=given)


# ---- hooks on parameters


def hooked() -> Base:
    """A mask, a clip that is not linear, one that reads the module's weights, and one that returns nothing."""
    torch.manual_seed(1)
    net = Base().double()
    mask = torch.tensor([[1.0, 0.0, 1.0]]).double()
    net.a.weight.register_hook(lambda grad: grad.mul_(mask))
    net.a.weight.register_hook(lambda grad: torch.tanh(3 * grad))
    net.b.weight.register_hook(lambda grad: grad + 0.1 * net.b.weight * net.a.bias.mean())
    net.b.bias.register_hook(lambda grad: None)
    return net


def test_hooks_on_parameters_change_the_training_as_in_torch() -> None:
    net = hooked()
    losses, judged = by_us(net)
    assert (losses, judged) != by_us(Base().double())
    with torch.no_grad():
        assert by_us(net)[0] == losses
    expected = by_torch(net)
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert judged == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode(), fm.ForwardMode()], ids=repr)
def test_exact_estimators_differentiate_hooks_on_parameters(estimator: Any) -> None:
    problem = fm.inner_problem(hooked(), mse, optimizer=lambda meta: optim.sgd(meta["lr"]))
    meta = {"lr": torch.tensor(LR, dtype=torch.float64, requires_grad=True)}
    assert check_meta_grad(problem, meta, TASK, steps=3, estimator=estimator).worst.error < 1e-6


def test_first_order_takes_hooked_gradients_as_constants() -> None:
    net = hooked()
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(LR))
    meta = {"params": fm.init_params(net)}
    out = fm.unroll(problem, meta, TASK, steps=3, estimator=fm.FirstOrder())
    out.loss.backward()
    end = {name: tensor.detach().requires_grad_() for name, tensor in out.state.params.items()}
    judged = mse(None, lambda x: torch.func.functional_call(net, end, (x,)), TASK.query)
    grads = torch.autograd.grad(judged, list(end.values()))
    torch.testing.assert_close([leaf.grad for leaf in meta["params"].values()], list(grads), rtol=1e-12, atol=1e-14)


def test_stacked_tasks_have_the_same_hooks() -> None:
    problem = fm.inner_problem(hooked(), mse, optimizer=optim.sgd(LR))
    tasks = fm.tasks.stack([TASK, fm.Task(TASK.query, TASK.support)])
    meta = {"params": fm.init_params(hooked())}
    losses = [fm.unroll_batch(problem, meta, tasks, steps=3, strategy=each).loss.item() for each in ("vmap", "loop")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_hook_does_not_run_without_a_gradient() -> None:
    net = hooked()
    model, params, buffers = fm.functionalize(net)
    assert model.hooked == {"a.weight", "b.weight", "b.bias"}
    assert model.apply_hooks({"a.weight": None}, params, buffers) == {"a.weight": None}


def test_hooks_that_wait_for_accumulation_are_refused() -> None:
    net = Base()
    net.b.weight.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(fm.ArgumentError, match=r"'b.weight' has a hook by register_post_accumulate_grad_hook.*Use reg"):
        fm.functionalize(net)
