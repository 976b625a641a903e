"""Problems on which memory policies are held against StoreAll."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import TOLERANCES

STEPS = 6
LENGTHS = [1, 2, 3, 5, STEPS, STEPS + 4, None]
KINDS = ["plain", "batch norm", "dropout", "adam", "trajectory", "learned loss", "frozen start"]


class Setting(NamedTuple):
    """A problem with something to learn."""

    problem: fm.Problem
    meta: Any
    task: fm.Task


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (predict(x) - y).square().mean()


def weighted(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return (meta["weights"] * (predict(x) - y).square()).mean()


def numbers(tasks: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    return torch.randn(*tasks, 5, 3).double(), torch.randn(*tasks, 5, 2).double()


def setting(kind: str = "plain", tasks: tuple[int, ...] = ()) -> Setting:
    with fm.rng.forked(3):
        middle = {"batch norm": nn.BatchNorm1d(4), "dropout": nn.Dropout(0.4)}.get(kind, nn.Identity())
        net = nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 2)).double()
        task = fm.Task(numbers(tasks), numbers(tasks))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.2).double().requires_grad_()}
    build: Any = lambda meta: optim.sgd(meta["lr"], momentum=0.7)  # noqa: E731
    if kind == "adam":
        build = lambda meta: optim.adam(meta["lr"], eps=0.1)  # noqa: E731
    if kind in ("learned loss", "frozen start"):
        meta["weights"] = torch.tensor([0.5, 1.5]).double().requires_grad_()
        problem = fm.inner_problem(net, weighted, optimizer=build, meta_loss_fn=mse)
        if kind == "frozen start":
            meta = {"weights": meta["weights"], "lr": meta["lr"].detach()}
    else:
        trajectory = kind == "trajectory" and (lambda step: 1 + 0.5 * step)
        problem = fm.inner_problem(net, mse, optimizer=build, trajectory_loss=trajectory)
    return Setting(problem, meta, task)


def wanted(meta: Any) -> list[Tensor]:
    return [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad]


def loss_of(case: Setting, memory: Any, strategy: str = "single", **options: Any) -> Tensor:
    if strategy == "single":
        return fm.unroll(*case, steps=STEPS, memory=memory, **options).loss
    return fm.unroll_batch(*case, steps=STEPS, memory=memory, strategy=strategy, **options).loss  # type: ignore[arg-type]


def gradient(case: Setting, memory: Any, *, twice: bool = False, **options: Any) -> list[Tensor]:
    """The meta-gradient, or the gradient of its square."""
    leaves = wanted(case.meta)
    first = list(torch.autograd.grad(loss_of(case, memory, **options), leaves, create_graph=twice))
    return list(torch.autograd.grad(fm.tree.dot(first, first), leaves)) if twice else first


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCES.memory, atol=TOLERANCES.memory)


def learned_optimizer() -> Setting:
    """A hand-written step whose update is a small network's, with a momentum for each coordinate as its state."""

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {"w": torch.tensor([0.3, -0.8, 0.5]).double(), "momentum": torch.zeros(3).double()}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(batch @ w) ** 2).sum())(state["w"])
        features = torch.stack([slope, state["momentum"]], dim=1)
        out = torch.tanh(features @ meta["in"]) @ meta["out"]
        return {"w": state["w"] - out[:, 0], "momentum": 0.5 * state["momentum"] + out[:, 1]}, fm.StepInfo(loss)

    with fm.rng.forked(4):
        meta = {"in": torch.randn(2, 4).double().requires_grad_(), "out": (0.3 * torch.randn(4, 2)).double()}
        batch = torch.randn(6, 3).double()
    meta["out"].requires_grad_()
    problem = fm.Problem(init, step, lambda meta, state, query, seed: (torch.cos(query @ state["w"]) ** 2).sum())
    return Setting(problem, meta, fm.Task(batch, batch + 0.1))


def tightest(case: Setting, steps: int = STEPS, **options: Any) -> fm.Budget:
    """The smallest budget that a policy stays within."""
    try:
        fm.unroll(*case, steps=steps, memory=fm.budget(1), **options)
    except fm.MemoryBudgetError as error:
        return fm.budget(error.smallest)
    raise AssertionError("a budget of one byte was enough")
