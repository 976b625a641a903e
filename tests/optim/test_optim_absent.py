"""Parameters without a gradient in a step: they and what is kept for them stay, as in torch.optim."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import CASES, MAIN, TORCH_CASES, outer, start
from torch import Tensor

import funcmeta as fm
from funcmeta import optim
from funcmeta._errors import ArgumentError, StructureError
from funcmeta.optim import schedules

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STEPS = 12


@pytest.fixture(autouse=True)
def _double() -> Any:
    """torch.optim.NAdam multiplies its momenta in the default dtype, whatever that of the parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def absent(step: int) -> set[str]:
    """The matrix has no gradient at first and in every third step, the scalar never."""
    return {"b"} | ({"m"} if step < 2 or step % 3 == 0 else set()) | ({"w"} if step in (4, 5) else set())


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Any]:
    """Functions of the parameters, so that every meta-gradient is of second order; a row of the matrix is dead."""
    found = {"w": params["w"].cos() + step * 0.2, "m": params["m"].tanh() * (1 + 0.1 * step), "b": params["b"].sin()}
    found["m"] = found["m"] * torch.tensor([[1.0], [0.0]])
    return {name: None if name in absent(step) else grad for name, grad in found.items()}


def by_torch(
    optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range, before: Callable[[], Any] = lambda: None
) -> dict[str, Tensor]:
    for step in steps:
        found = gradients(dict(zip(start(), params, strict=True)), step)
        for leaf, grad in zip(params, found.values(), strict=True):
            leaf.grad = None if grad is None else grad.detach().clone()
        before()
        optimizer.step()
    return dict(zip(start(), [leaf.detach() for leaf in params], strict=True))


def by_us(transform: optim.Transform, state: Any, params: Any, steps: range, *, at_once: bool = True) -> Any:
    step_by = transform if at_once else transform._replace(advance=None)
    for step in steps:
        params, state = optim.advance(step_by, gradients(params, step), state, params)
    return params, state


def leaves() -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in start().values()]


def detached(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach() for name, leaf in params.items()}


@pytest.mark.parametrize("at_once", [True, False], ids=["advance", "update"])
@pytest.mark.parametrize("name", TORCH_CASES)
def test_they_stay_as_in_torch(name: str, at_once: bool) -> None:
    case = TORCH_CASES[name]
    expected = by_torch(case.torch_optimizer(mine := leaves()), mine, range(STEPS))
    transform = case.build()
    got, state = by_us(transform, transform.init(start()), start(), range(STEPS), at_once=at_once)
    torch.testing.assert_close(got, expected, **EXACT)
    assert torch.equal(got["b"], start()["b"])
    fm.tree.check_same(transform.init(start()), state)


@pytest.mark.parametrize("form", ["tensors", "trees", "schedules"])
@pytest.mark.parametrize("name", ["sgd dampening", "adam decoupled", "nadam", "radam", "adamax", "adagrad"])
def test_they_stay_with_hyper_parameters_of_each_form(name: str, form: str) -> None:
    case = TORCH_CASES[name]
    forms: dict[str, Callable[[float], Any]] = {
        "tensors": torch.tensor,
        "trees": lambda value: dict.fromkeys(start(), torch.tensor(value)),
        "schedules": lambda value: lambda step: value + 0 * step.double(),
    }
    transform = case.build(**{key: forms[form](value) for key, value in case.hypers.items()})
    expected = by_torch(case.torch_optimizer(mine := leaves()), mine, range(STEPS))
    got, _ = by_us(transform, transform.init(start()), start(), range(STEPS))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adagrad"])
def test_a_schedule_counts_the_steps_of_the_optimizer(name: str) -> None:
    case = TORCH_CASES[name]
    optimizer = case.torch_optimizer(mine := leaves(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    expected = start()
    for step in range(STEPS):
        expected = by_torch(optimizer, mine, range(step, step + 1))
        scheduler.step()
    transform = case.build(lr=schedules.linear(0.3, 0.03, 10))
    got, _ = by_us(transform, transform.init(start()), start(), range(STEPS))
    torch.testing.assert_close(got, expected, **EXACT)


def test_lion_leaves_them_alone() -> None:
    transform = CASES["lion"].build()
    got, state = by_us(transform, transform.init(start()), start(), range(STEPS))
    for name in ("w", "m", "b"):
        alone, own = {name: start()[name]}, transform.init({name: start()[name]})
        for step in range(STEPS):
            grad = gradients({**start(), **alone}, step)[name]
            if grad is not None:
                alone, own = optim.advance(transform, {name: grad}, own, alone)
        assert torch.equal(got[name], alone[name])
        assert torch.equal(state.exp_avg[name], own.exp_avg[name])


@pytest.mark.parametrize("name", MAIN)
def test_the_gradient_for_a_hyper_parameter_is_that_of_finite_differences(name: str) -> None:
    case = CASES[name]
    for hyper, value in case.hypers.items():
        if hyper in case.flat:
            continue

        def run(point: Tensor, hyper: str = hyper) -> Tensor:
            transform = case.build(**{hyper: point})
            return outer(by_us(transform, transform.init(start()), start(), range(7))[0])

        point = torch.tensor(value, requires_grad=True)
        (got,) = torch.autograd.grad(run(point), point)
        with torch.no_grad():
            expected = fm.testing.finite_difference(run, point.detach(), torch.tensor(1.0), order=4)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["adam", "sgd dampening", "nadam"])
def test_vmap_and_the_loop_agree(name: str) -> None:
    transform = CASES[name].build()
    many = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in start().items()}
    got = torch.vmap(lambda params: by_us(transform, transform.init(params), params, range(5))[0])(many)
    for index in range(2):
        params = {key: leaf[index] for key, leaf in many.items()}
        expected, _ = by_us(transform, transform.init(params), params, range(5))
        torch.testing.assert_close({key: leaf[index] for key, leaf in got.items()}, expected, **EXACT)


