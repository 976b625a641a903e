"""The strategies: what they draw, that it is smooth where it is run, and that Hypothesis is optional."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import strategies
from funcmeta.testing._families import FAMILIES

few = settings(max_examples=50)


@few
@given(strategies.parameter_trees())
def test_trees_are_of_doubles_and_not_empty(params: Any) -> None:
    leaves = fm.tree.leaves(params)
    assert sum(leaf.numel() for leaf in leaves) > 0
    for leaf in leaves:
        assert leaf.dtype == torch.float64
        assert bool((leaf.abs() <= 1).all())


@pytest.mark.parametrize(
    "wanted",
    [
        lambda params: isinstance(params, torch.Tensor) and params.dim() == 0,
        lambda params: any(leaf.numel() == 0 for leaf in fm.tree.leaves(params)),
        lambda params: isinstance(params, dict) and any(isinstance(leaf, list) for leaf in params.values()),
        lambda params: isinstance(params, tuple) and len(fm.tree.leaves(params)) > 2,
    ],
    ids=["0-d", "empty leaf", "nested", "tuple"],
)
def test_trees_of_every_kind_are_drawn(wanted: Any) -> None:
    assert wanted(find(strategies.parameter_trees(), wanted))


@few
@given(strategies.smooth_losses(), strategies.parameter_trees(), st.floats(-3, 3))
def test_gradients_keep_their_sign_and_size(loss: strategies.SmoothLoss, params: Any, scale: float) -> None:
    x = torch.linspace(-3, 3, 4, dtype=torch.float64)
    _, grads = fm.value_and_grad(loss)(params, x)
    _, others = fm.value_and_grad(loss)(fm.tree.map(lambda leaf: scale * leaf, params), x + scale)
    for grad, other in zip(fm.tree.leaves(grads), fm.tree.leaves(others), strict=True):
        assert bool((grad.sign() == other.sign()).all())
        assert bool((grad.abs() >= 0.5).all())
        assert bool((grad.abs() <= 3).all())


def test_parameters_interact() -> None:
    point = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64)
    slope = torch.func.grad(lambda w: strategies.SmoothLoss(1)(w, torch.zeros(1).double()))
    hessian = torch.func.jacrev(slope)(point)
    assert bool((hessian.abs() > 1e-4).all())


@few
@given(strategies.problems(), st.integers(1, 4))
def test_problems_keep_their_distance_from_kinks(case: strategies.Case, steps: int) -> None:
    sizes: list[torch.Tensor] = []

    training = case.problem.step.__self__  # type: ignore[attr-defined]

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        _, grads = fm.value_and_grad(lambda params: training.inner_loss(meta, params, batch))(state.params)
        sizes.extend(leaf.abs().flatten() for leaf in fm.tree.leaves(grads))
        return training.step(meta, state, batch, seed)

    with torch.no_grad():
        fm.unroll(case.problem._replace(step=step), case.meta, case.task, steps=steps)
    assert bool(((torch.cat(sizes) >= 0.35) & (torch.cat(sizes) <= 3.1)).all())


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_every_family_is_drawn_and_builds(name: str, data: st.DataObject) -> None:
    optimizer = data.draw(strategies.optimizers(name))
    assert optimizer.name == name
    assert isinstance(optimizer.build(optimizer.hypers()), fm.Transform)
    params = {"a": torch.ones(2).double()}
    transform = optimizer.build(optimizer.hypers())
    fm.tree.check_same(params, transform.update(params, transform.init(params), params)[0])


def test_every_inner_optimizer_has_a_family() -> None:
    words = {word for name in FAMILIES for word in name.split()}
    others = {"advance", "apply_updates", "chain", "schedules", "Transform", "add_weight_decay"}
    conversions = {name for name in optim.__all__ if name.startswith(("from_", "to_"))}
    assert set(optim.__all__) - others - conversions <= words


@few
@given(strategies.transforms())
def test_transforms_are_finished(transform: Any) -> None:
    params = torch.ones(2).double()
    transform.update(params, transform.init(params), params)


@settings(max_examples=4)
@given(strategies.problems(optimizer=strategies.optimizers("lion")))
def test_a_failing_example_prints_what_it_is_made_of(case: strategies.Case) -> None:
    assert "SmoothLoss(seed=" in repr(case)
    assert "name='lion'" in repr(case)


@pytest.mark.parametrize("make", [strategies.parameter_trees, strategies.smooth_losses, strategies.optimizers])
def test_hypothesis_is_optional(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(fm.MissingExtraError, match=r"Hypothesis.* is not installed.*extra funcmeta\[test\]\. Run pip"):
        make()


def test_the_toolkit_is_imported_without_hypothesis() -> None:
    script = "import sys; sys.modules['hypothesis'] = None; import funcmeta.testing"
    subprocess.run([sys.executable, "-c", script], check=True)
