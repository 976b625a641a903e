"""compare: every figure of a row against hand-made values, costs against known ones, and what it says of bad inputs."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta._files import written
from funcmeta._live_bytes import LiveBytes, peak_bytes
from funcmeta.compare import Comparison, LeafRow, Row
from funcmeta.compare._agreement import agreement
from funcmeta.compare._measure import median_seconds
from funcmeta.compare._plot import draw_agreement, figure
from funcmeta.compare._table import bytes_text, leaf_label, table, time_text

measure = sys.modules["funcmeta.compare._measure"]
CPU = torch.device("cpu")
NOTHING = fm.Task(torch.ones(1), None)


def scalar(value: float = 2.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def quadratic(inner: Any = lambda meta, a: a * meta**2, outer: Any = lambda meta, a: a * meta**2) -> fm.Problem:
    """Gradient descent at rate 1 on a scalar a, from 1."""

    def step(meta: Any, a: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        loss, slope = fm.value_and_grad(lambda a: inner(meta, a))(a)
        return a - slope, fm.StepInfo(loss)

    def init(meta: Any, task: fm.Task, seed: int) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    return fm.Problem(init, step, lambda meta, a, query, seed: outer(meta, a))


def by_leaf(meta: Any, a: Tensor) -> Tensor:
    return a * (meta["x"] ** 2 - 3 * meta["y"])


def in_two(meta: Any, a: Tensor) -> Tensor:
    return a * (meta["x"] ** 2 + meta["y"] ** 2)


def toy(**options: Any) -> Comparison:
    return fm.compare(quadratic(), scalar(), NOTHING, **{"steps": 1, **options})


def net_problem(activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    net = nn.Sequential(nn.Linear(3, 16), activation(), nn.Linear(16, 1)).to(dtype)

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return ((predict(x) - y) ** 2).mean()

    problem = fm.inner_problem(net, loss, optimizer=lambda meta: fm.optim.sgd(meta["lr"]))
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.3, dtype=dtype, requires_grad=True)}
    x, y = torch.randn(20, 3, dtype=dtype), torch.randn(20, 1, dtype=dtype)
    return problem, meta, fm.Task((x[:10], y[:10]), (x[10:], y[10:]))


# ---- the figures


def test_the_scalar_toy_by_hand() -> None:
    exact, first = toy().rows
    assert (exact.name, first.name) == ("second order", "first order")
    assert exact.loss == first.loss == -12.0  # a_1 = 1 - 4
    assert (exact.cosine, exact.norm_ratio, exact.relative_error) == (1.0, 1.0, 0.0)
    assert first.cosine == 1.0
    assert first.norm_ratio == pytest.approx(12 / 28, rel=1e-12)
    assert first.relative_error == pytest.approx(16 / 28, rel=1e-12)
    assert exact.worst_leaf == first.worst_leaf == ("meta", 1.0)
    assert exact.fd_error < 1e-8
    assert first.fd_error == pytest.approx(16 / 28, rel=1e-7)
    assert exact.evaluations == first.evaluations == 2
    assert exact.seconds > 0
    assert exact.peak_bytes > first.peak_bytes > 0
    assert exact.unreached == first.unreached == ()


def test_the_worst_leaf_and_the_whole_by_hand() -> None:
    """L = (1 - x² - y²)(x² - 3y) at (1, 2): exact (2, 32), with a_1 = -4 constant (-8, 12)."""
    meta = {"x": scalar(1.0), "y": scalar(2.0)}
    comparison = fm.compare(quadratic(in_two, by_leaf), meta, NOTHING, steps=1)
    exact, first = comparison.rows
    assert first.worst_leaf == ("meta['x']", -1.0)
    assert first.cosine == pytest.approx((2 * -8 + 32 * 12) / math.sqrt(1028 * 208), rel=1e-12)
    assert first.norm_ratio == pytest.approx(math.sqrt(208 / 1028), rel=1e-12)
    assert first.relative_error == pytest.approx(math.sqrt((10**2 + 20**2) / 1028), rel=1e-12)
    assert exact.fd_error < 1e-7
    assert 0.1 < first.fd_error < 10
    found = {row.leaf: row for row in comparison.leaves if row.name == "first order"}
    assert found["meta['x']"] == LeafRow("first order", "meta['x']", 1, 1, -1.0, pytest.approx(4.0))
    assert found["meta['y']"].norm_ratio == pytest.approx(12 / 32)
    assert found["meta"].elements == 2
    assert found["meta"].cosine == first.cosine


def test_leaves_over_the_inner_steps_by_hand() -> None:
    """a_k = 1 - k x², so L' is 2x - 4k x³ and, with a_k constant, 2x - 2k x³."""
    rows = [row for row in toy(steps=3).leaves if row.name == "first order"]
    assert [row.steps for row in rows] == [1, 2, 3]
    assert [row.norm_ratio for row in rows] == pytest.approx([12 / 28, 28 / 60, 44 / 92])


