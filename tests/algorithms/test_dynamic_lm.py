"""The language model with three memories: its gates, its exactness, its windows."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import learned
from funcmeta.algorithms import dynamic_lm
from funcmeta.testing import MetaGradientCheck, MetaGradientMismatch

WORDS = 7
SEGMENT = 4


def model(layers: int = 1, dropout: float = 0.0) -> dynamic_lm.LanguageModel:
    with fm.rng.forked(3):
        net = dynamic_lm.LanguageModel(WORDS, 3, layers=layers, dropout=dropout).double()
        for weight in net.parameters():
            nn.init.normal_(weight, std=0.7)
    return net


def stream(steps: int = 6, segment: int = SEGMENT) -> fm.Task:
    tokens = torch.randint(WORDS, (steps * segment + 1,), generator=fm.rng.generator(5))
    pairs = list(zip(tokens[:-1].split(segment), tokens[1:].split(segment), strict=True))
    return fm.Task(pairs.__getitem__, None, (0,) * steps)


def make_gates(**options: Any) -> fm.LearnedOptimizer:
    with fm.rng.forked(4):
        return learned.gates(**options).double()


def build(gates: fm.LearnedOptimizer, **options: Any) -> dynamic_lm.DynamicLanguageModel:
    return dynamic_lm.build(model(), gates, **options)


def stirred(meta: Any, scale: float = 0.5) -> Any:
    """Gates that depend on what they see."""
    generator = fm.rng.generator(6)
    own = {
        name: (leaf + scale * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).detach().requires_grad_()
        for name, leaf in meta["gates"].items()
    }
    return {**meta, "gates": own}


def dynamic_evaluation(task: fm.Task, copy: float, update: float, flush: float) -> Tensor:
    """The losses of all words, by plain torch."""
    net = model()
    params = dict(net.named_parameters())
    static = {name: param.detach().clone() for name, param in params.items()}
    hidden, losses = net.start(), []
    for step in range(len(task.spec)):
        words, following = task.support(step)
        scores, hidden = torch.func.functional_call(net, params, (words, hidden))
        each = F.cross_entropy(scores, following, reduction="none")
        grads = torch.autograd.grad(each.mean(), list(params.values()))
        params = {
            name: (copy * param - update * grad + flush * static[name]).detach().requires_grad_()
            for (name, param), grad in zip(params.items(), grads, strict=True)
        }
        hidden = tuple(part.detach() for part in hidden)
        losses.append(each.detach())
    return torch.cat(losses)


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize(("lr", "decay"), [(0.3, 0.0), (0.3, 0.05)])
def test_untrained_gates_are_dynamic_evaluation(lr: float, decay: float, hidden: int) -> None:
    gates = make_gates(copy=1 - decay if decay else 1, update=lr, flush=decay, hidden=hidden)
    algorithm, task = build(gates), stream()
    losses = torch.cat(algorithm.adapt(algorithm.init(), task).losses)
    values = gates.bias.detach().sigmoid().tolist()  # exact logits are rounded to float32 where the gates are made
    torch.testing.assert_close(values, [1 - decay, lr, decay] if decay else [lr], rtol=1e-6, atol=0)
    copy, update, flush = values if decay else (1.0, *values, 0.0)
    torch.testing.assert_close(losses, dynamic_evaluation(task, copy, update, flush), rtol=1e-12, atol=0)
    assert not torch.allclose(losses, dynamic_evaluation(task, copy, update, flush + 0.001), rtol=1e-6)


def test_open_gates_of_one_and_none_are_sgd() -> None:
    algorithm, task = build(make_gates(copy=0.9, update=0.2, flush=0.1)), stream()
    meta = algorithm.init()
    with torch.no_grad():
        meta["gates"]["bias"].copy_(torch.tensor([800.0, math.log(0.3 / 0.7), -800.0], dtype=torch.float64))
    losses = torch.cat(algorithm.adapt(meta, task).losses)
    torch.testing.assert_close(losses, dynamic_evaluation(task, 1.0, 0.3, 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["flushed", "closed"])
def test_flushed_at_each_step_it_is_the_static_model(way: str) -> None:
    gates = make_gates(copy=1, update=0, flush=0) if way == "closed" else make_gates(update=0)
    algorithm, task = build(gates), stream()
    meta = algorithm.init()
    if way == "flushed":
        with torch.no_grad():
            meta["gates"]["bias"].copy_(torch.tensor([-800.0, 800.0]))
    reading = algorithm.adapt(meta, task)
    words, following = (torch.cat(parts) for parts in zip(*[task.support(step) for step in range(6)], strict=True))
    net = model()
    expected = F.cross_entropy(net(words, net.start())[0], following, reduction="none").detach()
    torch.testing.assert_close(torch.cat(reading.losses), expected, rtol=1e-12, atol=0)


def test_flush_brings_the_weights_back() -> None:
    algorithm = build(make_gates(copy=0.5, update=0, flush=0.5))
    meta = algorithm.init()
    moved = {name: leaf.detach() + 1 for name, leaf in meta["static"].items()}
    state = dynamic_lm.ReadingState(moved, model().start())
    back = algorithm.adapt(meta, stream(3), carry=fm.Carry(state, 0)).carry.state.params
    for name, leaf in meta["static"].items():
        torch.testing.assert_close(back[name], leaf.detach() + 1 / 8)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_gates_see_sizes_only(layers: int) -> None:
    """The gates of one tensor do not depend on its shape or on the order of its coordinates."""
    gates = make_gates(hidden=3)
    with torch.no_grad():
        gates.weight.normal_(generator=fm.rng.generator(1))
    param, grad, static = torch.randn(3, 4, 6, dtype=torch.float64, generator=fm.rng.generator(2)).unbind()
    change, _ = gates(param, grad, static)
    flat, _ = gates(*[each.flatten().flip(0) for each in (param, grad, static)])
    torch.testing.assert_close(flat.flip(0).view(4, 6), change, rtol=1e-12, atol=0)


def problem_of(learn_static: bool = True) -> tuple[fm.Problem, Any, fm.Task]:
    algorithm = build(make_gates(copy=0.9, update=0.6, flush=0.15, hidden=3), learn_static=learn_static)
    return algorithm.problem, stirred(algorithm.init()), stream(3)


@cache
def checked() -> MetaGradientCheck:
    """The check of the plain unroll, whose differences serve all others."""
    return fm.check_meta_grad(*problem_of(), steps=3)


def test_the_meta_gradient_is_exact() -> None:
    assert checked().worst.error < 1e-6
    assert not checked().vacuous


@pytest.mark.parametrize(
    ("estimator", "memory"),
    [(fm.MixedMode(), fm.StoreAll()), (fm.Reverse(), fm.Segments(1)), (fm.MixedMode(), fm.Revolve(1))],
    ids=repr,
)
def test_the_meta_gradient_is_exact_under(estimator: Any, memory: Any) -> None:
    fm.check_meta_grad(*problem_of(), steps=3, estimator=estimator, memory=memory, reference=checked())


def rewritten(problem: fm.Problem, change: Callable[..., Any]) -> fm.Problem:
    """The problem with steps that something was done to."""
    return problem._replace(step=lambda meta, state, batch, seed: change(problem.step, meta, state, batch, seed))


def gate_inputs_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    original = learned._gates._sizes
    try:
        learned._gates._sizes = lambda x: original(x.detach())  # type: ignore[assignment]
        return step(meta, state, batch, seed)
    finally:
        learned._gates._sizes = original


def hidden_state_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    return step(meta, state._replace(hidden=fm.tree.detach(state.hidden)), batch, seed)


def flush_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    static = fm.tree.detach(meta["static"])
    following, info = step({**meta, "static": static}, state, batch, seed)
    return following, info


def weights_cut(step: Any, meta: Any, state: Any, batch: Any, seed: int) -> Any:
    following, info = step(meta, state, batch, seed)
    params = {name: leaf.detach() if name == "decoder.bias" else leaf for name, leaf in following.params.items()}
    return following._replace(params=params), info


@pytest.mark.parametrize("mutant", [gate_inputs_cut, hidden_state_cut, flush_cut, weights_cut])
def test_a_wrong_meta_gradient_is_found(mutant: Any) -> None:
    problem, meta, task = problem_of()
    with pytest.raises(MetaGradientMismatch):
        fm.check_meta_grad(rewritten(problem, mutant), meta, task, steps=3, reference=checked())


def test_first_order_is_another_gradient() -> None:
    problem, meta, task = problem_of()
    exact, first = (
        torch.autograd.grad(
            fm.unroll(problem, meta, task, steps=3, estimator=estimator).loss, list(meta["gates"].values())
        )
        for estimator in (fm.Reverse(), fm.FirstOrder())
    )
    assert not any(torch.allclose(*pair, rtol=1e-3) for pair in zip(exact, first, strict=True))


@pytest.mark.parametrize("learn_static", [True, False])
def test_two_windows_with_an_attached_carry_are_one(learn_static: bool) -> None:
    problem, meta, _ = problem_of(learn_static)
    task = stream(5)
    leaves = [leaf for leaf in fm.tree.leaves(meta) if leaf.requires_grad]
    whole = fm.unroll(problem, meta, task, steps=5)
    head = fm.unroll(problem, meta, task, steps=2)
    tail = fm.unroll(problem, meta, task, steps=3, carry=fm.Carry(head.state, 2))
    torch.testing.assert_close(head.loss + tail.loss, whole.loss, rtol=1e-12, atol=0)
    one, other = (torch.autograd.grad(loss, leaves) for loss in (whole.loss, head.loss + tail.loss))
    for pair in zip(one, other, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


def test_several_streams_at_once_are_each_by_itself() -> None:
    problem, meta, _ = problem_of()
    words = torch.randint(WORDS, (3, 2, SEGMENT + 1), generator=fm.rng.generator(1))
    tasks = fm.Task(lambda step: (words[step][:, :-1], words[step][:, 1:]), None)
    leaves = fm.tree.leaves(meta)
    one, other = (
        torch.autograd.grad(fm.unroll_batch(problem, meta, tasks, steps=3, strategy=strategy).loss, leaves)
        for strategy in ("vmap", "loop")
    )
    for pair in zip(one, other, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    problem, meta, task = problem_of()
    leaves = fm.tree.leaves(meta)
    one, other = (
        torch.autograd.grad(fm.unroll(each, meta, task, steps=3).loss, leaves)
        for each in (problem, fm.compile(problem))
    )
    for pair in zip(one, other, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


def test_windows_go_through_the_stream_to_its_end() -> None:
    algorithm, task = build(make_gates(copy=1, flush=0), window=4, estimator=fm.Reverse()), stream(6)
    meta = algorithm.init()
    first = algorithm.loss(meta, task)
    second = algorithm.loss(meta, task, carry=first.carry)
    assert (first.carry.step, second.carry.step) == (4, 6)
    reading = algorithm.adapt(meta, task)
    assert reading.carry.step == 6
    means = torch.stack([losses.mean() for losses in reading.losses])
    torch.testing.assert_close(first.loss.detach(), means[:4].mean())
    torch.testing.assert_close(second.loss.detach(), means[4:].mean())


def test_a_single_segment_is_not_left_over() -> None:
    algorithm, task = build(make_gates(), window=3), stream(7)
    meta = algorithm.init()
    first = algorithm.loss(meta, task)
    second = algorithm.loss(meta, task, carry=first.carry)
    assert (first.carry.step, second.carry.step) == (3, 7)
    assert second.info.losses.shape == (4,)


def test_a_detached_carry_still_reaches_the_static_weights() -> None:
    """FLUSH reads them at each step, not only at the first."""
    algorithm, task = build(make_gates(copy=0.9, flush=0.1), window=2, learn_static=True), stream(4)
    meta = algorithm.init()
    out = algorithm.loss(meta, task, carry=algorithm.loss(meta, task).carry)
    slopes = torch.autograd.grad(out.loss, list(meta["static"].values()))
    assert all(slope.any() for slope in slopes)


def test_reading_changes_nothing_and_ignores_dropout() -> None:
    net = model(dropout=0.5)
    algorithm, task = dynamic_lm.build(net, make_gates()), stream()
    meta = algorithm.init()
    kept = fm.tree.map(lambda leaf: leaf.detach().clone(), meta)
    first, second = algorithm.adapt(meta, task), build(make_gates()).adapt(meta, task)
    assert all(torch.equal(*pair) for pair in zip(first.losses, second.losses, strict=True))
    assert all(torch.equal(*pair) for pair in zip(fm.tree.leaves(meta), fm.tree.leaves(kept), strict=True))
    assert all(torch.equal(kept["static"][name], weight) for name, weight in net.named_parameters())
    assert not any(leaf.requires_grad for leaf in fm.tree.leaves(first.carry.state))


def test_reading_on_from_a_carry_is_reading_at_once() -> None:
    algorithm, task = build(make_gates()), stream(6)
    meta = algorithm.init()
    head = algorithm.loss(meta, task, carry=None).carry
    assert head.step == 6
    half = fm.unroll(algorithm.problem, meta, task, steps=3).carry
    whole, rest = algorithm.adapt(meta, task), algorithm.adapt(meta, task, carry=half)
    torch.testing.assert_close(torch.cat(rest.losses), torch.cat(whole.losses[3:]), rtol=1e-12, atol=0)


def test_words_of_one_text_or_of_several() -> None:
    net, words = model(layers=2), torch.arange(6).view(3, 2)
    scores, _ = net(words, net.start(2))
    for column in range(2):
        torch.testing.assert_close(scores[:, column], net(words[:, column], net.start())[0])
    assert [name for name, _ in net.named_parameters()].count("decoder.weight") == 0


def test_the_gates_learn_to_read() -> None:
    """Texts of one repeated word each: the gates learn to update more."""
    tokens = torch.cat([torch.full((24,), word) for word in (1, 4, 2, 5)])
    pairs = list(zip(tokens[:-1].split(6), tokens[1:].split(6), strict=True))
    task = fm.Task(pairs.__getitem__, None, (0,) * len(pairs))
    algorithm = build(make_gates(copy=0.99, update=0.05, flush=0.01, hidden=0), window=8)
    meta = algorithm.init()
    outer = torch.optim.Adam(fm.tree.leaves(meta["gates"]), lr=0.2)
    before = torch.cat(algorithm.adapt(meta, task).losses).mean()
    for _ in range(12):
        carry = None
        while carry is None or carry.step < len(pairs):
            out = algorithm.loss(meta, task, carry=carry)
            outer.zero_grad()
            out.loss.backward()
            outer.step()
            carry = out.carry
    after = torch.cat(algorithm.adapt(meta, task).losses).mean()
    assert after < 0.75 * before
    assert meta["gates"]["bias"][1].sigmoid() > 0.2


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    algorithm = build(make_gates(update=0.9))
    meta = algorithm.init()
    start = dynamic_lm.ReadingState(meta["static"], tuple(part + math.nan for part in model().start()))
    with pytest.raises(fm.NonFiniteError, match="step 2"):
        algorithm.loss(meta, stream(), carry=fm.Carry(start, 2))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(fm.ArgumentError, match=r"gates is linear.*expected gates.*Pass funcmeta.learned.gates\(...\)"):
        dynamic_lm.build(model(), learned.linear())
    with pytest.raises(
        fm.ArgumentError, match=r"module is a Linear without start\(\).*Pass a LanguageModel, or define"
    ):
        dynamic_lm.build(nn.Linear(2, 2), learned.gates())
    with pytest.raises(fm.ArgumentError, match=r"window is 1, expected an integer of at least 2\. The loss"):
        build(make_gates(), window=1)
    algorithm = build(make_gates())
    meta = algorithm.init()
    carry = algorithm.loss(meta, stream()).carry
    with pytest.raises(
        fm.ArgumentError, match=r"the stream has 6 segments, of which 0 are left, expected at least 2: .* Begin another"
    ):
        algorithm.loss(meta, stream(), carry=carry)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy": 1.5}, r"copy is 1.5, expected a number in \(0, 1\), or 1 to fix the gate. Pass e.g. copy=0.1"),
        ({"update": 1}, r"update is 1, expected a number in \(0, 1\), or 0 to fix the gate"),
        ({"flush": -0.1}, r"flush is -0.1, expected a number in \(0, 1\), or 0"),
        ({"flush": "wide"}, r"flush is 'wide', expected a number in \(0, 1\), or 0"),
        ({"hidden": -1}, "hidden is -1, expected an integer of at least 0"),
    ],
)
def test_bad_gates_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        learned.gates(**options)


@pytest.mark.parametrize(
    "options", [{}, {"hidden": 0}, {"flush": 0.0, "copy": 1.0}, {"copy": 1, "update": 0, "flush": 0}]
)
def test_gates_are_saved_and_read(options: dict[str, Any], tmp_path: Any) -> None:
    gates = make_gates(**options)
    learned.save(gates, tmp_path / "gates")
    again = learned.load(tmp_path / "gates")
    assert again.config == gates.config
    grad = torch.ones(3, dtype=torch.float64)
    assert torch.equal(again(grad, grad, grad * 2)[0], gates(grad, grad, grad * 2)[0])


def test_the_first_layer_learns_once_the_second_has_begun() -> None:
    problem, meta, task = problem_of(learn_static=False)
    out = fm.unroll(problem, meta, task, steps=3)
    assert all(slope.any() for slope in torch.autograd.grad(out.loss, list(meta["gates"].values())))


def test_static_training_keeps_the_epoch_that_was_best() -> None:
    train = torch.randint(WORDS, (400,), generator=fm.rng.generator(7))
    held_out = torch.randint(WORDS, (100,), generator=fm.rng.generator(8))
    with fm.rng.forked(0):
        net = dynamic_lm.LanguageModel(WORDS, 8)
        losses = list(dynamic_lm.train_static(net, train, held_out, epochs=6, lr=0.05, rows=4, length=8))
    assert len(losses) == 6
    assert min(losses) < losses[-1]
    scores, _ = net(held_out[:-1], net.start())
    assert F.cross_entropy(scores, held_out[1:]).item() == pytest.approx(min(losses), abs=1e-5)


def test_static_training_that_diverges() -> None:
    net, words = dynamic_lm.LanguageModel(WORDS, 2), torch.zeros(40, dtype=torch.int64)
    with torch.no_grad():
        net.decoder.bias.fill_(math.nan)
    with pytest.raises(fm.DivergenceError, match=r"not finite after any epoch\. Lower lr"):
        list(dynamic_lm.train_static(net, words, words, epochs=1))


def test_static_training_needs_a_text() -> None:
    net, words = dynamic_lm.LanguageModel(WORDS, 2), torch.zeros(40, dtype=torch.int64)
    with pytest.raises(fm.ArgumentError, match="the texts have 40 and 1 words, expected at least 32 and 2"):
        dynamic_lm.train_static(net, words, words[:1], epochs=1)
    with pytest.raises(fm.ArgumentError, match="epochs is 0, expected a positive integer"):
        dynamic_lm.train_static(net, words, words, epochs=0)
    with pytest.raises(fm.ArgumentError, match="lr is 0, expected a positive number"):
        dynamic_lm.train_static(net, words, words, epochs=1, lr=0)


def test_a_long_text_is_validated_in_parts_that_hand_on_their_state() -> None:
    words = torch.randint(WORDS, (9000,), generator=torch.Generator().manual_seed(0))
    net = model()
    [loss] = dynamic_lm.train_static(net, words[:200], words, epochs=1, lr=1e-9)
    with torch.no_grad():
        whole = F.cross_entropy(net(words[:-1], net.start())[0], words[1:])
    assert loss == pytest.approx(whole.item(), rel=1e-12)
