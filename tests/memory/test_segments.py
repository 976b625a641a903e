"""Segments: the meta-gradient of StoreAll, for two runs of each step."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from memory_cases import (
    KINDS,
    LENGTHS,
    STEPS,
    Setting,
    close,
    gradient,
    learned_optimizer,
    loss_of,
    mse,
    numbers,
    setting,
    wanted,
)
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import optim
from funcmeta._gradient import steering
from funcmeta.memory._witness import Witness

lengths = pytest.mark.parametrize("length", LENGTHS)


# ---- equal to StoreAll


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@lengths
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_that_of_store_all(kind: str, length: int | None, twice: bool) -> None:
    case = setting(kind)
    close(gradient(case, fm.Segments(length), twice=twice), gradient(case, fm.StoreAll(), twice=twice))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", ["batch norm", "adam", "frozen start"])
def test_tasks_in_a_batch(kind: str, twice: bool, strategy: str) -> None:
    case = setting(kind, (3,))
    options = {"twice": twice, "strategy": strategy}
    close(gradient(case, fm.Segments(2), **options), gradient(case, fm.StoreAll(), **options))


@pytest.mark.parametrize("kind", ["plain", "batch norm", "dropout", "trajectory"])
def test_first_order_is_that_of_store_all(kind: str) -> None:
    """The constant inner gradients are constants in the replay too."""
    case, options = setting(kind), {"estimator": fm.FirstOrder()}
    got = gradient(case, fm.Segments(2), **options)
    close(got, gradient(case, fm.StoreAll(), **options))
    exact = gradient(case, fm.StoreAll())
    assert max(float((a - b).abs().max()) for a, b in zip(got, exact, strict=True)) > 1e-3


@lengths
def test_results_are_those_of_store_all(length: int | None) -> None:
    case = setting("batch norm")
    ours, theirs = (fm.unroll(*case, steps=STEPS, memory=each) for each in (fm.Segments(length), fm.StoreAll()))
    close(ours.loss, theirs.loss)
    close(ours.info.losses, theirs.info.losses)
    close(ours.state.params, theirs.state.params)
    close(ours.state.buffers["1.running_var"], theirs.state.buffers["1.running_var"])
    assert int(ours.state.step) == int(ours.state.buffers["1.num_batches_tracked"]) == STEPS


def test_the_state_may_hold_more_than_tensors() -> None:
    """A name, None, an integer that counts, and an integer tensor."""

    def init(meta: Any, task: fm.Task, seed: int) -> Any:
        return {"w": meta["w"] * 1, "name": "run", "none": None, "count": 0, "n": torch.tensor(0)}

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        scale = 1 + state["count"]
        loss, slope = fm.value_and_grad(lambda w: (torch.sin(w) ** 2).sum() * scale)(state["w"])
        new = {"w": state["w"] - meta["lr"] * slope, "count": state["count"] + 1, "n": state["n"] + 1}
        return {**state, **new}, fm.StepInfo(loss)

    problem = fm.Problem(init, step, lambda meta, state, query, seed: (state["w"] ** 3).sum() * state["count"])
    meta = {"w": torch.tensor([0.3, -0.8]).double(), "lr": torch.tensor(0.1).double()}
    case = Setting(problem, fm.tree.map(lambda leaf: leaf.requires_grad_(), meta), fm.Task(torch.ones(1), None))
    for length in (1, 2, None):
        state = fm.unroll(*case, steps=STEPS, memory=fm.Segments(length)).state
        assert (state["name"], state["none"], state["count"], int(state["n"])) == ("run", None, STEPS, STEPS)
        for twice in (False, True):
            close(
                gradient(case, fm.Segments(length), twice=twice),
                gradient(case, fm.StoreAll(), twice=twice),
            )


def test_a_carry_that_is_differentiated() -> None:
    case = setting()
    whole = gradient(case, fm.StoreAll())
    first = fm.unroll(*case, steps=2, memory=fm.Segments(2))
    rest = fm.unroll(*case, steps=STEPS - 2, memory=fm.Segments(3), carry=fm.Carry(first.state, 2))
    close(list(torch.autograd.grad(rest.loss, wanted(case.meta))), whole)


def test_the_final_state_may_be_used_outside() -> None:
    """A penalty on the state that unroll returns is differentiated with the loss."""
    case = setting()

    def total(memory: Any) -> list[Tensor]:
        out = fm.unroll(*case, steps=STEPS, memory=memory)
        penalty = fm.tree.norm(out.state.params) ** 2 + fm.tree.norm(out.state.opt_state) ** 2
        return list(torch.autograd.grad(out.loss + penalty, wanted(case.meta)))

    close(total(fm.Segments(4)), total(fm.StoreAll()))


@pytest.mark.parametrize("length", [1, 4])
def test_backward_twice(length: int) -> None:
    case = setting("batch norm")
    loss = loss_of(case, fm.Segments(length))
    leaves = wanted(case.meta)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    close(torch.autograd.grad(loss, leaves), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_a_part_of_the_leaves() -> None:
    case = setting()
    loss = loss_of(case, fm.Segments(2))
    (slope,) = torch.autograd.grad(loss, case.meta["lr"])
    close(slope, torch.autograd.grad(loss_of(case, fm.StoreAll()), case.meta["lr"])[0])


# ---- cost


class Counted(NamedTuple):
    """How often the user's loss ran: until the meta-loss, and with its derivative."""

    forward: int
    backward: int