# ---- transforms of gradients


@pytest.mark.parametrize("limit", [0.4, torch.tensor(0.4)], ids=["number", "tensor"])
def test_a_common_norm_leaves_them_out(limit: Any) -> None:
    """torch.nn.utils.clip_grad_norm_ does too; it adds 1e-6 to the norm."""
    optimizer = torch.optim.Adam(mine := leaves(), lr=0.1)
    clip = lambda: torch.nn.utils.clip_grad_norm_(mine, 0.4)  # noqa: E731
    expected = by_torch(optimizer, mine, range(STEPS), clip)
    transform = optim.chain(optim.clip_by_global_norm(limit), optim.adam(0.1))
    got, _ = by_us(transform, transform.init(start()), start(), range(STEPS))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    none = dict.fromkeys(start())
    assert transform.update(none, transform.init(start()), start())[0] == none


@pytest.mark.parametrize(
    "link", [optim.clip_by_value(0.4), optim.clip_by_norm(0.4), optim.scale(0.7), optim.add_weight_decay(0.3)]
)
def test_a_link_of_a_chain_passes_them_on(link: optim.Transform) -> None:
    transform = optim.chain(link, optim.adamw(0.1, weight_decay=0.2))
    got, _ = by_us(transform, transform.init(start()), start(), range(STEPS))
    assert torch.equal(got["b"], start()["b"])
    alone = start()
    state = transform.init({"m": alone["m"]})
    for step in range(STEPS):
        grad = gradients(alone, step)["m"]
        if grad is not None:
            moved, state = optim.advance(transform, {"m": grad}, state, {"m": alone["m"]})
            alone = {**alone, **moved}
    torch.testing.assert_close(got["m"], alone["m"], **EXACT)


@pytest.mark.parametrize("otherwise", [None, optim.chain(), optim.sgd(0.1, momentum=0.9)])
def test_a_mask_passes_them_on(otherwise: Any) -> None:
    transform = optim.masked(optim.adam(0.1), lambda name: name == "m", otherwise=otherwise)
    updates, _ = transform.update(gradients(start(), 0), transform.init(start()), start())
    assert (updates["m"], updates["b"]) == (None, None)
    assert isinstance(updates["w"], Tensor)
    got, _ = by_us(transform, transform.init(start()), start(), range(STEPS))
    adam = optim.adam(0.1)
    expected, _ = by_us(adam, adam.init(start()), start(), range(STEPS))
    torch.testing.assert_close(got["m"], expected["m"], **EXACT)
    assert torch.equal(got["b"], start()["b"])


def test_updates_that_are_none_are_not_added() -> None:
    params = [torch.tensor([1.0, 2.0]), {"b": torch.tensor(3.0)}]
    assert optim.apply_updates(params, [None, {"b": torch.tensor(0.5)}])[1]["b"] == 3.5
    assert optim.apply_updates(params, [None, {"b": None}])[0] is params[0]
    with pytest.raises(StructureError, match=r"updates\[1\]\['b'\] is float64\[2\] on cpu, expected float64\[\]"):
        optim.apply_updates(params, [None, {"b": torch.ones(2)}])
    with pytest.raises(StructureError, match=r"updates has other keys than expected"):
        optim.apply_updates(params, [None, {"c": None}])


def test_a_state_without_counts_meets_no_gradient() -> None:
    transform = optim.adam()
    state = transform.init(start())._replace(missed=())
    transform.update(start(), state, start())
    with pytest.raises(StructureError, match=r"missed is \(\) \(tuple\), expected an int64 tensor of shape \[3\]"):
        transform.update(gradients(start(), 0), state, start())
    with pytest.raises(StructureError, match=r"missed is int64\[2\] on cpu.*Pass a state that the transform has made"):
        transform.update(start(), state._replace(missed=torch.zeros(2, dtype=torch.int64)), start())


# ---- states of torch.optim


