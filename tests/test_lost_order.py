"""Backward passes that torch differentiates only in part are refused; right ones and linear ones are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcmeta as fm

pytestmark = pytest.mark.filterwarnings("ignore::funcmeta.FallbackWarning")

Saved = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def function(forward: Callable[[Tensor], Tensor], backward: Callable[..., Any], saved: Saved) -> Any:
    """An autograd.Function of one tensor; ``saved`` gets input and output, ``backward`` cotangent and saved tensors."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = forward(x)
            ctx.save_for_backward(*saved(x, y))
            return y

        @staticmethod
        def backward(ctx: Any, by: Tensor) -> Any:
            return backward(by, *ctx.saved_tensors)

    return Made.apply


def given(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x,)


class Recomputed(torch.autograd.Function):
    """A checkpoint of one's own, whose backward takes a gradient."""

    @staticmethod
    def forward(ctx: Any, run: Any, create_graph: bool, x: Tensor) -> Tensor:
        ctx.run, ctx.create_graph = run, create_graph
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.view_as(x)
            out = ctx.run(x)
        return None, None, torch.autograd.grad(out, x, by, create_graph=ctx.create_graph)[0]


class Scaled(torch.autograd.Function):
    """x · s, whose gradient with respect to x reads a copy of s that forward made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.copied = s * 2
        ctx.save_for_backward(x)
        return x * s * 2

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return by * ctx.copied, 2 * (by * x).sum()


class Several(torch.autograd.Function):
    """Two outputs, one of integers, further arguments, and no cotangents made of nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int, index: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.power, place = power, x.argmax()
        ctx.mark_non_differentiable(place)
        return x * 3, x**power, place

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None, _: Any) -> Any:
        (x,) = ctx.saved_tensors
        found = None if second is None else second * ctx.power * x ** (ctx.power - 1)
        return found if first is None else first * 3 + (0 if found is None else found), None, None


