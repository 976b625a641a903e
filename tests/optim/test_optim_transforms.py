"""Each optimizer under vmap, torch.func and torch.compile, on any tree, and without writing to anything."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from optim_cases import CASES, MAIN, Case, gradients, outer, start
from torch import Tensor

from funcmeta import optim, tree

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def fixed_gradients(params: Any, step: int) -> Any:
    """Gradients without a graph, made from the step and the shapes alone; the first entries are exactly zero."""
    return tree.map(
        lambda leaf: torch.arange(leaf.numel(), dtype=leaf.dtype).view(leaf.shape) * (0.3 - 0.2 * step), params
    )


def trained(transform: optim.Transform, params: Any, steps: int = 3) -> tuple[Any, Any]:
    state = transform.init(params)
    for step in range(steps):
        updates, state = transform.update(fixed_gradients(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in case.hypers.items()}


def advanced_and_applied(transform: optim.Transform, wanted: list[Tensor]) -> tuple[Any, Any]:
    """Parameters, state and gradients after two steps by ``advance``, and by ``update`` and ``apply_updates``."""
    results = []
    for step in (optim.advance, lambda transform, *rest: optim.advance(transform._replace(advance=None), *rest)):
        params = tree.map(lambda leaf: leaf.detach().requires_grad_(), start())
        leaves, state = list(params.values()), transform.init(params)
        for index in range(2):
            params, state = step(transform, gradients(params, index), state, params)
        found = torch.autograd.grad(outer(params), [*leaves, *wanted], allow_unused=True, materialize_grads=True)
        results.append((params, state, found))
    return results[0], results[1]


@pytest.mark.parametrize("name", CASES)
def test_advance_is_update_and_apply(name: str) -> None:
    case = CASES[name]
    learned = {key: value.requires_grad_() for key, value in tensors(case).items()}
    for transform, wanted in ((case.build(), []), (case.build(**learned), list(learned.values()))):
        torch.testing.assert_close(*advanced_and_applied(transform, wanted), **CLOSE)


def test_an_empty_chain_adds_the_gradients() -> None:
    params, grads = {"a": torch.ones(2)}, {"a": torch.full((2,), 0.5)}
    moved, _ = optim.advance(optim.chain(), grads, optim.chain().init(params), params)
    assert torch.equal(moved["a"], torch.full((2,), 1.5))


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vmap_over_parameters_and_hyper_parameters(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    factors = torch.tensor([0.9, 1.0, 1.1], dtype=dtype)
    many = {key: torch.stack([leaf * factor for factor in factors]) for key, leaf in start(dtype).items()}
    hypers = {key: value * factors for key, value in tensors(case, dtype).items()}
    got = torch.vmap(lambda params, values: trained(case.build(**values), params))(many, hypers)
    for index in range(3):
        alone = trained(
            case.build(**{key: value[index] for key, value in hypers.items()}),
            {key: leaf[index] for key, leaf in many.items()},
        )
        one = pytree.tree_map(lambda leaf, index=index: leaf[index], got)
        torch.testing.assert_close(one, alone, **(CLOSE if dtype == torch.float64 else {}))


@pytest.mark.parametrize("name", CASES)
def test_func_grad_equals_autograd_grad(name: str) -> None:
    case, params = CASES[name], start()

    def function(values: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
        return outer(trained(case.build(**values), params)[0])

    got = torch.func.grad(function, argnums=(0, 1))(tensors(case), params)
    values = {key: value.requires_grad_() for key, value in tensors(case).items()}
    leaves = {key: leaf.requires_grad_() for key, leaf in start().items()}
    found = torch.autograd.grad(
        function(values, leaves), [*values.values(), *leaves.values()], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close([*got[0].values(), *got[1].values()], list(found), **CLOSE)


def compiled_step(case: Case, backend: str) -> None:
    """One compiled step with hyper-parameters as inputs equals the plain one, and so do the gradients for these."""

    def step(values: dict[str, Tensor], grads: Any, state: Any, params: Any) -> Any:
        updates, state = case.build(**values).update(grads, state, params)
        return optim.apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        values = {key: value.requires_grad_() for key, value in tensors(case).items()}
        params: Any = start()
        state = case.build(**tensors(case)).init(params)
        for index in range(2):
            params, state = function(values, fixed_gradients(params, index), state, params)
        found = torch.autograd.grad(outer(params), list(values.values()), allow_unused=True, materialize_grads=True)
        results.append((params, state, found))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("name", MAIN)
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    compiled_step(CASES[name], "eager")


@pytest.mark.parametrize(
    ("name", "backend"), [("sgd dampening", "aot_eager"), ("radam", "aot_eager"), ("adam", "inductor")]
)
def test_compiles_with_gradients(name: str, backend: str) -> None:
    torch.compiler.reset()
    compiled_step(CASES[name], backend)


@pytest.mark.parametrize("name", ["adam", "sgd dampening"])
def test_a_scheduled_step_compiles_once(name: str) -> None:
    torch.compiler.reset()
    schedule = optim.schedules.warmup(optim.schedules.cosine_decay(0.1, 10), 2)
    transform = CASES[name].build(lr=schedule)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(transform.update, fullgraph=True, backend=counter)
    params = start()
    states = [transform.init(params)] * 2
    for step in range(4):
        grads = fixed_gradients(params, step)
        (expected, one), (got, two) = transform.update(grads, states[0], params), compiled(grads, states[1], params)
        torch.testing.assert_close(got, expected, **CLOSE)
        states = [one, two]
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda number: optim.sgd(number, momentum=number, dampening=number, weight_decay=number),
        lambda number: optim.adam(number, betas=(number, 0.9), eps=number),
        lambda number: optim.chain(optim.clip_by_value(number), optim.scale(number)),
    ],
)
def test_numbers_that_change_are_traced(build: Callable[[float], Any]) -> None:
    torch.compiler.reset()
    params = start()
    grads = fixed_gradients(params, 0)

    def run(number: float) -> Any:
        transform = build(number)
        return transform.update(grads, transform.init(params), params)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for number in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(number), run(number), **CLOSE)


class Point(NamedTuple):
    left: Any
    right: Any


TREES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "nested": lambda flat: {"body": {"w": flat["w"], "m": [flat["m"]]}, "head": (flat["b"],)},
    "list": lambda flat: list(flat.values()),
    "tuple": lambda flat: tuple(flat.values()),
    "named tuple": lambda flat: Point(flat["w"], (flat["m"], flat["b"])),
}


@pytest.mark.parametrize("form", TREES)
@pytest.mark.parametrize("name", [name for name in MAIN if name != "masked"])
def test_any_tree_gives_what_a_flat_dict_gives(name: str, form: str) -> None:
    flat, _ = trained(CASES[name].build(), start())
    got, _ = trained(CASES[name].build(), TREES[form](start()))
    torch.testing.assert_close(got, TREES[form](flat), **CLOSE)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("empty", [{}, [], (), {"w": torch.zeros(0, 3)}], ids=["dict", "list", "tuple", "size 0"])
def test_empty_trees_and_empty_tensors(name: str, empty: Any) -> None:
    params, _ = trained(CASES[name].build(), empty)
    assert type(params) is type(empty)
    assert [leaf.shape for leaf in tree.leaves(params)] == [leaf.shape for leaf in tree.leaves(empty)]


def test_a_single_tensor_is_a_tree() -> None:
    params, state = trained(optim.adam(0.1), torch.ones(3))
    assert params.shape == state.exp_avg.shape == (3,)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.float64, torch.float32], ids=str)
def test_dtypes_and_shapes_stay(name: str, dtype: torch.dtype, other: torch.dtype) -> None:
    case = CASES[name]
    transform = case.build(**tensors(case, other))
    params = start(torch.float64)
    params = {key: leaf.to(dtype) for key, leaf in params.items()}
    state = transform.init(params)
    for step in range(2):
        updates, new = transform.update(fixed_gradients(params, step), state, params)
        tree.check_same(params, updates)
        tree.check_same(state, new)
        assert all(leaf.isfinite().all() for leaf in tree.leaves(updates))
        params, state = optim.apply_updates(params, updates), new


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_and_the_state_is_tensors(name: str) -> None:
    transform, params = CASES[name].build(), start()
    _, state = trained(transform, params)
    grads = fixed_gradients(params, 5)
    given = (params, grads, state)
    before = pytree.tree_map(torch.clone, given)
    versions = [leaf._version for leaf in tree.leaves(given)]
    first = transform.update(grads, state, params)
    second = transform.update(grads, state, params)
    torch.testing.assert_close(given, before, rtol=0, atol=0)
    assert versions == [leaf._version for leaf in tree.leaves(given)]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(isinstance(leaf, Tensor) for leaf in tree.leaves(state))
    assert isinstance(state, tuple)
    assert hasattr(state, "_fields")


def test_steps_are_counted_on_a_0d_integer_tensor() -> None:
    _, state = trained(optim.adam(), start())
    assert state.step.dtype == torch.int64
    assert state.step.shape == ()
    assert state.step == 3


def test_plain_sgd_keeps_nothing() -> None:
    assert tree.leaves(optim.sgd(0.1).init(start())) == []
    assert len(tree.leaves(optim.sgd(lambda step: 0.1).init(start()))) == 1


@pytest.mark.parametrize("name", ["adam", "radam", "nadam"])
def test_bias_correction_is_precise_in_float32(name: str) -> None:
    """With β₂ = 0.999 in float32 arithmetic the first update would be off by 1e-5."""
    case = CASES[name]
    values = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    single, _ = trained(case.build(**values), start(torch.float32), steps=1)
    double, _ = trained(
        case.build(**values), {key: leaf.double() for key, leaf in start(torch.float32).items()}, steps=1
    )
    torch.testing.assert_close({key: leaf.double() for key, leaf in single.items()}, double, rtol=3e-7, atol=3e-8)


def test_a_per_entry_learning_rate_broadcasts() -> None:
    params = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    rates = torch.tensor([0.0, 0.1, 0.2])
    updates, _ = optim.sgd(rates).update(params, optim.sgd(rates).init(params), params)
    torch.testing.assert_close(updates, {"w": -rates.expand(2, 3), "b": -rates})


def test_a_graph_from_the_state_is_kept() -> None:
    """Momentum carries the derivative of the first gradient into the second update."""
    first = torch.tensor([2.0], requires_grad=True)
    transform, params = optim.sgd(1.0, momentum=0.5), {"w": torch.zeros(1)}
    _, state = transform.update({"w": first}, transform.init(params), params)
    updates, _ = transform.update({"w": torch.ones(1)}, state, params)
    assert torch.autograd.grad(updates["w"].sum(), first)[0].item() == -0.5


def test_the_problem_of_the_table_has_a_second_order() -> None:
    params = start()
    assert all(grad.grad_fn is not None for grad in gradients(params, 0).values())
