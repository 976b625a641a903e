"""Parameters that a step's loss does not use: trained as by torch.optim, and differentiated so by every estimator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm

STEPS = 5


class Heads(nn.Module):
    """A body, two heads of which a batch names one, and what backward() reaches with zeros or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.first, self.second, self.spare = (nn.Linear(2, 1) for _ in range(3))
        self.still = nn.Parameter(torch.tensor([0.7]))
        self.zero = nn.Parameter(torch.tensor([0.6]))

    def forward(self, x: Tensor, head: int) -> Tensor:
        z = self.body(x).tanh()
        y = self.first(z) if head == 0 else self.second(z)
        return y * self.still.detach() + 0.0 * self.zero  # type: ignore[no-any-return]


def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y, head = batch
    return F.mse_loss(predict(x, head), y)


def judge(meta: Any, predict: Any, query: Any) -> Tensor:
    """Both heads, and every parameter, so that all that moved counts."""
    x, y, _ = query
    both = F.mse_loss(predict(x, 0), y) + F.mse_loss(predict(x, 1), y)
    return both + sum((0.3 * leaf.sin()).sum() for leaf in predict.params.values())  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, tuple[Callable[[Any], fm.Transform], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (lambda lr: fm.optim.sgd(lr), lambda ps, lr: torch.optim.SGD(ps, lr)),
    "damped": (
        lambda lr: fm.optim.sgd(lr, momentum=0.8, dampening=0.3, weight_decay=0.2),
        lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.8, dampening=0.3, weight_decay=0.2),
    ),
    "adamw": (
        lambda lr: fm.optim.adamw(lr, betas=(0.7, 0.8), eps=0.02, weight_decay=0.3),
        lambda ps, lr: torch.optim.AdamW(ps, lr, betas=(0.7, 0.8), eps=0.02, weight_decay=0.3),
    ),
}


