"""What learned optimizers compute: against formulas, tensor by tensor, in every dtype; and what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned
from funcmeta.learned import _features as features

SHARED = {
    "linear": learned.linear,
    "lstm": learned.lstm,
    "lstm, plain": lambda: learned.lstm(hidden=3, layers=1, preprocess="none"),
    "rnnprop": learned.rnnprop,
    "mlp": learned.mlp,
    "hierarchical": learned.hierarchical,
    "gates": learned.gates,
}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Tensors of zero to four dimensions; one without coordinates."""
    torch.manual_seed(seed)
    shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "kernel": (2, 3, 2, 2), "row": (1, 4), "none": (0, 3)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def run(transform: fm.Transform, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    state = transform.init(params)
    for grads in gradients:
        updates, state = transform.update(grads, state, params)
        params = fm.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("kind", SHARED)
def test_all_coordinates_at_once_equal_a_loop_over_tensors(kind: str) -> None:
    torch.manual_seed(0)
    optimizer = SHARED[kind]().double()
    params, gradients = tensors(1), [tensors(seed) for seed in (2, 3, 4)]
    together, _ = run(fm.as_transform(optimizer), params, gradients)
    for name, param in params.items():
        state = optimizer.init_state(param)
        for grads in gradients:
            update, state = optimizer(param, grads[name], state)
            param = param + update
        torch.testing.assert_close(together[name], param, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [*SHARED, "hyperparameters"])
def test_a_parameter_without_a_gradient_stays(kind: str) -> None:
    """So does what is kept for it: each tensor by itself, which takes no step then, comes to the same."""
    torch.manual_seed(0)
    params = tensors(1)
    makers = {**SHARED, "hyperparameters": lambda: learned.hyperparameters(params, momentum=0.5, per="coordinate")}
    optimizer = makers[kind]().double()
    gradients: list[Any] = [
        {name: None if (place + step) % 3 == 0 or name == "kernel" else grad for place, (name, grad) in enumerate(row)}
        for step, row in enumerate([list(tensors(seed).items()) for seed in (2, 3, 4, 5)])
    ]
    transform = fm.as_transform(optimizer)
    together, state = run(transform, params, gradients)
    fm.tree.check_same(transform.init(params), state)
    assert torch.equal(together["kernel"], params["kernel"])
    for name, param in params.items():
        moves = [row[name] for row in gradients if row[name] is not None]
        own = {"w": param}
        if kind == "hyperparameters":
            rate = optimizer.log_lr[0].exp()  # the logarithm is one of single precision
            alone, _ = run(fm.optim.sgd(rate, momentum=0.5), own, [{"w": grad} for grad in moves])
        else:
            alone, _ = run(transform, own, [{"w": grad} for grad in moves])
        torch.testing.assert_close(together[name], alone["w"], rtol=1e-12, atol=1e-14)
    nothing = dict.fromkeys(params)
    updates, after = transform.update(nothing, state, params)
    assert updates == nothing
    for before, now in zip(fm.tree.leaves(state), fm.tree.leaves(after), strict=True):
        if before.is_floating_point():  # means over no coordinates at all are NaN
            torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


class Whole(fm.LearnedOptimizer):
    """An optimizer of whole trees, with what it does to each gradient."""

    whole = True

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def init_state(self, param: Any) -> tuple[()]:
        return ()

    def forward(self, param: Any, grad: Any, state: tuple[()]) -> tuple[Any, tuple[()]]:
        return fm.tree.map(self.act, param, grad), state


def test_an_optimizer_of_whole_trees_meets_no_gradient() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    grads = {"a": torch.ones(2), "b": None}
    moved, _ = run(fm.as_transform(Whole(lambda param, grad: None if grad is None else -grad)), params, [grads])
    assert (moved["a"].tolist(), moved["b"].tolist()) == ([0.0, 0.0], [1.0] * 3)
    with pytest.raises(fm.StructureError, match=r"Whole takes whole trees and failed on a gradient that is"):
        run(fm.as_transform(Whole(lambda param, grad: -grad)), params, [grads])
    with pytest.raises(TypeError, match="a reason of its own"):
        run(fm.as_transform(Whole(_raising)), params, [params])
    with pytest.raises(fm.StructureError, match=r"update is float32\[3\] on cpu for a parameter without a gradient"):
        run(fm.as_transform(Whole(lambda param, grad: -param)), params, [grads])


def _raising(param: Tensor, grad: Tensor) -> Tensor:
    raise TypeError("a reason of its own")


@pytest.mark.parametrize("kind", SHARED)
def test_the_number_of_weights_does_not_depend_on_what_is_optimized(kind: str) -> None:
    optimizer = SHARED[kind]()
    for params in ({"one": torch.ones(1)}, tensors(1, torch.float32), [torch.ones(7, 7), {"deep": torch.ones(2)}]):
        moved, _ = run(fm.as_transform(optimizer), params, [fm.tree.map(torch.ones_like, params)])
        fm.tree.check_same(params, moved)
    assert sum(weight.numel() for weight in optimizer.parameters()) < 7000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", SHARED)
def test_updates_have_the_dtype_of_the_parameters(kind: str, dtype: torch.dtype) -> None:
    optimizer = SHARED[kind]()
    params = tensors(1, dtype)
    transform = fm.as_transform(optimizer)
    updates, state = transform.update(tensors(2, dtype), transform.init(params), params)
    assert {name: update.dtype for name, update in updates.items()} == dict.fromkeys(params, dtype)
    kept = dtype if kind == "gates" else torch.float32
    assert all(leaf.dtype in (kept, torch.int64) for leaf in fm.tree.leaves(state))


@pytest.mark.parametrize("kind", SHARED)
def test_zero_gradients_have_finite_derivatives(kind: str) -> None:
    optimizer = SHARED[kind]().double()
    params = {"w": torch.zeros(3, 2, dtype=torch.float64)}
    grads = {"w": torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)}
    moved, _ = run(fm.as_transform(optimizer), params, [grads, grads])
    wanted = [grads["w"], *optimizer.parameters()]
    found = torch.autograd.grad(moved["w"].sum(), wanted, allow_unused=True)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in found)


