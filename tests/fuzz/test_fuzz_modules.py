"""Modules made functional, inner problems from them, what inspects them, and learned optimizers, under fire."""

from typing import Any

import torch
from fuzzing import FLOATS, Draw, Refused, attempt, close, contiguous, either, fuzz, junk, own, tensor, tree_of
from hypothesis import strategies as st
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned


class Odd(nn.Module):
    """A module with a frozen parameter, a tied one, an empty one, an integer buffer and one that is not contiguous."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype).view(3, 2).T)
        self.twin = self.weight
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 2, dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.weight * self.frozen).tanh() + self.empty.sum() + self.twin.mean()


def a_module(draw: Draw) -> Any:
    """A module that takes x of shape [n, 2], or something that is none of use."""
    kind = draw(
        st.sampled_from(["linear", "mlp", "odd", "batchnorm", "dropout", "none", "lazy", "meta", "frozen", "junk"])
    )
    dtype = draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 99)))
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(2, 1),
        "mlp": lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)),
        "odd": lambda: Odd(dtype),
        "batchnorm": lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)),
        "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)),
        "none": lambda: nn.ReLU(),
        "lazy": lambda: nn.LazyLinear(1),
        "meta": lambda: nn.Linear(2, 1, device="meta"),
        "frozen": lambda: nn.Linear(2, 1).requires_grad_(False),
        "junk": lambda: draw(junk()),
    }
    module = made[kind]()
    return module.to(dtype) if isinstance(module, nn.Module) and kind != "lazy" else module


@fuzz()
def test_functionalize_is_the_module(draw: Draw) -> None:
    module = a_module(draw)
    split = attempt(lambda: fm.functionalize(module), module)
    leaves = attempt(lambda: fm.init_params(module), module)
    if isinstance(split, Refused):
        assert isinstance(leaves, Refused)
        return
    model, params, buffers = split
    if any(each.is_meta for each in params.values()):
        return
    dtype = next(iter(params.values())).dtype
    x = tensor(draw, [(3, 2), (2, 2), (1, 2), (0, 2)], [dtype])
    changed = draw(st.sampled_from(["", "", "", "missing", "shape", "junk", "buffers"]))
    if changed == "missing":
        params = dict(list(params.items())[1:])
    if changed == "shape":
        params = {name: each[None] for name, each in params.items()}
    given = draw(junk()) if changed == "junk" else params
    kept = draw(junk()) if changed == "buffers" else buffers
    train, seed = draw(st.sampled_from([True, False, None])), either(draw, st.sampled_from([None, 3]), junk(), 10)

    @own
    def run() -> Any:
        if seed is None:
            torch.manual_seed(0)
        try:
            return model(given, kept, x, train=train, seed=seed)
        except ValueError as error:
            if "Expected more than 1 value per channel" in str(error):  # BatchNorm's own refusal of one example
                raise TypeError(str(error)) from error
            raise
        finally:
            if seed is None:
                torch.set_rng_state(generators)  # drawn from, as the module does

    generators = torch.get_rng_state()
    out = attempt(run, given, kept, x, module)
    if isinstance(out, Refused) or train is None or seed is None or isinstance(seed, Tensor):
        return
    module.train(train)
    with fm.rng.forked(seed):
        close(out[0], module(contiguous(x)), 1e-5)
    assert out[1].keys() == buffers.keys()


@own
def squares(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()  # type: ignore[no-any-return]


@fuzz()
def test_inner_problem_agrees_with_torch_optim(draw: Draw) -> None:
    module = either(draw, nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), junk(), 15)
    adapt = either(draw, None, st.sampled_from([lambda name: False, lambda name: "2" in name, 3, "0"]), 5)
    optimizer = either(draw, fm.optim.sgd(0.1), st.one_of(junk(), st.just(lambda meta: fm.optim.sgd(0.1))), 6)
    trajectory = either(draw, False, st.sampled_from([True, lambda step: 0.5, lambda step: "x", 3, None]), 5)
    loss_fn = either(
        draw,
        squares,
        st.one_of(
            junk().filter(lambda value: not callable(value)), st.just(lambda meta, predict, batch: predict(batch[0]))
        ),
        12,
    )
    problem = attempt(
        lambda: fm.inner_problem(module, loss_fn, optimizer=optimizer, adapt=adapt, trajectory_loss=trajectory), module
    )
    if isinstance(problem, Refused):
        return
    params = fm.init_params(module)
    kind = draw(st.sampled_from(["", "", "", "missing", "float", "none", "shape", "strided", "junk"]))
    if kind == "missing":
        params = dict(list(params.items())[1:])
    if kind == "float":
        params = {name: each.detach().float().requires_grad_() for name, each in params.items()}
    if kind == "shape":
        params = {name: each.detach()[None].requires_grad_() for name, each in params.items()}
    if kind == "strided":
        params = {name: torch.stack([each.detach()] * 2, -1)[..., 0].requires_grad_() for name, each in params.items()}
    meta: Any = {} if kind == "none" else {"params": draw(junk()) if kind == "junk" else params}
    x, y = tensor(draw, [(3, 2), (1, 2)], [torch.float64]), tensor(draw, [(3, 1), (1, 1)], [torch.float64])
    task = fm.Task((x, y), either(draw, (x, y), None, 8))
    steps = draw(st.integers(0, 3))
    out = attempt(lambda: fm.unroll(problem, meta, task, steps=steps), meta, x, y, module)
    if isinstance(out, Refused) or trajectory is not False or loss_fn is not squares or callable(adapt):
        return
    reference = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    reference.load_state_dict(module.state_dict())
    stepper = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(steps):
        stepper.zero_grad()
        ((reference(contiguous(x)) - y) ** 2).mean().backward()
        stepper.step()
    close(dict(out.state.params), dict(reference.named_parameters()), 1e-10)


@fuzz(cost=4)
def test_inspect(draw: Draw) -> None:
    module = a_module(draw)
    inputs = either(draw, st.just((torch.ones(3, 2),)), st.tuples(junk()), 3)
    seed = either(draw, 0, junk(), 6)
    found = attempt(lambda: fm.inspect(module, *inputs, seed=seed), module, inputs)
    if not isinstance(found, Refused):
        assert len(str(found).splitlines()) > 6
        if isinstance(module, nn.Linear):
            assert found["double backward"].status == "works"


MAKERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "linear": (learned.linear, ("gradient", "parameter")),
    "lstm": (learned.lstm, ("hidden", "layers", "preprocess", "p", "scale")),
    "rnnprop": (learned.rnnprop, ("hidden", "layers", "scale", "beta1", "beta2")),
    "mlp": (learned.mlp, ("hidden", "layers", "step_scale", "exp_scale")),
    "hierarchical": (learned.hierarchical, ("coordinate", "tensor", "scale")),
    "gates": (learned.gates, ("copy", "update", "flush", "hidden")),
}
SMALL = {"hidden": 3, "layers": 1, "coordinate": 3, "tensor": 3}


@fuzz(cost=2)
def test_learned_optimizers(draw: Draw) -> None:
    """Any arguments are refused or make an optimizer, which treats all layouts alike and each tensor as it should."""
    make, names = MAKERS[draw(st.sampled_from(sorted(MAKERS)))]
    spoiled = draw(st.sampled_from(["", "", *names]))
    values = {name: SMALL[name] for name in names if name in SMALL}
    if spoiled:
        values[spoiled] = draw(
            st.one_of(junk().filter(lambda value: not isinstance(value, int) or value < 9), st.floats(-1.0, 1.0))
        )
    torch.manual_seed(0)
    state_of_generators = torch.get_rng_state()

    def build() -> Any:
        try:
            return make(**values)
        finally:
            torch.set_rng_state(state_of_generators)

    optimizer = attempt(build, values)
    if isinstance(optimizer, Refused):
        return
    theta = either(draw, fm.init_params(optimizer), st.one_of(junk(), st.just({"weight": torch.ones(2)})), 6)
    transform = attempt(lambda: fm.as_transform(optimizer, theta), optimizer, theta)
    if isinstance(transform, Refused):
        return
    dtype = draw(st.sampled_from(FLOATS))
    params = tree_of(draw, lambda: tensor(draw, dtypes=[dtype], odds=20))
    leaves, spec = fm.tree.flatten(params)
    column = [tensor(draw, [leaf.shape], [leaf.dtype]) for leaf in leaves]
    grads = either(draw, fm.tree.unflatten(column, spec), st.one_of(junk(), st.just({"p0": torch.ones(3)})), 10)
    state = attempt(lambda: transform.init(params), params, optimizer)
    if isinstance(state, Refused):
        return
    out = attempt(lambda: transform.update(grads, state, params), grads, state, params, optimizer)
    if isinstance(out, Refused):
        return
    assert all(leaf.is_floating_point() for leaf in leaves)
    if any(leaf.is_meta for leaf in leaves):
        return
    alone = transform.update(contiguous(grads), transform.init(contiguous(params)), contiguous(params))
    close(out[0], alone[0], 1e-3 if any(leaf.dtype not in FLOATS for leaf in leaves) else 1e-5)


@fuzz(cost=2)
def test_torch_optimizers_agree_with_torch(draw: Draw) -> None:
    module = nn.Linear(2, 3).double()
    with torch.no_grad():
        module.weight.copy_(tensor(draw, [(3, 2)], [torch.float64]))
    params = either(
        draw,
        st.sampled_from([list(module.parameters()), list(module.named_parameters())]),
        st.one_of(junk(), st.just([module.weight, 3]), st.just([{"params": [module.weight], "lr": 1.0}])),
        6,
    )
    chosen = either(draw, st.sampled_from([fm.optim.adam(0.1), learned.linear(gradient=-0.1)]), junk(), 6)
    made = attempt(lambda: learned.TorchOptimizer(params, chosen), module)
    if isinstance(made, Refused):
        return
    if draw(st.booleans()):
        module(torch.ones(4, 2, dtype=torch.float64)).sin().sum().backward()
        if draw(st.integers(0, 5)) == 5:
            module.weight.grad = None
    twin = nn.Linear(2, 3).double()
    twin.load_state_dict(module.state_dict())
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    out = attempt(lambda: made.step())
    if not isinstance(out, Refused) and isinstance(chosen, fm.Transform) and len(made.param_groups[0]["params"]) == 2:
        torch.optim.Adam(twin.parameters(), lr=0.1).step()
        close(list(module.parameters()), list(twin.parameters()), 1e-10)
    saved = either(
        draw,
        made.state_dict(),
        st.one_of(
            junk(),
            st.just({"state": {1: 2}, "param_groups": []}),
            st.just({"state": {"funcmeta": {"leaves": [torch.ones(7)]}}}),
        ),
        2,
    )
    attempt(lambda: made.load_state_dict(saved), saved)
