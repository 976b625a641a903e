"""Where torch's backward pass is not the derivative of its forward pass, all exact estimators mean the same."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_mixed_mode import by_hand, close, descending, gradient, leaf, wavy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcmeta as fm

ESTIMATORS = [fm.MixedMode(), fm.ForwardMode(), fm.ForwardMode(2)]
POLICIES = [fm.StoreAll(), fm.Segments(1), fm.Revolve(2)]


class Scaled(torch.autograd.Function):
    """The identity, with a gradient of another size, and with everything that torch.func asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return -0.3 * by

    @staticmethod
    def jvp(ctx: Any, along: Tensor) -> Tensor:
        return along.clone()


@torch.jit.script
def squash(x: Tensor) -> Tensor:
    return x * torch.tanh(x) + 0.3 * x


class Text(nn.Module):
    """A model of words whose head is the embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3, **options)
        self.mix = nn.Linear(3, 3)

    def forward(self, words: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.words(words).cumsum(1))) @ self.words.weight.T


class Gated(nn.Module):
    """A net with a hidden layer that something is done to."""

    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.through = nn.Linear(4, 5), nn.Linear(5, 2), through

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.through(torch.tanh(self.first(x))))  # type: ignore[no-any-return]


def hooked(x: Tensor) -> Tensor:
    x = x * 1.0
    if x.requires_grad:
        x.register_hook(lambda by: by.sign() * by.abs().sqrt())
    return x


def node_hooked(x: Tensor) -> Tensor:
    x = x * 1.0
    if x.grad_fn is not None:
        x.grad_fn.register_hook(lambda by, _: (by[0] * 0.4, by[1]) if len(by) > 1 else (by[0] * 0.4,))
    return x


def halved() -> nn.Module:
    layer = nn.Softplus()
    layer.register_full_backward_hook(lambda module, by, _: (by[0] * 0.5,))
    return layer


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tensor hook": (lambda: Gated(hooked), "registers a hook"),
    "node hook": (lambda: Gated(node_hooked), "reads a grad_fn"),
    "module hook": (lambda: Gated(halved()), "autograd.Function|grad_fn"),
    "reversal": (lambda: Gated(Scaled.apply), "autograd.Function|ScaledGenerated"),  # type: ignore[arg-type]
    "TorchScript": (lambda: Gated(lambda x: squash(x)), "CppFunction, whose gradient is not known"),
}


def of_net(build: Callable[[], nn.Module]) -> tuple[fm.Problem, Any, fm.Task]:
    with fm.rng.forked(5):
        net = build().double()
        batch, query = ((torch.randn(6, 4).double(), torch.randn(6, 2).double()) for _ in range(2))
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: F.mse_loss(predict(batch[0]), batch[1]),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=meta["momentum"]),
    )
    fixed = fm.tree.detach(fm.init_params(net))
    return problem, {"params": fixed, "lr": leaf(0.4), "momentum": leaf(0.6)}, fm.Task(batch, query)


def slopes(case: Any, estimator: Any, memory: Any = None) -> list[Tensor]:
    problem, meta, task = case
    out = fm.unroll(problem, meta, task, steps=3, estimator=estimator, memory=memory or fm.StoreAll())
    return list(torch.autograd.grad(out.loss, [each for each in fm.tree.leaves(meta) if each.requires_grad]))


def check_agreement(case: Any, why: str, estimators: Any = None) -> None:
    """Every exact estimator gives what Reverse gives, and says once why it does as Reverse does."""
    expected = slopes(case, fm.Reverse())
    for estimator in estimators or ESTIMATORS:
        for memory in POLICIES:
            with pytest.warns(fm.FallbackWarning, match=why) as told:
                got = slopes(case, estimator, memory)
            close(got, expected, 1e-12)
            assert len([each for each in told if each.category is fm.FallbackWarning]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NETS)
def test_a_gradient_that_is_no_derivative_is_that_of_reverse(name: str) -> None:
    build, why = NETS[name]
    check_agreement(of_net(build), why)


@pytest.mark.parametrize("name", ["tensor hook", "node hook", "module hook", "reversal"])
def test_these_gradients_are_no_derivatives(name: str) -> None:
    """Otherwise agreement would show nothing: central differences are elsewhere."""
    problem, meta, task = of_net(NETS[name][0])

    def at(rate: float) -> float:
        with torch.no_grad():
            return float(fm.unroll(problem, {**meta, "lr": torch.tensor(rate).double()}, task, steps=3).loss)

    difference = (at(0.4 + 1e-5) - at(0.4 - 1e-5)) / 2e-5
    assert abs(difference - float(slopes((problem, meta, task), fm.Reverse())[0])) > 1e-4


TEXTS = {
    "padding": ({"padding_idx": 0}, "padding_idx"),
    "padding, counted from the end": ({"padding_idx": -1}, "padding_idx"),
    "by frequency": ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
}


@pytest.mark.parametrize("options", TEXTS)
def test_an_embedding_tied_to_the_head(options: str) -> None:
    with fm.rng.forked(6):
        net = Text(**TEXTS[options][0]).double()
        words, query = torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
    problem = fm.inner_problem(
        net,
        lambda meta, predict, words: F.cross_entropy(predict(words).flatten(0, 1), words.flatten()),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"]),
    )
    fixed = fm.tree.detach(fm.init_params(net))
    for meta in ({"params": fixed, "lr": leaf(0.5)}, {"params": fm.init_params(net), "lr": leaf(0.5)}):
        case = problem, meta, fm.Task(words, query)
        check_agreement(case, TEXTS[options][1], [fm.MixedMode()])
        with warnings.catch_warnings():  # inside torch.func rows of padding have a formula, so ForwardMode may stay
            warnings.simplefilter("ignore", fm.FallbackWarning)
            close(slopes(case, fm.ForwardMode()), slopes(case, fm.Reverse()), 1e-12)


def test_a_plain_embedding_is_no_reason_to_fall_back() -> None:
    with fm.rng.forked(6):
        net, words = Text().double(), torch.randint(7, (4, 5))
    problem = fm.inner_problem(
        net,
        lambda meta, predict, words: F.cross_entropy(predict(words).flatten(0, 1), words.flatten()),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"]),
    )
    case = problem, {"params": fm.tree.detach(fm.init_params(net)), "lr": leaf(0.5)}, fm.Task(words, words)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fm.FallbackWarning)
        for estimator in ESTIMATORS:
            close(slopes(case, estimator), slopes(case, fm.Reverse()), 1e-12)


@pytest.mark.parametrize("where", ["init", "update", "meta-loss"])
def test_forward_mode_is_held_against_reverse_outside_of_losses(where: str) -> None:
    """A Function that reverses gradients there shows in no inner loss."""

    def reversed_at(place: str, x: Tensor) -> Tensor:
        return Scaled.apply(x) if place == where else x  # type: ignore[no-any-return, no-untyped-call]

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(wavy)(w, batch)
        return w - meta["lr"] * reversed_at("update", slope), fm.StepInfo(value)

    case = by_hand(step, judge=lambda meta, w, query, seed: reversed_at("meta-loss", w).pow(3).sum())
    problem = case.problem._replace(init=lambda meta, task, seed: reversed_at("init", meta["w"] * 1))
    case = case._replace(problem=problem)
    expected = gradient(case, fm.Reverse())
    with pytest.warns(fm.FallbackWarning, match="forward and reverse mode differ for a random direction"):
        got = gradient(case, fm.ForwardMode())
    close(got, expected)


def test_mixed_mode_compares_the_slope_along_the_cotangent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last net: were the Function taken for a good node, the slope of the loss would give it away."""
    monkeypatch.setattr("funcmeta._mixed.obstacle", lambda nodes: "")
    case = descending(lambda meta, w, batch: wavy(Scaled.apply(w * meta["a"]), batch), {"a": leaf(0.7, 1.1, 0.4)})  # type: ignore[no-untyped-call]
    with pytest.warns(fm.FallbackWarning, match="is not the derivative of the inner loss"):
        got = gradient(case, fm.MixedMode())
    close(got, gradient(case, fm.Reverse()))


