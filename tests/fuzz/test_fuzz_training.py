"""Samplers, algorithms, the outer loop, and what measures meta-gradients, under bad and odd arguments."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from fuzzing import Draw, Refused, attempt, close, either, fuzz, junk, own, same, tensor, tree_of
from hypothesis import strategies as st
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import tasks, training

SMALL_JUNK = junk().filter(lambda value: not isinstance(value, int) or value < 9)
NO_FUNCTIONS = SMALL_JUNK.filter(lambda value: not callable(value))
"""A function given for another is called as one, and what it does then is its own affair."""
COUNTS = st.one_of(st.integers(-1, 4), SMALL_JUNK)


@own
def squares(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()  # type: ignore[no-any-return]


def a_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()


SINES = tasks.sinusoids(3, 2, dtype=torch.float64)


@fuzz()
def test_samplers(draw: Draw) -> None:
    dtype = either(draw, st.sampled_from([torch.float32, torch.float64]), SMALL_JUNK, 10)
    device = either(draw, "cpu", st.one_of(st.sampled_from(["meta", "nowhere"]), SMALL_JUNK), 12)
    name = draw(st.sampled_from(["sinusoids", "quadratics", "glyphs", "mnist1d"]))
    make, names = {
        "sinusoids": (tasks.sinusoids, ("shots", "queries")),
        "quadratics": (tasks.quadratics, ("dimension",)),
        "glyphs": (tasks.glyphs, ("ways", "shots", "queries", "size")),
        "mnist1d": (tasks.mnist1d, ("batch_size",)),
    }[name]
    values = {each: either(draw, draw(st.integers(1, 4)), COUNTS, 6) for each in names}
    sampler = attempt(lambda: make(**values, dtype=dtype, device=device), values)  # type: ignore[operator]
    if isinstance(sampler, Refused):
        return
    if name == "mnist1d":
        x, _ = sampler.support(draw(st.integers(0, 200)))
        assert x.shape == (values["batch_size"], 40)
        return
    seed, number = either(draw, st.integers(0, 99), junk(), 10), either(draw, st.integers(1, 3), COUNTS, 8)
    one = attempt(lambda: sampler.sample(seed), seed)
    many = attempt(lambda: sampler.sample_batch(seed, number), seed, number)
    if isinstance(many, Refused) or device == "meta":
        return
    assert not isinstance(one, Refused)
    assert all(leaf.shape[0] == number for leaf in fm.tree.leaves(many.support))
    for index in range(number):
        again = sampler.sample(fm.rng.fold(seed, index))
        close(fm.tree.map(lambda leaf: leaf[index], tuple(many.support)), tuple(again.support), 0)  # noqa: B023
    several = either(draw, [one, sampler.sample(7)], st.one_of(junk(), st.lists(st.one_of(st.just(one), junk()))), 3)
    attempt(lambda: tasks.stack(several), several)


@fuzz(cost=2)
def test_algorithms(draw: Draw) -> None:
    name = draw(st.sampled_from(["maml", "anil", "meta_sgd", "reptile", "meta_lstm", "l2l"]))
    good: dict[str, dict[str, Any]] = {
        "maml": {"steps": 1, "lr": 0.1},
        "anil": {"steps": 1, "lr": 0.1, "head": "2"},
        "meta_sgd": {"steps": 1, "lr": 0.1},
        "reptile": {"steps": 2, "optimizer": fm.optim.sgd(0.1)},
        "meta_lstm": {"steps": 1, "hidden": 2},
        "l2l": {"optimizer": fm.learned.lstm(hidden=2, layers=1), "steps": 2, "window": 2},
    }
    values = dict(good[name])
    for each in values:
        values[each] = either(draw, values[each], st.one_of(SMALL_JUNK, st.integers(-1, 3), st.floats(-1.0, 1.0)), 8)
    values["strategy"] = either(draw, st.sampled_from(["vmap", "loop"]), junk(), 10)
    if draw(st.integers(0, 5)) == 5:
        values["estimator"], values["memory"] = draw(junk()), draw(st.one_of(junk(), st.just(fm.Segments(1))))
        if name == "reptile":
            del values["estimator"], values["memory"]
    net = either(draw, a_net(), junk(), 15)
    build = getattr(fm, name).build
    first = (values.pop("optimizer"), net) if name == "l2l" else (net,)
    generators = torch.get_rng_state()

    def made() -> Any:
        try:
            return build(*first, squares, **values)
        finally:
            torch.set_rng_state(generators)  # initial weights are drawn, as those of a module of torch

    algorithm = attempt(made, net)
    if isinstance(algorithm, Refused):
        return
    torch.manual_seed(0)
    meta: Any = either(draw, algorithm.init(), st.one_of(junk(), st.just({"params": {}})), 10)
    batch = SINES.sample_batch(draw(st.integers(0, 9)), 2)
    some = either(draw, batch, st.one_of(junk(), st.just(SINES.sample(0)), st.just(batch._replace(query=None))), 8)
    seed = either(draw, st.integers(0, 9), junk(), 10)
    loss = attempt(lambda: algorithm.loss(meta, some, seed=seed), meta, some, net)
    if not isinstance(loss, Refused):
        assert bool(loss.isfinite())
    one = either(draw, SINES.sample(3), st.one_of(junk(), st.just(batch)), 8)
    if name != "l2l":
        predict = attempt(lambda: algorithm.adapt(meta, one, seed=seed), meta, one, net)
        if not isinstance(predict, Refused) and not isinstance(one, Refused):
            assert predict(torch.zeros(2, 1, dtype=torch.float64)).shape == (2, 1)
    if name == "maml" and not isinstance(loss, Refused) and some is batch and values["steps"] == 1:
        own_loss = torch.zeros((), dtype=torch.float64)
        for index in range(2):
            (x, y), (u, v) = ([leaf[index] for leaf in part] for part in (batch.support, batch.query))
            params = {key: leaf.detach().requires_grad_() for key, leaf in meta["params"].items()}
            inner = ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()
            grads = torch.autograd.grad(inner, list(params.values()))
            moved = {key: leaf - values["lr"] * grad for (key, leaf), grad in zip(params.items(), grads, strict=True)}
            own_loss = own_loss + ((torch.func.functional_call(net, moved, (u,)) - v) ** 2).mean() / 2
        close(loss, own_loss, 1e-8)


@fuzz(cost=10)
def test_fit_and_evaluate(draw: Draw) -> None:
    algorithm = fm.maml.build(a_net(), squares, steps=1, lr=0.1, strategy="loop")
    values: dict[str, Any] = {
        "steps": either(draw, st.integers(1, 2), COUNTS, 8),
        "batch_size": either(draw, st.integers(1, 2), COUNTS, 8),
        "accumulate": either(draw, 1, COUNTS, 8),
        "seed": either(draw, 0, junk(), 10),
        "clip": either(draw, None, st.one_of(junk(), st.floats(0.1, 1.0)), 4),
        "meta": either(draw, None, st.one_of(junk(), st.just({"params": {}})), 8),
        "spread": either(draw, "tasks", junk(), 12),
        "alarm": either(draw, training.Alarm(), st.one_of(junk(), st.just(training.Alarm(limit=draw(junk())))), 8),
        "watch": either(draw, (), junk(), 12),
        "scheduler": either(draw, None, NO_FUNCTIONS, 12),
    }
    sampler = either(draw, SINES, junk(), 10)
    validation = training.Validation(SINES, every=1, number=2)
    spoiled = draw(st.sampled_from(["every", "number", "patience", "score", "tasks"]))
    values["validation"] = either(
        draw, None, st.sampled_from([validation, validation._replace(**{spoiled: draw(NO_FUNCTIONS)})]), 4
    )
    optimizer = either(draw, lambda meta: torch.optim.SGD(meta["params"].values(), lr=0.1), junk(), 10)
    used = either(draw, algorithm, junk(), 10)
    fitted = attempt(lambda: training.fit(used, sampler, optimizer, **values))
    if not isinstance(fitted, Refused):
        assert fitted.step == values["steps"] or fitted.ended == "patience"
        assert all(leaf.isfinite().all() for leaf in fm.tree.leaves(fitted.meta))
    meta = either(draw, algorithm.init(), junk(), 6)
    number = either(draw, st.integers(2, 3), COUNTS, 4)
    judged = attempt(
        lambda: training.evaluate(
            used,
            meta,
            sampler,
            number=number,
            score=either(draw, None, NO_FUNCTIONS, 6),
            seed=values["seed"],
        ),
        meta,
    )
    if not isinstance(judged, Refused):
        assert judged.scores.shape == (number,)


@fuzz()
def test_what_is_saved_comes_back(draw: Draw) -> None:
    meta = either(draw, tree_of(draw, lambda: tensor(draw, odds=6, special=True, grad=None)), junk(), 6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meta"
        saved = attempt(
            lambda: training.save(meta, either(draw, path, st.sampled_from([Path(folder), folder, 3, None, ""]), 20)),
            meta,
        )
        if isinstance(saved, Refused) or not path.exists():
            return
        again = attempt(lambda: training.load(path))
        assert not isinstance(again, Refused)
        for mine, other in zip(fm.tree.leaves(again), fm.tree.leaves(meta), strict=True):
            assert (mine.dtype, mine.shape, mine.requires_grad) == (other.dtype, other.shape, other.requires_grad)
            assert same(mine.detach(), other.detach())
        content = bytearray(path.read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        path.write_bytes(content[: draw(st.sampled_from([None, -1, 8, 0]))])
        attempt(lambda: training.load(path))
        attempt(lambda: fm.learned.load(path))


@fuzz(cost=4)
def test_files_of_learned_optimizers(draw: Draw) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "o"
        fm.learned.save(fm.learned.lstm(hidden=2, layers=1), path)
        content = bytearray(path.read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            content[draw(st.integers(0, min(400, len(content) - 1)))] = draw(st.integers(0, 255))
        path.write_bytes(content)
        attempt(lambda: fm.learned.load(path))


def a_problem() -> Any:
    def step(meta: Any, w: Tensor, x: Tensor, seed: int) -> Any:
        loss, grad = fm.value_and_grad(lambda w: (w * x).sin().sum())(w)
        return w - meta["lr"] * grad, fm.StepInfo(loss)

    return fm.Problem(
        own(lambda meta, task, seed: meta["w"] * 1), own(step), own(lambda meta, w, x, seed: (w * x).cos().sum())
    )


@fuzz(cost=4)
def test_measures_of_meta_gradients(draw: Draw) -> None:
    """check_meta_grad, compare, horizon_report and finite_difference, with something broken."""
    problem = a_problem()
    w = tensor(draw, [(2,), (1,), (0,), ()], [torch.float64, torch.float64, torch.float32], odds=12, grad=True)
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=draw(st.booleans()))
    meta = either(draw, {"w": w, "lr": lr}, junk(), 12)
    x = torch.tensor(0.7, dtype=torch.float64)
    task = either(draw, fm.Task(x, x), junk(), 15)
    steps = either(draw, st.integers(0, 2), SMALL_JUNK, 10)
    seed = either(draw, 0, junk(), 15)
    which = draw(st.sampled_from(["check", "compare", "horizon", "difference"]))
    estimators: Any = either(
        draw,
        None,
        st.one_of(
            junk(),
            st.just({}),
            st.just({"a": 3}),
            st.just({"a": (fm.Reverse(), 3)}),
            st.just({"es": fm.EvolutionStrategies(0.1, 1), "r": fm.Reverse()}),
        ),
        3,
    )
    if which == "check":
        keys = {
            "directions": either(draw, 1, SMALL_JUNK, 8),
            "tolerance": either(draw, 1e-5, SMALL_JUNK, 8),
            "order": either(draw, 4, SMALL_JUNK, 8),
            "estimator": either(draw, fm.Reverse(), junk(), 8),
        }
        out = attempt(
            lambda: fm.check_meta_grad(problem, meta, task, steps=steps, seed=seed, allow_vacuous=True, **keys),
            meta,
            task,
        )
        if not isinstance(out, Refused):
            assert math.isfinite(out.loss)
    elif which == "compare":
        out = attempt(
            lambda: fm.compare(
                problem,
                meta,
                task,
                steps=steps,
                seed=seed,
                estimators=estimators,
                reference=either(draw, None, junk(), 6),
                directions=either(draw, 1, SMALL_JUNK, 6),
            ),
            meta,
            task,
        )
        if not isinstance(out, Refused) and estimators is None:
            assert out.rows[0].relative_error == 0 or math.isnan(out.rows[0].relative_error)
    elif which == "horizon":
        horizons = either(draw, (1, 2), st.one_of(junk(), st.lists(st.integers(-1, 3), max_size=2)), 3)
        chosen = either(draw, {"first order": fm.FirstOrder()}, st.just(estimators), 3)
        attempt(
            lambda: fm.horizon_report(
                problem,
                meta,
                task,
                horizons=horizons,
                estimators=chosen,
                repeats=either(draw, 2, SMALL_JUNK, 6),
                seed=seed,
            ),
            meta,
            task,
        )
    else:
        at = tree_of(draw, lambda: tensor(draw, dtypes=[torch.float64], odds=12))
        direction = either(draw, fm.tree.map(torch.ones_like, at), junk(), 6)
        function = either(
            draw,
            own(lambda tree: sum((leaf.sin().sum() for leaf in fm.tree.leaves(tree)), torch.zeros(()))),
            st.sampled_from([own(lambda tree: 3.0), own(lambda tree: torch.ones(2)), own(lambda tree: "x")]),
            5,
        )
        order, eps = either(draw, st.sampled_from([2, 4, 6]), SMALL_JUNK, 6), either(draw, None, SMALL_JUNK, 5)
        attempt(lambda: fm.finite_difference(function, at, direction, eps=eps, order=order), at, direction)
