"""The contract of every exact estimator: right on every model, inner optimizer, memory policy and strategy."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from contract_cases import CASES, ESTIMATORS, MODELS, PAIRS, TASKS, build, equals_truth
from torch import Tensor

import funcmeta as fm
from funcmeta import _exact_layers
from funcmeta._batching import take
from funcmeta.testing import TOLERANCES, MetaGradientCheck, MetaGradientMismatch, check_meta_grad
from funcmeta.testing._differences import probes
from funcmeta.testing.mutants import MUTANTS

MEMORIES = (fm.Segments(1), fm.Revolve(2), fm.Segments(), fm.Offload(fm.Segments(2)))
MANY = ("loop", "vmap")
cases = pytest.mark.parametrize(("model", "optimizer", "steps"), CASES)
pairs = pytest.mark.parametrize(("model", "optimizer"), PAIRS)
models = pytest.mark.parametrize("model", MODELS)
exactly = pytest.mark.filterwarnings("error::funcmeta.FallbackWarning")


def loss_of(
    model: str,
    optimizer: str,
    steps: int,
    strategy: str = "single",
    dtype: torch.dtype = torch.float64,
    *,
    moved: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The meta-loss, and the leaves of meta by name; these are elsewhere when ``moved`` says so."""
    problem, meta, tasks = build(model, optimizer, dtype)
    if moved:
        every = [leaf.detach().requires_grad_() for leaf in moved.values()]
        meta = fm.tree.unflatten(every, fm.tree.flatten(meta)[1])
    leaves = dict(fm.tree.named_leaves(meta, "meta"))
    if strategy == "single":
        return fm.unroll(problem, meta, take(tasks, 0), steps=steps, **options).loss, leaves
    return fm.unroll_batch(problem, meta, tasks, steps=steps, strategy=strategy, **options).loss, leaves  # type: ignore[arg-type]