FALLBACKS: dict[str, tuple[Callable[[Any, Tensor, Any], Tensor], str]] = {
    "no forward mode": (
        lambda meta, w, batch: F.soft_margin_loss(w * meta["a"], torch.ones_like(w)),
        "forward AD with soft_margin_loss_backward",
    ),
    "wrong in forward mode": (
        lambda meta, w, batch: torch.cumprod(w * meta["a"], 0).sin().sum(),
        "torch differentiates the gradient of torch.cumprod wrongly in forward mode",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FALLBACKS)
def test_forward_mode_falls_back_under_the_policy(name: str) -> None:
    loss, why = FALLBACKS[name]
    case = descending(loss, {"a": leaf(0.7, 1.1, 0.4)})
    for memory in POLICIES:
        with pytest.warns(fm.FallbackWarning, match=f"ForwardMode takes .* as Reverse does, because .*{why}"):
            got = gradient(case, fm.ForwardMode(), "single", memory)
        close(got, gradient(case, fm.Reverse()))


def test_what_is_wrong_with_the_problem_is_no_reason_to_fall_back() -> None:
    case = descending(lambda meta, w, batch: wavy(w, batch) @ torch.ones(2).double())
    with pytest.raises(RuntimeError, match=r"both arguments to (matmul|linear) need to be|dot"):
        gradient(case, fm.ForwardMode())


@pytest.mark.parametrize("mode", ["ForwardMode", "torch.func.jvp"])
def test_no_grad_around_an_inner_gradient_makes_a_constant(mode: str) -> None:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        value, slope = fm.value_and_grad(wavy)(w, batch)
        with torch.no_grad():
            _, held = fm.value_and_grad(wavy)(w, batch)
        return w - meta["lr"] * (slope + 0.5 * held), fm.StepInfo(value)

    case = by_hand(step)
    expected = gradient(case, fm.Reverse())
    if mode == "ForwardMode":
        close(gradient(case, fm.ForwardMode()), expected)
        return
    task = fm.Task(*fm.tree.map(lambda leaf: leaf[0], case.tasks[:2]))

    def loss(rate: Tensor) -> Tensor:
        return fm.unroll(case.problem, {"w": case.meta["w"].detach(), "lr": rate}, task, steps=3).loss

    rate = case.meta["lr"].detach()
    close(torch.func.jvp(loss, (rate,), (torch.ones_like(rate),))[1], expected["meta['lr']"])


def test_a_state_that_passes_through_moves_with_meta() -> None:
    """A step may hand on a tensor that depends on meta since the start."""
    case = by_hand(lambda meta, w, batch, seed: (w, fm.StepInfo((w**2).sum())))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fm.FallbackWarning)
        problem, meta, task = case.problem, {"w": case.meta["w"]}, fm.Task(*fm.tree.map(lambda x: x[0], case.tasks[:2]))
        found = [
            torch.autograd.grad(fm.unroll(problem, meta, task, steps=2, estimator=each).loss, meta["w"])[0]
            for each in (fm.ForwardMode(), fm.ForwardMode(1), fm.Reverse())
        ]
    close(found[0], found[2])
    close(found[1], found[2])


def test_mixed_mode_goes_through_hooks_for_saved_tensors() -> None:
    """They see no tangent, which torch keeps beside what they pack; ForwardMode, by torch.func, falls back."""
    case = of_net(lambda: Gated(lambda x: checkpoint(torch.sin, x, use_reentrant=False)))  # type: ignore[arg-type, return-value]
    expected = slopes(of_net(lambda: Gated(torch.sin)), fm.Reverse())
    with warnings.catch_warnings():
        warnings.simplefilter("error", fm.FallbackWarning)
        for memory in POLICIES:
            close(slopes(case, fm.MixedMode(), memory), expected, 1e-12)
    with pytest.warns(fm.FallbackWarning, match="saved tensor hooks"):
        close(slopes(case, fm.ForwardMode()), expected, 1e-12)
