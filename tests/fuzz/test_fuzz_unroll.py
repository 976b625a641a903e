"""The unroll, its estimators and its memory policies, under bad and odd arguments; held against a plain loop."""

from collections.abc import Callable
from typing import Any

import torch
from fuzzing import FLOATS, Draw, Refused, attempt, close, contiguous, either, fuzz, junk, own, tensor, tree_of
from hypothesis import strategies as st
from torch import Tensor

import funcmeta as fm
from funcmeta.memory import Revolve, Segments, StoreAll

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LEARNED = 0.1


def inner_loss(params: Any, x: Tensor) -> Tensor:
    """A smooth loss of any tree of tensors, which has second derivatives."""
    leaves = fm.tree.leaves(params)
    parts = [(1.3 * leaf + leaf.sin() * (index + 1)).sum() for index, leaf in enumerate(leaves)]
    x = x * 1  # torch subtracts no bool
    total = sum(parts, torch.zeros((), dtype=x.dtype, device=x.device))
    return (1 + (total - x) ** 2).sqrt().mean()


def start(meta: Any, task: fm.Task, seed: int) -> Any:
    return meta["params"]


def step(meta: Any, params: Any, x: Tensor, seed: int) -> tuple[Any, fm.StepInfo]:
    loss, grads = fm.value_and_grad(inner_loss)(params, x)
    return fm.tree.map(lambda leaf, grad: leaf - meta["lr"] * grad, params, grads), fm.StepInfo(loss)


def judge(meta: Any, params: Any, x: Tensor, seed: int) -> Tensor:
    return inner_loss(params, x)


PROBLEM = fm.Problem(own(start), own(step), own(judge))


