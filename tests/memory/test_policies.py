"""Every policy: the meta-gradient of StoreAll, at the cost that its plan foretells."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import (
    KINDS,
    STEPS,
    Setting,
    close,
    gradient,
    learned_optimizer,
    loss_of,
    mse,
    setting,
    tightest,
    wanted,
)
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta.memory import _follow

FIXED: list[Any] = [
    fm.Segments(2),
    fm.Revolve(1),
    fm.Revolve(2),
    fm.Revolve(3),
    fm.Revolve(STEPS + 5),
    fm.Offload(fm.Segments(2)),
    fm.Offload(fm.Revolve(2)),
]
fixed = pytest.mark.parametrize("memory", FIXED, ids=repr)
policies = pytest.mark.parametrize("memory", [*FIXED, "budget"], ids=repr)
twice = pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])


def of(case: Setting, memory: Any, **options: Any) -> Any:
    """The policy itself, or for the word "budget" the tightest one that this setting allows."""
    return tightest(case, **options) if memory == "budget" else memory


# ---- equal to StoreAll


@twice
@policies
@pytest.mark.parametrize("kind", [*KINDS, "learned optimizer"])
def test_the_meta_gradient_is_that_of_store_all(kind: str, memory: Any, twice: bool) -> None:
    case = learned_optimizer() if kind == "learned optimizer" else setting(kind)
    close(gradient(case, of(case, memory), twice=twice), gradient(case, fm.StoreAll(), twice=twice))


@twice
@policies
@pytest.mark.parametrize("kind", ["batch norm", "trajectory"])
def test_tasks_under_vmap(kind: str, memory: Any, twice: bool) -> None:
    case, options = setting(kind, (3,)), {"twice": twice, "strategy": "vmap"}
    if memory == "budget":
        memory = fm.budget(40_000)
    close(gradient(case, memory, **options), gradient(case, fm.StoreAll(), **options))


@policies
def test_tasks_in_a_loop(memory: Any) -> None:
    case = setting("batch norm", (3,))
    if memory == "budget":
        memory = fm.budget(3 * 40_000)
    close(gradient(case, memory, strategy="loop"), gradient(case, fm.StoreAll(), strategy="loop"))


@pytest.mark.parametrize("steps", [0, 1, 2])
@fixed
def test_few_steps(memory: Any, steps: int) -> None:
    case = setting()
    case = case._replace(meta={"params": case.meta["params"], "lr": case.meta["lr"].detach()})
    slopes = [
        torch.autograd.grad(fm.unroll(*case, steps=steps, memory=each).loss, wanted(case.meta))
        for each in (memory, fm.StoreAll())
    ]
    close(*slopes)


@given(
    st.sampled_from(["plain", "trajectory"]),
    st.integers(2, 12),
    st.one_of(st.integers(1, 13).map(fm.Segments), st.integers(1, 13).map(fm.Revolve)),
)
@settings(max_examples=40)
def test_any_number_of_steps(kind: str, steps: int, memory: Any) -> None:
    case = setting(kind)
    ours, theirs = (fm.unroll(*case, steps=steps, memory=each) for each in (memory, fm.StoreAll()))
    close((ours.loss, ours.state.params, ours.info.losses), (theirs.loss, theirs.state.params, theirs.info.losses))
    close(*(torch.autograd.grad(each.loss, wanted(case.meta)) for each in (ours, theirs)))


@policies
def test_a_carry_that_is_differentiated(memory: Any) -> None:
    case = setting("trajectory")
    policy = of(case, memory)
    first = fm.unroll(*case, steps=3, memory=policy)
    rest = fm.unroll(*case, steps=STEPS - 3, memory=policy, carry=fm.Carry(first.state, 3))
    close(list(torch.autograd.grad(first.loss + rest.loss, wanted(case.meta))), gradient(case, fm.StoreAll()))


@fixed
def test_a_final_state_that_is_used_outside(memory: Any) -> None:
    case = setting()

    def total(policy: Any) -> list[Tensor]:
        out = fm.unroll(*case, steps=STEPS, memory=policy)
        penalty = fm.tree.norm(out.state.params) ** 2 + fm.tree.norm(out.state.opt_state) ** 2
        return list(torch.autograd.grad(out.loss + penalty, wanted(case.meta)))

    close(total(memory), total(fm.StoreAll()))


@fixed
def test_a_state_whose_keys_change_their_order(memory: Any) -> None:
    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(state["w"])
        new = {"v": 0.5 * state["v"] + slope, "n": state["n"] + 1, "w": state["w"] - meta * (slope + state["v"])}
        return dict(reversed(new.items())) if int(state["n"]) % 2 else new, fm.StepInfo(loss)

    problem = fm.Problem(
        lambda meta, task, seed: {"w": meta * 1, "v": torch.zeros(2).double(), "n": torch.tensor(0)},
        step,
        lambda meta, state, query, seed: (state["w"] ** 2 * state["v"]).sum(),
    )
    meta = torch.tensor([0.3, 0.4]).double().requires_grad_()
    case = Setting(problem, meta, fm.Task(torch.ones(1), None))
    close(gradient(case, memory), gradient(case, fm.StoreAll()))


def dropped(name: str) -> Callable[..., Any]:
    """A deliberate bug in the sum of gradients over the parts of a run."""
    return {
        "the later part": lambda total, more: more,
        "the earlier part": lambda total, more: more if total is None else total,
    }[name]


@pytest.mark.parametrize("part", ["the later part", "the earlier part"])
def test_a_dropped_part_would_be_found_out(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = setting()
    expected = gradient(case, fm.StoreAll())
    monkeypatch.setattr(_follow, "_sum", dropped(part))
    with pytest.raises(AssertionError, match="not close"):
        close(gradient(case, fm.Revolve(2)), expected)


# ---- cost


class Taken:
    """A setting that counts its steps, and how many states are alive at the most."""

    def __init__(self) -> None:
        self.steps, self.most = 0, 0
        self._states = weakref.WeakSet[Any]()

        def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
            self.steps += 1
            self._note(w)
            loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(w)
            new = w - meta * slope
            self._note(new)
            return new, fm.StepInfo(loss)

        problem = fm.Problem(
            lambda meta, task, seed: torch.ones(3).double(), step, lambda meta, w, query, seed: (w**2).sum()
        )
        self.case = Setting(problem, torch.tensor(0.2).double().requires_grad_(), fm.Task(torch.ones(1), None))

    def _note(self, w: Tensor) -> None:
        self._states.add(w.untyped_storage())
        self.most = max(self.most, len({each._cdata for each in self._states}))


PLANNED = [*FIXED, fm.StoreAll(), fm.Segments(), fm.Segments(7)]


@pytest.mark.parametrize("steps", [1, 5, 23])
@pytest.mark.parametrize("memory", PLANNED, ids=repr)
def test_steps_are_taken_as_often_as_planned(memory: Any, steps: int) -> None:
    taken = Taken()
    out = fm.unroll(*taken.case, steps=steps, memory=memory)
    plan = fm.plan(memory, steps)
    assert out.info.memory == plan
    out.loss.backward()
    assert taken.steps == plan.evaluations


@pytest.mark.parametrize("memory", [fm.Revolve(1), fm.Revolve(2), fm.Revolve(5), fm.Offload(fm.Revolve(3))], ids=repr)
def test_no_more_states_are_alive_than_planned(memory: Any) -> None:
    """Beside those stored: the one a step begins at, the one it makes, and the one that the unroll returned."""
    taken = Taken()
    out = fm.unroll(*taken.case, steps=40, memory=memory)
    out.loss.backward()
    assert taken.most <= fm.plan(memory, 40).peak_states + 3
    everything = Taken()
    fm.unroll(*everything.case, steps=40).loss.backward()
    assert everything.most > 40


def test_without_a_graph_nothing_is_stored() -> None:
    taken = Taken()
    with torch.no_grad():
        fm.unroll(*taken.case, steps=40, memory=fm.Segments(1))
    assert (taken.steps, taken.most) == (40, 3)  # the initial one, and two that a step is between


def test_what_was_stored_goes_with_the_loss() -> None:
    """No reference goes round in a circle, which would keep states until the garbage collector comes by."""
    taken = Taken()
    gc.disable()
    try:
        for memory in (fm.Revolve(5), fm.Segments(2)):
            out = fm.unroll(*taken.case, steps=20, memory=memory)
            del out
            assert len(taken._states) == 0
    finally:
        gc.enable()


def test_a_leaf_that_some_steps_hand_on_makes_no_circle() -> None:
    """Such a tensor is stored, and is what the Function returns."""
    made = weakref.WeakSet[Any]()

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum())(state["w"])
        new = state["w"] - meta * slope
        old = new * 2 if state["count"] == 1 else state["old"]
        made.update([new.untyped_storage(), old.untyped_storage()])
        return {"w": new, "old": old, "count": state["count"] + 1}, fm.StepInfo(loss)

    problem = fm.Problem(
        lambda meta, task, seed: {"w": torch.ones(3), "old": torch.ones(3), "count": 0},
        step,
        lambda meta, state, query, seed: (state["w"] * state["old"]).sum(),
    )
    case = Setting(problem, torch.tensor(0.2, requires_grad=True), fm.Task(torch.ones(1), None))
    gc.collect()
    gc.disable()
    try:
        out = fm.unroll(*case, steps=20, memory=fm.Segments(4))
        del out
        assert len(made) == 0
    finally:
        gc.enable()


# ---- after an exception, and twice


def fragile(fail_at: set[int]) -> Setting:
    """The setting with batch normalization, whose loss raises at the calls of these numbers."""
    case, ran = setting("batch norm"), iter(range(1000))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        if next(ran) in fail_at:
            raise KeyboardInterrupt("in the middle")
        return mse(meta, predict, batch)

    with fm.rng.forked(3):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Setting(
        fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.7)), case.meta, case.task
    )


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("later", [0, 1, 3])
@fixed
def test_the_same_backward_pass_works_after_an_exception(memory: Any, later: int, create_graph: bool) -> None:
    expected = gradient(setting("batch norm"), fm.StoreAll())
    case = fragile({STEPS + 1 + later})  # the steps and the meta-loss come before
    loss = loss_of(case, memory)
    options = {"retain_graph": True, "create_graph": create_graph}
    if fm.plan(memory, STEPS).evaluations - STEPS <= later:
        pytest.skip("the backward pass takes fewer steps")
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        torch.autograd.grad(loss, wanted(case.meta), **options)
    assert torch.is_grad_enabled()
    for _ in range(2):
        close(list(torch.autograd.grad(loss, wanted(case.meta), **options)), expected)
    close(gradient(case, memory), expected)


@fixed
def test_backward_twice(memory: Any) -> None:
    case = setting("batch norm")
    loss = loss_of(case, memory)
    first = torch.autograd.grad(loss, wanted(case.meta), retain_graph=True)
    close(torch.autograd.grad(loss, wanted(case.meta)), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted(case.meta))


@fixed
def test_a_meta_that_was_changed_before_the_backward_pass(memory: Any) -> None:
    """As for StoreAll, torch notices."""
    case = setting()
    loss = loss_of(case, memory)
    with torch.no_grad():
        case.meta["lr"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    case.meta["lr"].data.sub_(1)


# ---- steps that do not come out the same


def test_a_share_that_differs() -> None:
    """The losses are the same; what a step gives to the meta-loss is not."""
    noise = torch.Generator().manual_seed(0)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, slope = fm.value_and_grad(lambda w: (w**2).sum())(w)
        return w - meta * slope, fm.StepInfo(loss, loss * torch.rand((), generator=noise))

    case = Setting(
        fm.Problem(lambda meta, task, seed: torch.ones(2), step, None),
        torch.tensor(0.1, requires_grad=True),
        fm.Task(torch.ones(1), None),
    )
    with pytest.raises(fm.ReplayError, match="Step 0 was run again and gave the share of the meta-loss"):
        loss_of(case, fm.Segments(3)).backward()


@pytest.mark.parametrize("inner", [fm.StoreAll(), fm.Segments(1)], ids=repr)
@pytest.mark.parametrize("outer", [fm.StoreAll(), fm.Revolve(2)], ids=repr)
def test_one_unroll_inside_another(outer: Any, inner: Any) -> None:
    """Each replays its own steps, and the check of unused leaves does not take one for the other."""
    within = setting("trajectory")

    def nested(memory: Any) -> Setting:
        def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
            start = {"params": fm.tree.detach(within.meta["params"]), "lr": meta["lr"] * w.sum()}
            out = fm.unroll(within.problem, start, within.task, steps=3, memory=memory)
            return w - 0.1 * out.loss * meta["scale"], fm.StepInfo(out.loss)

        problem = fm.Problem(lambda meta, task, seed: torch.ones(2).double(), step, lambda m, w, q, s: (w**2).sum())
        meta = {"lr": torch.tensor(0.1).double(), "scale": torch.tensor(1.0).double()}
        return Setting(problem, fm.tree.map(lambda leaf: leaf.requires_grad_(), meta), fm.Task(torch.ones(1), None))

    close(gradient(nested(inner), outer), gradient(nested(fm.StoreAll()), fm.StoreAll()))


# ---- models that checkpoint themselves


def middle(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(hidden @ weight).sin()


def self_checkpointing(checkpointed: bool, tasks: tuple[int, ...] = ()) -> Setting:
    """A loss that keeps no activation of its middle, but computes it again."""

    def loss(w: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ w["first"])
        if checkpointed:
            hidden = torch.utils.checkpoint.checkpoint(middle, hidden, w["middle"], use_reentrant=False)
        else:
            hidden = middle(hidden, w["middle"])
        return (hidden @ w["last"]).square().mean()

    def step(meta: Any, w: Any, x: Tensor, seed: int) -> Any:
        value, slopes = fm.value_and_grad(loss)(w, x)
        return fm.tree.map(lambda leaf, slope: leaf - meta["lr"] * slope, w, slopes), fm.StepInfo(value)

    with fm.rng.forked(5):
        w = {"first": torch.randn(3, 4), "middle": torch.randn(4, 4), "last": torch.randn(4, 1)}
        x = torch.randn(*tasks, 5, 3).double()
    meta = {"w": fm.tree.map(lambda leaf: leaf.double().requires_grad_(), w), "lr": torch.tensor(0.2).double()}
    problem = fm.Problem(lambda meta, task, seed: meta["w"], step, lambda meta, w, x, seed: loss(w, x))
    return Setting(problem, {**meta, "lr": meta["lr"].requires_grad_()}, fm.Task(x, x))


@twice
@pytest.mark.parametrize("memory", [fm.StoreAll(), *FIXED], ids=repr)
def test_a_loss_that_checkpoints_itself(memory: Any, twice: bool) -> None:
    ours, plain = self_checkpointing(True), self_checkpointing(False)
    close(gradient(ours, memory, twice=twice), gradient(plain, fm.StoreAll(), twice=twice))


class CheckpointedPart(torch.nn.Module):
    """A part with a normalization, of which no activation is kept."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Tanh())
        self.head = torch.nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)
        else:
            x = self.part(x)
        return self.head(x)  # type: ignore[no-any-return]


