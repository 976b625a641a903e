"""Chains, masks, clips and schedules do what their names say, and bad arguments say what to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import start

from funcmeta import optim
from funcmeta._errors import ArgumentError, FuncmetaError, StructureError
from funcmeta.optim import schedules

PARAMS = {"body.weight": torch.tensor([1.0, 2.0]), "body.bias": torch.tensor([3.0]), "head": torch.tensor([4.0])}
GRADS = {"body.weight": torch.tensor([3.0, 0.0]), "body.bias": torch.tensor([0.0]), "head": torch.tensor([-4.0])}


def once(transform: optim.Transform, grads: Any = GRADS, params: Any = PARAMS) -> Any:
    return transform.update(grads, transform.init(params), params)[0]


def test_a_chain_clips_first_and_descends_then() -> None:
    updates = once(optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.5)))
    expected = {"body.weight": [-0.3, 0.0], "body.bias": [0.0], "head": [0.4]}
    torch.testing.assert_close(updates, {name: torch.tensor(value) for name, value in expected.items()})


def test_an_empty_chain_is_the_identity() -> None:
    torch.testing.assert_close(once(optim.chain()), GRADS, rtol=0, atol=0)


def test_chains_nest() -> None:
    inner = optim.chain(optim.clip_by_value(1.0), optim.scale(2.0))
    torch.testing.assert_close(
        once(optim.chain(inner, optim.sgd(0.5))),
        once(optim.chain(optim.clip_by_value(1.0), optim.scale(2.0), optim.sgd(0.5))),
    )


def test_a_clip_by_norm_takes_each_tensor_by_itself() -> None:
    updates = once(optim.clip_by_norm(1.0))
    torch.testing.assert_close(updates["body.weight"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(updates["head"], torch.tensor([-1.0]))


@pytest.mark.parametrize("clip", [optim.clip_by_norm, optim.clip_by_global_norm, optim.clip_by_value])
def test_gradients_below_the_limit_pass_to_the_bit(clip: Callable[[float], optim.Transform]) -> None:
    torch.testing.assert_close(once(clip(100.0), start(), start()), start(), rtol=0, atol=0)


def test_a_global_norm_may_be_scheduled() -> None:
    transform = optim.clip_by_global_norm(lambda step: 1.0 + step)
    state = transform.init(PARAMS)
    norms = []
    for _ in range(2):
        updates, state = transform.update(GRADS, state, PARAMS)
        norms.append(round(torch.cat(list(updates.values())).norm().item(), 5))
    assert norms == [1.0, 2.0]


def test_weight_decay_in_a_chain_is_that_of_sgd() -> None:
    torch.testing.assert_close(
        once(optim.chain(optim.add_weight_decay(0.1), optim.sgd(0.5))), once(optim.sgd(0.5, weight_decay=0.1))
    )


@pytest.mark.parametrize(
    "where", [lambda name: name == "head", {"head": True, "body.weight": False, "body.bias": False}]
)
def test_masked_out_parameters_stay(where: Any) -> None:
    updates = once(optim.masked(optim.adam(0.5), where))
    assert [value.abs().sum().item() > 0 for value in updates.values()] == [False, False, True]
    assert list(updates) == list(PARAMS)


def test_the_others_may_go_through_another_transform() -> None:
    transform = optim.masked(
        optim.add_weight_decay(0.1), lambda name: not name.endswith("bias"), otherwise=optim.chain()
    )
    updates = once(optim.chain(transform, optim.sgd(1.0)))
    expected = {"body.weight": [-3.1, -0.2], "body.bias": [0.0], "head": [3.6]}
    torch.testing.assert_close(updates, {name: torch.tensor(value) for name, value in expected.items()})


def test_names_in_a_nested_tree_are_dotted() -> None:
    seen: list[str] = []

    def where(name: str) -> bool:
        seen.append(name)
        return name.startswith("body.0")

    params = {"body": [torch.ones(1), torch.ones(1)], "head": (torch.ones(1),)}
    updates = once(optim.masked(optim.sgd(1.0), where), params, params)
    assert seen[:3] == ["body.0", "body.1", "head.0"]
    torch.testing.assert_close(updates, {"body": [-torch.ones(1), torch.zeros(1)], "head": (torch.zeros(1),)})


def test_schedules_equal_those_of_torch() -> None:
    weight = torch.ones(1, requires_grad=True)
    pairs: list[tuple[Any, Callable[[Any], Any]]] = [
        (schedules.constant(0.5), lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        (schedules.linear(0.5, 0.1, 6), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=6)),
        (schedules.exponential_decay(0.5, 0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
        (schedules.cosine_decay(0.5, 12, 0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, 0.1)),
    ]
    for schedule, make in pairs:
        optimizer = torch.optim.SGD([weight], lr=0.5)
        scheduler = make(optimizer)
        for step in range(12):
            value = schedule(torch.tensor(step))
            assert value.dtype == torch.float64
            assert value.item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), (schedule, step)
            assert schedule(step).item() == value.item()
            optimizer.step()
            scheduler.step()


def test_schedules_are_differentiable() -> None:
    first, last = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.1))
    made = {
        "linear": (schedules.linear(first, last, 4), (0.75, 0.25)),
        "cosine": (schedules.cosine_decay(first, 2, last), (0.5, 0.5)),
        "exponential": (schedules.exponential_decay(first, last, 2), (0.1**0.5, 0.25 / 0.1**0.5)),
        "warmup": (schedules.warmup(schedules.linear(first, last, 4), 1), (1.0, 0.0)),
    }
    for name, (schedule, expected) in made.items():
        got = torch.autograd.grad(schedule(torch.tensor(1)), (first, last))
        assert [each.item() for each in got] == pytest.approx(expected), name


def test_a_schedule_counts_from_zero() -> None:
    transform = optim.sgd(schedules.linear(1.0, 0.0, 2))
    state = transform.init(PARAMS)
    seen = []
    for _ in range(3):
        updates, state = transform.update(GRADS, state, PARAMS)
        seen.append(-updates["body.weight"][0].item() / 3)
    assert seen == [1.0, 0.5, 0.0]


def test_the_ends_of_the_ranges_belong_to_them() -> None:
    """With ρ = 1 nothing is forgotten, and with β = 0 everything; a rate of 0 stands still."""
    params = {"w": torch.ones(2)}
    for transform in (optim.adadelta(rho=1.0), optim.adadelta(rho=0.0), optim.adam(betas=(0, 0.0)), optim.sgd(0)):
        updates, _ = transform.update({"w": torch.ones(2)}, transform.init(params), params)
        assert bool(updates["w"].isfinite().all())


WHERE_2 = {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}
BAD: dict[str, tuple[Callable[[], Any], type[FuncmetaError], str]] = {
    "negative lr": (lambda: optim.sgd(-0.1), ArgumentError, "lr is -0.1, expected a number at least 0"),
    "nan lr": (lambda: optim.adam(float("nan")), ArgumentError, "lr is nan, expected a number at least 0"),
    "beta of one": (lambda: optim.adam(betas=(0.9, 1.0)), ArgumentError, "beta2 is 1.0, expected a number in [0, 1)"),
    "negative beta": (lambda: optim.nadam(betas=(-1, 0.9)), ArgumentError, "beta1 is -1, expected a number in [0, 1)"),
    "rho": (lambda: optim.adadelta(rho=1.5), ArgumentError, "rho is 1.5, expected a number in [0, 1]"),
    "dampening": (lambda: optim.sgd(0.1, dampening=float("nan")), ArgumentError, "dampening is nan, expected a number"),
    "number in a tree": (lambda: optim.sgd({"w": -1.0}), ArgumentError, "lr is -1.0, expected a number at least 0"),
    "one beta": (lambda: optim.adam(betas=0.9), ArgumentError, "betas is 0.9, expected a pair"),  # type: ignore[arg-type]
    "one of two betas": (lambda: optim.adam(betas=(0.9,)), ArgumentError, r"betas is (0.9,), expected a pair"),  # type: ignore[arg-type]
    "three betas": (lambda: optim.lion(betas=(0, 0, 0)), ArgumentError, "Pass for example betas=(0.9, 0.999)"),  # type: ignore[arg-type]
    "text": (
        lambda: optim.sgd("fast"),
        ArgumentError,
        "lr is 'fast' (str), expected a number, a floating-point tensor",
    ),
    "bool": (lambda: optim.sgd(True), ArgumentError, "lr is True (bool), expected a number"),
    "nothing": (lambda: optim.sgd(None), ArgumentError, "lr is None (NoneType), expected a number"),
    "integer tensor": (
        lambda: optim.sgd(torch.tensor(1)),
        StructureError,
        "lr is int64[] on cpu, expected a dense",
    ),
    "nesterov": (lambda: optim.sgd(0.1, nesterov=True), ArgumentError, "nesterov=True with momentum=0.0"),
    "nesterov damped": (
        lambda: optim.sgd(0.1, momentum=0.9, dampening=0.1, nesterov=True),
        ArgumentError,
        "Pass for example momentum=0.9, or nesterov=False",
    ),
    "integer schedule": (
        lambda: once(optim.sgd(lambda step: step)),
        StructureError,
        "lr(step) is int64[] on cpu, expected a dense floating-point tensor",
    ),
    "schedule of nothing": (lambda: once(optim.sgd(lambda step: None)), ArgumentError, "lr(step) is None (NoneType)"),
    "tree of other keys": (lambda: once(optim.sgd({"w": 0.1})), StructureError, "lr has other keys than expected"),
    "wide tensor": (
        lambda: once(optim.sgd(torch.ones(2))),
        StructureError,
        "lr is float32[2] on cpu, which does not broadcast to params['body.bias'] of shape [1]",
    ),
    "wide tensor in a tree": (
        lambda: once(optim.sgd({**dict.fromkeys(PARAMS, 0.1), "head": torch.ones(1, 1)})),
        StructureError,
        "which does not broadcast to params['head'] of shape [1]. Pass a 0-d tensor",
    ),
    "tree for a global norm": (
        lambda: once(optim.clip_by_global_norm(dict.fromkeys(PARAMS, 1.0))),
        StructureError,
        "expected one number or 0-d tensor for all parameters together",
    ),
    "vector for a global norm": (
        lambda: once(optim.clip_by_global_norm(torch.ones(2))),
        StructureError,
        "max_norm is float32[2] on cpu, expected one number",
    ),
    "vector for a norm": (
        lambda: optim.clip_by_norm(torch.ones(3)),
        StructureError,
        "max_norm is float32[3] on cpu, expected one number or 0-d tensor for each tensor",
    ),
    "vector in a tree for a norm": (
        lambda: optim.clip_by_norm({**dict.fromkeys(PARAMS, 1.0), "head": torch.ones(1)}),
        StructureError,
        "max_norm['head'] is float32[1] on cpu, expected one number",
    ),
    "vector of a schedule for a norm": (
        lambda: once(optim.clip_by_norm(lambda step: torch.ones(2))),
        StructureError,
        "max_norm(step) is float32[2] on cpu, expected one number",
    ),
    "numbers as parameters": (lambda: optim.sgd(0.1).init([1.0]), StructureError, "Wrap numbers in torch.tensor"),
    "gradient that is a number": (
        lambda: once(optim.sgd(0.1), {**GRADS, "head": 0.0}),
        StructureError,
        "a gradient is 0.0 (float), but its parameter is float32[1] on cpu. Pass one dense gradient of the same shape "
        "on the same device for each; None where the loss does not depend on it",
    ),
    "gradient of another shape": (
        lambda: once(optim.adam(), {**GRADS, "head": torch.ones(())}),
        StructureError,
        "a gradient is float32[] on cpu, but its parameter is float32[1] on cpu",
    ),
    "gradients of other keys": (
        lambda: once(optim.adam(), {"head": torch.ones(1)}),
        StructureError,
        "grads has other keys than expected: missing grads['body.weight'], grads['body.bias']",
    ),
    "class in a chain": (
        lambda: optim.chain(optim.sgd),  # type: ignore[arg-type]
        ArgumentError,
        "expected a Transform. Pass what sgd(...), adam(...)",
    ),
    "class in a mask": (
        lambda: optim.masked(optim.sgd, lambda name: True),  # type: ignore[arg-type]
        ArgumentError,
        "(function), expected a Transform",
    ),
    "number otherwise": (
        lambda: optim.masked(optim.adam(), lambda name: True, otherwise=0.0),  # type: ignore[arg-type]
        ArgumentError,
        "got 0.0 (float), expected a Transform",
    ),
    "mask of numbers": (
        lambda: once(optim.masked(optim.adam(), lambda name: 1)),  # type: ignore[arg-type,return-value]
        ArgumentError,
        "where gives 1 (int) for 'body.weight', expected True or False",
    ),
    "mask of other keys": (
        lambda: once(optim.masked(optim.adam(), {"head": True})),
        StructureError,
        "where has other keys than expected",
    ),
    "names that collide": (
        lambda: once(optim.masked(optim.adam(), lambda name: True), WHERE_2, WHERE_2),
        StructureError,
        "two parameters have the same dotted name among ['a.b', 'a.b']. Use keys without dots",
    ),
    "no steps": (lambda: schedules.linear(1.0, 0.0, 0), ArgumentError, "steps is 0, expected a positive integer"),
    "half a step": (lambda: schedules.cosine_decay(1.0, 0.5), ArgumentError, "steps is 0.5"),  # type: ignore[arg-type]
    "no rise": (lambda: schedules.warmup(lambda step: 1.0, -1), ArgumentError, "steps is -1"),
    "no rate": (lambda: schedules.exponential_decay(1.0, 0.5, True), ArgumentError, "steps is True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_to_do(name: str) -> None:
    function, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        function()
