"""Each optimizer equals its namesake in torch.optim, whatever its options, and states go back and forth."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_cases import CASES, TORCH_CASES, gradients, start
from torch import Tensor

from funcmeta import optim
from funcmeta._errors import ArgumentError, StructureError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SWEEPS: dict[str, dict[str, list[Any]]] = {
    "sgd": {"momentum": [0.0, 0.6], "dampening": [0.0, 0.4], "weight_decay": [0.0, 0.2], "maximize": [False, True]},
    "sgd nesterov": {"momentum": [0.6], "weight_decay": [0.0, 0.2], "maximize": [False, True]},
    "adam": {
        "weight_decay": [0.0, 0.2],
        "amsgrad": [False, True],
        "maximize": [False, True],
        "decoupled_weight_decay": [False, True],
    },
    "adamw": {"weight_decay": [0.0, 0.2], "amsgrad": [False, True], "maximize": [False, True]},
    "amsgrad": {"weight_decay": [0.0, 0.2], "maximize": [False, True]},
    "adamax": {"weight_decay": [0.0, 0.2], "maximize": [False, True]},
    "nadam": {
        "weight_decay": [0.0, 0.2],
        "momentum_decay": [0.0, 0.1],
        "maximize": [False, True],
        "decoupled_weight_decay": [False, True],
    },
    "radam": {"weight_decay": [0.0, 0.2], "decoupled_weight_decay": [False, True], "maximize": [False, True]},
    "rmsprop": {
        "weight_decay": [0.0, 0.2],
        "momentum": [0.0, 0.6],
        "centered": [False, True],
        "maximize": [False, True],
    },
    "adagrad": {
        "weight_decay": [0.0, 0.2],
        "lr_decay": [0.0, 0.1],
        "initial_accumulator_value": [0.0, 0.3],
        "maximize": [False, True],
    },
    "adadelta": {"weight_decay": [0.0, 0.2], "maximize": [False, True]},
}
"""For each namesake, the values of every option that changes the result."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """torch.optim.NAdam multiplies its momenta in the default dtype, whatever that of the parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def swept() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, options in SWEEPS.items():
        for values in itertools.product(*options.values()):
            yield name, dict(zip(options, values, strict=True))