def test_a_tied_weight_is_one_parameter() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    optimizer = learned.lstm(hidden=2, layers=1)
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: predict(batch).square().mean(),
        optimizer=lambda meta: fm.as_transform(optimizer, meta),
    )
    out = fm.unroll(problem, fm.init_params(optimizer), fm.Task(torch.ones(2, 3), torch.ones(2, 3)), steps=2)
    assert list(out.state.params) == ["0.weight"]


def test_log_and_sign() -> None:
    grad = torch.tensor([1.0, -math.e, math.exp(-5.0), -math.exp(-12.0), 0.0], dtype=torch.float64)
    seen = features.log_sign(grad, 10.0)
    expected = torch.tensor([[0.0, 0.1, -0.5, -1.0, -1.0], [1.0, -1.0, 1.0, -math.exp(-2.0), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-15)


def test_factored_averages_restore_a_matrix_of_rank_one() -> None:
    """Where g² is an outer product, its factored estimate is exact: the inverse root is 1/|g|."""
    rows, columns = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.5, 2.5, 3.5])
    grad = torch.outer(rows, columns).double()
    old = features.factored_zeros(grad, 1)
    _, scales = features.factored(old, grad, grad.new_tensor([0.0]))
    torch.testing.assert_close(scales.inverse_root[0], 1 / grad, rtol=1e-8, atol=0)
    torch.testing.assert_close(scales.rows[0, :, 0], grad.square().mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(scales.columns[0, 0], grad.square().mean(0), rtol=1e-12, atol=0)


def test_the_largest_dimensions_are_factored() -> None:
    old = features.factored_zeros(torch.ones(8, 2, 5), 3)
    assert old.rows.shape == (3, 1, 2, 5) or old.columns.shape == (3, 1, 2, 5)
    assert {old.rows.shape, old.columns.shape} == {(3, 8, 2, 1), (3, 1, 2, 5)}


def test_features_of_time() -> None:
    seen = features.time_features(torch.tensor(3), torch.zeros(2, dtype=torch.float64))
    assert seen.shape == (11, 2)
    torch.testing.assert_close(seen[1], torch.zeros(2, dtype=torch.float64))
    assert seen[0, 0] == pytest.approx(math.tanh(2.0))


def test_the_mlp_sees_39_features() -> None:
    optimizer = learned.mlp().double()
    grad = torch.randn(4, 3, dtype=torch.float64)
    seen, slots = optimizer.observe(grad, grad, optimizer.slots(grad), torch.tensor(0))
    assert seen.shape == (39, 4, 3)
    torch.testing.assert_close(slots.momenta[:, 0, 0], grad[0, 0] * torch.tensor([0.1, 0.01, 0.001]).double())
    torch.testing.assert_close(seen[:28].square().mean((1, 2)).sqrt()[0], torch.tensor(1.0).double(), rtol=1e-4, atol=0)


def test_rnnprop_sees_what_adam_computes() -> None:
    optimizer = learned.rnnprop(beta1=0.9, beta2=0.99).double()
    grads = [torch.randn(3, dtype=torch.float64) for _ in range(4)]
    adam = fm.optim.adam(1.0, betas=(0.9, 0.99), eps=0.0)
    slots, state = optimizer.slots(grads[0]), adam.init(grads[0])
    for step, grad in enumerate(grads):
        seen, slots = optimizer.observe(grad, grad, slots, torch.tensor(step))
        update, state = adam.update(grad, state, grad)
        torch.testing.assert_close(seen[0], -update, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["rnnprop", "hierarchical"])
def test_the_scale_of_the_loss_does_not_count(kind: str) -> None:
    torch.manual_seed(0)
    optimizer = SHARED[kind]().double()
    params = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    gradients = [{"w": torch.randn(4, 3, dtype=torch.float64)} for _ in range(3)]
    larger = [{"w": 1000 * grads["w"]} for grads in gradients]
    one, other = (run(fm.as_transform(optimizer), params, each)[0]["w"] for each in (gradients, larger))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_the_lstm_is_that_of_torch() -> None:
    """With the same weights, two steps of torch.nn.LSTMCell and a linear layer."""
    torch.manual_seed(0)
    optimizer = learned.lstm(hidden=4, layers=1, preprocess="none", scale=0.5).double()
    gates = optimizer.network.cells[0].gates
    cell = nn.LSTMCell(1, 4).double()
    with torch.no_grad():
        cell.weight_ih.copy_(gates.weight[:, :1])
        cell.weight_hh.copy_(gates.weight[:, 1:])
        cell.bias_ih.copy_(gates.bias)
        cell.bias_hh.zero_()
    grads = torch.randn(2, 6, dtype=torch.float64)
    state, memory = optimizer.init_state(grads[0]), None
    for grad in grads:
        update, state = optimizer(grad, grad, state)
        memory = cell(grad[:, None], memory)
        expected = 0.5 * (memory[0] @ optimizer.out.weight.T + optimizer.out.bias)[:, 0]
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("per", ["all", "layer", "tensor", "coordinate"])
def test_hyperparameters_are_momentum_sgd(per: str) -> None:
    params, gradients = tensors(1), [tensors(seed) for seed in (2, 3, 4)]
    optimizer = learned.hyperparameters(params, lr=0.2, momentum=0.7, per=per).double()
    got, _ = run(fm.as_transform(optimizer), params, gradients)
    expected, _ = run(fm.optim.sgd(0.2, momentum=0.7), params, gradients)
    for name in params:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)