def gradient(*case: Any, **options: Any) -> dict[str, Tensor]:
    loss, leaves = loss_of(*case, **options)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def along(*case: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The meta-gradient along a fixed direction, attached, and the leaves of meta by name."""
    loss, leaves = loss_of(*case, **options)
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    with fm.rng.forked(5):
        return fm.tree.dot(first, [torch.randn_like(leaf) for leaf in first]), leaves


def derivative_again(*case: Any, **options: Any) -> dict[str, Tensor]:
    """The derivative of the meta-gradient along a fixed direction."""
    slope, leaves = along(*case, **options)
    return dict(zip(leaves, torch.autograd.grad(slope, list(leaves.values())), strict=True))


reference = cache(gradient)
reference_again = cache(derivative_again)


def assert_agree(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Each leaf agrees relative to its largest entry; one below 1e-3 of the largest of all, relative to that."""
    most = max(float(leaf.abs().max()) for leaf in expected.values())
    for name, leaf in expected.items():
        scale = max(float(leaf.abs().max()), 1e-3 * most)
        deviation = float((got[name] - leaf).abs().max()) / scale
        assert deviation <= tolerance, f"{name} deviates by {deviation:.1e}, allowed {tolerance:.1e}"


@cache
def check(model: str, optimizer: str, steps: int) -> MetaGradientCheck:
    problem, meta, tasks = build(model, optimizer)
    return check_meta_grad(problem, meta, take(tasks, 0), steps=steps)


@cases
def test_the_meta_gradient_equals_finite_differences(model: str, optimizer: str, steps: int) -> None:
    figures = check(model, optimizer, steps)
    _, meta, _ = build(model, optimizer)
    assert len(figures.derivatives) == 1 + len(fm.tree.leaves(meta))
    assert figures.worst.error <= TOLERANCES.fixed
    assert not figures.vacuous


@pytest.mark.parametrize("mutant", MUTANTS)
@cases
def test_each_mutant_is_rejected(model: str, optimizer: str, steps: int, mutant: str) -> None:
    truth = check(model, optimizer, steps)
    problem, meta, tasks = build(model, optimizer)

    def run() -> MetaGradientCheck:
        return check_meta_grad(MUTANTS[mutant](problem), meta, take(tasks, 0), steps=steps, reference=truth)

    if equals_truth(mutant, steps):
        assert run().worst.error <= TOLERANCES.fixed
    else:
        with pytest.raises(MetaGradientMismatch, match="differs from finite differences"):
            run()


@models
def test_the_meta_gradient_of_vmapped_tasks_equals_finite_differences(model: str) -> None:
    check_meta_grad(*build(model, "adam"), steps=3, strategy="vmap", order=2)


@cases
def test_memories_agree(model: str, optimizer: str, steps: int) -> None:
    for memory in MEMORIES:
        got = gradient(model, optimizer, steps, memory=memory)
        assert_agree(got, reference(model, optimizer, steps), TOLERANCES.memory)


@pytest.mark.parametrize("strategy", MANY)
@pairs
def test_memories_agree_for_many_tasks(model: str, optimizer: str, strategy: str) -> None:
    for memory in MEMORIES[:2]:
        got = gradient(model, optimizer, 3, strategy, memory=memory)
        assert_agree(got, reference(model, optimizer, 3, strategy), TOLERANCES.memory)


@cases
def test_strategies_agree(model: str, optimizer: str, steps: int) -> None:
    loop, vmap = (reference(model, optimizer, steps, strategy) for strategy in MANY)
    assert_agree(vmap, loop, TOLERANCES.exact)


@pairs
def test_memories_and_strategies_agree_to_first_order(model: str, optimizer: str) -> None:
    loop = reference(model, optimizer, 3, "loop", estimator=fm.FirstOrder())
    for strategy in MANY:
        for memory in (fm.StoreAll(), *MEMORIES[:2]):
            got = gradient(model, optimizer, 3, strategy, estimator=fm.FirstOrder(), memory=memory)
            assert_agree(got, loop, TOLERANCES.memory if strategy == "loop" else TOLERANCES.exact)


@pairs
def test_the_loop_is_the_mean_of_single_tasks(model: str, optimizer: str) -> None:
    problem, meta, tasks = build(model, optimizer)
    losses = [fm.unroll(problem, meta, take(tasks, index), steps=3).loss for index in range(TASKS)]
    leaves = dict(fm.tree.named_leaves(meta, "meta"))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    assert_agree(dict(zip(leaves, grads, strict=True)), reference(model, optimizer, 3, "loop"), TOLERANCES.memory)


@pairs
def test_single_precision_is_close_to_double(model: str, optimizer: str) -> None:
    for strategy in MANY:
        for memory in (fm.StoreAll(), fm.Segments(2)):
            got = gradient(model, optimizer, 3, strategy, torch.float32, memory=memory)
            assert_agree(got, reference(model, optimizer, 3, strategy), TOLERANCES.single)


def second_derivative_errors(model: str, strategy: str) -> list[float]:
    """Errors of the derivative of the meta-gradient along a direction, for all leaves and each leaf."""
    leaves = {name: leaf.detach() for name, leaf in loss_of(model, "sgd momentum", 0, strategy)[1].items()}

    def slope(some: Mapping[str, Tensor]) -> Tensor:
        return along(model, "sgd momentum", 2, strategy, moved={**leaves, **some})[0]

    expected = derivative_again(model, "sgd momentum", 2, strategy)
    value = float(slope({}).detach())
    found = probes(slope, leaves, expected, value=value, directions=1, order=2, seed=0, tolerance=TOLERANCES.fixed)
    return [probe.judge(expected, TOLERANCES.fixed).error for probe in found]


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@models
def test_the_second_derivative_equals_finite_differences(model: str, strategy: str) -> None:
    errors = second_derivative_errors(model, strategy)
    assert max(errors) <= TOLERANCES.fixed


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@pytest.mark.parametrize("model", ["conv batchnorm", "attention"])
def test_fused_normalization_would_be_found_out(model: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = {layer: run for layer, run in _exact_layers._EXACT.items() if "norm" not in layer.__name__}
    monkeypatch.setattr(_exact_layers, "_EXACT", fused)
    assert max(second_derivative_errors(model, strategy)) > 1e3 * TOLERANCES.fixed


@pairs
def test_memories_agree_when_differentiated_again(model: str, optimizer: str) -> None:
    for memory in MEMORIES[:2]:
        got = derivative_again(model, optimizer, 3, memory=memory)
        assert_agree(got, reference_again(model, optimizer, 3), TOLERANCES.memory)


@models
def test_strategies_agree_when_differentiated_again(model: str) -> None:
    loop = reference_again(model, "adam", 3, "loop")
    for memory in (fm.StoreAll(), fm.Segments(2)):
        assert_agree(derivative_again(model, "adam", 3, "vmap", memory=memory), loop, TOLERANCES.exact)


# ---- the other exact estimators


@exactly
@pytest.mark.parametrize("strategy", ["single", *MANY])
@pairs
def test_mixed_mode_is_reverse(model: str, optimizer: str, strategy: str) -> None:
    memories = (fm.StoreAll(), fm.Segments(2), fm.Revolve(2)) if optimizer == "adam" else (fm.Segments(2),)
    for memory in memories:
        got = gradient(model, optimizer, 3, strategy, estimator=fm.MixedMode(), memory=memory)
        assert_agree(got, reference(model, optimizer, 3, strategy), TOLERANCES.memory)


@exactly
@models
def test_mixed_mode_is_reverse_over_many_steps(model: str) -> None:
    got = gradient(model, "adam", 10, estimator=fm.MixedMode())
    assert_agree(got, reference(model, "adam", 10), TOLERANCES.memory)


@exactly
@pytest.mark.parametrize("strategy", ["single", "vmap"])
@models
def test_mixed_mode_is_reverse_when_differentiated_again(model: str, strategy: str) -> None:
    got = derivative_again(model, "adam", 3, strategy, estimator=fm.MixedMode(), memory=fm.Segments(2))
    tolerance = TOLERANCES.memory if strategy == "single" else TOLERANCES.exact
    assert_agree(got, reference_again(model, "adam", 3, strategy), tolerance)


@pytest.mark.parametrize("strategy", ["single", "vmap"])
@models
def test_forward_mode_is_reverse(model: str, strategy: str) -> None:
    got = gradient(model, "sgd momentum", 2, strategy, estimator=fm.ForwardMode())
    assert_agree(got, reference(model, "sgd momentum", 2, strategy), TOLERANCES.exact)


@pytest.mark.parametrize("strategy", ["single", *MANY])
@pairs
def test_one_window_is_reverse(model: str, optimizer: str, strategy: str) -> None:
    for length, memory in ((3, fm.StoreAll()), (4, fm.Segments(2))):
        got = gradient(model, optimizer, 3, strategy, estimator=fm.Truncated(length), memory=memory)
        assert_agree(got, reference(model, optimizer, 3, strategy), TOLERANCES.memory)


@exactly
@pytest.mark.parametrize("name", ESTIMATORS)
@models
def test_the_others_in_single_precision_are_close_to_double(model: str, name: str) -> None:
    for strategy in ("single", "vmap"):
        got = gradient(model, "sgd momentum", 2, strategy, torch.float32, estimator=ESTIMATORS[name])
        assert_agree(got, reference(model, "sgd momentum", 2, strategy), TOLERANCES.single)


@exactly
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("model", ["mlp", "conv groupnorm"])
def test_the_others_equal_finite_differences(model: str, name: str) -> None:
    problem, meta, tasks = build(model, "adam")
    truth = check(model, "adam", 3)
    check_meta_grad(problem, meta, take(tasks, 0), steps=3, estimator=ESTIMATORS[name], reference=truth)