def torch_steps(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> list[Tensor]:
    for step in steps:
        found = gradients(dict(zip(start(), [leaf.detach().clone() for leaf in params], strict=True)), step)
        for leaf, grad in zip(params, found.values(), strict=True):
            leaf.grad = grad.detach()
        optimizer.step()
    return params


def our_steps(transform: optim.Transform, state: Any, params: dict[str, Tensor], steps: range) -> tuple[Any, Any]:
    for step in steps:
        found = {name: grad.detach() for name, grad in gradients(params, step).items()}
        params = {name: leaf.detach() for name, leaf in params.items()}
        updates, state = transform.update(found, state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def leaves_of(params: dict[str, Tensor]) -> list[Tensor]:
    return [leaf.detach().clone().requires_grad_() for leaf in params.values()]


@pytest.mark.parametrize(("name", "options"), list(swept()), ids=str)
def test_equals_its_namesake_with_all_options(name: str, options: dict[str, Any]) -> None:
    case = TORCH_CASES[name]
    flags = {key: value for key, value in options.items() if isinstance(value, bool)}
    numbers = {key: value for key, value in options.items() if key not in flags}
    merged = case._replace(options={**case.options, **flags})
    expected = torch_steps(merged.torch_optimizer(leaves := leaves_of(start()), **numbers), leaves, range(20))
    transform = merged.build(**numbers)
    got, _ = our_steps(transform, transform.init(start()), start(), range(20))
    torch.testing.assert_close(list(got.values()), [leaf.detach() for leaf in expected], **EXACT)


@pytest.mark.parametrize("name", TORCH_CASES)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["number", "tensor"])
def test_equals_its_namesake_over_20_steps(name: str, lr: float | Tensor) -> None:
    case = TORCH_CASES[name]
    expected = torch_steps(case.torch_optimizer(leaves := leaves_of(start()), lr=lr), leaves, range(20))
    transform = case.build(lr=lr)
    got, _ = our_steps(transform, transform.init(start()), start(), range(20))
    torch.testing.assert_close(list(got.values()), [leaf.detach() for leaf in expected], **EXACT)
    assert any(
        (before - after).abs().max() > 0.01 for before, after in zip(start().values(), got.values(), strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_numbers_tensors_trees_and_callables_agree(name: str) -> None:
    case = CASES[name]
    expected = our_steps(case.build(), case.build().init(start()), start(), range(4))[0]
    forms: list[dict[str, Any]] = [
        {key: torch.tensor(value) for key, value in case.hypers.items()},
        {key: lambda step, value=value: value for key, value in case.hypers.items()},
        {key: lambda step, value=value: torch.tensor(value) + 0 * step for key, value in case.hypers.items()},
    ]
    if name != "clip by global norm":
        trees = {key: dict.fromkeys(reversed(start()), value) for key, value in case.hypers.items()}
        if name == "masked":
            trees = {"lr": {"w": case.hypers["lr"]}}
        forms += [trees, {key: lambda step, tree=tree: tree for key, tree in trees.items()}]
    for form in forms:
        if "nesterov" in case.options:
            form.pop("dampening", None)
        transform = case.build(**form)
        got = our_steps(transform, transform.init(start()), start(), range(4))[0]
        torch.testing.assert_close(got, expected, **EXACT)


def test_defaults_are_those_of_torch() -> None:
    for name in SWEEPS:
        case = TORCH_CASES[name]
        hypers = {"lr": 0.05} if case.make is optim.sgd else {}
        expected = torch_steps(case.namesake(leaves := leaves_of(start()), **hypers), leaves, range(5))  # type: ignore[misc]
        transform = case.make(**hypers)
        got, _ = our_steps(transform, transform.init(start()), start(), range(5))
        torch.testing.assert_close(list(got.values()), [leaf.detach() for leaf in expected], **EXACT)


@pytest.mark.parametrize("name", ["lion", "lion up"])
def test_lion_equals_the_program_of_its_paper(name: str) -> None:
    hypers, sign = CASES[name].hypers, -1 if CASES[name].options else 1
    expected, momenta = start(), {key: torch.zeros_like(leaf) for key, leaf in start().items()}
    for step in range(20):
        grads = {key: sign * grad.detach() for key, grad in gradients(dict(expected), step).items()}
        for key, grad in grads.items():
            weight, momentum = expected[key].detach(), momenta[key]
            direction = torch.sign(hypers["beta1"] * momentum + (1 - hypers["beta1"]) * grad)
            expected[key] = weight - hypers["lr"] * (direction + hypers.get("weight_decay", 0.0) * weight)
            momenta[key] = hypers["beta2"] * momentum + (1 - hypers["beta2"]) * grad
    transform = CASES[name].build()
    got, _ = our_steps(transform, transform.init(start()), start(), range(20))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "sgd nesterov"])
def test_what_is_not_given_is_as_in_its_namesake(name: str) -> None:
    case, given = CASES[name], {"lr": 0.1} if name == "sgd" else {}
    assert case.namesake is not None
    expected = torch_steps(case.namesake(leaves := leaves_of(start()), **given), leaves, range(20))
    transform = case.make(**given)
    got, _ = our_steps(transform, transform.init(start()), start(), range(20))
    torch.testing.assert_close(list(got.values()), [leaf.detach() for leaf in expected], **EXACT)


def test_what_is_not_given_to_lion() -> None:
    told = optim.lion(1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False)
    expected, _ = our_steps(told, told.init(start()), start(), range(20))
    got, _ = our_steps(optim.lion(), optim.lion().init(start()), start(), range(20))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_training_goes_on_from_torch(name: str) -> None:
    case = TORCH_CASES[name]
    optimizer = case.torch_optimizer(leaves := leaves_of(start()))
    torch_steps(optimizer, leaves, range(5))
    params = dict(zip(start(), [leaf.detach().clone() for leaf in leaves], strict=True))
    steps = 5 if name == "sgd dampening" else None
    state = optim.from_torch_optim_state(case.build(), optimizer, params, step=steps)
    expected = torch_steps(optimizer, leaves, range(5, 20))
    got, _ = our_steps(case.build(), state, params, range(5, 20))
    torch.testing.assert_close(list(got.values()), [leaf.detach() for leaf in expected], **EXACT)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_training_goes_on_in_torch(name: str) -> None:
    case = TORCH_CASES[name]
    transform = case.build()
    params, state = our_steps(transform, transform.init(start()), start(), range(5))
    optimizer = case.torch_optimizer(leaves := leaves_of(params))
    optimizer.load_state_dict(optim.to_torch_optim_state(state, optimizer))
    kept = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(state)]
    got = torch_steps(optimizer, leaves, range(5, 20))
    expected, _ = our_steps(transform, state, params, range(5, 20))
    torch.testing.assert_close([leaf.detach() for leaf in got], list(expected.values()), **EXACT)
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(state), kept, rtol=0, atol=0)


def test_an_optimizer_that_has_not_stepped_gives_the_initial_state() -> None:
    params = {"w": torch.ones(2)}
    for transform, optimizer in [
        (optim.adam(), torch.optim.Adam([torch.ones(2)])),
        (optim.sgd(0.1, momentum=0.9), torch.optim.SGD([torch.ones(2)], momentum=0.9).state_dict()),
    ]:
        state = optim.from_torch_optim_state(transform, optimizer, params)
        torch.testing.assert_close(state, transform.init(params))


def test_bad_conversions_say_what_to_do() -> None:
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    plain, adam = torch.optim.SGD([weight], 0.1, momentum=0.5), torch.optim.Adam([weight])
    plain.step()
    adam.step()
    params = {"w": torch.ones(2)}
    damped = optim.sgd(0.1, momentum=0.5, dampening=0.5)
    with pytest.raises(ArgumentError, match=r"counted no steps.*Pass step="):
        optim.from_torch_optim_state(damped, plain, params)
    with pytest.raises(ArgumentError, match=r"ChainState, which has no namesake"):
        optim.from_torch_optim_state(optim.chain(optim.adam()), adam, params)
    with pytest.raises(ArgumentError, match=r"LionState, which has no namesake"):
        optim.to_torch_optim_state(optim.lion().init(params), adam)
    with pytest.raises(StructureError, match=r"holds 1 parameters, but params has 2"):
        optim.from_torch_optim_state(optim.adam(), adam, {**params, "b": torch.ones(1)})
    with pytest.raises(StructureError, match=r"exp_avg is float64\[2\] on cpu, expected float64\[3\]"):
        optim.from_torch_optim_state(optim.adam(), adam, {"w": torch.ones(3)})
    with pytest.raises(StructureError, match=r"max_exp_avg_sq is None.*same options"):
        optim.from_torch_optim_state(optim.amsgrad(), adam, params)
    with pytest.raises(StructureError, match=r"exp_avg of 2, exp_avg_sq of 2 parameters, but the optimizer has 1"):
        optim.to_torch_optim_state(optim.adam().init([torch.ones(1), torch.ones(1)]), adam)