def test_many_inner_steps_are_sampled_evenly_to_the_last() -> None:
    problem = quadratic(lambda meta, a: 1e-3 * a * meta**2)
    rows = fm.compare(problem, scalar(), NOTHING, steps=37).leaves
    assert [row.steps for row in rows if row.name == "first order"] == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]


def test_the_reference_can_be_chosen() -> None:
    comparison = toy(reference="first order")
    exact, first = comparison.rows
    assert comparison.reference == "first order"
    assert exact.norm_ratio == pytest.approx(28 / 12)
    assert first.relative_error == 0.0
    assert exact.fd_error < 1e-8  # finite differences do not follow the reference


def test_reptile_is_held_against_the_same_meta_loss() -> None:
    problem, meta, task = net_problem()
    meta["lr"].requires_grad_(False)
    estimators = {"exact": fm.Reverse(), "reptile": fm.Reptile()}
    exact, reptile = fm.compare(problem, meta, task, steps=3, estimators=estimators).rows
    last = fm.unroll(problem, meta, task, steps=3).info.losses[-1].item()
    assert reptile.loss == pytest.approx(last)
    assert exact.fd_error < 1e-6
    assert reptile.fd_error > 0.1
    assert reptile.evaluations == 3
    assert exact.evaluations == 4


def test_a_net_in_float64_has_an_exact_and_a_wrong_row() -> None:
    exact, first = fm.compare(*net_problem(), steps=4).rows
    assert exact.fd_error < 1e-7
    assert first.fd_error > 0.01
    assert first.cosine < 0.9999


def test_a_net_in_float32_is_measured_in_float32() -> None:
    comparison = fm.compare(*net_problem(dtype=torch.float32), steps=4)
    assert comparison.dtype == "float32"
    assert comparison.rows[0].fd_error < 5e-3


def test_agreement_of_zeros() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert agreement([one], [one]) == (pytest.approx(1.0), 1.0, 0.0)
    assert agreement([zero], [one]) == (0.0, 0.0, 1.0)
    assert agreement([one], [zero]).cosine == 0.0
    assert agreement([one], [zero]).norm_ratio == math.inf
    assert all(math.isnan(each) for each in agreement([zero], [zero]))


def test_leaves_without_a_gradient_anywhere_have_no_worst() -> None:
    problem = quadratic(outer=lambda meta, a: 0 * a * meta**2)
    row = fm.compare(problem, scalar(), NOTHING, steps=1).rows[1]
    assert row.worst_leaf[0] == ""
    assert math.isnan(row.worst_leaf[1])
    assert math.isnan(row.cosine)


# ---- finite differences across jumps


def test_differences_shrink_below_a_jump() -> None:
    """A jump of the loss 1e-6 beside the point makes the usual difference wild."""
    problem = quadratic(outer=lambda meta, a: a * meta**2 + (meta > 2 + 1e-6).double())
    comparison = fm.compare(problem, scalar(), NOTHING, steps=1)
    assert comparison.rows[0].fd_error < 1e-6
    assert comparison.fd_spread < 1e-6


def test_hopeless_differences_say_so() -> None:
    """A loss that is a staircase has no differences that agree."""
    stairs = quadratic(outer=lambda meta, a: a * meta**2 + 1e3 * torch.sin(1e13 * meta.detach()))
    assert fm.compare(stairs, scalar(), NOTHING, steps=1).fd_spread > 0.1


