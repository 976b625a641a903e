"""The one inner gradient: its value, its graph, and where it runs."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmeta as fm
from funcmeta._gradient import constant, steered
from funcmeta.testing import finite_difference


def loss(params: Any, scale: Any = 1.0) -> Tensor:
    return scale * (torch.sin(params["w"]).sum() * params["b"][0] ** 3).square()


def point(requires_grad: bool = False) -> dict[str, Any]:
    params = {"w": torch.randn(3).double(), "b": [torch.tensor(0.7).double()]}
    return fm.tree.map(lambda leaf: leaf.requires_grad_(requires_grad), params)  # type: ignore[no-any-return]


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- values


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_value_and_gradient_are_those_of_torch_func(grad_mode: bool, requires_grad: bool) -> None:
    params = point(requires_grad)
    with torch.set_grad_enabled(grad_mode):
        value, grads = fm.value_and_grad(loss)(params, scale=2.0)
    expected, expected_value = torch.func.grad_and_value(loss)(params, scale=2.0)
    close(value, expected_value)
    close(grads, expected)
    attached = grad_mode and requires_grad
    assert value.requires_grad == attached
    assert all(leaf.requires_grad == attached for leaf in fm.tree.leaves(grads))


def test_a_single_tensor_is_a_tree() -> None:
    value, slope = fm.value_and_grad(lambda w: w**3)(torch.tensor(2.0))
    assert (float(value), float(slope)) == (8.0, 12.0)


def test_an_unused_parameter_gets_zeros() -> None:
    params = {"w": torch.ones(2, requires_grad=True), "unused": torch.ones(3, requires_grad=True)}
    square = fm.value_and_grad(lambda p: (p["w"] ** 2).sum())
    assert square(params)[1]["unused"].tolist() == [0.0, 0.0, 0.0]
    assert torch.func.vmap(square)(fm.tree.map(lambda leaf: leaf[None], params))[1]["unused"].tolist() == [[0.0] * 3]


def test_the_arguments_stay_as_they_are() -> None:
    params = point()
    copies = fm.tree.map(torch.clone, params)
    fm.value_and_grad(loss)(params)
    close(params, copies)
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in fm.tree.leaves(params))


# ---- further output


def with_aux(params: Any) -> tuple[Tensor, Any]:
    return loss(params), {"square": params["w"] ** 2, "name": "run", "none": None, "count": [1, params["b"][0] * 2]}


def test_further_output_may_be_anything() -> None:
    params = point(requires_grad=True)
    (value, aux), grads = fm.value_and_grad(with_aux, has_aux=True)(params)
    close((value, grads), fm.value_and_grad(loss)(params))
    assert (aux["name"], aux["none"], aux["count"][0]) == ("run", None, 1)
    close(aux["square"], params["w"] ** 2)


def test_further_output_carries_its_derivative() -> None:
    params = point(requires_grad=True)
    (_, aux), _ = fm.value_and_grad(with_aux, has_aux=True)(params)
    close(torch.autograd.grad(aux["square"].sum(), params["w"])[0], 2 * params["w"])
    with torch.no_grad():
        (_, aux), _ = fm.value_and_grad(with_aux, has_aux=True)(params)
    assert not aux["square"].requires_grad


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_further_output_inside_torch_func(transform: str) -> None:
    params = point()
    seen: list[Any] = []

    def run(params: Any) -> Tensor:
        (value, aux), _ = fm.value_and_grad(with_aux, has_aux=True)(params)
        seen.append((aux["name"], aux["none"], aux["count"][0]))
        return value + aux["square"].sum()

    if transform == "vmap":
        result = torch.func.vmap(run)(fm.tree.map(lambda leaf: leaf[None], params))[0]
        close(result, run(params))
    elif transform == "grad":
        close(torch.func.grad(run)(params)["w"], torch.func.grad(loss)(params)["w"] + 2 * params["w"])
    else:
        ones = fm.tree.map(torch.ones_like, params)
        slope = fm.tree.dot(torch.func.grad(loss)(params), ones) + 2 * params["w"].sum()
        close(torch.func.jvp(run, (params,), (ones,))[1], slope)
    assert set(seen) == {("run", None, 1)}


# ---- a gradient is partial


def test_the_gradient_leaves_out_other_uses_of_the_same_tensor() -> None:
    """ℓ(w) = (w - c)² with c the tensor w itself: the gradient is 2 (w - c) = 0; its derivative by w is 2 - 2 = 0."""
    w = torch.tensor(3.0, requires_grad=True)
    _, slope = fm.value_and_grad(lambda p: (p - w) ** 2 + p * w)(w)
    assert float(slope.detach()) == 3.0
    assert float(torch.autograd.grad(slope, w)[0]) == 1.0
    with torch.no_grad():
        assert float(fm.value_and_grad(lambda p: (p - w) ** 2 + p * w)(w)[1]) == 3.0


def test_the_gradient_is_partial_where_parameters_are_those_of_meta() -> None:
    """A proximal term at step 0, where the parameters are meta's own tensors (iMAML's inner loss)."""
    target = torch.tensor([1.0, -2.0]).double()

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        value, slope = fm.value_and_grad(lambda w: ((w - target) ** 4).sum() + ((w - meta["w"]) ** 2).sum() * 3)(w)
        return w - 0.05 * slope, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, w, query, seed: (w**3).sum())
    task = fm.Task(torch.ones(1), None)

    def of(w: Tensor, **options: Any) -> Tensor:
        return fm.unroll(problem, {"w": w}, task, steps=3, **options).loss

    w = torch.tensor([0.5, 0.3]).double().requires_grad_()
    direction = torch.tensor([0.7, -1.1]).double()
    with torch.no_grad():
        expected = finite_difference(of, w, direction, order=4)
    for memory in (fm.StoreAll(), fm.Segments(1), fm.Segments(3)):
        got = torch.autograd.grad(of(w, memory=memory), w)[0] @ direction
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0.0)


# ---- the graph


def test_no_graph_is_kept_without_need() -> None:
    """Nothing outside requires grad: the graph of the loss is freed with the call."""
    kept: list[weakref.ref[Any]] = []

    def watched(params: Any) -> Tensor:
        saved = params["w"].exp()
        kept.append(weakref.ref(saved))
        return loss({**params, "w": saved})

    value, grads = fm.value_and_grad(watched)(point())
    gc.collect()
    assert kept[0]() is None
    assert not value.requires_grad
    assert not any(leaf.requires_grad for leaf in fm.tree.leaves(grads))


def test_a_graph_is_kept_when_something_else_requires_grad() -> None:
    scale = torch.tensor(2.0).double().requires_grad_()
    params = point()
    value, grads = fm.value_and_grad(loss)(params, scale)
    close(torch.autograd.grad(value, scale, retain_graph=True)[0], loss(params))
    close(torch.autograd.grad(grads["w"].sum(), scale)[0], torch.func.grad(loss)(params)["w"].sum())


def test_an_inner_gradient_inside_another_keeps_its_graph() -> None:
    """With g = d(p q²)/dq = 2 p q at q = 1.5, the outer loss (1 - g)² has the derivative -2 (1 - 3 p) 3."""
    q = torch.tensor(1.5)

    def outer(p: Tensor) -> Tensor:
        _, slope = fm.value_and_grad(lambda q: p * q**2)(q)
        return (1 - slope) ** 2

    for p in (torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)):
        value, slope = fm.value_and_grad(outer)(p)
        assert (float(value), float(slope)) == (25.0, 30.0)
        assert value.requires_grad == p.requires_grad
    assert float(torch.func.grad(outer)(torch.tensor(2.0))) == 30.0


def test_an_unroll_inside_a_gradient() -> None:
    """The outer gradient may be a value_and_grad of a whole unroll, whose meta then requires no grad before."""

    def step(meta: Tensor, a: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        value, slope = fm.value_and_grad(lambda a: a * meta**2)(a)
        return a - slope, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: torch.ones(()), step, lambda meta, a, query, seed: a * meta**2)
    task = fm.Task(torch.ones(1), None)
    _, slope = fm.value_and_grad(lambda x: fm.unroll(problem, x, task, steps=1).loss)(torch.tensor(2.0))
    assert float(slope) == -28.0


# ---- rules


def test_a_rule_holds_inside_the_block_only() -> None:
    params = point(requires_grad=True)
    with steered(constant):
        value, grads = fm.value_and_grad(loss)(params)
        with pytest.raises(ValueError, match="as asked"), steered(lambda objective, params: 1 / 0):
            raise ValueError("as asked")
        assert not fm.value_and_grad(loss)(params)[1]["w"].requires_grad
    assert value.requires_grad
    assert not grads["w"].requires_grad
    close(grads, fm.value_and_grad(loss)(params)[1])
    assert fm.value_and_grad(loss)(params)[1]["w"].requires_grad


# ---- inside torch.func and torch.compile


def second(params: Any) -> Tensor:
    """A function of the inner gradient, and so of second order."""
    _, grads = fm.value_and_grad(loss)(params)
    return fm.tree.norm(grads) ** 2


def test_inside_vmap() -> None:
    batch = {"w": torch.randn(4, 3).double(), "b": [torch.rand(4).double()]}
    values, grads = torch.func.vmap(fm.value_and_grad(loss))(batch)
    for index in range(4):
        one = fm.tree.map(lambda leaf, index=index: leaf[index], batch)
        value, slopes = fm.value_and_grad(loss)(one)
        close(values[index], value)
        close(fm.tree.map(lambda leaf, index=index: leaf[index], grads), slopes)


def test_inside_torch_func_grad_and_jvp() -> None:
    params, direction = point(), point()
    expected = finite_difference(second, params, direction, order=4)
    leaves = fm.tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    reverse = torch.autograd.grad(second(leaves), fm.tree.leaves(leaves))
    inside = torch.func.grad(second)(params)
    forward = torch.func.jvp(second, (params,), (direction,))[1]
    for slope in (fm.tree.dot(list(reverse), fm.tree.leaves(direction)), fm.tree.dot(inside, direction), forward):
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=0.0)


def test_inside_torch_compile() -> None:
    """A compiled step that takes its gradient inside is exact, though dynamo breaks the graph at the rule."""

    def step(w: Tensor, lr: Tensor) -> Tensor:
        _, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(w)
        return w - lr * slope

    compiled = torch.compile(step, backend="aot_eager")
    w, lr = torch.randn(3).double(), torch.tensor(0.3).double()
    for leaves in ((w, lr), (w.clone().requires_grad_(), lr.clone().requires_grad_())):
        close(compiled(*leaves), step(*leaves))
    got, expected = (torch.autograd.grad((run(*leaves) ** 3).sum(), leaves) for run in (compiled, step))
    close(got, expected)


# ---- refused


@pytest.mark.parametrize("where", ["plain", "vmap"])
def test_refused_losses(where: str) -> None:
    def run(fn: Any) -> Any:
        w = torch.ones(1, 2)
        return fm.value_and_grad(fn)(w[0]) if where == "plain" else torch.func.vmap(fm.value_and_grad(fn))(w)

    with pytest.raises(fm.DetachedError, match=r"does not depend on the parameters.*Compute it from the parameters"):
        run(lambda w: (w.detach() ** 2).sum())
    with pytest.raises(fm.DetachedError, match="under no_grad, or never used them"):
        run(lambda w: torch.zeros(()))
    with pytest.raises(fm.LossError, match=r"The inner loss has shape \[2\], expected \[\]. Reduce it"):
        run(lambda w: w**2)
    with pytest.raises(
        fm.LossError, match=r"The inner loss is a tuple, expected a 0-d tensor\. Return the loss itself"
    ):
        run(lambda w: ((w**2).sum(), None))
    with pytest.raises(fm.LossError, match=r"The inner loss is torch.int64, expected a floating-point tensor. Convert"):
        run(lambda w: w.sum().long())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"w": torch.ones(1), "n": torch.tensor([1])},
            r"params\['n'\] is int64\[1\] on cpu, expected a floating-point",
        ),
        ({"w": torch.ones(1), "n": 3.0}, r"params\['n'\] is 3.0 \(float\), expected a floating-point tensor. Keep"),
    ],
    ids=["integers", "a number"],
)
def test_refused_parameters(params: Any, message: str) -> None:
    with pytest.raises(fm.StructureError, match=message):
        fm.value_and_grad(lambda p: (p["w"] ** 2).sum())(params)


def test_a_parameter_that_only_the_meta_loss_uses_gets_a_plain_zero() -> None:
    """Two heads: the support trains one, the query judges both. The zero of the other one is no tensor of a graph."""
    heads = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    meta = {name: leaf.requires_grad_() for name, leaf in heads.items()}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, grads = fm.value_and_grad(lambda p: (p["a"].sin() ** 2).sum())(state)
        return {name: state[name] - 0.3 * grads[name] for name in state}, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: dict(meta), step, lambda m, s, q, seed: (s["a"] * s["b"]).sum())
    task = fm.Task(torch.zeros(1), None)
    for memory in (fm.StoreAll(), fm.Segments(1)):
        assert fm.testing.check_meta_grad(problem, meta, task, steps=3, memory=memory).worst.error < 1e-6


def test_a_loss_of_something_else_that_requires_grad_is_refused() -> None:
    """It requires grad, but not because of the parameters: training would stand still without a word."""
    other = torch.ones(2, requires_grad=True)
    with pytest.raises(fm.DetachedError, match="does not depend on the parameters"):
        fm.value_and_grad(lambda p: (other**2).sum())(torch.ones(2))


def test_a_gradient_inside_the_loss_is_part_of_its_value_under_every_estimator() -> None:
    def penalized(a: Tensor, x: Tensor) -> Tensor:
        loss, slope = fm.value_and_grad(lambda a: torch.cos(a * x))(a)
        return loss + slope**2

    def step(meta: Any, a: Tensor, x: Tensor, seed: int) -> Any:
        loss, slope = fm.value_and_grad(penalized)(a, x)
        return a - 0.1 * slope, fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta["a"], step, lambda meta, a, x, seed: torch.cos(a * x))
    meta = {"a": torch.tensor(1.0, dtype=torch.float64, requires_grad=True)}
    x = torch.tensor(2.0, dtype=torch.float64)
    exact, first = (
        fm.unroll(problem, meta, fm.Task(x, x), steps=3, estimator=each).loss
        for each in (fm.Reverse(), fm.FirstOrder())
    )
    assert exact.item() == first.item()
    gradients = [torch.autograd.grad(loss, meta["a"])[0].item() for loss in (exact, first)]
    assert abs(gradients[0] - gradients[1]) > 1e-3
    assert fm.testing.check_meta_grad(problem, meta, fm.Task(x, x), steps=3).worst.error < 1e-6


@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1), fm.Segments(2)])
def test_an_unroll_inside_an_inner_loss_keeps_its_derivatives(memory: Any) -> None:
    """The inner loss is the meta-loss of another training, whose learning rate is learned."""
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    start = torch.tensor(0.7, dtype=torch.float64)

    def inner_step(m: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: torch.sin(w * m["b"]))(w)
        return w - m["rate"] * slope, fm.StepInfo(loss)

    inner = fm.Problem(lambda m, t, s: m["b"] * 1.5, inner_step, lambda m, w, q, s: (w * m["b"]).cos())
    task = fm.Task(torch.zeros(1), None)

    def step(meta: Any, b: Tensor, batch: Any, seed: int) -> Any:
        def loss_of(b: Tensor) -> Tensor:
            return fm.unroll(inner, {"b": b, "rate": meta["rate"]}, task, steps=3, memory=memory).loss

        loss, slope = fm.value_and_grad(loss_of)(b)
        return b - 0.5 * slope, fm.StepInfo(loss)

    outer = fm.Problem(lambda meta, t, s: start, step, lambda meta, b, q, s: b**2)
    assert fm.testing.check_meta_grad(outer, {"rate": rate}, task, steps=2).worst.error < 1e-6
