"""Inner optimizers, schedules and what combines them, under bad and odd arguments; held against torch.optim."""

from collections.abc import Callable
from typing import Any

import torch
from fuzzing import FLOATS, Draw, Refused, attempt, close, contiguous, either, fuzz, junk, same, tensor, tree_of
from hypothesis import strategies as st
from torch import Tensor

import funcmeta as fm
from funcmeta import optim
from funcmeta.optim import schedules
from funcmeta.testing._families import FAMILIES, paired

NAMESAKES: dict[Callable[..., Any], Any] = {
    optim.sgd: torch.optim.SGD,
    optim.adam: torch.optim.Adam,
    optim.adamw: torch.optim.AdamW,
    optim.adamax: torch.optim.Adamax,
    optim.nadam: torch.optim.NAdam,
    optim.radam: torch.optim.RAdam,
    optim.rmsprop: torch.optim.RMSprop,
    optim.adagrad: torch.optim.Adagrad,
    optim.adadelta: torch.optim.Adadelta,
}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
NUMBERS = st.one_of(
    st.floats(-1.0, 2.0), st.sampled_from([0, 1, 0.0, 1.0, 1e-30, 1e30, float("nan"), float("inf"), -1])
)


def hyper(draw: Draw, ends: tuple[float, float]) -> Any:
    """A hyper-parameter: mostly one in its range, as a number or in another of the forms it may take."""
    value = draw(st.floats(*ends))
    form = draw(
        st.sampled_from(["number"] * 6 + ["tensor", "double", "schedule", "number drawn", "junk", "odd tensor"])
    )
    if form == "number":
        return value
    if form == "tensor":
        return torch.tensor(value, requires_grad=draw(st.booleans()))
    if form == "double":
        return torch.tensor([value], dtype=torch.float64)
    if form == "schedule":
        return lambda step: value / (1 + step)
    if form == "number drawn":
        return draw(NUMBERS)
    return draw(junk()) if form == "junk" else tensor(draw, odds=1)


def usual(number: Any) -> bool:
    """Whether a function of the user can compute with it."""
    if isinstance(number, Tensor):
        return number.is_floating_point() and number.layout is torch.strided and number.is_cpu
    return isinstance(number, float)


def beyond(tensors: Any, size: float) -> bool:
    return any(bool((each.abs() > size).any()) for each in fm.tree.leaves(tensors))


def steps_of(transform: Any, grads: Any, state: Any, params: Any, steps: int, *, joined: bool) -> tuple[Any, Any]:
    """Some steps with the same gradients."""
    for _ in range(steps):
        if joined:
            params, state = optim.advance(transform, grads, state, params)
        else:
            updates, state = transform.update(grads, state, params)
            params = fm.apply_updates(params, updates)
    return params, state


