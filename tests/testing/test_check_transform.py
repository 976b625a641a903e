"""The check of a transform: every optimizer of the library passes, and each way to be wrong is named."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmeta as fm
from funcmeta import optim
from funcmeta._graph import inside_functorch
from funcmeta.optim import Transform
from funcmeta.testing import CheckError, check_transform

PARAMS = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), "b": [torch.tensor(0.5).double()]}


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


OPTIMIZERS: dict[str, tuple[Callable[[Any], Transform], dict[str, Tensor]]] = {
    "sgd": (lambda h: optim.sgd(h["lr"], momentum=h["momentum"]), {"lr": scalar(0.1), "momentum": scalar(0.9)}),
    "adam": (lambda h: optim.adam(h["lr"], eps=0.02), {"lr": scalar(0.1)}),
    "clip": (lambda h: optim.chain(optim.clip_by_global_norm(h), optim.rmsprop(0.1, eps=0.02)), scalar(0.5)),
    "decay": (lambda h: optim.adamw(0.1, eps=0.02, weight_decay=h), scalar(0.3)),
}


def rule(update: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    """A transform without a state, from a rule (gradient, parameter) -> update."""
    return Transform(lambda params: (), lambda grads, state, params: (fm.tree.map(update, grads, params), state))


def counted(following: Callable[[Tensor], Any]) -> Transform:
    """SGD that counts its steps, in this way."""
    return Transform(
        lambda params: {"step": torch.zeros((), dtype=torch.int64)},
        lambda grads, state, params: (fm.tree.map(lambda grad: -grad, grads), {"step": following(state["step"])}),
    )


class Doubled(torch.autograd.Function):
    """The identity, with a derivative of two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


calls = iter(range(10**6))