def count(memory: Any, *, estimator: Any = fm.Reverse(), vmap: bool = False) -> Counted:  # noqa: B008
    ran = 0

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        nonlocal ran
        ran += 1
        return mse(meta, predict, batch)

    with fm.rng.forked(0):
        net = nn.Linear(3, 2).double()
        task = fm.Task(numbers((2,)), numbers((2,))) if vmap else fm.Task(numbers(), numbers())
    problem = fm.inner_problem(net, loss, optimizer=optim.sgd(0.1))
    meta = {"params": fm.init_params(net)}
    options: dict[str, Any] = {"steps": STEPS, "memory": memory, "estimator": estimator}
    if vmap:
        fm.unroll_batch(problem, meta, task, strategy="vmap", **options)  # the first call compares with a loop
        ran = 0
        out = fm.unroll_batch(problem, meta, task, strategy="vmap", **options)
    else:
        out = fm.unroll(problem, meta, task, **options)
    forward = ran
    out.loss.backward()
    return Counted(forward, ran - forward)


@pytest.mark.parametrize("vmap", [False, True], ids=["single", "vmap"])
@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
def test_store_all_runs_each_step_once(estimator: Any, vmap: bool) -> None:
    assert count(fm.StoreAll(), estimator=estimator, vmap=vmap) == (STEPS + 1, 0)


@pytest.mark.parametrize("vmap", [False, True], ids=["single", "vmap"])
@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
@lengths
def test_segments_run_each_step_but_the_last_ones_twice(length: int | None, estimator: Any, vmap: bool) -> None:
    last = min(length or round(math.sqrt(STEPS)), STEPS)
    assert count(fm.Segments(length), estimator=estimator, vmap=vmap) == (STEPS + 1, STEPS - last)