@fuzz()
def test_transforms_refuse_or_agree_with_torch(draw: Draw) -> None:
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    hypers = {key: hyper(draw, ends) for key, ends in family.hypers.items()}
    computes = not hasattr(optim, family.make.__name__)
    if computes and not all(map(usual, hypers.values())):
        return  # the family computes with what it is given
    options = {key: draw(st.booleans()) for key in family.options}
    transform = attempt(lambda: family.make(**paired(hypers), **options), hypers)
    if isinstance(transform, Refused):
        return
    dtype = draw(st.sampled_from(FLOATS))
    params = tree_of(draw, lambda: tensor(draw, dtypes=[dtype], odds=12, special=draw(st.booleans())))
    leaves, spec = fm.tree.flatten(params)
    if computes and any(leaf.is_meta for leaf in leaves):
        return
    column: list[Any] = []
    for leaf in leaves:
        right = tensor(draw, [leaf.shape], [leaf.dtype], special=draw(st.booleans()))
        column.append(either(draw, right, st.one_of(junk(), st.just(right[None])), 40))
    grads = either(draw, fm.tree.unflatten(column, spec), st.sampled_from([None, {}, [], {"p0": torch.ones(3)}]), 30)
    state = attempt(lambda: transform.init(params), params, hypers)
    if isinstance(state, Refused):
        return
    if draw(st.integers(0, 30)) == 30:
        state = draw(
            st.sampled_from([None, (), {}, optim.adam().init({"w": torch.ones(2)}), optim.sgd(0.1).init(params)])
        )
    steps, joined = draw(st.integers(1, 3)), draw(st.booleans())
    if any(callable(each) and not isinstance(each, Tensor) for each in hypers.values()):
        joined = False
    out = attempt(lambda: steps_of(transform, grads, state, params, steps, joined=joined), grads, state, params, hypers)
    if isinstance(out, Refused):
        return
    assert [(leaf.shape, leaf.dtype, leaf.device) for leaf in fm.tree.leaves(out[0])] == [
        (leaf.shape, leaf.dtype, leaf.device) for leaf in leaves
    ]
    assert all(leaf.is_floating_point() for leaf in leaves)
    if any(leaf.is_meta or leaf.dtype not in FLOATS for leaf in leaves):
        return
    again = steps_of(transform, contiguous(grads), state, contiguous(params), steps, joined=not joined)
    close(out[0], again[0], TOLERANCE[dtype])
    plain = all(type(each) in (int, float) for each in hypers.values())
    # where two products are near each other, or overflow, their difference is what rounding leaves of it: v - a² of
    # a centered RMSprop, momentum · b - dampening · g of SGD
    fused = plain and options.get("centered") and (hypers["alpha"] < 0.3 or beyond(grads, 1e15))
    fused = fused or (plain and hypers.get("dampening", 0) > 1e6)
    if family.make in NAMESAKES and plain and not fused and "schedule" not in name and leaves:
        floats = {key: float(each) for key, each in hypers.items()}  # it takes no pair of one integer and one float
        own = [leaf.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for leaf in leaves]
        reference = NAMESAKES[family.make](own, **paired(floats), **options, foreach=False)
        for leaf, grad in zip(own, fm.tree.aligned(params, grads), strict=True):
            leaf.grad = grad.detach().clone(memory_format=torch.contiguous_format)
        for _ in range(steps):
            reference.step()
        close(fm.tree.leaves(out[0]), own, TOLERANCE[dtype])


@fuzz()
def test_every_argument_of_a_transform_may_be_broken(draw: Draw) -> None:
    """Keywords by their names, whatever comes in them."""
    make, names = draw(
        st.sampled_from(
            [
                (optim.sgd, ("lr", "momentum", "dampening", "weight_decay")),
                (optim.adam, ("lr", "betas", "eps", "weight_decay")),
                (optim.lion, ("lr", "betas", "weight_decay")),
                (optim.nadam, ("lr", "betas", "eps", "momentum_decay")),
                (optim.radam, ("lr", "betas", "eps")),
                (optim.adamax, ("lr", "betas", "eps")),
                (optim.rmsprop, ("lr", "alpha", "eps", "momentum")),
                (optim.adagrad, ("lr", "lr_decay", "initial_accumulator_value", "eps")),
                (optim.adadelta, ("lr", "rho", "eps")),
                (optim.clip_by_value, ("limit",)),
                (optim.clip_by_norm, ("max_norm",)),
                (optim.clip_by_global_norm, ("max_norm",)),
                (optim.scale, ("factor",)),
                (optim.add_weight_decay, ("weight_decay",)),
            ]
        )
    )
    chosen = draw(st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=2))
    values = {name: draw(st.one_of(junk(), NUMBERS, st.just(lambda step: 0.5))) for name in chosen}
    if "betas" in values and draw(st.booleans()):
        values["betas"] = (draw(st.one_of(NUMBERS, junk())), draw(NUMBERS))
    if "lr" in names:
        values.setdefault("lr", 0.1)
    transform = attempt(lambda: make(**values), values)
    if isinstance(transform, Refused):
        return
    assert isinstance(transform, fm.Transform)
    params = {"w": torch.tensor([0.5, -1.0]), "b": torch.tensor(2.0)}
    grads = {"w": torch.tensor([1.0, 0.0]), "b": torch.tensor(-1.0)}
    out = attempt(lambda: steps_of(transform, grads, transform.init(params), params, 2, joined=False), params, grads)
    if not isinstance(out, Refused):
        assert [(leaf.shape, leaf.dtype) for leaf in out[0].values()] == [((2,), torch.float32), ((), torch.float32)]


