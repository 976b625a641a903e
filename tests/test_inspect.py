"""What inspect finds: one module for each answer."""

from typing import Any

import pytest
import torch
from contract_cases import Attention, ConvBatchNorm, Recurrent, Tied
from torch import Tensor, nn

import funcmeta as fm

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
NAMES = ["double backward", "forward AD", "vmap", "buffers", "randomness", "tied weights"]


class With(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layer(x))


class Once(torch.autograd.Function):
    """A square that torch differentiates once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * by


class WrongBackward(torch.autograd.Function):
    """A square whose backward treats the input as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * by


class WrongForward(torch.autograd.Function):
    """A square with a wrong forward-mode derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * by

    @staticmethod
    def jvp(ctx: Any, by: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * by


class WrongBatch(torch.autograd.Function):
    """A square with a wrong batching rule."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * by

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return 2 * x.square(), in_dims[0]


class Constant(torch.autograd.Function):
    """A sum that says it has the slope one, whatever comes from above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        return torch.ones(ctx.shape, dtype=by.dtype)


def branching(out: Tensor) -> Tensor:
    """Looks at a number, which vmap cannot."""
    return out if float(out.detach().sum()) > 0 else -out


class SinglePrecision(nn.Module):
    """Insists on float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return torch.tanh(self.layer(x))