WRONG = {
    "writes to a gradient": (rule(lambda g, p: g.mul_(-0.1)), r"update writes to arguments\[0\]\['w'\]"),
    "writes the same value": (rule(lambda g, p: -g.copy_(g.clone())), r"update writes to arguments\[0\].*out of place"),
    "writes to a parameter": (rule(lambda g, p: p.sub_(g) * 0), r"update writes to arguments\[2\]"),
    "writes to the state": (counted(lambda step: step.add_(1)), r"update writes to arguments\[1\]\['step'\]"),
    "counts on its own": (rule(lambda g, p: -g * next(calls)), r"update gives another result\[0\].*Keep what changes"),
    "drops parameters": (
        Transform(lambda params: (), lambda grads, state, params: ({"w": grads["w"]}, ())),
        r"updates has other keys than expected: missing updates\['b'\]\[0\]",
    ),
    "changes a shape": (rule(lambda g, p: g.sum()), r"updates\['w'\] is float64\[\] on cpu, expected float64\[2, 2\]"),
    "changes a dtype": (rule(lambda g, p: g.float()), r"updates\['.'\].* is float32.*, expected float64"),
    "changes the state": (counted(lambda step: (step, step)), r"state has other keys than expected.*state\['step'\]"),
    "changes the state's dtype": (
        counted(lambda step: step + 0.5),
        r"state\['step'\] is float32\[\] on cpu, expected int64\[\]",
    ),
    "asks for a value": (
        rule(lambda g, p: -g if float(g.detach().sum()) > 0 else -2 * g),
        r"does not run under torch\.func\.vmap: .*no value of a tensor steer Python",
    ),
    "is no function of the gradient alone": (
        rule(lambda g, p: -g.detach() * 0.1),
        r"differ from finite differences.*(?s:.)*\n  grads\[0\]\['w'\]: computed 0, finite difference",
    ),
    "loses half of a square": (rule(lambda g, p: -g * g.detach()), r"\n  grads\[2\].*(?s:.)*Look for float\(\)"),
    "forgets a parameter": (rule(lambda g, p: -g - p.detach()), r"\n  params\['w'\]"),
    "doubles a derivative": (rule(lambda g, p: -Doubled.apply(g)), r"differ from finite differences"),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_pass(name: str) -> None:
    build, hypers = OPTIMIZERS[name]
    found = check_transform(build, PARAMS, hypers=hypers)
    assert max(each.error for each in found) <= 1e-6
    moved = {each.leaf for each in found}
    assert {"all leaves", "params['w']", "params['b'][0]", "grads[0]['w']", "grads[2]['b'][0]"} < moved
    assert any(name.startswith("hypers") for name in moved)


def test_a_finished_transform_passes() -> None:
    found = check_transform(optim.sgd(0.1), PARAMS, steps=1)
    assert not any("hypers" in each.leaf for each in found)


def test_a_state_may_hold_what_is_no_tensor() -> None:
    transform = Transform(
        lambda params: {"warm": False}, lambda grads, state, params: (fm.tree.map(torch.neg, grads), {"warm": True})
    )
    check_transform(transform, PARAMS)


def test_hyper_parameters_with_the_shapes_of_the_parameters() -> None:
    rates = fm.tree.map(lambda leaf: 0.1 + 0.01 * leaf, PARAMS)
    check_transform(optim.sgd, PARAMS, hypers=rates, edges=False)
    with pytest.raises(CheckError, match=r"have the shape \[0\]: .* pass edges=False where a hyper-parameter"):
        check_transform(optim.sgd, PARAMS, hypers=rates)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    transform, message = WRONG[name]
    with pytest.raises(CheckError, match=message):
        check_transform(transform, PARAMS)


def test_a_detached_hyper_parameter_is_named() -> None:
    with pytest.raises(CheckError, match=r"differ from finite differences.*(?s:.)*\n  hypers: computed 0, finite"):
        check_transform(lambda rate: optim.sgd(rate.item()), PARAMS, hypers=scalar(0.1))


def test_a_batch_that_is_mixed_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(fn: Callable[..., Any], tasks: int) -> Callable[..., Any]:
        return lambda *batch: fm.tree.map(lambda leaf: leaf.flip(0), torch.func.vmap(fn)(*batch))

    monkeypatch.setattr("funcmeta.testing._transform.over_tasks", mixed)
    with pytest.raises(CheckError, match=r"Under torch\.func\.vmap result(?s:.)* is tensor(?s:.)*, without it tensor"):
        check_transform(optim.sgd(0.1), PARAMS)


def test_an_update_that_is_not_finite_is_named() -> None:
    transform = rule(lambda g, p: -g / (p - 1.0) if p.dim() == 0 else -g)
    with pytest.raises(
        CheckError, match=r"not finite when all parameters have the shape \[\], expected finite numbers"
    ):
        check_transform(transform, {"w": torch.tensor([1.0, 2.0]).double()})


def test_a_transform_that_torch_func_can_not_differentiate() -> None:
    def update(g: Tensor, p: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return -g

    with pytest.raises(CheckError, match=r"does not run under torch\.func\.grad: .*setup_context"):
        check_transform(rule(update), PARAMS)


def test_a_transform_that_is_another_one_under_torch_func() -> None:
    transform = rule(lambda g, p: -g.detach() if inside_functorch() else -g)
    with pytest.raises(CheckError, match=r"torch\.func\.grad gives another derivative by grads\[0\]\['w'\]"):
        check_transform(transform, PARAMS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, fm.ArgumentError, "steps is 0, expected a positive integer"),
        ({"params": {}}, fm.ArgumentError, "params has no leaves"),
        ({"params": {"w": torch.ones(2)}}, fm.StructureError, "params['w'] is float32[2] on cpu, expected a float64"),
        ({"params": {"w": 1.5}}, fm.StructureError, "params['w'] is 1.5 (float), expected a float64 tensor"),
        ({"hypers": scalar(0.1)}, fm.ArgumentError, "hypers came with a finished Transform"),
        ({"transform": optim.sgd, "hypers": torch.tensor(0.1)}, fm.StructureError, "hypers is float32[] on cpu"),
        ({"transform": 0.1}, fm.ArgumentError, "transform is 0.1, expected a Transform"),
        ({"transform": lambda hypers: None}, fm.ArgumentError, "expected a Transform, or a function that makes one"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_transform(**{"transform": optim.sgd(0.1), "params": PARAMS, **changes})


@pytest.mark.parametrize(
    "update",
    [lambda g, p: -0.1 * g / ((g * g).sqrt() + 1e-8), lambda g, p: -0.1 * g / (g * g).sqrt()],
    ids=["infinite slope", "0 / 0"],
)
def test_a_root_of_a_zero_gradient_is_found(update: Callable[..., Tensor]) -> None:
    with pytest.raises(CheckError, match=r"not finite where a gradient is exactly 0(?s:.)*pass edges=False"):
        check_transform(rule(update), PARAMS)
    check_transform(rule(update), PARAMS, edges=False)