def test_the_replay_casts_as_the_first_run_did() -> None:
    """The loss is computed under autocast, its backward pass runs outside."""
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    problem = fm.inner_problem(net, mse, optimizer=optim.sgd(0.5))
    batch = torch.randn(5, 3), torch.randn(5, 2)
    case, slopes = Setting(problem, {"params": fm.init_params(net)}, fm.Task(batch, batch)), []
    for memory in (fm.StoreAll(), fm.Segments(2)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(case, memory)
        slopes.append(list(torch.autograd.grad(loss, wanted(case.meta))))
        assert not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


# ---- after an exception


def fragile(fail_at: list[int]) -> Setting:
    """The plain setting, whose loss raises at the calls whose numbers are in ``fail_at``."""
    case, ran = setting(), iter(range(1000))

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        if next(ran) in fail_at:
            raise KeyboardInterrupt("in the middle")
        return mse(meta, predict, batch)

    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = fm.inner_problem(net, loss, optimizer=lambda meta: optim.sgd(meta["lr"], momentum=0.7))
    return Setting(problem, case.meta, case.task)


@pytest.mark.parametrize("estimator", [fm.Reverse(), fm.FirstOrder()], ids=repr)
@pytest.mark.parametrize("fail_at", [2, STEPS + 3], ids=["forward", "backward"])
def test_it_works_again_after_an_exception(fail_at: int, estimator: Any) -> None:
    case, flags = fragile([fail_at]), torch.backends.mkldnn.enabled
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        gradient(case, fm.Segments(2), estimator=estimator)
    assert steering() is None
    assert torch.is_grad_enabled()
    assert torch.backends.mkldnn.enabled == flags
    assert torch.equal(torch.get_rng_state(), before)
    close(gradient(case, fm.Segments(2), estimator=estimator), gradient(setting(), fm.StoreAll(), estimator=estimator))


# ---- refused


def test_a_source_of_batches_that_can_not_be_replayed() -> None:
    case = setting()
    stream = iter([numbers() for _ in range(3 * STEPS)])
    task = case.task._replace(support=lambda step: next(stream))
    with pytest.raises(fm.ReplayError, match=r"support\(0\) gave two different batches in a row.*or use StoreAll\(\)"):
        loss_of(case._replace(task=task), fm.Segments(2))
    assert loss_of(case._replace(task=task), fm.StoreAll()).isfinite()


def test_a_source_of_batches_that_differs_later() -> None:
    """The start does not give it away; the replay of step 3 does, and names it."""
    case = setting()
    asked = [0] * STEPS

    def support(step: int) -> Any:
        asked[step] += 1
        x, y = case.task.support
        return x, y + (asked[step] if step == 3 else 0)

    loss = loss_of(case._replace(task=case.task._replace(support=support)), fm.Segments(2))
    with pytest.raises(fm.ReplayError, match=r"Step 3 was run again and gave the loss .* functions of \(step, seed\)"):
        loss.backward()


def test_a_generator_in_the_loss() -> None:
    case, generator = setting(), torch.Generator().manual_seed(0)

    def noisy(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return mse(meta, predict, (x + 0.1 * torch.randn(x.shape, generator=generator), y))

    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = fm.inner_problem(net, noisy, optimizer=lambda meta: optim.sgd(meta["lr"]))
    loss = loss_of(case._replace(problem=problem), fm.Segments(3))
    with pytest.raises(fm.ReplayError, match="no iterators, no generators, no counters outside the state"):
        loss.backward()


@pytest.mark.parametrize(("change", "same"), [(1e-10, True), (1e-6, False)])
def test_a_repeated_step_may_differ_by_rounding(change: float, same: bool) -> None:
    """Half of the digits are compared: kernels add in different orders."""
    taken: list[int] = []
    case = learned_optimizer()

    def step(meta: Any, state: Any, batch: Any, seed: int) -> Any:
        taken.append(1)
        state, info = case.problem.step(meta, state, batch, seed)
        return state, info._replace(loss=info.loss * (1 + change * (len(taken) > 20)))

    out = fm.unroll(case.problem._replace(step=step), *case[1:], steps=20, memory=fm.Segments(5))
    if same:
        torch.autograd.grad(out.loss, wanted(case.meta))
    else:
        with pytest.raises(fm.ReplayError, match="was run again and gave the loss"):
            torch.autograd.grad(out.loss, wanted(case.meta))


def test_repeated_steps_are_compared_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison is a wait for the device."""
    compared, compare = [], Witness.compare

    def counting(self: Witness) -> None:
        compared.append(len(self._again))
        compare(self)

    monkeypatch.setattr(Witness, "compare", counting)
    case = learned_optimizer()
    out = fm.unroll(*case, steps=900, memory=fm.Segments(300))
    torch.autograd.grad(out.loss, wanted(case.meta))
    assert sum(compared) == 600
    assert max(compared) >= 256
    assert len(compared) <= 8


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_inside_torch_func_it_is_refused(transform: str) -> None:
    case = setting()

    def loss(meta: Any) -> Tensor:
        return loss_of(case._replace(meta=meta), fm.Segments(2))

    meta = fm.tree.detach(case.meta)
    if transform == "vmap":
        meta = fm.tree.map(lambda leaf: leaf[None], meta)
    with pytest.raises(fm.ArgumentError, match=r"cannot run inside torch.func. Use StoreAll\(\) there"):
        getattr(torch.func, transform)(loss)(meta)


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "2"])
def test_bad_lengths(length: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"expected a positive integer or None\. Pass e.g. length=10"):
        fm.Segments(length)


def test_memory_policies_compare_and_print() -> None:
    assert fm.Segments(2) == fm.Segments(2) != fm.Segments(3)
    assert repr(fm.Segments()) == "Segments(length=None)"


def test_draws_after_the_loss_follow_the_seed() -> None:
    """An optimizer that masks its updates at random: the same in a replay, the same for the same seed."""

    def masking() -> fm.Transform:
        def update(grads: Any, state: Any, params: Any) -> Any:
            return {name: -0.1 * grad * (torch.rand_like(grad) < 0.5) for name, grad in grads.items()}, state

        return fm.Transform(lambda params: (), update)

    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    problem = fm.inner_problem(net, lambda m, predict, x: predict(x).square().mean(), optimizer=masking())
    meta = {"params": fm.init_params(net)}

    def gradient(memory: Any) -> Any:
        loss = fm.unroll(problem, meta, fm.Task(x, x), steps=4, memory=memory, seed=3).loss
        return torch.autograd.grad(loss, list(meta["params"].values()))

    truth = gradient(fm.StoreAll())
    for memory in (fm.StoreAll(), fm.Segments(1), fm.Segments(4)):
        for one, other in zip(truth, gradient(memory), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_step_that_ends_elsewhere_at_the_same_loss_is_found() -> None:
    generator = torch.Generator().manual_seed(0)

    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> Any:
        loss, gradient = fm.value_and_grad(lambda w: (w**2).sum())(w)
        return w - 0.1 * gradient * torch.rand(2, generator=generator, dtype=torch.float64), fm.StepInfo(loss)

    problem = fm.Problem(lambda meta, task, seed: meta, step, lambda meta, w, query, seed: w.sum())
    meta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = fm.unroll(problem, meta, fm.Task(torch.zeros(1), None), steps=2, memory=fm.Segments(1)).loss
    with pytest.raises(fm.ReplayError, match="The steps before step 1 were run again and ended in another state"):
        loss.backward()