def test_relu_nets_are_measured_too() -> None:
    comparison = fm.compare(*net_problem(nn.ReLU), steps=5, directions=2)
    assert comparison.rows[0].fd_error < 1e-6
    assert comparison.directions == 2


# ---- leaves that are not reached


def learned_loss(meta: Any, a: Tensor) -> Tensor:
    return meta["weight"] * a * 4


def test_a_leaf_that_first_order_does_not_reach_is_constant_for_it() -> None:
    meta = {"weight": scalar(1.0), "x": scalar(2.0)}
    problem = quadratic(learned_loss, lambda meta, a: a * meta["x"] ** 2)
    comparison = fm.compare(problem, meta, NOTHING, steps=1)
    exact, first = comparison.rows
    assert exact.unreached == ()
    assert first.unreached == ("meta['weight']",)
    assert first.worst_leaf == ("meta['weight']", 0.0)
    assert first.norm_ratio == pytest.approx(12 / math.sqrt(12**2 + 16**2))  # exact: (-16, -12)
    assert "'first order' gives no gradient to meta['weight']" in str(comparison)


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=str)
def test_first_order_may_reach_nothing_at_all(memory: Any) -> None:
    problem = quadratic(learned_loss, lambda meta, a: 3 * a)
    estimators = {"exact": fm.Reverse(), "first order": (fm.FirstOrder(), memory)}
    exact, first = fm.compare(problem, {"weight": scalar(1.0)}, NOTHING, steps=2, estimators=estimators).rows
    assert exact.fd_error < 1e-7
    assert first.unreached == ("meta['weight']",)
    assert (first.cosine, first.norm_ratio, first.relative_error) == (0.0, 0.0, 1.0)


def test_a_leaf_that_is_used_late_is_no_error() -> None:
    """The second step alone uses y, so after one step no gradient reaches it."""

    def step(meta: Any, a: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        loss, slope = fm.value_and_grad(lambda a: a * meta[batch] ** 2)(a)
        return a - slope, fm.StepInfo(loss)

    task = fm.Task(lambda index: "xy"[index], None)
    problem = quadratic(outer=by_leaf)._replace(step=step, meta_loss=lambda meta, a, query, seed: a * 5)
    rows = fm.compare(problem, {"x": scalar(1.0), "y": scalar(2.0)}, task, steps=2).leaves
    late = [row for row in rows if row.leaf == "meta['y']" and row.name == "second order"]
    assert math.isnan(late[0].cosine)
    assert late[1].cosine == 1.0


def test_the_reference_must_reach_every_leaf() -> None:
    meta = {"weight": scalar(1.0), "x": scalar(2.0)}
    problem = quadratic(learned_loss, lambda meta, a: a * meta["x"] ** 2)
    with pytest.raises(fm.UnreachedLeafError, match=re.escape("No gradient reaches meta['weight']")):
        fm.compare(problem, meta, NOTHING, steps=1, reference="first order")


def test_a_detached_reference_is_an_error() -> None:
    problem = quadratic(outer=lambda meta, a: a.detach() * meta.detach() ** 2)
    with pytest.raises(fm.DetachedError, match="The meta-loss does not depend on meta"):
        fm.compare(problem, scalar(), NOTHING, steps=1)


def test_a_graph_that_is_cut_by_compilation_is_not_taken_for_an_unreached_leaf() -> None:
    torch._dynamo.reset()
    inner = torch.compile(lambda meta, a: a * meta**2 + a**2 * meta, backend="aot_eager")
    estimators = {"first order": fm.FirstOrder(), "exact": fm.Reverse()}
    with pytest.raises(fm.DetachedError, match=r"compiled by torch\.compile"):
        fm.compare(quadratic(inner), scalar(), NOTHING, steps=1, estimators=estimators)


def test_the_seed_is_that_of_the_unroll() -> None:
    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        return (predict(batch) ** 2).mean()

    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)).double()
    problem = fm.inner_problem(net, loss, optimizer=fm.optim.sgd(0.1))
    meta, x = {"params": fm.init_params(net)}, torch.ones(4, 8, dtype=torch.float64)
    for seed in (3, 4):
        comparison = fm.compare(problem, meta, fm.Task(x, x), steps=2, seed=seed)
        expected = fm.unroll(problem, meta, fm.Task(x, x), steps=2, seed=seed).loss.item()
        assert [row.loss for row in comparison.rows] == [expected, expected]
        assert comparison.rows[0].fd_error < 1e-6