@fuzz()
def test_clips_agree_with_torch(draw: Draw) -> None:
    limit = draw(st.one_of(st.floats(0.0, 2.0), NUMBERS, junk()))
    make = draw(st.sampled_from([optim.clip_by_value, optim.clip_by_norm, optim.clip_by_global_norm]))
    transform = attempt(lambda: make(limit), limit)
    grads = tree_of(draw, lambda: tensor(draw, dtypes=[torch.float64], odds=20, special=draw(st.booleans())))
    if isinstance(transform, Refused):
        return
    out = attempt(lambda: transform.update(grads, transform.init(grads), grads)[0], grads, limit)
    if isinstance(out, Refused) or any(leaf.is_meta or leaf.dtype != torch.float64 for leaf in fm.tree.leaves(grads)):
        return
    if not isinstance(limit, int | float):
        return
    leaves = [leaf.detach() for leaf in fm.tree.leaves(grads)]
    if make is optim.clip_by_value:
        close(out, [leaf.clamp(-limit, limit) for leaf in leaves], 1e-9)
        return
    groups = [leaves] if make is optim.clip_by_global_norm else [[leaf] for leaf in leaves]
    expected = []
    for group in groups:
        norm = sum((leaf**2).sum() for leaf in group) ** 0.5 if group else torch.zeros(())
        expected += [leaf if norm <= limit else leaf * (limit / norm) for leaf in group]
    if all(bool(leaf.isfinite().all()) for leaf in leaves):
        close(out, expected, 1e-9)


@fuzz()
def test_schedules(draw: Draw) -> None:
    value = st.one_of(st.floats(-2.0, 2.0), junk())
    count = st.one_of(st.integers(-1, 20), junk())
    make, arguments = draw(
        st.one_of(
            st.tuples(st.just(schedules.constant), st.tuples(value)),
            st.tuples(st.just(schedules.linear), st.tuples(value, value, count)),
            st.tuples(st.just(schedules.exponential_decay), st.tuples(value, value, count)),
            st.tuples(st.just(schedules.cosine_decay), st.tuples(value, count, value)),
            st.tuples(st.just(schedules.warmup), st.tuples(st.one_of(st.just(schedules.constant(0.5)), junk()), count)),
        )
    )
    schedule = attempt(lambda: make(*arguments), arguments)
    if isinstance(schedule, Refused):
        return
    step = draw(st.one_of(st.integers(0, 50), st.integers(0, 50).map(torch.tensor)))
    out = attempt(lambda: schedule(step), step, arguments)
    if not isinstance(out, Refused):
        assert isinstance(out, Tensor)
        assert out.dtype == torch.float64 or any(isinstance(each, Tensor) for each in arguments)
        assert out.is_meta or torch.equal(schedule(int(step)).nan_to_num(7), out.nan_to_num(7))


