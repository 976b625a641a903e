"""A replaying policy writes nothing onto the caller's tensors, wherever a step keeps them."""

from typing import Any

import pytest
import torch
from memory_cases import close
from torch import Tensor

import funcmeta as fm

POLICIES = [fm.Segments(1), fm.Segments(2), fm.Revolve(1), fm.Revolve(2), fm.Offload(fm.Segments(2)), fm.budget(10**7)]


def keeping() -> tuple[fm.Problem, Any, fm.Task, dict[str, Tensor]]:
    """A step that keeps its batch, what it captured and what init captured; one of them under two names."""
    given = {
        "x": torch.tensor([1.0, 2.0, 3.0]).double(),
        "labels": torch.tensor([0, 2, 1]),
        "mask": torch.tensor([True, False, True]),
        "captured": torch.tensor([0.5, -0.5, 0.1]).double(),
        "start": torch.tensor([0.2, 0.3, 0.4]).double(),
    }

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        start = given["start"]
        same = {"last": start, "again": start, "captured": start, "labels": given["labels"], "mask": given["mask"]}
        return {"w": start, **same}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        x, labels, mask = batch
        weight = state["last"] + state["again"][state["labels"]] * state["mask"] + state["captured"]
        loss, slope = fm.value_and_grad(lambda w: torch.sin(w * weight).pow(2).sum())(state["w"])
        same = {"last": x, "again": x, "captured": given["captured"], "labels": labels, "mask": mask}
        return {"w": state["w"] - meta["lr"] * slope, **same}, fm.StepInfo(loss)

    problem = fm.Problem(init, step, lambda meta, state, query, seed: (state["w"] * query).sum())
    meta = {"lr": torch.tensor(0.1).double().requires_grad_()}
    batch = given["x"], given["labels"], given["mask"]
    return problem, meta, fm.Task(batch, given["x"]), given


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.MixedMode(), fm.FirstOrder()], ids=repr)
@pytest.mark.parametrize("memory", POLICIES, ids=repr)
def test_what_a_step_keeps_of_its_batch_stays_as_it_was(memory: Any, estimator: Any) -> None:
    problem, meta, task, given = keeping()
    before = {name: each.clone() for name, each in given.items()}
    slopes = []
    for policy in (memory, fm.StoreAll(), memory):  # the last time with what the first time left
        out = fm.unroll(problem, meta, task, steps=5, estimator=estimator, memory=policy)
        slopes += torch.autograd.grad(out.loss, meta["lr"])
        for name, each in given.items():
            assert not each.requires_grad, name
            assert each.grad_fn is None, name
            assert torch.equal(each, before[name]), name
            assert each._version == 0, name
    close(slopes[0], slopes[1])
    close(slopes[2], slopes[1])


def test_inside_of_another_unroll() -> None:
    """An inner unroll under a replaying policy hands the outer step's batch to the outer state."""
    problem, _, task, given = keeping()

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        inner = fm.unroll(problem, {"lr": meta * state["w"].sum()}, task, steps=3, memory=fm.Segments(1))
        return {"w": state["w"] - 0.1 * inner.loss, "kept": inner.state["last"]}, fm.StepInfo(inner.loss)

    outer = fm.Problem(
        lambda meta, task, seed: {"w": torch.ones(2).double(), "kept": given["x"]},
        step,
        lambda meta, state, query, seed: (state["w"].sum() + state["kept"].sum()) ** 2,
    )
    slopes = []
    for memory in (fm.StoreAll(), fm.Segments(2)):
        rate = torch.tensor(0.1).double().requires_grad_()
        out = fm.unroll(outer, rate, fm.Task(torch.zeros(1), None), steps=3, memory=memory)
        slopes += torch.autograd.grad(out.loss, rate)
        assert not any(each.requires_grad or each.grad_fn is not None for each in given.values())
    close(*slopes)