@pytest.mark.parametrize("name", TORCH_CASES)
def test_training_goes_on_from_torch(name: str) -> None:
    case = TORCH_CASES[name]
    optimizer = case.torch_optimizer(mine := leaves())
    params = detached(by_torch(optimizer, mine, range(5)))
    params = {key: leaf.clone() for key, leaf in params.items()}
    state = optim.from_torch_optim_state(case.build(), optimizer, params, step=5 if name == "sgd dampening" else None)
    got, _ = by_us(case.build(), state, params, range(5, STEPS))
    torch.testing.assert_close(got, by_torch(optimizer, mine, range(5, STEPS)), **EXACT)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", TORCH_CASES)
def test_training_goes_on_in_torch(name: str, steps: int) -> None:
    case = TORCH_CASES[name]
    transform = case.build()
    params, state = by_us(transform, transform.init(start()), start(), range(steps))
    mine = [leaf.detach().clone().requires_grad_() for leaf in params.values()]
    optimizer = case.torch_optimizer(mine)
    optimizer.load_state_dict(optim.to_torch_optim_state(state, optimizer))
    got = by_torch(optimizer, mine, range(steps, STEPS))
    torch.testing.assert_close(got, by_us(transform, state, params, range(steps, STEPS))[0], **EXACT)


@pytest.mark.parametrize("name", ["adam", "rmsprop both", "adadelta", "nadam", "radam", "adagrad"])
def test_the_steps_of_each_parameter_go_there_and_back(name: str) -> None:
    case = TORCH_CASES[name]
    optimizer = case.torch_optimizer(mine := leaves())
    params = by_torch(optimizer, mine, range(6))
    counted = [float(optimizer.state[leaf].get("step", 0)) if leaf in optimizer.state else 0.0 for leaf in mine]
    assert counted == [4, 3, 0]
    state = optim.from_torch_optim_state(case.build(), optimizer, params, step=6)
    assert state.step == 6
    assert state.missed.tolist() == [2, 3, 6]
    saved = optim.to_torch_optim_state(state, optimizer)
    assert [float(saved["state"][index]["step"]) for index in range(3)] == counted


@pytest.mark.parametrize("hypers", [{}, {"momentum": 0.6}, {"momentum": 0.6, "dampening": 0.4}], ids=str)
def test_a_scheduled_sgd_goes_on_at_its_step(hypers: dict[str, float]) -> None:
    """torch.optim.SGD does not count; without momentum it keeps nothing at all."""
    optimizer = torch.optim.SGD(mine := leaves(), lr=0.2, **hypers)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    transform = optim.sgd(schedules.linear(0.2, 0.02, 10), **hypers)
    for step in range(STEPS):
        if step == 5:
            params = {key: leaf.detach().clone() for key, leaf in zip(start(), mine, strict=True)}
            state = optim.from_torch_optim_state(transform, optimizer, params, step=5)
        expected = by_torch(optimizer, mine, range(step, step + 1))
        scheduler.step()
    got, _ = by_us(transform, state, params, range(5, STEPS))
    torch.testing.assert_close(got, expected, **EXACT)
    with pytest.raises(ArgumentError, match=r"counted no steps.*Pass step="):
        optim.from_torch_optim_state(transform, optimizer, params)


def test_steps_that_can_not_be_kept_are_refused() -> None:
    params = start()
    adam = torch.optim.Adam(mine := leaves())
    by_torch(adam, mine, range(3))
    with pytest.raises(ArgumentError, match=r"step is 2, but the optimizer has taken at least 3\. Pass step="):
        optim.from_torch_optim_state(optim.adam(), adam, params, step=2)
    with pytest.raises(ArgumentError, match=r"step is 2, but this transform counts no steps.*Leave it out"):
        optim.from_torch_optim_state(optim.sgd(0.1), torch.optim.SGD(leaves(), 0.1), params, step=2)
    heavy = optim.sgd(schedules.constant(0.1), momentum=0.9)
    fresh = torch.optim.SGD(leaves(), lr=0.1, momentum=0.9)
    assert optim.from_torch_optim_state(heavy, fresh, params).step == 0
    assert optim.from_torch_optim_state(heavy, fresh, params, step=4).step == 4
    with pytest.raises(ArgumentError, match=r"counted no steps.*Pass step="):
        optim.from_torch_optim_state(heavy, torch.optim.SGD(leaves(), lr=0.1), params)


@pytest.mark.parametrize("given", [0.0, torch.tensor(0.0), lambda step: 0.0], ids=["number", "tensor", "schedule"])
def test_dampening_waits_for_a_momentum(given: Any) -> None:
    """As in torch.optim, in each form of the momentum; with one, the dampening matters."""
    expected = by_torch(torch.optim.SGD(mine := leaves(), lr=0.1, dampening=0.5), mine, range(4))
    transform = optim.sgd(0.1, momentum=given, dampening=0.5)
    got, _ = by_us(transform, transform.init(start()), start(), range(4))
    torch.testing.assert_close(got, expected, **EXACT)
    heavy = optim.sgd(0.1, momentum=0.2, dampening=0.5)
    undamped = optim.sgd(0.1, momentum=0.2)
    pair = [by_us(each, each.init(start()), start(), range(4))[0]["w"] for each in (heavy, undamped)]
    assert (pair[0] - pair[1]).abs().max() > 1e-2