@fuzz()
def test_apply_updates_chain_and_masked(draw: Draw) -> None:
    params = tree_of(draw, lambda: tensor(draw, odds=15))
    leaves, spec = fm.tree.flatten(params)
    own = [
        either(draw, tensor(draw, [leaf.shape], [leaf.dtype]), st.one_of(junk(), st.just(leaf[None])), 30)
        for leaf in leaves
    ]
    updates = either(draw, fm.tree.unflatten(own, spec), st.one_of(junk(), st.just({"p0": torch.ones(2)})), 12)
    out = attempt(lambda: fm.apply_updates(params, updates), params, updates)
    if not isinstance(out, Refused):
        for mine, one, other in zip(fm.tree.leaves(out), leaves, fm.tree.aligned(params, updates), strict=True):
            assert (mine.shape, mine.dtype, mine.device) == (one.shape, one.dtype, one.device)
            assert mine.is_meta or same(mine, one + other)
    parts = draw(
        st.lists(st.one_of(st.sampled_from([optim.sgd(0.5), optim.adam(0.1), optim.scale(2.0)]), junk()), max_size=3)
    )
    parts = either(draw, [part for part in parts if isinstance(part, fm.Transform)], st.just(parts), 3)
    whole = attempt(lambda: fm.chain(*parts), parts)
    where = draw(
        st.one_of(
            st.just(lambda name: name.endswith("0")),
            st.just(lambda name: 1),
            st.just(fm.tree.map(lambda leaf: True, params)),
            st.just({"p0": True}),
            junk(),
        )
    )
    part = either(draw, optim.sgd(0.5), junk(), 10)
    otherwise = either(draw, st.sampled_from([None, optim.chain(), optim.scale(-1.0)]), junk(), 10)
    mask = attempt(lambda: fm.masked(part, where, otherwise=otherwise), where)
    floating = all(leaf.dtype in FLOATS and not leaf.is_meta for leaf in leaves)
    grads = fm.tree.map(torch.ones_like, params)
    for transform in (whole, mask):
        if isinstance(transform, Refused):
            continue
        found = attempt(lambda: transform.update(grads, transform.init(params), params)[0], params, grads)  # noqa: B023
        if isinstance(found, Refused) or not floating:
            continue
        if transform is whole:
            state, expected = whole.init(params), grads
            for each, mine in zip(parts, state.states, strict=True):
                expected = each.update(expected, mine, params)[0]
            close(found, expected, 1e-9)
        elif callable(where) and otherwise is None:
            names = [
                ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
                for path, _ in torch.utils._pytree.tree_flatten_with_path(params)[0]
            ]
            close(
                found,
                [
                    torch.full_like(leaf, -0.5 if name.endswith("0") else 0.0)
                    for name, leaf in zip(names, leaves, strict=True)
                ],
                0,
            )


@fuzz(cost=2)
def test_states_to_and_from_torch(draw: Draw) -> None:
    params = tree_of(draw, lambda: tensor(draw, dtypes=[torch.float64]))
    leaves = [
        leaf.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for leaf in fm.tree.leaves(params)
    ]
    make, namesake = draw(
        st.sampled_from(
            [
                (optim.adam, torch.optim.Adam),
                (lambda: optim.sgd(0.1, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)),
                (optim.lion, torch.optim.Adam),
                (lambda: optim.chain(), torch.optim.Adagrad),
            ]
        )
    )
    if not leaves:
        return
    optimizer = namesake(leaves)
    if draw(st.booleans()):
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    transform = make()
    source = either(
        draw,
        st.sampled_from([optimizer, optimizer.state_dict()]),
        st.one_of(junk(), st.just({"state": {}}), st.just({"state": {0: {}}, "param_groups": []})),
        5,
    )
    target = either(draw, params, st.one_of(junk(), st.just({"w": torch.ones(3)})), 6)
    step = either(draw, None, st.one_of(st.integers(-2, 5), junk()), 4)
    state = attempt(lambda: optim.from_torch_optim_state(transform, source, target, step=step), params)
    if isinstance(state, Refused):
        return
    back = attempt(
        lambda: optim.to_torch_optim_state(either(draw, state, junk(), 8), either(draw, optimizer, junk(), 8))
    )
    if not isinstance(back, Refused) and not any(leaf.is_meta for leaf in fm.tree.tensors(back)):
        optimizer.load_state_dict(back)
