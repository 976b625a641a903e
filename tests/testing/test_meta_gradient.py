"""The check of a meta-gradient: it passes what is right, names what is wrong, and admits when it shows nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.testing import (
    TOLERANCES,
    CheckError,
    MetaGradientMismatch,
    VacuousCheckWarning,
    check_meta_grad,
    mutants,
)

NET = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()


def case(loss: Any = mse, tasks: int | None = None, **options: Any) -> tuple[fm.Problem, dict[str, Any], fm.Task]:
    with fm.rng.forked(0):
        net = NET
        shape = () if tasks is None else (tasks,)
        x, y = torch.randn(*shape, 4, 2).double(), torch.randn(*shape, 4, 1).double()
    problem = fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.5), **options)
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.2, dtype=torch.float64, requires_grad=True)}
    return problem, meta, fm.Task((x, y), (x + 0.1, y))


def test_figures_of_a_right_gradient() -> None:
    problem, meta, task = case()
    check = check_meta_grad(problem, meta, task, steps=3, directions=2)
    names = [name for name, _ in fm.tree.named_leaves(meta, "meta")]
    assert [each.leaf for each in check.derivatives] == [name for name in ("all leaves", *names) for _ in "ab"]
    assert check.worst.error == max(each.error for each in check.derivatives) < 1e-8
    assert check.loss == pytest.approx(float(fm.unroll(problem, meta, task, steps=3).loss.detach()), rel=1e-12)
    assert not check.vacuous


def test_nothing_of_the_caller_is_changed() -> None:
    problem, meta, task = case()
    before = fm.tree.map(lambda leaf: (leaf.detach().clone(), leaf._version), meta)
    check_meta_grad(problem, meta, task, steps=2)
    for leaf, (value, version) in zip(fm.tree.leaves(meta), _pairs(before), strict=True):
        assert torch.equal(leaf.detach(), value)
        assert leaf._version == version
        assert leaf.grad is None


def _pairs(tree: Any) -> list[tuple[Tensor, int]]:
    flat = fm.tree.leaves(tree)
    return list(zip(flat[::2], flat[1::2], strict=True))


def test_differences_grow_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, task = case()
    modes: list[bool] = []

    def step(*arguments: Any) -> Any:
        modes.append(torch.is_grad_enabled())
        return problem.step(*arguments)

    check_meta_grad(problem._replace(step=step), meta, task, steps=2)
    assert modes.count(True) == 2 * 2
    assert modes.count(False) == 2 * 4 * (1 + len(fm.tree.leaves(meta)))


@pytest.mark.parametrize("strategy", ["vmap", "loop", "auto"])
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(2)], ids=repr)
def test_many_tasks(strategy: Any, memory: Any) -> None:
    problem, meta, task = case(tasks=2)
    assert check_meta_grad(problem, meta, task, steps=3, strategy=strategy, memory=memory).worst.error < 1e-8


def test_only_leaves_that_require_grad_are_moved() -> None:
    problem, meta, task = case()
    meta["lr"] = meta["lr"].detach()
    meta["params"]["0.bias"].requires_grad_(False)
    check = check_meta_grad(problem, meta, task, steps=2)
    assert len(check.derivatives) == 1 + 3


def test_one_leaf_has_no_line_of_all_leaves() -> None:
    problem, meta, task = case()
    check = check_meta_grad(problem, {"lr": meta["lr"]}, task, steps=2)
    assert [each.leaf for each in check.derivatives] == ["meta['lr']"]


def test_a_shared_tensor_is_checked_at_each_place() -> None:
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    problem = fm.inner_problem(NET, mse, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=meta["momentum"]))
    check = check_meta_grad(problem, {"lr": rate, "momentum": rate}, case()[2], steps=3)
    assert [each.leaf for each in check.derivatives] == ["all leaves", "meta['lr']", "meta['momentum']"]


def test_a_mismatch_names_leaf_and_figures() -> None:
    problem, meta, task = case()
    with pytest.raises(MetaGradientMismatch) as caught:
        check_meta_grad(problem, meta, task, steps=3, estimator=fm.FirstOrder())
    text = str(caught.value)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, CheckError)
    assert "of 3 steps under FirstOrder() and StoreAll() differs" in text
    assert "along 6 of 6 directions, expected relative errors up to 1.0e-06:" in text
    assert "\n  meta['params']['0.weight']: computed " in text
    assert "finite difference " in text
    assert "Look for a tensor that is detached" in text


def test_a_small_leaf_does_not_hide() -> None:
    """A wrong rate of 1e-4 beside parameters a million times as important is found and is the only one named."""

    class Frozen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return 1.1 * grads[0]

    step = fm.value_and_grad(lambda w: w.cos().sum())

    def problem(wrong: bool) -> fm.Problem:
        def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
            loss, slope = step(w)
            rate = Frozen.apply(meta["lr"]) if wrong else meta["lr"]  # type: ignore[no-untyped-call]
            return w - rate * slope, fm.StepInfo(loss)

        return fm.Problem(lambda meta, task, seed: meta["w"], take, lambda meta, w, query, seed: 1e3 * (w**3).sum())

    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    meta = {"w": w, "lr": torch.tensor(1e-4, dtype=torch.float64, requires_grad=True)}
    task = fm.Task(w.detach(), None)
    assert not check_meta_grad(problem(False), meta, task, steps=2).vacuous
    with pytest.raises(MetaGradientMismatch, match=r"along 2 of 3.*\n  all leaves: .*\n  meta\['lr'\]: .*\nLook"):
        check_meta_grad(problem(True), meta, task, steps=2)


def test_a_reference_saves_the_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, meta, task = case()
    truth = check_meta_grad(problem, meta, task, steps=3)
    monkeypatch.setattr("funcmeta.testing._differences.finite_difference", None)
    again = check_meta_grad(problem, meta, task, steps=3, memory=fm.Segments(1), reference=truth)
    assert [each.expected for each in again.derivatives] == [each.expected for each in truth.derivatives]
    with pytest.raises(MetaGradientMismatch):
        check_meta_grad(mutants.detached(problem), meta, task, steps=3, reference=truth)


def test_a_reference_keeps_its_own_directions_order_and_seed() -> None:
    """What would be ignored is refused; what is left out is that of the reference."""
    problem, meta, task = case()
    truth = check_meta_grad(problem, meta, task, steps=3, directions=2, order=6, seed=5)
    again = check_meta_grad(problem, meta, task, steps=3, seed=5, reference=truth)
    assert len(again.derivatives) == len(truth.derivatives) > len(check_meta_grad(problem, meta, task, steps=3).probes)
    for name, value in (("directions", 2), ("order", 6)):
        with pytest.raises(fm.ArgumentError, match=rf"{name} is {value} beside a reference.* Leave it out, or pass no"):
            check_meta_grad(problem, meta, task, steps=3, seed=5, reference=truth, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match=r"seed is 0, but the reference .* with seed 5\. Pass that seed"):
        check_meta_grad(problem, meta, task, steps=3, reference=truth)


def test_a_tolerance_below_rounding_raises_no_false_alarm() -> None:
    assert check_meta_grad(*case(), steps=2, tolerance=1e-15).worst.error <= 1e-15


VACUOUS = r"Over {} steps the first-order meta-gradient agrees .* Take more steps, .* pass allow_vacuous=True"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_check_that_shows_nothing(steps: int) -> None:
    """After no step, and after one of Adam without eps at gradients far from zero, first order is right."""
    step = fm.value_and_grad(lambda w: (w**2).sum())
    adam = optim.adam(0.1, eps=0.0)

    def take(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, grads = step(state.params)
        updates, opt_state = adam.update(grads, state.opt_state, state.params)
        return state._replace(params=state.params + updates, opt_state=opt_state), fm.StepInfo(loss)

    problem = fm.Problem(
        lambda meta, task, seed: fm.InnerState(meta, {}, adam.init(meta), torch.tensor(0)),
        take,
        lambda meta, state, query, seed: state.params.exp().sum(),
    )
    meta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    task = fm.Task(meta.detach(), None)
    with pytest.warns(VacuousCheckWarning, match=VACUOUS.format(steps)):
        check_meta_grad(problem, meta, task, steps=steps)
    assert check_meta_grad(problem, meta, task, steps=steps, allow_vacuous=True).vacuous
    assert not check_meta_grad(problem, meta, task, steps=2, tolerance=1e-6).vacuous


def learned_weight(power: float) -> tuple[fm.Problem, dict[str, Tensor], fm.Task]:
    """A loss with a learned weight, which acts through the inner gradient alone."""
    step = fm.value_and_grad(lambda w, weight: (weight * w**power).sum())

    def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = step(w, meta["weight"])
        return w - 0.1 * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta["w"], take, lambda meta, w, query, seed: (w**2).sum())
    meta = {"w": torch.tensor([1.0, 2.0]).double().requires_grad_(), "weight": torch.tensor(1.0).double()}
    return problem, meta, fm.Task(meta["w"].detach(), None)


def test_a_leaf_without_a_first_order_gradient_tells_the_orders_apart() -> None:
    problem, meta, task = learned_weight(1)
    assert check_meta_grad(problem, meta, task, steps=2, allow_vacuous=True).vacuous
    meta["weight"].requires_grad_()
    assert not check_meta_grad(problem, meta, task, steps=2).vacuous
    meta["w"] = meta["w"].detach()
    assert not check_meta_grad(problem, meta, task, steps=2).vacuous


def test_steps_without_an_inner_gradient_are_told_from_zero() -> None:
    def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        return w * meta, fm.StepInfo(w.sum())

    problem = fm.Problem(lambda meta, task, seed: meta, take, lambda meta, w, query, seed: w**2)
    meta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert not check_meta_grad(problem, meta, fm.Task(torch.ones(1), None), steps=2).vacuous


def test_a_kink_is_found_out() -> None:
    step = fm.value_and_grad(lambda w: (w**2).sum() / 2)

    def take(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = step(w)
        return w - 0.1 * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta, take, lambda meta, w, query, seed: w.abs().sum())
    meta = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    check_meta_grad(problem, meta, fm.Task(torch.ones(1), None), steps=2)
    with pytest.raises(MetaGradientMismatch, match="a kink in the loss"):
        check_meta_grad(problem, meta * torch.tensor([1.0, 1e-7]), fm.Task(torch.ones(1), None), steps=2)


@pytest.mark.parametrize("directions", [0, -1, 1.0, True])
def test_bad_directions(directions: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"directions is .*, expected a positive integer\. Pass e\.g\."):
        check_meta_grad(*case(), steps=1, directions=directions)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1, None])
def test_a_bad_tolerance(tolerance: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"tolerance is .*, expected a number between 0 and 1\. Pass e\.g\."):
        check_meta_grad(*case(), steps=1, tolerance=tolerance)


def test_nothing_to_check() -> None:
    problem, meta, task = case()
    with pytest.raises(fm.ArgumentError, match=r"No leaf of meta requires grad.*Call requires_grad_\(\)"):
        check_meta_grad(problem, fm.tree.detach(meta), task, steps=1)


def test_a_leaf_of_single_precision() -> None:
    problem, meta, task = case()
    meta["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(fm.StructureError, match=r"meta\['lr'\] is float32\[\] on cpu, expected float64.*\.double\(\)"):
        check_meta_grad(problem, meta, task, steps=1)


def test_a_leaf_that_is_no_tensor() -> None:
    problem, meta, task = case()
    with pytest.raises(fm.StructureError, match=r"meta\['lr'\] is 0\.1 \(float\), expected a tensor\. Wrap"):
        check_meta_grad(problem, {**meta, "lr": 0.1}, task, steps=1)


def test_a_meta_loss_of_single_precision() -> None:
    problem, meta, task = case(meta_loss_fn=lambda *arguments: mse(*arguments).float())
    with pytest.raises(fm.StructureError, match=r"The meta-loss is float32\[\] on cpu, expected float64"):
        check_meta_grad(problem, meta, task, steps=1)


def test_a_tensor_that_no_gradient_reaches_keeps_its_own_error() -> None:
    problem, meta, task = case()
    meta["unused"] = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(fm.UnreachedLeafError, match=r"meta\['unused'\]"):
        check_meta_grad(problem, meta, task, steps=1)


def test_the_table_of_tolerances_is_the_one_of_the_verification_standard() -> None:
    assert TOLERANCES._asdict() == {"fixed": 1e-6, "drawn": 1e-5, "exact": 1e-10, "memory": 1e-12, "single": 1e-4}


def test_the_figures_print_as_a_table_with_the_worst_first() -> None:
    check = check_meta_grad(*case(), steps=2)
    lines = str(check).splitlines()
    assert lines[0].startswith("meta-loss ")
    assert lines[1].strip() == str(check.worst)
    assert len(lines) == 1 + len(check.derivatives)


# ---- each option makes its documented difference


def test_seed_and_order_decide_the_differences() -> None:
    problem, meta, task = case()

    def expected(**options: Any) -> list[float]:
        check = check_meta_grad(problem, meta, task, steps=2, tolerance=1e-3, **options)
        return [each.expected for each in check.derivatives]

    assert expected() == expected(seed=0, order=4)
    assert expected(seed=1)[0] != pytest.approx(expected()[0], rel=1e-3)  # another direction
    assert expected(order=2) != expected()
    assert expected(order=2) == pytest.approx(expected(), rel=1e-3)  # the same one, less exactly


def test_seed_decides_the_draws_of_the_training() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    problem = fm.inner_problem(net, mse, optimizer=lambda meta: optim.sgd(meta["lr"]), train=True)
    meta, task = {"lr": torch.tensor(0.2, dtype=torch.float64, requires_grad=True)}, case()[2]
    for seed in (0, 1):
        check = check_meta_grad(problem, meta, task, steps=2, seed=seed)
        assert check.loss == fm.unroll(problem, meta, task, steps=2, seed=seed).loss.item()


def test_the_task_is_the_one_that_was_given() -> None:
    problem, meta, task = case()
    other = fm.Task(task.query, task.support)
    losses = [check_meta_grad(problem, meta, each, steps=2).loss for each in (task, other)]
    assert losses == [fm.unroll(problem, meta, each, steps=2).loss.item() for each in (task, other)]
    assert losses[0] != losses[1]


def test_the_strategy_is_the_one_that_was_given() -> None:
    problem, meta, task = case(tasks=3)
    calls = [0]

    def step(*arguments: Any) -> Any:
        calls[0] += 1
        return problem.step(*arguments)

    counts = []
    for strategy in ("vmap", "loop"):
        calls[0] = 0
        check_meta_grad(problem._replace(step=step), meta, task, steps=2, strategy=strategy)  # type: ignore[arg-type]
        counts.append(calls[0])
    assert counts[1] > 2 * counts[0]


@pytest.mark.filterwarnings("error::funcmeta.testing.VacuousCheckWarning")
def test_a_vacuous_check_may_be_allowed() -> None:
    problem, meta, task = case()
    with pytest.raises(VacuousCheckWarning):
        check_meta_grad(problem, meta, task, steps=0)
    assert check_meta_grad(problem, meta, task, steps=0, allow_vacuous=True).vacuous