def with_a_part(checkpointed: bool) -> Setting:
    with fm.rng.forked(3):
        net = CheckpointedPart(checkpointed).double()
        batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    problem = fm.inner_problem(
        net,
        lambda meta, predict, batch: (predict(batch[0]) - batch[1]).square().mean(),
        optimizer=lambda meta: fm.optim.sgd(meta["lr"], momentum=0.7),
    )
    meta = {"params": fm.init_params(net), "lr": torch.tensor(0.2).double().requires_grad_()}
    return Setting(problem, meta, fm.Task(batch, batch))


@twice
@pytest.mark.parametrize("memory", [fm.StoreAll(), *FIXED], ids=repr)
def test_a_module_that_checkpoints_itself(memory: Any, twice: bool) -> None:
    ours, plain = with_a_part(True), with_a_part(False)
    close(gradient(ours, memory, twice=twice), gradient(plain, fm.StoreAll(), twice=twice))
    if not twice:
        got = gradient(ours, memory, estimator=fm.MixedMode())
        close(got, gradient(plain, fm.StoreAll()))


def test_under_vmap_torch_refuses_such_a_loss() -> None:
    """With an error of its own, which speaks of functorch: strategy="loop" is the way."""
    with pytest.raises(RuntimeError, match="functorch"):
        loss_of(self_checkpointing(True, (3,)), fm.StoreAll(), "vmap")
    assert loss_of(self_checkpointing(True, (3,)), fm.StoreAll(), "loop").isfinite()