class Generating(nn.Module):
    """Draws from a generator that nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        out: Tensor = self.layer(x)
        return out + torch.randn(out.shape, generator=generator)


def finding(module: nn.Module, name: str, *inputs: Any) -> fm.Finding:
    return fm.inspect(module, *(inputs or (X,)))[name]  # type: ignore[no-any-return]


# ---- good modules


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), X),
        (ConvBatchNorm(), torch.randn(4, 1, 5, 5)),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), X),
        (Recurrent(nn.LSTM), torch.randn(3, 4, 2)),
        (Recurrent(nn.GRU), torch.randn(3, 4, 2)),
        (Attention(), torch.randn(2, 3, 4)),
        (Tied(), torch.randint(5, (3, 4))),
        (nn.Linear(3, 2).double(), X.double()),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), X),
    ],
    ids=["mlp", "batch norm", "layer norm", "lstm", "gru", "attention", "tied", "linear, double", "weight norm"],
)
def test_all_works(module: nn.Module, inputs: Tensor) -> None:
    readiness = fm.inspect(module, inputs)
    assert [each.name for each in readiness.findings] == NAMES
    assert {name: readiness[name].status for name in NAMES[:3]} == dict.fromkeys(NAMES[:3], "works")
    assert readiness["double backward"].detail == "agrees with finite differences"
    assert readiness["forward AD"].detail == "agrees with double backward"
    assert readiness["vmap"].detail == "equal to a loop"
    assert not any(each.advice for each in readiness.findings)
    assert "fails" not in str(readiness)


def test_buffers_and_ties_and_draws_are_listed() -> None:
    batch_norm = finding(ConvBatchNorm(), "buffers", torch.randn(4, 1, 5, 5))
    assert batch_norm.detail == "returned anew by a call: 1.running_mean, 1.running_var, 1.num_batches_tracked"
    still = nn.Linear(3, 2)
    still.register_buffer("mask", torch.ones(3))
    assert finding(still, "buffers")[1:3] == ("works", "constant")
    assert finding(nn.Linear(3, 2), "buffers")[1:3] == ("none", "no buffers")
    tied = finding(Tied(), "tied weights", torch.randint(5, (3, 4)))
    assert tied[1:3] == ("works", "one entry each: decoder.weight is embedding.weight")
    dropout = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))
    assert finding(dropout, "randomness")[1:3] == ("works", "draws follow the seed")
    assert finding(dropout, "vmap")[1:3] == ("works", "not compared with a loop: draws differ under vmap")
    assert finding(nn.Linear(3, 2), "randomness")[1:3] == ("none", "deterministic")


def test_several_outputs_and_integers_among_them() -> None:
    readiness = fm.inspect(With(lambda out: {"out": out, "best": out.argmax(1), "more": (out.exp(), None)}), X)
    assert [each.status for each in readiness.findings[:3]] == ["works"] * 3


def test_a_gradient_without_a_graph_has_no_second_derivative() -> None:
    """Zero is right where the gradient is a constant, as finite differences of it say too."""
    assert finding(With(Constant.apply), "double backward")[1:3] == ("works", "agrees with finite differences")


# ---- what fails


@pytest.mark.parametrize(
    ("module", "name", "detail", "advice"),
    [
        (
            With(Once.apply),
            "double backward",
            "marked once_differentiable",
            "use FirstOrder(), or replace the operation",
        ),
        (With(WrongBackward.apply), "double backward", "differs from finite differences by", "look for detach()"),
        (
            With(lambda out: out * out.detach()),
            "double backward",
            "differs from finite differences",
            "look for detach()",
        ),
        (
            With(Once.apply),
            "forward AD",
            "In order to use an autograd.Function",
            "Reverse() needs double backward only",
        ),
        (
            With(WrongForward.apply),
            "forward AD",
            "differs from double backward",
            "trust Reverse() after check_meta_grad",
        ),
        (With(branching), "vmap", "vmap: It looks like", 'unroll_batch(strategy="loop")'),
        (With(WrongBatch.apply), "vmap", "differs from a loop", 'use unroll_batch(strategy="loop")'),
        (Generating(), "randomness", "one seed gives two results", "draw from torch's global generator"),
    ],
    ids=[
        "once",
        "wrong backward",
        "detached",
        "no jvp",
        "wrong jvp",
        "looks at numbers",
        "wrong batching",
        "generator",
    ],
)
def test_what_fails_says_what_to_do(module: nn.Module, name: str, detail: str, advice: str) -> None:
    found = finding(module, name)
    assert found.status == "fails"
    assert detail in found.detail
    assert advice in found.advice


def test_without_float64_differences_are_left_out() -> None:
    found = finding(SinglePrecision(), "double backward")
    assert found[1:] == ("works", "exists; not compared with differences: does not run in float64", "")


# ---- the table


def test_the_table() -> None:
    good, bad = fm.Finding("vmap", "works", "", ""), fm.Finding("forward AD", "fails", "no rule", "use another")
    assert str(fm.Readiness("Net", (good, bad))).splitlines() == [
        "Net",
        "  vmap        works",
        "  forward AD  fails  no rule",
        "                     → use another",
    ]


def test_a_detail_is_one_short_line() -> None:
    detail = finding(With(branching), "vmap").detail
    assert "\n" not in detail
    assert len(detail) <= 160


def test_indexing() -> None:
    readiness = fm.inspect(nn.Linear(3, 2), X)
    assert readiness["vmap"] is readiness.findings[2]
    assert readiness[0] == readiness.module == "Linear"
    name, findings = readiness
    assert (name, len(findings)) == ("Linear", 6)
    with pytest.raises(fm.ArgumentError, match=r"There is no finding 'speed'. Ask for one of \['double backward'"):
        readiness["speed"]


# ---- refused


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(fm.ArgumentError, match=r"Linear does not run on these inputs: .*Pass what its forward takes"):
        fm.inspect(nn.Linear(3, 2), torch.ones(4, 5))
    with pytest.raises(
        fm.ArgumentError, match="returns no floating-point tensor, so there is nothing to differentiate"
    ):
        fm.inspect(With(lambda out: out.argmax(1)), X)
    with pytest.raises(fm.ArgumentError, match="has no parameter that requires grad"):
        fm.inspect(nn.ReLU(), X)


def test_the_seed_decides_what_is_drawn() -> None:
    """Every other seed draws a branch that is differentiated once only."""

    def sometimes_once(z: Tensor) -> Tensor:
        return Once.apply(z) if torch.rand(()) < 0.5 else z.square()  # type: ignore[no-untyped-call, no-any-return]

    def draw(seed: int) -> float:
        with fm.rng.forked(seed):
            return torch.rand(()).item()

    low = next(seed for seed in range(100) if draw(seed) < 0.5)
    high = next(seed for seed in range(100) if draw(seed) >= 0.5)
    found = {seed: fm.inspect(With(sometimes_once), X, seed=seed)["double backward"].status for seed in (low, high)}
    assert found == {low: "fails", high: "works"}
