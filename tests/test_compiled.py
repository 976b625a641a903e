"""compile: the same numbers under every estimator, policy and strategy, compiled once; or an error that says why."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract_cases import MODELS, build
from test_contract import assert_agree, gradient
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import _lowering, optim
from funcmeta.testing import TOLERANCES

X, Y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
TASK = fm.Task((X, Y), (X + 0.1, Y))


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def mlp(*middle: nn.Module) -> nn.Module:
    with fm.rng.forked(2):
        return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 2)).double()


def usual(net: nn.Module, loss: Any = mse, **options: Any) -> tuple[fm.Problem, dict[str, Any]]:
    problem = fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.7), **options)
    return problem, {"params": fm.init_params(net), "lr": torch.tensor(0.2).double().requires_grad_()}


def meta_gradient(problem: fm.Problem, meta: Any, task: fm.Task = TASK, steps: int = 3, **options: Any) -> list[Tensor]:
    run = fm.unroll_batch if "strategy" in options else fm.unroll
    return list(torch.autograd.grad(run(problem, meta, task, steps=steps, **options).loss, fm.tree.leaves(meta)))


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is compiled meanwhile."""
    made: list[Any] = []
    kernel = _lowering.Lowered.kernel
    monkeypatch.setattr(_lowering.Lowered, "kernel", lambda *args: made.append(args) or kernel(*args))
    return made


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adam"])
@pytest.mark.parametrize("model", MODELS)
def test_the_meta_gradient_is_the_eager_one(model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, tasks = build(model, optimizer)
    compiled = fm.compile(problem, backend="aten"), meta, tasks
    for strategy in ("single", "vmap"):
        for estimator in (fm.Reverse(), fm.FirstOrder()):
            expected = gradient(model, optimizer, 3, strategy, estimator=estimator)
            for memory in (fm.StoreAll(), fm.Segments(2)):
                with monkeypatch.context() as context:
                    context.setattr("test_contract.build", lambda *case: compiled)
                    got = gradient(model, optimizer, 3, strategy, estimator=estimator, memory=memory)
                assert_agree(got, expected, TOLERANCES.memory)
