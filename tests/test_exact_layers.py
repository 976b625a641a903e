"""Normalization by elementary operations: the numbers of torch, and right derivatives where those of torch are not."""

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import funcmeta as fm
from funcmeta._exact_layers import DualLayers, ExactLayers, exact_layers
from funcmeta.testing import finite_difference

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (3,), weight, bias)


LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "batch": (batch_norm, (5, 3)),
    "instance": (instance_norm, (2, 3, 4)),
    "layer": (layer_norm, (5, 3)),
}
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)


def exactly(layer: Layer) -> Layer:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with ExactLayers():
            return layer(x, weight, bias)

    return run


def scalar(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A loss none of whose derivatives by the weight and the bias vanishes."""
    return torch.tanh(layer(x, weight, bias)).pow(2).sum() + layer(x, weight, bias).pow(3).sum()


def arguments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape).double(), torch.rand(3).double() + 0.5, torch.randn(3).double()


# ---- the numbers of torch

MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (nn.BatchNorm1d, (6, 3)),
    "BatchNorm1d on sequences": (nn.BatchNorm1d, (4, 3, 5)),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 3, 2, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (2, 3, 2, 2, 2)),
    "InstanceNorm1d": (nn.InstanceNorm1d, (4, 3, 5)),
    "InstanceNorm2d": (nn.InstanceNorm2d, (4, 3, 2, 3)),
    "InstanceNorm3d": (nn.InstanceNorm3d, (2, 3, 2, 2, 2)),
}
OPTIONS: list[dict[str, Any]] = [
    {"momentum": None},
    *[
        {"affine": affine, "track_running_stats": track, "momentum": momentum, "eps": eps}
        for affine, track, (momentum, eps) in itertools.product((True, False), (True, False), [(0.1, 1e-5), (0.7, 0.1)])
    ],
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_values_and_statistics_are_those_of_torch(name: str, options: dict[str, Any], train: bool) -> None:
    build, shape = MODULES[name]
    layer = build(3, **options).double().train(train)
    for tensor in layer.parameters():
        nn.init.normal_(tensor)
    ours = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(shape).double() * 3 + 1
        with ExactLayers():
            got = ours(x)
        torch.testing.assert_close(got, layer(x), rtol=1e-10, atol=1e-12)
    for key, statistic in layer.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), statistic, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_layer_normalization_is_that_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = nn.LayerNorm(shape, **options).double()
    for tensor in layer.parameters():
        nn.init.normal_(tensor)
    x = torch.randn(4, *shape).double() * 3 + 1
    with ExactLayers():
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_normalization_is_that_of_torch(dim: int | None) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double(), dim=dim)
    nn.init.uniform_(layer.parametrizations.weight.original0, 0.5, 2.0)
    x = torch.randn(5, 3).double()
    with ExactLayers():
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=1e-12, atol=1e-12)


REFUSED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "batch norm of one image with one pixel": ((1, 3, 1, 1), lambda x: F.batch_norm(x, None, None, training=True)),
    "batch norm with one weight": ((5, 3), lambda x: F.batch_norm(x, None, None, x.new_ones(1), training=True)),
    "batch norm with one bias": ((5, 3), lambda x: F.batch_norm(x, None, None, None, x.new_ones(1), training=True)),
    "batch norm with other statistics": (
        (5, 3),
        lambda x: F.batch_norm(x, torch.ones(1), torch.ones(1), training=True),
    ),
    "batch norm with a weight in float32": (
        (5, 3),
        lambda x: F.batch_norm(x, None, None, torch.ones(3), training=True),
    ),
    "batch norm without eps": ((5, 3), lambda x: F.batch_norm(x, None, None, training=True, eps=0.0)),
    "torch's batch norm with one weight": (
        (5, 3),
        lambda x: torch.batch_norm(x, x.new_ones(1), None, None, None, True, 0.1, 1e-5, False),
    ),
    "instance norm of one pixel": ((4, 3, 1, 1), lambda x: F.instance_norm(x)),
    "instance norm of rows": ((4, 3), lambda x: F.instance_norm(x)),
    "instance norm with one weight": ((4, 3, 5), lambda x: F.instance_norm(x, weight=x.new_ones(1))),
    "layer norm of another width": ((4, 6), lambda x: F.layer_norm(x, (2,))),
    "layer norm of too many dimensions": ((4, 6), lambda x: F.layer_norm(x, (5, 4, 6))),
    "layer norm of nothing": ((4, 6), lambda x: F.layer_norm(x, ())),
    "layer norm with one weight": ((4, 6), lambda x: F.layer_norm(x, (6,), x.new_ones(1))),
    "layer norm with a flat weight": ((4, 2, 3), lambda x: F.layer_norm(x, (2, 3), x.new_ones(6))),
    "layer norm with a bias in float32": ((4, 6), lambda x: F.layer_norm(x, (6,), None, torch.ones(6))),
    "group norm that does not divide": ((4, 3, 2), lambda x: F.group_norm(x, 2)),
    "group norm of one value": ((1, 3), lambda x: F.group_norm(x, 3)),
    "group norm of vectors": ((4,), lambda x: F.group_norm(x, 2)),
    "group norm with one weight": ((4, 6), lambda x: F.group_norm(x, 2, x.new_ones(1))),
    "mse by an unknown reduction": ((4, 1), lambda x: F.mse_loss(x, x + 1, reduction="average")),
    "huber by an unknown reduction": ((4, 1), lambda x: F.huber_loss(x, x + 1, reduction="average")),
    "huber without width": ((4, 1), lambda x: F.huber_loss(x, x + 1, delta=0.0)),
}


@pytest.mark.parametrize("batched", [False, True], ids=["plain", "vmap"])
@pytest.mark.parametrize(("shape", "layer"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused_by_its_own_error(
    shape: tuple[int, ...], layer: Callable[[Tensor], Any], batched: bool
) -> None:
    x = torch.randn(shape).double()
    with pytest.raises((ValueError, RuntimeError)) as by_torch:
        layer(x)
    message = re.escape(str(by_torch.value).split(", but got ")[0])
    with pytest.raises(by_torch.type, match=message), ExactLayers(), DualLayers():
        torch.func.vmap(layer)(torch.stack([x, x])) if batched else layer(x)


def test_what_torch_accepts_is_accepted() -> None:
    """torch.batch_norm itself takes one example, F.batch_norm no rows, and a weight of as many numbers."""
    taken: dict[Callable[[Tensor], Tensor], tuple[int, ...]] = {
        (lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)): (1, 3),
        (lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False)): (4, 3),
        (lambda x: F.batch_norm(x, None, None, training=True)): (0, 3),
        (lambda x: F.batch_norm(x, None, None, x.new_full((1, 3), 2.0), training=True)): (5, 3),
        (lambda x: F.group_norm(x, 3)): (0, 3),
    }
    for layer, shape in taken.items():
        x = torch.randn(shape).double()
        with ExactLayers(), DualLayers():
            got = layer(x)
        torch.testing.assert_close(got, layer(x))


def test_a_loss_that_broadcasts_warns_as_in_torch() -> None:
    x, y = torch.randn(4, 1), torch.randn(4)
    for loss in (F.mse_loss, F.huber_loss):
        with pytest.warns(UserWarning, match="target size"), DualLayers():
            loss(x, y)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_a_layer_of_another_width_does_not_train(strategy: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(1, track_running_stats=False), nn.Linear(4, 1))
    problem = fm.inner_problem(net, lambda meta, predict, x: predict(x).square().mean(), optimizer=fm.optim.sgd(0.1))
    tasks = fm.Task(torch.randn(3, 5, 2), torch.randn(3, 5, 2))
    with pytest.raises(RuntimeError, match="weight should contain 4 elements not 1"):
        fm.unroll_batch(problem, {"params": fm.init_params(net)}, tasks, steps=1, strategy=strategy)


@layers
def test_the_first_derivative_is_that_of_torch(layer: Layer, shape: tuple[int, ...]) -> None:
    inputs = [each.requires_grad_() for each in arguments(shape)]
    ours = torch.autograd.grad(scalar(exactly(layer), *inputs), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(scalar(layer, *inputs), inputs), rtol=1e-9, atol=1e-10)


def test_outside_the_mode_torch_is_as_it_was() -> None:
    with ExactLayers():
        pass
    inputs = [each.requires_grad_() for each in arguments((5, 3))]
    assert "NativeBatchNorm" in type(batch_norm(*inputs).grad_fn).__name__
    assert "NativeBatchNorm" not in type(exactly(batch_norm)(*inputs).grad_fn).__name__


# ---- derivatives


@layers
def test_second_derivatives_equal_finite_differences(layer: Layer, shape: tuple[int, ...]) -> None:
    inputs = [each.requires_grad_() for each in arguments(shape)]
    assert gradcheck(exactly(layer), inputs)
    assert gradgradcheck(exactly(layer), inputs)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_derivatives_of_weight_normalization_equal_finite_differences(dim: int) -> None:
    def layer(v: Tensor, g: Tensor) -> Tensor:
        with ExactLayers():
            return torch._weight_norm(v, g, dim)

    shape = {0: (4, 1), 1: (1, 3), -1: ()}[dim]
    inputs = torch.randn(4, 3).double().requires_grad_(), (torch.rand(shape).double() + 0.5).requires_grad_()
    assert gradcheck(layer, inputs)
    assert gradgradcheck(layer, inputs)


def curvature(layer: Layer, inputs: Any, along: Any) -> Any:
    """The derivative of the gradient along a direction, with its graph."""
    first = torch.autograd.grad(scalar(layer, *inputs), inputs, create_graph=True)
    return torch.autograd.grad(fm.tree.dot(list(first), list(along)), inputs, create_graph=True)


def third_derivative_error(layer: Layer, shape: tuple[int, ...]) -> float:
    """Relative error of a third derivative along random directions against differences of (right) second ones."""
    inputs = [each.requires_grad_() for each in arguments(shape)]
    along, across, again = ([torch.randn_like(each) for each in inputs] for _ in range(3))
    third = torch.autograd.grad(fm.tree.dot(list(curvature(layer, inputs, along)), across), inputs)
    computed = float(fm.tree.dot(list(third), again))

    def second(at: list[Tensor]) -> Tensor:
        leaves = [each.detach().requires_grad_() for each in at]
        return fm.tree.dot(list(curvature(exactly(layer), leaves, along)), across)

    expected = float(finite_difference(second, inputs, again, order=4))
    return abs(computed - expected) / abs(expected)


@layers
def test_third_derivatives_equal_finite_differences(layer: Layer, shape: tuple[int, ...]) -> None:
    assert third_derivative_error(exactly(layer), shape) < 1e-7


def batched_curvature(layer: Layer, shape: tuple[int, ...], strategy: str) -> list[Tensor]:
    """Hessian-vector products of three tasks, each with its own input, weight and bias: torch.autograd over vmap."""
    with fm.rng.forked(0):
        tasks = [arguments(shape) for _ in range(3)]
    inputs = [torch.stack(column).requires_grad_() for column in zip(*tasks, strict=True)]
    gradient = torch.func.grad(lambda *each: scalar(layer, *each), argnums=(0, 1, 2))
    if strategy == "vmap":
        first = list(torch.func.vmap(gradient)(*inputs))
    else:
        first = [
            torch.stack(column) for column in zip(*[gradient(*task) for task in zip(*inputs, strict=True)], strict=True)
        ]
    along = [torch.linspace(-1, 1, each.numel()).reshape(each.shape).double() for each in inputs]
    return list(torch.autograd.grad(fm.tree.dot(first, along), inputs))


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@layers
def test_batched_second_derivatives_are_those_of_a_loop(layer: Layer, shape: tuple[int, ...]) -> None:
    loop = batched_curvature(exactly(layer), shape, "loop")
    assert worst_error(batched_curvature(exactly(layer), shape, "vmap"), loop) < 1e-11
    torch.testing.assert_close(loop, batched_curvature(layer, shape, "loop"), rtol=1e-8, atol=1e-9)


# ---- where torch itself is wrong


def weight_norm_is_right() -> bool:
    inputs = torch.randn(4, 3).double().requires_grad_(), torch.rand(4, 1).double().requires_grad_()
    return gradgradcheck(torch._weight_norm, inputs, raise_exception=False)


def vmap_is_right(name: str) -> bool:
    layer, shape = LAYERS[name]
    loop = batched_curvature(exactly(layer), shape, "loop")
    return worst_error(batched_curvature(layer, shape, "vmap"), loop) < 1e-6


def third_is_right(name: str) -> bool:
    return third_derivative_error(*LAYERS[name]) < 1e-5


@pytest.mark.parametrize(
    "is_right",
    [
        weight_norm_is_right,
        *[pytest.param(lambda name=name: vmap_is_right(name), id=f"{name} norm under vmap") for name in LAYERS],
        *[pytest.param(lambda name=name: third_is_right(name), id=f"{name} norm, third") for name in LAYERS],
    ],
)
def test_the_fused_kernels_of_torch_are_wrong(is_right: Callable[[], bool]) -> None:
    """Why the detours exist: no error, wrong numbers. Should torch get one right, the test is skipped and says so."""
    if is_right():
        pytest.skip(f"torch {torch.__version__} gets this right: its detour in funcmeta._exact_layers could go")


NATIVE: dict[str, Any] = {
    "layer_norm": lambda x, w, b: torch.layer_norm(x, (4,), w, b),
    "batch_norm": lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    "instance_norm": lambda x, w, b: torch.instance_norm(x[None], w, b, None, None, True, 0.1, 1e-5, False)[0],
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_step_of_ones_own_gets_exact_layers_too(name: str) -> None:
    """Neither a FunctionalModel nor torch.nn.functional is needed: vmap equals a loop, and finite differences."""
    meta = {
        "mix": torch.randn(4, 4, dtype=torch.float64).requires_grad_(),
        "weight": (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_(),
        "bias": torch.randn(4, dtype=torch.float64).requires_grad_(),
    }

    def loss(p: Any, x: Tensor) -> Tensor:
        made = x @ p["mix"]
        made = made if name != "instance_norm" else made.T
        out = NATIVE[name](made, p["weight"], p["bias"])
        return out.tanh().pow(3).sum()

    def step(meta: Any, p: Any, x: Tensor, seed: int) -> Any:
        value, grads = fm.value_and_grad(loss)(p, x)
        return {key: p[key] - 0.1 * grads[key] for key in p}, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: dict(meta), step, lambda meta, p, x, seed: loss(p, x))
    tasks = fm.Task(torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64))
    for strategy in ("vmap", "loop"):
        check = fm.testing.check_meta_grad(problem, meta, tasks, steps=2, strategy=strategy)
        assert check.worst.error < 1e-6


# ---- wherever the block is entered


def fused(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def third_derivative(norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of a Hessian-vector product of a batch normalization, in fixed directions."""
    with fm.rng.forked(0):
        x, *along = torch.randn(3, 6, 2).double()
    slope = x.requires_grad_()
    result = norm(slope).pow(3).sum()
    for direction in along:
        (first,) = torch.autograd.grad(result, slope, create_graph=True)
        result = (first * direction).sum()
    return torch.autograd.grad(result, slope)[0]


class Handled(torch.overrides.TorchFunctionMode):
    """Does something in the place of torch.sin, while no other mode is in force."""

    def __init__(self, instead: Callable[[], Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.instead() if func is torch.sin else func(*args, **(kwargs or {}))


def test_the_block_is_in_force_where_modes_are_off() -> None:
    def within() -> Tensor:
        with exact_layers():
            return third_derivative(fused)

    expected = third_derivative(lambda x: (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5))
    torch.testing.assert_close(within(), expected)
    with exact_layers(), torch._C.DisableTorchFunction():
        torch.testing.assert_close(within(), expected)
    with Handled(within), exact_layers():
        torch.testing.assert_close(torch.sin(torch.ones(1)), expected)


def test_torch_is_still_wrong_there() -> None:
    expected = third_derivative(lambda x: (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5))
    assert float((third_derivative(fused) - expected).abs().max()) > 1e-3


# ---- layers with a second derivative in forward mode

DUAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        f"{name} {reduction}": lambda x, y, loss=loss, options=options, reduction=reduction: loss(
            x, y, reduction=reduction, **options
        )
        for name, loss, options in (
            ("mse", F.mse_loss, {}),
            ("huber", F.huber_loss, {}),
            ("huber, wide", F.huber_loss, {"delta": 2.5}),
            ("huber, narrow", F.huber_loss, {"delta": 0.2}),
        )
        for reduction in ("mean", "sum", "none")
    },
    "mse, broadcast": lambda x, y: F.mse_loss(x, y[:1].expand_as(x)),
    "mse, weighted": lambda x, y: F.mse_loss(x, y, weight=y.square()),
    "huber, weighted": lambda x, y: F.huber_loss(x, y, weight=y.square()),
    "mse, the old arguments": lambda x, y: F.mse_loss(x, y, False, False, "sum"),
    "group norm": lambda x, y: F.group_norm(x, 2, y[0], y[1]),
    "group norm without weights": lambda x, y: F.group_norm(x, 4),
    "group norm with a large eps": lambda x, y: F.group_norm(x, 1, y[0], None, eps=0.3),
    "group norm of images": lambda x, y: F.group_norm(x.reshape(2, 4, 2, 1), 2, y[0], y[1]),
    "silu": lambda x, y: F.silu(x * y),
    "mish": lambda x, y: F.mish(x * y),
    "silu in place": lambda x, y: F.silu(x * y, inplace=True),
    "mish in place": lambda x, y: F.mish(x * y, inplace=True),
}


def derivatives(layer: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Value, gradient, and the derivative of the gradient along a direction."""
    with fm.rng.forked(6):
        x, y, along = (torch.randn(4, 4).double().requires_grad_() for _ in range(3))
    value = layer(x, y)
    first = torch.autograd.grad(value.sin().sum(), (x, y), create_graph=True, materialize_grads=True)
    second = torch.autograd.grad((first[0] * along).sum() + (first[1] * along).sum(), (x, y), materialize_grads=True)
    return value, *first, *second


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", DUAL)
def test_dual_layers_are_those_of_torch(name: str) -> None:
    with DualLayers():
        ours = derivatives(DUAL[name])
    torch.testing.assert_close(ours, derivatives(DUAL[name]), rtol=1e-10, atol=1e-12)


NOT_DUAL = ("in place", "weighted", "arguments")


@pytest.mark.parametrize("name", [name for name in DUAL if not name.endswith(NOT_DUAL)])
def test_dual_layers_have_a_second_derivative_in_forward_mode(name: str) -> None:
    with fm.rng.forked(6):
        x, y, along = (torch.randn(4, 4).double() for _ in range(3))

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: DUAL[name](x, y).sin().sum())(x)

    expected = torch.func.vjp(gradient, x)[1](along)[0]
    with DualLayers():
        got = torch.func.jvp(gradient, (x,), (along,))[1]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_room_for_the_sums(dtype: torch.dtype) -> None:
    with fm.rng.forked(7):
        x = 5 * torch.randn(2, 4096)
    with exact_layers():
        got = F.layer_norm(x.to(dtype), (4096,))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), F.layer_norm(x, (4096,)), rtol=0.0, atol=0.05)


# ---- draws

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x * 1.0, 0.5, True, True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "gumbel": lambda x: F.gumbel_softmax(x, 0.5, False, 1e-10, 0),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x * torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x.detach(), 0.5)),
    "method": lambda x: x * torch.full_like(x.detach(), 0.5).bernoulli(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_do_not_depend_on_how_a_tensor_lies(draw: str) -> None:
    net = nn.Linear(6, 6).double()
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: DRAWS[draw](predict(batch).transpose(0, 1)).square().mean(),
        optimizer=lambda meta: fm.optim.sgd(meta),
    )
    x = torch.randn(6, 6, dtype=torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    ways = {
        "reverse": (problem, fm.Reverse()),
        "forward": (problem, fm.ForwardMode()),
        "mixed": (problem, fm.MixedMode()),
    }
    if draw not in ("bernoulli", "method"):  # compile refuses these: torch records them as other draws
        ways["compiled"] = (fm.compile(problem, backend="aten"), fm.Reverse())
    losses = {
        name: fm.unroll(made, rate, fm.Task(x, x), steps=2, estimator=estimator, seed=3).loss.item()
        for name, (made, estimator) in ways.items()
    }
    assert max(losses.values()) - min(losses.values()) < 1e-12


def test_dropout_in_place_writes_to_a_tensor_that_is_not_contiguous() -> None:
    x = torch.ones(4, 6).transpose(0, 1)
    with ExactLayers():
        out = F.dropout(x, 0.5, True, True)
    assert out is x
    assert set(x.unique().tolist()) == {0.0, 2.0}