def test_an_optimizer_of_ones_own_runs_tensor_by_tensor() -> None:
    class Descent(fm.LearnedOptimizer):
        def __init__(self) -> None:
            super().__init__()
            self.lr = nn.Parameter(torch.tensor(0.5))

        def init_state(self, param: Tensor) -> Tensor:
            return torch.zeros_like(param)

        def forward(self, param: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = 0.9 * state + grad
            return -self.lr * state, state

    params, gradients = tensors(1, torch.float32), [tensors(seed, torch.float32) for seed in (2, 3)]
    theta = {"lr": torch.tensor(0.25, requires_grad=True)}
    got, _ = run(fm.as_transform(Descent(), theta), params, gradients)
    expected, _ = run(fm.optim.sgd(0.25, momentum=0.9), params, gradients)
    for name in params:
        torch.testing.assert_close(got[name], expected[name])
    (grad,) = torch.autograd.grad(got["vector"].sum(), theta["lr"])
    assert grad != 0


class Wrong(fm.LearnedOptimizer):
    """Its update has another shape than its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(0.5))

    def init_state(self, param: Tensor) -> tuple[()]:
        return ()

    def forward(self, param: Tensor, grad: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return grad.sum(), state


VECTOR = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: fm.as_transform(nn.Linear(1, 1)), fm.ArgumentError, "expected a LearnedOptimizer. Pass what"),
        (lambda: fm.as_transform(learned.linear(), {}), fm.StructureError, r"theta has \[\], expected \['weight'\]"),
        (lambda: fm.as_transform(learned.linear(), 3), fm.StructureError, "theta has int, expected"),
        (
            lambda: fm.as_transform(learned.linear(), {"weight": torch.ones(3)}),
            fm.StructureError,
            r"theta\['weight'\] is float32\[3\] on cpu, expected a floating-point tensor of shape \[2\]",
        ),
        (
            lambda: run(fm.as_transform(learned.linear()), VECTOR, [{"w": torch.ones(3)}]),
            fm.StructureError,
            "a gradient is",
        ),
        (lambda: run(fm.as_transform(learned.linear()), VECTOR, [{"v": torch.ones(2)}]), fm.StructureError, "grads"),
        (lambda: run(fm.as_transform(Wrong()), VECTOR, [VECTOR]), fm.StructureError, "update is float32"),
        (lambda: fm.as_transform(learned.linear()).init({"w": 3}), fm.StructureError, "expected a tensor"),
        (lambda: learned.lstm(hidden=0), fm.ArgumentError, "hidden is 0, expected a positive integer"),
        (lambda: learned.lstm(layers=1.5), fm.ArgumentError, "layers is 1.5"),
        (lambda: learned.lstm(preprocess="log"), fm.ArgumentError, "preprocess is 'log', expected one of"),
        (lambda: learned.lstm(p=100.0), fm.ArgumentError, "p is 100.0, expected at most 80"),
        (lambda: learned.lstm(preprocess="none", p=5.0), fm.ArgumentError, "p is 5.0 with preprocess='none'.*Leave p"),
        (lambda: learned.linear(gradient=torch.nan), fm.ArgumentError, "gradient is nan, expected a finite number"),
        (lambda: learned.lstm(p=0), fm.ArgumentError, "p is 0, expected a positive number"),
        (lambda: learned.rnnprop(beta1=1.0), fm.ArgumentError, r"beta1 is 1.0, expected a number in \[0, 1\)"),
        (lambda: learned.mlp(step_scale=-1.0), fm.ArgumentError, "step_scale is -1.0"),
        (lambda: learned.hierarchical(tensor=True), fm.ArgumentError, "tensor is True"),
        (lambda: learned.hyperparameters([torch.ones(1)]), fm.ArgumentError, "expected a dict of tensors"),
        (lambda: learned.hyperparameters(VECTOR, per="row"), fm.ArgumentError, "per is 'row'"),
        (
            lambda: run(fm.as_transform(learned.hyperparameters(VECTOR)), {"v": torch.ones(2)}, []),
            fm.StructureError,
            "but the hyper-parameters were made for",
        ),
    ],
)
def test_bad_input(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize("kind", SHARED)
def test_weights_of_another_dtype_than_the_module(kind: str) -> None:
    optimizer = SHARED[kind]()
    theta = {name: weight.detach().double() for name, weight in optimizer.named_parameters()}
    params = tensors(1)
    transform = fm.as_transform(optimizer, theta)
    state = transform.init(params)
    updates, following = transform.update(tensors(2), state, params)
    fm.tree.check_same(state, following)
    fm.tree.check_same(params, updates)


@pytest.mark.parametrize("kind", SHARED)
def test_no_parameters_at_all(kind: str) -> None:
    transform = fm.as_transform(SHARED[kind]())
    updates, _ = transform.update({}, transform.init({}), {})
    assert updates == {}


def test_a_learned_initial_state_is_that_of_the_weights_given() -> None:
    class Remembering(fm.LearnedOptimizer):
        def __init__(self) -> None:
            super().__init__()
            self.begin = nn.Parameter(torch.tensor(1.0))

        def init_state(self, param: Tensor) -> Tensor:
            return self.begin.expand_as(param)

        def forward(self, param: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return -state * grad, state

    begin = torch.tensor(3.0, requires_grad=True)
    moved, _ = run(fm.as_transform(Remembering(), {"begin": begin}), VECTOR, [VECTOR])
    assert moved["w"].tolist() == [-2.0, -2.0]
    (slope,) = torch.autograd.grad(moved["w"].sum(), begin)
    assert slope == -2.0


def test_nothing_is_changed() -> None:
    params, grads = tensors(1, torch.float32), tensors(2, torch.float32)
    before = {name: param.clone() for name, param in params.items()}
    for make in SHARED.values():
        transform = fm.as_transform(make())
        first = transform.init(params)
        kept = [leaf.clone() for leaf in fm.tree.leaves(first)]
        transform.update(grads, first, params)
        assert all(torch.equal(old, leaf) for old, leaf in zip(kept, fm.tree.leaves(first), strict=True))
    assert all(torch.equal(before[name], param) for name, param in params.items())


def test_a_subclass_without_its_functions_can_not_be_made() -> None:
    class Half(fm.LearnedOptimizer):
        def init_state(self, param: Tensor) -> tuple[()]:
            return ()

    for kind in (Half, learned.Coordinatewise):
        with pytest.raises(TypeError, match="abstract"):
            kind()