class Written(torch.autograd.Function):
    """exp in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.exp_())
        return x

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return by * ctx.saved_tensors[0]  # type: ignore[no-any-return]


@torch.library.custom_op("funcmeta_tests::gaussian", mutates_args=())
def gaussian(x: Tensor, width: float) -> Tensor:
    return (-width * x * x).exp()


@torch.library.custom_op("funcmeta_tests::stored", mutates_args=())
def stored(x: Tensor) -> tuple[Tensor, Tensor]:
    """sin(x), and its slope for the backward pass."""
    return x.sin(), x.cos()


def _keep_both(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.width = inputs[1]


def _keep_slope(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1].detach())


gaussian.register_autograd(
    lambda ctx, by: (-2 * ctx.width * by * ctx.saved_tensors[0] * ctx.saved_tensors[1], None),
    setup_context=_keep_both,
)
stored.register_autograd(lambda ctx, by, _: by * ctx.saved_tensors[0], setup_context=_keep_slope)

RIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of its input": lambda x, s: function(torch.sin, lambda by, x: by * x.cos(), given)(x),
    "of its output": lambda x, s: function(torch.tanh, lambda by, y: by * (1 - y * y), lambda x, y: (y,))(x),
    "an intermediate beside": lambda x, s: function(
        torch.sin, lambda by, x, _: by * x.cos(), lambda x, y: (x, x.cos())
    )(x),
    "recomputed": lambda x, s: Recomputed.apply(lambda t: t.sin() * t, True, x),
    "several": lambda x, s: sum(Several.apply(x, 2, torch.arange(3))[:2]),
    "in place": lambda x, s: Written.apply(x * 0.3),
    "a custom operator": lambda x, s: gaussian(x, 0.5),
    "torch's checkpoint": lambda x, s: checkpoint(lambda t: t.sin() * s, x, use_reentrant=False),
    "a mask": lambda x, s: function(torch.relu, lambda by, m: by * m, lambda x, y: ((x > 0).to(x),))(x - 0.1),
}
OWN_RULE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reversed": lambda x, s: function(torch.clone, lambda by, x: -by, given)(x),
    "straight through": lambda x, s: function(torch.round, lambda by, x: by * (x.abs() < 1), given)(x),
    "a kink at zero": lambda x, s: function(torch.relu, lambda by, x: by * (x > 0), given)(x * 0),
    "a surrogate": lambda x, s: function(torch.sign, lambda by, x: by / (1 + x.abs()) ** 2, given)(x),
    "clipped": lambda x, s: function(torch.clone, lambda by, x: by.clamp(-0.01, 0.01), given)(x),
    "dropped": lambda x, s: function(
        lambda x: x * 2, lambda by, m: by * m, lambda x, y: ((torch.rand_like(x) > 0.5).to(x),)
    )(x),
}
LOST: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "an intermediate": (
        lambda x, s: function(lambda x: x.exp().log1p(), lambda by, e: by * e / (1 + e), lambda x, y: (x.exp(),))(x),
        "Made",
        "its inputs",
    ),
    "a part": (
        lambda x, s: function(
            lambda x: x * x.tanh(), lambda by, x, t: by * (t + x * (1 - t * t)), lambda x, y: (x, x.tanh())
        )(x),
        "Made",
        "its inputs",
    ),
    "detached": (
        lambda x, s: function(torch.sin, lambda by, x: by * x.detach().cos(), given)(x),
        "Made",
        "its inputs",
    ),
    "an input that is not trained": (Scaled.apply, "Scaled", "its inputs"),  # type: ignore[dict-item]
    "the cotangent": (
        lambda x, s: function(lambda x: 2 * x, lambda by, x: 2 * by.detach(), given)(x),
        "Made",
        "the gradient that it gets",
    ),
    "half of the cotangent": (
        lambda x, s: function(lambda x: 2 * x, lambda by, x: by + by.detach(), given)(x),
        "Made",
        "the gradient that it gets",
    ),
    "recomputed": (lambda x, s: Recomputed.apply(lambda t: t.sin() * t, False, x), "Recomputed", "its inputs"),
    "recomputed, linear": (
        lambda x, s: Recomputed.apply(lambda t: 3 * t, False, x),
        "Recomputed",
        "the gradient that it gets",
    ),
    "a custom operator": (lambda x, s: stored(x)[0], "GeneratedBackwardFor_funcmeta_tests_stored", "its inputs"),
}
ESTIMATORS = [(fm.Reverse(), fm.StoreAll()), (fm.Reverse(), fm.Segments(1)), (fm.MixedMode(), fm.StoreAll())]


def case(layer: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Any:
    """Descent on a loss through a layer, beside another way, so that the gradient always has some graph."""
    with fm.rng.forked(4):
        x, w = torch.randn(6, 3, dtype=dtype), torch.randn(3, 4, dtype=dtype)

    def loss(p: Tensor, scale: Tensor) -> Tensor:
        return (layer(x @ p, scale) - 0.3).square().mean() + (p.sin() ** 2).mean() * scale

    def step(meta: Any, p: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(loss)(p, meta["scale"])
        return p - meta["lr"] * slope, fm.StepInfo(value)

    problem = fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, p, q, seed: (p**2).mean())
    meta = {"w": w, "lr": torch.tensor(0.2, dtype=dtype), "scale": torch.tensor(0.7, dtype=dtype)}
    return problem, {name: leaf.requires_grad_() for name, leaf in meta.items()}, fm.Task(torch.ones(1), None)


@pytest.mark.parametrize(("estimator", "memory"), ESTIMATORS, ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_backward_pass_is_exact(name: str, estimator: Any, memory: Any) -> None:
    assert fm.check_meta_grad(*case(RIGHT[name]), steps=2, estimator=estimator, memory=memory).worst.error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*RIGHT, *OWN_RULE])
def test_no_false_alarm(name: str, dtype: torch.dtype) -> None:
    problem, meta, task = case((RIGHT | OWN_RULE)[name], dtype)
    fm.unroll(problem, meta, task, steps=3).loss.backward()
    assert meta["lr"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("estimator", "memory"), ESTIMATORS, ids=str)
@pytest.mark.parametrize("name", LOST)
def test_a_lost_order_names_the_function(name: str, estimator: Any, memory: Any, dtype: torch.dtype) -> None:
    layer, function_name, what = LOST[name]
    problem, meta, task = case(layer, dtype)
    message = rf"runs {function_name}\w*, an autograd\.Function .* depends on {what}, .* Or use FirstOrder\(\)"
    with pytest.raises(fm.DetachedError, match=message):
        fm.unroll(problem, meta, task, steps=2, estimator=estimator, memory=memory)
    with torch.no_grad():
        assert fm.unroll(problem, meta, task, steps=2).loss.isfinite()


def test_first_order_loses_nothing() -> None:
    problem, meta, task = case(LOST["recomputed"][0])
    meta["scale"].requires_grad_(False)
    assert fm.unroll(problem, meta, task, steps=2, estimator=fm.FirstOrder()).loss.requires_grad


def test_outside_an_unroll_too() -> None:
    w = torch.randn(3, requires_grad=True)
    lost = LOST["an intermediate"][0]
    with pytest.raises(fm.DetachedError, match=r"Made, an autograd\.Function"):
        fm.value_and_grad(lambda w: lost(w, w).sum())(w)
    with torch.no_grad():
        fm.value_and_grad(lambda w: lost(w, w).sum())(w)


class Mapped(torch.autograd.Function):
    """sin, which vmap can run, from a slope that forward made or from the input."""

    generate_vmap_rule = True
    reads_input = False

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])


class Wrong(Mapped):
    @staticmethod
    def backward(ctx: Any, by: Tensor, _: Any) -> Tensor:
        return by * ctx.saved_tensors[1]  # type: ignore[no-any-return]


class Right(Mapped):
    @staticmethod
    def backward(ctx: Any, by: Tensor, _: Any) -> Tensor:
        return by * ctx.saved_tensors[0].cos()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_under_a_batch_of_tasks(strategy: Any) -> None:
    net = nn.Linear(2, 2).double()
    tasks = fm.Task(torch.randn(3, 4, 2).double(), torch.randn(3, 4, 2).double())
    meta = {"params": fm.init_params(net)}
    wrong, right = (
        fm.inner_problem(
            net, lambda m, predict, x, made=made: made.apply(predict(x))[0].square().sum(), optimizer=fm.optim.sgd(0.1)
        )
        for made in (Wrong, Right)
    )
    with pytest.raises(fm.DetachedError, match=r"runs Wrong, an autograd\.Function"):
        fm.unroll_batch(wrong, meta, tasks, steps=2, strategy=strategy)
    assert fm.check_meta_grad(right, meta, tasks, steps=2, strategy=strategy).worst.error < 1e-6


def test_each_function_is_tried_once_in_an_unroll() -> None:
    """Steps after the first call it once each; the first one some times more."""
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(0)
        return x.sin()

    made = function(forward, lambda by, x: by * x.cos(), given)
    counts = []
    for steps in (1, 3, 6):
        problem, meta, task = case(lambda x, s: made(x))
        calls.clear()
        fm.unroll(problem, meta, task, steps=steps)
        counts.append(len(calls))
    assert counts[0] > 2
    assert (counts[1] - counts[0], counts[2] - counts[1]) == (2, 3)


# ---- hooks


def solving(z: Tensor, create_graph: bool, add: bool) -> None:
    """The hook of a deep equilibrium: (I − Jᵀ)⁻¹ g by repetition, or one repetition plus g."""
    z0 = z.view_as(z)
    f0 = 0.5 * torch.sin(z0)

    def solve(g: Tensor) -> Tensor:
        y = g
        for _ in range(1 if add else 20):
            pulled = torch.autograd.grad(f0, z0, y, retain_graph=True, create_graph=create_graph)[0]
            y = pulled + (g if add or create_graph else g.detach())
        return y

    z.register_hook(solve)


HOOKS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "scaled": (lambda z: z.register_hook(lambda g: 0.5 * g), True),
    "clipped": (lambda z: z.register_hook(lambda g: g.clamp(-0.01, 0.01)), True),
    "normalized": (lambda z: z.register_hook(lambda g: g / (g.norm() + 1e-3)), True),
    "looked at": (lambda z: z.register_hook(lambda g: None), True),
    "stopped": (lambda z: z.register_hook(torch.zeros_like), True),
    "noisy": (lambda z: z.register_hook(lambda g: g + 0.01 * torch.randn_like(g)), True),
    "detached": (lambda z: z.register_hook(lambda g: 2 * g.detach()), False),
    "solved": (lambda z: solving(z, False, False), False),
    "solved in part": (lambda z: solving(z, False, True), False),
    "solved with a graph": (lambda z: solving(z, True, False), True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory", [fm.StoreAll(), fm.Segments(1)], ids=repr)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_tensors(name: str, memory: Any, dtype: torch.dtype) -> None:
    register, fine = HOOKS[name]

    def layer(x: Tensor, scale: Tensor) -> Tensor:
        z = x.tanh()
        if z.requires_grad:
            register(z)
        return z

    problem, meta, task = case(layer, dtype)
    if fine:
        fm.unroll(problem, meta, task, steps=2, memory=memory).loss.backward()
    else:
        with pytest.raises(fm.DetachedError, match=r"runs a hook .* without the graph of the one that it gets"):
            fm.unroll(problem, meta, task, steps=2, memory=memory)


@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
def test_backward_hooks_on_modules(pre: bool) -> None:
    with fm.rng.forked(2):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        batch = torch.randn(5, 3, dtype=torch.float64)
    for detached in (False, True):
        changed = (lambda g: g.detach() / 2) if detached else (lambda g: g / 2)
        if pre:
            handle = net[2].register_full_backward_pre_hook(lambda module, out, f=changed: (f(out[0]),))
        else:
            handle = net[2].register_full_backward_hook(lambda module, into, out, f=changed: (f(into[0]),))
        problem = fm.inner_problem(
            net, lambda meta, predict, x: predict(x).square().mean(), optimizer=fm.optim.sgd(0.1)
        )
        handle.remove()
        meta = {"params": fm.init_params(net)}
        if detached:
            with pytest.raises(fm.DetachedError, match="runs a hook or a backward pass of its own"):
                fm.unroll(problem, meta, fm.Task(batch, batch), steps=2)
        else:
            fm.unroll(problem, meta, fm.Task(batch, batch), steps=2).loss.backward()