# ---- what is not touched


def test_meta_is_left_alone_and_grad_mode_does_not_matter() -> None:
    problem, meta, task = net_problem()
    meta["lr"].grad = torch.tensor(7.0, dtype=torch.float64)
    before = {name: leaf.detach().clone() for name, leaf in meta["params"].items()}
    usual = fm.compare(problem, meta, task, steps=2)
    with torch.no_grad():
        same = fm.compare(problem, meta, task, steps=2)
    assert [row.cosine for row in same.rows] == [row.cosine for row in usual.rows]
    assert meta["lr"].grad == 7.0
    assert all(leaf.grad is None and leaf.requires_grad for leaf in meta["params"].values())
    assert all(torch.equal(leaf, before[name]) for name, leaf in meta["params"].items())


def test_constant_leaves_of_meta_stay_constant() -> None:
    problem, meta, task = net_problem()
    meta["lr"].requires_grad_(False)
    assert "meta['lr']" not in {row.leaf for row in fm.compare(problem, meta, task, steps=1).leaves}


# ---- cost


def test_evaluations_and_memory_of_the_policies() -> None:
    problem, meta, task = net_problem()
    estimators = {"all": fm.Reverse(), "segments": (fm.Reverse(), fm.Segments(5))}
    everything, segments = fm.compare(problem, meta, task, steps=25, estimators=estimators).rows
    assert everything.evaluations == 25 + 1
    assert segments.evaluations == 2 * 25 - 5 + 1
    assert segments.peak_bytes < 0.5 * everything.peak_bytes
    assert segments.relative_error < 1e-12


def test_live_bytes_of_known_tensors() -> None:
    outside = torch.ones(10_000)

    def run() -> None:
        a = torch.empty(1000)  # 4000
        b = torch.empty(2000)  # 12000
        del a  # 8000
        c = torch.ones(500)  # 10000
        views = b.view(-1)[:3], c.add_(1), outside[:7], outside.mul_(1)  # no more
        del views
        torch.empty(100, dtype=torch.float64)  # 10800

    with LiveBytes() as live:
        run()
    assert live.peak == 12_000
    assert live.live == 0
    assert peak_bytes(run, CPU) == 12_000


def test_live_bytes_of_a_graph() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        y = x.sin().sin().sin()  # keeps both arguments beside the result: 3 x 4000
        del y

    assert peak_bytes(run, CPU) == 12_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_bytes_on_a_gpu() -> None:
    device = torch.device("cuda")
    kept = torch.empty(1 << 20, device=device)
    found = peak_bytes(lambda: torch.empty(1 << 20, device=device).sin(), device)
    assert found == 2 * kept.nbytes


def test_runs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    seconds = median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU)
    assert "".join(calls) == "ab" * measure.MOST
    assert seconds.keys() == {"a", "b"}
    calls.clear()
    monkeypatch.setattr(measure, "ENOUGH_SECONDS", 0.0)
    median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU)
    assert "".join(calls) == "ab" * measure.FEWEST


# ---- what is shown


def test_the_table_is_aligned_and_says_everything() -> None:
    text = str(toy(steps=2))
    lines = text.splitlines()
    assert lines[0] == "Meta-gradients after 2 inner steps, float64 on cpu, against 'second order'."
    assert lines[1].startswith("Finite differences: 3 random directions, themselves uncertain by ")
    assert lines[3].split() == ["second", "order", "first", "order"]
    assert len({len(line) for line in lines[3:]}) == 1
    assert "norm ratio                1.0000       0.4667" in lines
    assert "1 inner step," in str(toy(directions=1))
    assert "1 random direction," in str(toy(directions=1))