def setting(name: str, shift: float = 0.0) -> tuple[nn.Module, fm.Problem, dict[str, Any], fm.Task]:
    torch.manual_seed(3)
    net = Heads().double()
    make, _ = OPTIMIZERS[name]
    problem = fm.inner_problem(net, loss, optimizer=lambda meta: make(meta["lr"]), meta_loss_fn=judge)
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}
    x = torch.randn(2, 4, 3, dtype=torch.float64) + shift
    y = x.sin().sum(-1, keepdim=True)
    return net, problem, meta, fm.Task(lambda step: (x[0], y[0], step // 2 % 2), (x[1], y[1], 0))


def by_hand(name: str, net: nn.Module, task: fm.Task, params: Any, lr: float) -> tuple[dict[str, Tensor], Tensor]:
    """The training and the meta-loss by torch.optim; the gradients of a step are None before it, as by default."""
    net.load_state_dict(params)
    optimizer = OPTIMIZERS[name][1](net.parameters(), lr)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y, head = task.support(step)
        F.mse_loss(net(x, head), y).backward()
        optimizer.step()
    predict: Any = lambda x, head: net(x, head)  # noqa: E731
    predict.params = dict(net.named_parameters())
    with torch.no_grad():
        return {key: leaf.detach().clone() for key, leaf in net.named_parameters()}, judge(None, predict, task.query)


def slope_by_hand(name: str, net: nn.Module, task: fm.Task, meta: Any, along: Any, step: float = 1e-4) -> float:
    """The central difference, of fourth order, of the meta-loss of the training by hand."""

    def at(s: float) -> float:
        moved = fm.tree.map(lambda leaf, v: (leaf + s * v).detach(), meta, along)
        return by_hand(name, net, task, moved["params"], moved["lr"].item())[1].item()

    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


def direction(meta: Any) -> Any:
    """A random one in which a difference quotient sees what derivatives see: none through detach()."""
    torch.manual_seed(5)
    along = fm.tree.map(torch.randn_like, meta)
    along["params"]["still"] = torch.zeros_like(meta["params"]["still"])
    return along


def slope(out: Any, meta: Any, along: Any) -> float:
    pairs = [
        (leaf, v) for leaf, v in zip(fm.tree.leaves(meta), fm.tree.leaves(along), strict=True) if leaf.requires_grad
    ]
    found = torch.autograd.grad(out, [leaf for leaf, _ in pairs])
    return float(fm.tree.dot(list(found), [v for _, v in pairs]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_stay_as_in_torch(name: str) -> None:
    net, problem, meta, task = setting(name)
    got = fm.unroll(problem, meta, task, steps=STEPS)
    expected, judged = by_hand(name, net, task, fm.tree.detach(meta["params"]), 0.1)
    torch.testing.assert_close(fm.tree.detach(got.state.params), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.loss.detach(), judged, rtol=1e-12, atol=0)
    for still in ("spare.weight", "spare.bias", "still"):
        assert torch.equal(got.state.params[still], meta["params"][still])
    assert torch.equal(got.state.params["zero"], meta["params"]["zero"]) == (name == "sgd")


EXACT: dict[str, dict[str, Any]] = {
    "Reverse": {},
    "Segments": {"memory": fm.Segments(2)},
    "Revolve": {"memory": fm.Revolve(2)},
    "Offload": {"memory": fm.Offload(fm.Segments(2))},
    "MixedMode": {"estimator": fm.MixedMode()},
    "MixedMode, Segments": {"estimator": fm.MixedMode(), "memory": fm.Segments(1)},
    "ForwardMode": {"estimator": fm.ForwardMode()},
}


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_meta_gradients_are_those_of_the_training_by_torch(name: str, how: str) -> None:
    net, problem, meta, task = setting(name)
    along = direction(meta)
    out = fm.unroll(problem, meta, task, steps=STEPS, **EXACT[how])
    expected = slope_by_hand(name, net, task, meta, along)
    assert slope(out.loss, meta, along) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(out.loss, fm.unroll(problem, meta, task, steps=STEPS).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "estimator"), [("damped", fm.Reverse()), ("adamw", fm.MixedMode())], ids=str)
def test_compiled_gives_the_same(name: str, estimator: Any) -> None:
    _, problem, meta, task = setting(name)
    along = direction(meta)
    got, expected = (
        slope(fm.unroll(each, meta, task, steps=STEPS, estimator=estimator).loss, meta, along)
        for each in (fm.compile(problem, backend="aten"), problem)
    )
    assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "estimator", [fm.Reverse(), fm.MixedMode(), fm.FirstOrder(), fm.Truncated(2)], ids=lambda each: type(each).__name__
)
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["damped", "adamw"])
def test_stacked_tasks_give_the_mean(name: str, strategy: Any, estimator: Any) -> None:
    settings = [setting(name, shift) for shift in (0.0, 0.5)]
    _, problem, meta, _ = settings[0]
    if isinstance(estimator, fm.Truncated):  # its first window has no share of the meta-loss
        meta["params"] = fm.tree.detach(meta["params"])
    along, tasks = direction(meta), [each[3] for each in settings]

    def stacked(batches: list[Any]) -> Any:
        return torch.stack([each[0] for each in batches]), torch.stack([each[1] for each in batches])

    both = fm.Task(
        lambda step: (*stacked([task.support(step) for task in tasks]), step // 2 % 2),
        (*stacked([task.query for task in tasks]), 0),
    )
    out = fm.unroll_batch(problem, meta, both, steps=STEPS, strategy=strategy, estimator=estimator)
    alone = [fm.unroll(problem, meta, task, steps=STEPS, estimator=estimator).loss for task in tasks]
    torch.testing.assert_close(out.loss, sum(alone) / 2, rtol=1e-12, atol=0)
    assert slope(out.loss, meta, along) == pytest.approx(slope(sum(alone) / 2, meta, along), rel=1e-10)


@pytest.mark.parametrize("name", ["damped", "adamw"])
def test_first_order_holds_what_exists_constant(name: str) -> None:
    """By hand: the training by torch, and gradients as constants in a second one by the transform."""
    net, problem, meta, task = setting(name)
    along = direction(meta)
    state = problem.init(meta, task, 0)
    params, opt_state, transform = state.params, state.opt_state, OPTIMIZERS[name][0](meta["lr"])
    for step in range(STEPS):
        leaves = {key: leaf.detach().requires_grad_() for key, leaf in params.items()}
        x, y, head = task.support(step)
        own = F.mse_loss(torch.func.functional_call(net, leaves, (x, head)), y)
        grads = torch.autograd.grad(own, list(leaves.values()), allow_unused=True)
        assert sum(grad is None for grad in grads) == 5
        params, opt_state = fm.optim.advance(transform, dict(zip(leaves, grads, strict=True)), opt_state, params)
    expected = slope(problem.meta_loss(meta, state._replace(params=params), task.query, 0), meta, along)  # type: ignore[misc]
    got = fm.unroll(problem, meta, task, steps=STEPS, estimator=fm.FirstOrder())
    assert slope(got.loss, meta, along) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "estimator",
    [fm.Truncated(2), fm.Truncated(2, fm.MixedMode()), fm.EvolutionStrategies(sigma=1e-3, pairs=2)],
    ids=str,
)
def test_other_estimators_train_the_same(estimator: Any) -> None:
    net, problem, meta, task = setting("adamw")
    meta["params"] = fm.tree.detach(meta["params"])
    out = fm.unroll(problem, meta, task, steps=STEPS, estimator=estimator)
    expected, _ = by_hand("adamw", net, task, fm.tree.detach(meta["params"]), 0.1)
    torch.testing.assert_close(fm.tree.detach(out.state.params), expected, rtol=1e-12, atol=1e-13)


def test_a_carry_keeps_what_was_missed() -> None:
    net, problem, meta, task = setting("adamw")
    first = fm.unroll(problem, meta, task, steps=2)
    got = fm.unroll(problem, meta, task, steps=STEPS - 2, carry=fm.Carry(first.state, 2))
    along = direction(meta)
    assert slope(got.loss, meta, along) == pytest.approx(slope_by_hand("adamw", net, task, meta, along), rel=1e-6)


@pytest.mark.parametrize("rule", ["plain", "functorch", "vmap", "mixed", "first order"])
def test_what_a_loss_does_not_use_has_no_gradient_by_any_rule(rule: str) -> None:
    """None as in torch: not for a gradient of zeros, but for a custom function that gives none, and for detach()."""
    from funcmeta._gradient import constant, exact, steered
    from funcmeta._mixed import Mixed

    class Gone(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    def objective(p: Any) -> Tensor:
        extra = 0.0 if rule == "mixed" else Gone.apply(p["gone"])  # MixedMode falls back for a function of one's own
        return (p["used"] ** 2 + 0.0 * p["zero"] + p["cut"].detach() + extra).sum()  # type: ignore[no-any-return]

    names = ("used", "zero", "cut", "gone", "unused")
    params = {name: torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for name in names}
    rules = {"mixed": Mixed(), "first order": constant}
    seen = []

    def grads_of(params: Any) -> Tensor:
        with steered(rules.get(rule, exact)):
            _, grads = fm.value_and_grad(objective, materialize_grads=False)(params)
            _, filled = fm.value_and_grad(objective)(params)
        seen.append({name for name, grad in grads.items() if grad is None})
        assert all(filled[name].shape == params[name].shape for name in names)
        if rule != "vmap":  # which has no branches on values
            assert (filled["unused"] == 0).all()
        return grads["used"].sum() + grads["zero"].sum()  # type: ignore[no-any-return]

    if rule == "functorch":
        torch.func.grad(grads_of)(params)
    elif rule == "vmap":
        from funcmeta._batching import over_tasks

        over_tasks(grads_of, 2)(params)
    else:
        grads_of(params)
    assert seen == [{"cut", "gone", "unused"}]


def test_the_names_of_torch_are_checked() -> None:
    with pytest.raises(fm.ArgumentError, match="materialize_grads is 'no'"):
        fm.value_and_grad(loss, materialize_grads="no")  # type: ignore[arg-type]


def test_inside_torch_compile() -> None:
    """A step of one's own that takes its gradient inside, for two heads that take turns."""
    adam = fm.optim.adam(0.1)

    def step(params: Any, state: Any, x: Tensor, head: int) -> Any:
        def objective(p: Any) -> Tensor:
            return (torch.sin(p["body"] * x) * p["heads"][head]).sum()  # type: ignore[no-any-return]

        _, grads = fm.value_and_grad(objective, materialize_grads=False)(params)
        return fm.optim.advance(adam, grads, state, params)

    params: Any = {"body": torch.rand(3).double(), "heads": [torch.rand(3).double() for _ in range(2)]}
    state, x = adam.init(params), torch.rand(3).double()
    compiled = torch.compile(step, backend="aot_eager")
    with torch.no_grad():
        for index in range(3):
            expected = step(params, state, x, index % 2)
            got = compiled(params, state, x, index % 2)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
            params, state = expected
    assert state.missed.tolist() == [0, 1, 2]