def by_hand(meta: Any, batches: list[Tensor], query: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The meta-loss and its gradient by a loop of torch.autograd.grad on contiguous copies."""
    copies = contiguous(meta)
    leaves, spec = fm.tree.flatten(copies["params"])
    point = (
        leaves if not batches else [leaf if leaf.requires_grad else leaf.clone().requires_grad_() for leaf in leaves]
    )
    for x in batches:
        loss = inner_loss(fm.tree.unflatten(point, spec), x)
        grads = torch.autograd.grad(loss, point, create_graph=True)
        point = [leaf - copies["lr"] * grad for leaf, grad in zip(point, grads, strict=True)]
    loss = inner_loss(fm.tree.unflatten(point, spec), query)
    learned = [leaf for leaf in fm.tree.leaves(copies) if leaf.requires_grad]
    if not loss.requires_grad:
        return loss, [torch.zeros_like(leaf) for leaf in learned]
    return loss.detach(), list(torch.autograd.grad(loss, learned, materialize_grads=True)) if learned else []


def a_meta(draw: Draw, dtype: torch.dtype, *, special: bool) -> dict[str, Any]:
    """Initial parameters and a rate, some of them learned, now and then broken."""
    params = tree_of(draw, lambda: tensor(draw, dtypes=[dtype], odds=20, special=special, grad=None))
    rate = torch.tensor(LEARNED, dtype=dtype, requires_grad=draw(st.booleans()))
    return {"params": params, "lr": either(draw, rate, st.one_of(st.just(0.1), st.just(rate.to("meta"))), 25)}


def a_batch(draw: Draw, dtype: torch.dtype, *, special: bool = False) -> Tensor:
    return tensor(draw, [(3,), (1,), (2, 2), (3,), (0,)], [dtype], odds=20, special=special)


BAD_STEPS = junk().filter(lambda value: not (isinstance(value, int) and value == 10**6))
"""A million steps are taken, if it takes hours."""
SEEDS = st.one_of(st.integers(0, 2**63 - 1), st.just(0))
MEMORIES = st.one_of(
    st.sampled_from([StoreAll(), Segments(), Segments(2), Revolve(1), Revolve(3), fm.Offload(Segments(1))]),
    st.sampled_from([fm.budget(10**7), fm.budget(1), fm.budget(2000)]),
)
EXACT: list[Any] = [fm.Reverse(), fm.Reverse(), fm.Reverse(), fm.MixedMode(), fm.ForwardMode(), fm.Truncated(9)]
INEXACT: list[Any] = [fm.FirstOrder(), fm.Truncated(1), fm.Reptile(), fm.EvolutionStrategies(0.1, 2)]


def coarsest(dtype: torch.dtype, *trees: Any) -> float:
    """The tolerance of the coarsest dtype that takes part: a tensor with dimensions decides over one without."""
    dtypes = {dtype, *(leaf.dtype for each in trees for leaf in fm.tree.leaves(each) if isinstance(leaf, Tensor))}
    return max(TOLERANCE.get(each, TOLERANCE[torch.float32]) for each in dtypes)  # 0.1 · integers is in float32


def is_exact(estimator: Any) -> bool:
    return any(type(estimator) is type(each) and estimator == each for each in EXACT)


@fuzz()
def test_unroll_refuses_or_agrees_with_a_loop(draw: Draw) -> None:
    dtype, special = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 3)) == 3
    meta = either(draw, a_meta(draw, dtype, special=special), junk(), 25)
    x, query = a_batch(draw, dtype, special=special), a_batch(draw, dtype)
    support = either(draw, st.sampled_from([x, lambda index: x + 0.1 * index]), junk(), 20)
    task = either(draw, fm.Task(support, either(draw, query, junk(), 25)), junk(), 40)
    steps = either(draw, st.integers(0, 4), BAD_STEPS, 25)
    seed = either(draw, SEEDS, junk(), 40)
    estimator = either(draw, st.sampled_from(EXACT), st.one_of(st.sampled_from(INEXACT), junk()), 8)
    memory = either(draw, MEMORIES, junk(), 25)
    out = attempt(
        lambda: fm.unroll(PROBLEM, meta, task, steps=steps, estimator=estimator, memory=memory, seed=seed),
        *(meta, x, query, task),
    )
    if isinstance(out, Refused):
        return
    assert bool(out.loss.isfinite())
    assert out.info.losses.shape == (steps,)
    assert out.carry.step == steps
    learned = [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad]
    before = [None if leaf.grad is None else leaf.grad for leaf in learned]
    got = attempt(lambda: torch.autograd.grad(out.loss, learned, materialize_grads=True) if learned else [], meta, task)
    assert [leaf.grad for leaf in learned] == before
    batches = [task.support(index) if callable(task.support) else task.support for index in range(steps)]
    loss, grads = by_hand(meta, [contiguous(each) for each in batches], contiguous(task.query))
    if not isinstance(estimator, fm.Reptile):
        close(out.loss, loss, coarsest(dtype, meta, x, query))
    if is_exact(estimator) and not isinstance(got, Refused):
        close(list(got), grads, coarsest(dtype, meta, x, query))


@fuzz(cost=2)
def test_unroll_batch_refuses_or_agrees_with_loops(draw: Draw) -> None:
    dtype, tasks = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 3))
    meta = either(draw, a_meta(draw, dtype, special=draw(st.integers(0, 5)) == 5), junk(), 30)
    shapes = [(tasks, 3), (tasks, 3), (tasks, 3), (tasks, 1), (tasks, 2, 2)]
    x = tensor(draw, shapes, [dtype], odds=30)
    query = either(draw, tensor(draw, shapes, [dtype], odds=30), tensor(draw), 30)
    support = either(draw, st.sampled_from([x, lambda index: x + 0.1 * index]), junk(), 30)
    task = either(draw, fm.Task(support, query), junk(), 40)
    steps = either(draw, st.integers(0, 3), BAD_STEPS, 30)
    strategy: Any = either(draw, st.sampled_from(["vmap", "loop", "vmap", "loop", "auto"]), junk(), 30)
    estimator = either(draw, st.sampled_from(EXACT), junk(), 30)
    memory = either(draw, MEMORIES, junk(), 30)
    arguments = {"steps": steps, "strategy": strategy, "estimator": estimator, "memory": memory}
    out = attempt(lambda: fm.unroll_batch(PROBLEM, meta, task, **arguments), meta, x, query, task)
    if isinstance(out, Refused):
        return
    assert out.info.losses.shape == (steps, tasks)
    learned = [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad]
    got = attempt(lambda: torch.autograd.grad(out.loss, learned, materialize_grads=True) if learned else [], meta, task)
    every = []
    for index in range(tasks):
        batches = [(task.support(k) if callable(task.support) else task.support)[index] for k in range(steps)]
        every.append(by_hand(meta, [contiguous(each) for each in batches], contiguous(task.query[index])))
    tolerance = coarsest(dtype, meta, x, query)
    close(out.loss, torch.stack([loss for loss, _ in every]).mean(), tolerance)
    if not isinstance(got, Refused):
        means = [torch.stack(column).mean(0) for column in zip(*[grads for _, grads in every], strict=True)]
        close(list(got), means, tolerance)


@fuzz(cost=2)
def test_carries(draw: Draw) -> None:
    """Going on from a carry is the same as not having stopped; a broken carry is refused."""
    meta = {
        "params": {"w": tensor(draw, [(2,), (1,), ()], [torch.float64], grad=True)},
        "lr": torch.tensor(0.1).double(),
    }
    x = tensor(draw, [(3,)], [torch.float64])
    task = fm.Task(lambda index: x + 0.1 * index, x)
    first, second = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    begun = fm.unroll(PROBLEM, meta, task, steps=first)
    good = draw(st.sampled_from([begun.carry, fm.Carry(begun.state, first)]))
    parts = {"state": good.state, "step": good.step, "particles": None}
    name = draw(st.sampled_from(["", "", "state", "step", "particles", "all"]))
    if name in parts:
        parts[name] = draw(junk())
    carry = draw(junk()) if name == "all" else fm.Carry(**parts)
    out = attempt(lambda: fm.unroll(PROBLEM, meta, task, steps=second, carry=carry), meta, carry, task)
    if not isinstance(out, Refused) and carry == good:
        whole = fm.unroll(PROBLEM, meta, task, steps=first + second)
        close((out.loss, out.state), (whole.loss, whole.state), 1e-12)


BROKEN_RESULTS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda value: None,
    "a number": lambda value: 1.0,
    "an integer tensor": lambda value: value.long(),
    "a vector": lambda value: value[None],
    "detached": lambda value: value.detach(),
    "NaN": lambda value: value * float("nan"),
    "a new dtype": lambda value: value.float(),
    "on meta": lambda value: value.to("meta"),
    "as it is": lambda value: value,
    "an array": lambda value: value.detach().numpy(),
}


@fuzz(cost=2)
def test_what_a_problem_returns_may_be_broken(draw: Draw) -> None:
    """The loss, the state, the meta-loss or the pair of a step is something else."""
    place = draw(st.sampled_from(["inner loss", "state", "meta-loss", "info loss", "share", "pair", "init"]))
    broken = BROKEN_RESULTS[draw(st.sampled_from(sorted(BROKEN_RESULTS)))]
    junked = draw(junk()) if draw(st.integers(0, 4)) == 4 else None

    def spoil(here: str, value: Any) -> Any:
        if here != place:
            return value
        return junked if junked is not None else broken(value)

    def spoiled_step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        loss, grad = fm.value_and_grad(lambda w: spoil("inner loss", ((w * x).sin().sum() + w.sum())))(w)
        info = fm.StepInfo(spoil("info loss", loss), spoil("share", 0.1 * loss) if place == "share" else None)
        return (
            spoil("pair", (spoil("state", w - meta * grad), info))
            if place == "pair" and junked is not None
            else (
                spoil("state", w - meta * grad),
                info,
            )
        )

    problem = fm.Problem(
        own(lambda meta, task, seed: spoil("init", torch.ones(2, dtype=torch.float64) * meta)),
        own(spoiled_step),
        own(lambda meta, w, x, seed: spoil("meta-loss", (w * x).cos().sum())),
    )
    meta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.3, 1.0], dtype=torch.float64)
    memory, estimator = draw(MEMORIES), draw(st.sampled_from(EXACT))
    out = attempt(lambda: fm.unroll(problem, meta, fm.Task(x, x), steps=2, memory=memory, estimator=estimator), meta, x)
    if not isinstance(out, Refused):
        attempt(lambda: torch.autograd.grad(out.loss, meta), meta)


@fuzz(cost=2)
def test_constructors_of_estimators_and_memories(draw: Draw) -> None:
    make, names = draw(
        st.sampled_from(
            [
                (fm.Truncated, ("length", "estimator")),
                (fm.EvolutionStrategies, ("sigma", "pairs", "chunk", "share")),
                (fm.PersistentES, ("sigma", "pairs", "length", "chunk", "share")),
                (Segments, ("length",)),
                (Revolve, ("snapshots",)),
                (fm.Offload, ("inner", "device")),
                (fm.budget, ("bytes",)),
            ]
        )
    )
    good: dict[str, Any] = {
        "length": 2,
        "estimator": fm.FirstOrder(),
        "sigma": 0.1,
        "pairs": 2,
        "chunk": None,
        "share": (0, 1),
        "snapshots": 2,
        "inner": Segments(2),
        "device": "cpu",
        "bytes": 10**7,
    }
    numbers = st.one_of(st.integers(-2, 5), st.floats(-1.0, 1.0), st.tuples(st.integers(-1, 3), st.integers(-1, 3)))
    small = junk().filter(lambda value: not isinstance(value, int) or value < 9)
    values = {name: either(draw, good[name], st.one_of(small, numbers), 3) for name in names}
    made = attempt(lambda: make(**values), values)
    if isinstance(made, Refused):
        return
    w = tensor(draw, [(2,)], [torch.float64], grad=True)
    meta = {"params": {"w": w}, "lr": torch.tensor(0.1, dtype=torch.float64)}
    x = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    if hasattr(made, "run"):
        steps = either(draw, st.integers(0, 5), BAD_STEPS, 8)
        found = attempt(lambda: fm.plan(made, steps), made, steps)
        out = attempt(lambda: fm.unroll(PROBLEM, meta, fm.Task(x, x), steps=3, memory=made), meta, x)
        if not isinstance(out, Refused):
            close(
                torch.autograd.grad(out.loss, w),
                torch.autograd.grad(fm.unroll(PROBLEM, meta, fm.Task(x, x), steps=3).loss, w),
                1e-10,
            )
        if not isinstance(found, Refused):
            assert found.evaluations >= steps
    else:
        out = attempt(lambda: fm.unroll(PROBLEM, meta, fm.Task(x, x), steps=3, estimator=made), meta, x)
        if not isinstance(out, Refused):
            assert torch.autograd.grad(out.loss, w)[0].isfinite().all()


@fuzz()
def test_value_and_grad_agrees_with_autograd(draw: Draw) -> None:
    params = tree_of(draw, lambda: tensor(draw, odds=12, special=draw(st.integers(0, 3)) == 3, grad=None))
    if any(leaf.is_meta for leaf in fm.tree.leaves(params)):
        params = fm.tree.map(lambda leaf: leaf.detach().to("meta"), params)
    params = either(draw, params, junk(), 15)
    x = torch.tensor([0.5, -1.0], dtype=torch.float64).to(next(iter(fm.tree.tensors(params)), torch.ones(1)).device)
    scale = draw(st.sampled_from([1.0, 0.0, 2.0]))
    aux = draw(st.booleans())

    @own
    def loss(params: Any) -> Any:
        value = scale * inner_loss(params, x)
        return (value, {"aux": 3}) if aux else value

    attached = draw(st.booleans())
    with torch.set_grad_enabled(attached):
        out = attempt(lambda: fm.value_and_grad(loss, has_aux=aux)(params), params)
    if isinstance(out, Refused):
        return
    value, grads = (out[0][0], out[1]) if aux else out
    leaves = [leaf.detach().requires_grad_() for leaf in fm.tree.leaves(params)]
    expected = scale * inner_loss(fm.tree.like(params, leaves), x)
    close(value, expected, 1e-9)
    close(grads, torch.autograd.grad(expected, leaves), 1e-9)