def test_the_table_of_odd_numbers() -> None:
    row = Row("odd", 123456.0, math.nan, math.inf, 0.5, ("", math.nan), math.nan, 2.5, 3_210_000_000, 6)
    texts = [line.split()[-1] for line in table([row])]
    assert texts == ["odd", "1.23e+05", "-", "-", "0.5000", "-", "-", "-", "s", "GB", "6"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (2e-6, "2.00 µs"), (0, "0.00 µs")]
)
def test_time_has_a_unit(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1234, "1.23 kB"), (56_700_000, "56.7 MB"), (0, "0 B")])
def test_bytes_have_a_unit(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_leaves_are_called_by_their_last_key() -> None:
    assert leaf_label("meta['params']['0.weight']") == "0.weight"
    assert leaf_label("meta[1].lr") == ["1].lr"][-1]
    assert leaf_label("meta") == "all of meta"
    assert leaf_label("") == ""


def test_the_dict_is_json() -> None:
    comparison = toy()
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert content["rows"][1]["name"] == "first order"
    assert content["rows"][1]["worst_leaf"] == ["meta", 1.0]
    assert content["leaves"][1]["norm_ratio"] == pytest.approx(12 / 28)
    assert (content["steps"], content["directions"], content["dtype"], content["device"]) == (1, 3, "float64", "cpu")
    odd = comparison.rows[0]._replace(cosine=math.nan, norm_ratio=math.inf)
    rows = Comparison((odd,), (), "second order", 1, 3, 0.0, 0, "float64", "cpu").to_dict()["rows"]
    assert (rows[0]["cosine"], rows[0]["norm_ratio"]) == (None, None)


PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize(
    "estimators",
    [
        None,
        {"only": fm.Reverse()},
        {"exact": fm.Reverse(), "first order": fm.FirstOrder(), "segments": (fm.Reverse(), fm.Segments())},
    ],
    ids=["two", "one", "three"],
)
def test_a_picture_is_drawn(estimators: Any, tmp_path: Path) -> None:
    problem, meta, task = net_problem()
    fm.compare(problem, meta, task, steps=2, estimators=estimators).plot(tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(PNG)
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_sizes_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    leaves = [LeafRow(name, "meta", 1, steps, 1.0, 10.0**-steps) for name in ("a", "b") for steps in (1, 2, 3)]
    axes = figure(4, 3).subplots(1, 2)
    draw_agreement(axes, leaves, "a")
    assert [axis.get_yscale() for axis in axes] == ["linear", "log"]
    toy().plot(tmp_path / "picture.svg")
    assert b"<svg" in (tmp_path / "picture.svg").read_bytes()


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    comparison = toy()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fm.MissingExtraError, match=re.escape('pip install ".[demo]" in a checkout')):
        comparison.plot(tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with written(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with written(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# ---- bad inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a positive integer. Pass e.g. steps=3."),
        ({"steps": True}, "steps is True, expected a positive integer"),
        ({"directions": 0}, "directions is 0, expected a positive integer"),
        ({"directions": 2.0}, "directions is 2.0, expected a positive integer"),
        ({"seed": -1}, "seed is -1, expected an integer from 0"),
        ({"estimators": {}}, "estimators is {}, expected a dict of at least one name and estimator. Pass e.g."),
        ({"estimators": [fm.Reverse()]}, "estimators is [Reverse()], expected a dict"),
        ({"estimators": {"exact": fm.Reverse}}, "estimators['exact'] is <class"),
        ({"estimators": {"exact": (fm.Reverse(), fm.Reverse())}}, "or a pair of estimator and memory policy"),
        ({"estimators": {"exact": (fm.Reverse(),)}}, "Pass e.g. Reverse() or (Reverse(), Segments())."),
        ({"estimators": {0: fm.Reverse()}}, "estimators[0] is Reverse(), expected a name and an estimator"),
        ({"reference": "third"}, "reference is 'third', expected one of the estimators' names: second order, first"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=re.escape(message)):
        toy(**options)


def test_meta_without_anything_learned() -> None:
    with pytest.raises(fm.ArgumentError, match=r"No leaf of meta requires grad.*Call requires_grad_\(\)"):
        fm.compare(quadratic(), torch.tensor(2.0, dtype=torch.float64), NOTHING, steps=1)


def test_meta_with_a_number() -> None:
    with pytest.raises(fm.StructureError, match=re.escape("meta['lr'] is 0.1 (float), expected a tensor")):
        fm.compare(quadratic(), {"x": scalar(), "lr": 0.1}, NOTHING, steps=1)
