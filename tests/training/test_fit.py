"""The outer loop: equal to one written by hand, and what it does about trouble."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import KINDS, Case, Point, adam, down, few_shot, quadratic, sgd, squared, start, windows

import funcmeta as fm
from funcmeta.algorithms import Algorithm, l2l, maml
from funcmeta.training import Alarm, Evaluation, Folder, Mean, Record, Validation, evaluate, fit, load

TASKS = fm.tasks.sinusoids()


def run(case: Case, **options: Any) -> Any:
    return fit(case.algorithm, case.tasks, adam, **{"steps": 5, **case.options, **options})


def plain(**options: Any) -> Case:
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    return Case(maml.build(net, squared, steps=2, lr=0.01, strategy="vmap", **options), TASKS, {})


def same(left: Any, right: Any) -> bool:
    return all(map(torch.equal, fm.tree.leaves(left), fm.tree.leaves(right)))


def test_it_is_the_loop_by_hand() -> None:
    case = plain()
    start = case.algorithm.init()
    fitted = run(case, meta=start, seed=7, clip=0.5, scheduler=lambda outer: torch.optim.lr_scheduler.StepLR(outer, 2))
    meta = fm.tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), start)
    outer = adam(meta)
    scheduler = torch.optim.lr_scheduler.StepLR(outer, 2)
    losses = []
    for step in range(5):
        outer.zero_grad()
        loss = case.algorithm.loss(meta, TASKS.sample_batch(fm.rng.fold(7, 0, step), 4), seed=step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(meta["params"].values(), 0.5)
        outer.step()
        scheduler.step()
        losses.append(loss.item())
    assert same(fitted.meta, meta)
    assert [record.loss for record in fitted.records] == losses
    assert [record.rate for record in fitted.records] == [0.01, 0.01, 0.001, 0.001, pytest.approx(1e-4)]
    assert fitted.ended == "steps"
    assert not same(fitted.meta, start)


def test_a_record_has_the_norm_before_the_clip_and_the_time_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    start = case.algorithm.init()
    clock = iter(range(100))
    monkeypatch.setattr("funcmeta.training._run.time.perf_counter", lambda: next(clock) ** 2)
    first, second = run(case, meta=start, seed=7, steps=2, clip=1e-3).records
    case.algorithm.loss(start, TASKS.sample_batch(fm.rng.fold(7, 0, 0), 4), seed=0).backward()
    assert first.norm == pytest.approx(
        torch.cat([leaf.grad.flatten() for leaf in start["params"].values()]).norm().item()
    )
    assert (first.seconds, second.seconds) == (1, 5)


def test_accumulated_batches_are_one_large_batch() -> None:
    case = plain()
    start = case.algorithm.init()
    whole = TASKS.sample_batch(3, 4)

    class Parts:
        def sample_batch(self, seed: int, tasks: int) -> fm.Task:
            row = {fm.rng.fold(0, 0, 0): slice(0, 2), fm.rng.fold(0, 0, 1): slice(2, 4)}[seed]
            return fm.Task(*[tuple(leaf[row] for leaf in part) for part in whole[:2]], whole.spec[row])

    class Whole:
        def sample_batch(self, seed: int, tasks: int) -> fm.Task:
            return whole

    parts = fit(case.algorithm, Parts(), adam, steps=1, batch_size=2, accumulate=2, meta=start)
    at_once = fit(case.algorithm, Whole(), adam, steps=1, batch_size=4, meta=start)
    for left, right in zip(fm.tree.leaves(parts.meta), fm.tree.leaves(at_once.meta), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert parts.records[0].loss == pytest.approx(at_once.records[0].loss)


def test_windows_are_those_of_the_algorithm() -> None:
    case = windows()
    start = case.algorithm.init()
    fitted = run(case, meta=start, accumulate=1, steps=4)
    meta = fm.tree.map(lambda leaf: leaf.detach().clone().requires_grad_(), start)
    outer, losses, number = adam(meta), [], 0
    while len(losses) < 4:
        batch = case.tasks.sample_batch(fm.rng.fold(0, 0, number), 4)
        for loss in case.algorithm.windows(meta, batch, seed=number):
            outer.zero_grad()
            loss.backward()
            outer.step()
            losses.append(loss.item())
            if len(losses) == 4:
                break
        number += 1
    assert number > 1
    assert [record.loss for record in fitted.records] == losses
    assert same(fitted.meta, meta)


@pytest.mark.parametrize("kind", list(KINDS))
def test_stopped_and_resumed_is_never_stopped(kind: str, tmp_path: Path) -> None:
    case = KINDS[kind]()
    start = case.algorithm.init()
    run(case, steps=9, meta=start, folder=Folder(tmp_path / "whole"))
    for steps in (2, 2, 7, 9):
        part = run(case, steps=steps, meta=start, folder=Folder(tmp_path / "parts", every=100, resume=True))
    assert len({record.step for record in part.records if record.step}) == 9
    whole, parts = (tmp_path / name / "meta.safetensors" for name in ("whole", "parts"))
    if kind != "few shot":  # there each end had a validation, which chooses what is kept
        assert whole.read_bytes() == parts.read_bytes()
    newest = [path.parent / "checkpoints" / "step-00000009.safetensors" for path in (whole, parts)]
    meta = [fm.training._tree_file.read(path, "checkpoint")["meta"] for path in newest]
    assert same(*meta)
    assert same(load(parts), part.meta)


def test_arguments_are_not_changed(tmp_path: Path) -> None:
    case = plain()
    start = case.algorithm.init()
    before = fm.tree.map(torch.clone, start)
    fitted = run(case, meta=start)
    assert same(start, before)
    assert all(leaf.grad is None for leaf in fm.tree.leaves(start))
    assert all(leaf.requires_grad and leaf.grad is None for leaf in fm.tree.leaves(fitted.meta))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    case = few_shot()
    run(case, meta=case.algorithm.init())
    assert torch.equal(torch.get_rng_state(), state)


# --- validation


def test_the_best_is_kept_and_patience_ends() -> None:
    held_out = Validation(TASKS, every=2, number=3, score=lambda predict, task: predict.abs(), patience=2)
    fitted = fit(down(), TASKS, sgd, steps=100, validation=held_out)
    assert [record.validation.value for record in fitted.records if record.validation] == [3, 1, 1, 3]
    assert [record.step for record in fitted.records if record.best] == [0, 2]
    assert fitted.ended == "patience"
    assert fitted.step == 6
    assert fitted.meta.item() == 1
    highest = held_out._replace(higher_is_better=True, patience=None)
    assert fit(down(), TASKS, sgd, steps=9, validation=highest).meta.item() == -6


def ends(folder: Path) -> list[str]:
    """How the run ended, as its log says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["ended"] for line in lines if "ended" in line]


def test_a_run_that_is_extended_has_no_end_until_it_has_one(tmp_path: Path) -> None:
    def fail(record: Record) -> None:
        raise KeyError(record.step)

    fit(down(), TASKS, sgd, steps=2, folder=Folder(tmp_path))
    assert ends(tmp_path) == ["steps"]
    with pytest.raises(KeyError):
        fit(down(), TASKS, sgd, steps=4, folder=Folder(tmp_path, resume=True), watch=[fail])
    assert ends(tmp_path) == []
    for _ in range(2):
        fit(down(), TASKS, sgd, steps=4, folder=Folder(tmp_path, resume=True))
        assert ends(tmp_path) == ["steps"]


def test_the_best_and_the_patience_are_resumed(tmp_path: Path) -> None:
    def stop(record: Record) -> None:
        if record.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    held_out = Validation(TASKS, every=2, number=3, score=lambda predict, task: predict.abs(), patience=2)
    options: dict[str, Any] = {"steps": 100, "validation": held_out}
    assert fit(down(), TASKS, sgd, folder=Folder(tmp_path), watch=[stop], **options).step == 5
    assert ends(tmp_path) == ["SIGTERM"]
    resumed = fit(down(), TASKS, sgd, folder=Folder(tmp_path, resume=True), **options)
    assert (resumed.ended, resumed.step, resumed.meta.item()) == ("patience", 6, 1)
    assert [record.step for record in resumed.records if record.best] == [0, 2]
    assert ends(tmp_path) == ["patience"]


def test_draws_from_the_global_generator_follow_the_seed_and_the_step(tmp_path: Path) -> None:
    class Draws:
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def sample_batch(self, seed: int, tasks: int) -> fm.Task:
            self.drawn.append(torch.rand(()).item())
            return TASKS.sample_batch(seed, tasks)

    def drawn(steps: int, **options: Any) -> list[float]:
        tasks = Draws()
        fit(down(), tasks, sgd, steps=steps, **options)
        first, again, *others = tasks.drawn  # whether the sampler repeats itself is seen to before the first step
        assert first == again
        return others

    whole = drawn(4)
    assert len(set(whole)) == 4
    found = []
    for steps in (1, 3, 4):
        torch.rand(steps)
        found += drawn(steps, folder=Folder(tmp_path, resume=True))
    assert found == whole


def test_without_a_score_the_loss_is_judged() -> None:
    found = evaluate(down(), torch.tensor(2.0), TASKS, number=4)
    assert found.scores.tolist() == [2.0] * 4
    assert found.mean == Mean(2.0, 0.0)
    scores = evaluate(down(), torch.tensor(0.0), TASKS, number=50, score=lambda predict, task: task.support[0].mean())
    assert len(set(scores.scores.tolist())) == 50
    assert scores.mean.margin == pytest.approx(1.96 * scores.scores.std().item() / math.sqrt(50))


def test_tasks_that_got_worse_are_counted() -> None:
    before, after = (
        Evaluation(torch.tensor(scores, dtype=torch.float64), Mean(0.0, 0.0))
        for scores in ([1.0, 2.0, 3.0, 4.0, math.nan, math.nan], [0.5, 2.5, 3.5, math.nan, 1.0, math.nan])
    )
    assert after.worse(before, higher_is_better=False) == 3
    assert after.worse(before, higher_is_better=True) == 2
    assert after.quartiles() == (1.0, 2.5, 3.5)
    assert after.quartiles(higher_is_better=True) == (0.5, 1.0, 2.5)


# --- trouble


def spoiled(at: set[int], value: float = math.inf) -> Any:
    """An algorithm with the gradient 1, and another one at some steps."""
    return down()._replace(
        loss=lambda meta, tasks, seed=0: meta * (value if seed in at else 1.0) + 0 * tasks.support[0].sum()
    )


def test_an_alarm_stops() -> None:
    with pytest.raises(fm.DivergenceError, match=r"Outer step 3: The meta-loss is not finite\. .*Alarm\('skip'\)"):
        fit(spoiled({2}), TASKS, sgd, steps=5)
    root = down()._replace(loss=lambda meta, tasks, seed=0: (0 * meta).sqrt() + 0 * tasks.support[0].sum())
    with pytest.raises(fm.DivergenceError, match=r"Outer step 1: The meta-gradient is not finite"):
        fit(root, TASKS, sgd, steps=5)


def test_an_alarm_leaves_steps_out() -> None:
    fitted = fit(spoiled({2}), TASKS, sgd, steps=5, alarm=Alarm("skip"))
    assert fitted.meta.item() == 3 - 4
    assert fitted.alarms == 1
    assert [record.step for record in fitted.records if record.alarm] == [3]
    assert fitted.records[2].loss is None


def test_an_alarm_lowers_the_rate() -> None:
    fitted = fit(spoiled({1, 3}, 50.0), TASKS, sgd, steps=5, alarm=Alarm("lower", limit=10.0))
    assert fitted.meta.item() == 3 - 1 - 0.5 - 0.25
    assert [record.rate for record in fitted.records] == [1, 1, 0.5, 0.5, 0.25]
    assert "has the norm 50, above the limit of 10" in str(fitted.records[1].alarm)
    assert fit(spoiled({1}, 50.0), TASKS, sgd, steps=5, alarm=Alarm("skip")).alarms == 0


def test_a_hopeless_training_ends() -> None:
    with pytest.raises(fm.DivergenceError, match=r"Outer step 100: .* alarm 100 of this run"):
        fit(spoiled(set(range(1000))), TASKS, sgd, steps=1000, alarm=Alarm("skip"))


def test_an_inner_run_that_is_not_finite_is_an_alarm_that_names_the_step() -> None:
    def wild(meta: Any, predict: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return squared(meta, predict, batch) * 1e30

    algorithm = maml.build(nn.Linear(1, 1), wild, steps=3, lr=1.0, strategy="vmap")
    with pytest.raises(fm.DivergenceError, match="inner loss of step 1, task 0 is inf"):
        fit(algorithm, TASKS, adam, steps=2)
    fitted = fit(algorithm, TASKS, adam, steps=2, alarm=Alarm("skip"))
    assert fitted.alarms == 2


def test_a_loss_that_is_not_finite_is_an_alarm_though_its_gradient_is() -> None:
    algorithm = down()._replace(loss=lambda meta, tasks, seed=0: meta + 0 * tasks.support[0].sum() + math.nan)
    with pytest.raises(fm.DivergenceError, match="The meta-loss is not finite"):
        fit(algorithm, TASKS, sgd, steps=3)


def test_the_alarm_that_ends_a_run_is_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(fm.DivergenceError):
        fit(spoiled({1}), TASKS, sgd, steps=5, folder=Folder(tmp_path))
    last, end = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()[-2:])
    assert (last["step"], last["alarm"], last["alarms"]) == (2, "The meta-loss is not finite.", 1)
    assert end == {"ended": "alarm"}


def test_a_validation_that_diverges_is_no_better_and_ends_nothing(tmp_path: Path) -> None:
    def score(predict: Any, task: fm.Task) -> float:
        if predict < 2:
            raise fm.NonFiniteError("The inner loss of step 3 is nan.")
        return float(predict)

    held_out = Validation(TASKS, every=1, number=2, score=score, patience=2)
    with pytest.warns(fm.NonFiniteWarning, match="The validation after step 2 is not finite"):
        fitted = fit(down(), TASKS, sgd, steps=9, validation=held_out, folder=Folder(tmp_path))
    assert (fitted.ended, fitted.step, fitted.meta.item()) == ("patience", 3, 2)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    with pytest.raises(fm.NonFiniteError):
        evaluate(down(), torch.tensor(1.0), TASKS, number=2, score=score)


def test_scores_are_kept_in_full() -> None:
    found = evaluate(down(), torch.tensor(1.0), TASKS, number=2, score=lambda predict, task: 1 / 3)
    assert found.scores.tolist() == [1 / 3, 1 / 3]


def test_a_learned_optimizer_that_diverges_has_no_part_of_a_score() -> None:
    with fm.rng.forked(0):
        wild = fm.learned.linear(gradient=100.0)
    algorithm = l2l.build(wild, Point(), quadratic, steps=40, window=4, start=start, strategy="vmap", nonfinite="skip")
    with pytest.raises(fm.NonFiniteError):
        evaluate(algorithm, algorithm.init(), fm.tasks.quadratics(), number=2)


def test_alarms_are_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"alarm": Alarm("lower", limit=10.0)}
    whole = fit(spoiled({1, 3}, 50.0), TASKS, sgd, steps=6, **options)
    for steps in (2, 4, 6):
        part = fit(spoiled({1, 3}, 50.0), TASKS, sgd, steps=steps, folder=Folder(tmp_path, resume=True), **options)
    assert part.meta.item() == whole.meta.item()
    assert part.alarms == whole.alarms == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_and_the_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    def kill(record: Record) -> None:
        if record.step == 3:
            os.kill(os.getpid(), number)

    case = plain()
    start = case.algorithm.init()
    before = signal.getsignal(number)
    fitted = run(case, steps=6, meta=start, watch=[kill], folder=Folder(tmp_path))
    assert (fitted.ended, fitted.step) == (number.name, 3)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "meta.safetensors").exists()
    resumed = run(case, steps=6, meta=start, folder=Folder(tmp_path, resume=True))
    assert same(resumed.meta, run(case, steps=6, meta=start).meta)


def test_a_second_signal_is_not_held_back() -> None:
    def kill(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(plain(), watch=[kill])
    finally:
        signal.signal(signal.SIGINT, before)


# --- the folder


def test_what_a_folder_has(tmp_path: Path) -> None:
    fitted = run(few_shot(), steps=7, folder=Folder(tmp_path / "run", every=2, keep=3))
    names = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*"))
    checkpoints = [f"checkpoints/step-0000000{step}.safetensors" for step in (4, 6, 7)]
    assert names == [*checkpoints, "log.jsonl", "meta.safetensors"]
    *lines, last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert last == {"ended": "steps"}
    assert [line["step"] for line in lines] == list(range(8))
    assert set(lines[0]) == set(Record._fields)
    assert lines[3]["validation"] == fitted.records[3].validation._asdict()
    assert lines[1]["loss"] == fitted.records[1].loss


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(plain(), folder=Folder(tmp_path))
    with pytest.raises(fm.ArgumentError, match=r"has a run in it\. Pass resume=True"):
        run(plain(), folder=Folder(tmp_path))


def test_a_run_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    run(plain(), folder=Folder(tmp_path))
    resumed = Folder(tmp_path, resume=True)
    with pytest.raises(fm.ArgumentError, match="other settings: seed 0, now 1; batch_size 4, now 8"):
        run(plain(), folder=resumed, seed=1, batch_size=8)
    with pytest.raises(fm.ArgumentError, match=r"other settings: rates \[0.01\], now \[0.5\]"):
        fit(
            plain().algorithm,
            TASKS,
            lambda meta: torch.optim.Adam(meta["params"].values(), 0.5),
            steps=9,
            folder=resumed,
        )
    with pytest.raises(fm.ArgumentError, match="optimizer 'Adam', now 'SGD'"):
        fit(plain().algorithm, TASKS, lambda meta: torch.optim.SGD(meta["params"].values()), steps=9, folder=resumed)
    other = maml.build(nn.Linear(1, 1), squared, steps=1, lr=0.1, strategy="vmap")
    with pytest.raises(fm.StructureError, match=r"the checkpoint's meta .* It is of another model"):
        fit(other, TASKS, adam, steps=9, folder=resumed)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    foreign = path.parent / "foreign"
    fm.training.save({"lr": torch.ones(3)}, foreign)
    other = {"empty": b"", "truncated": content[:-40], "flipped": flipped, "foreign": foreign.read_bytes()}
    older = content.replace(b'\\"version\\": 1', b'\\"version\\": 0')
    path.write_bytes({**other, "older": older, "text": b"not a checkpoint at all"}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "cannot be read as safetensors"),
        ("truncated", "cannot be read as safetensors"),
        ("text", "cannot be read as safetensors"),
        ("flipped", "is damaged: its content does not have the checksum"),
        ("foreign", "holds a 'meta' in version 1 of the format, expected a 'checkpoint'"),
        ("older", "in version 0 of the format, expected a 'checkpoint' in version 1"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_and_the_previous_one_is_used_when_told(
    kind: str, message: str, tmp_path: Path
) -> None:
    case = plain()
    start = case.algorithm.init()
    run(case, steps=6, meta=start, folder=Folder(tmp_path, every=2))
    damage(tmp_path / "checkpoints" / "step-00000006.safetensors", kind)
    with pytest.raises(fm.DataError, match=rf"{message}.*step-00000004.safetensors is older: pass damaged='previous'"):
        run(case, steps=8, meta=start, folder=Folder(tmp_path, resume=True))
    resumed = run(case, steps=8, meta=start, folder=Folder(tmp_path, resume=True, damaged="previous"))
    assert same(resumed.meta, run(case, steps=8, meta=start).meta)
    for step in (8, 6):
        (tmp_path / "checkpoints" / f"step-0000000{step}.safetensors").write_bytes(b"")
    with pytest.raises(fm.DataError, match=r"cannot be read as safetensors"):
        run(case, steps=9, folder=Folder(tmp_path, resume=True, damaged="previous"))


def test_a_folder_that_can_not_be_written_to_is_an_error_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[Record] = []
    with pytest.raises(fm.SaveError, match=r"log\.jsonl could not be written: Not a directory\. .*whole"):
        run(plain(), folder=Folder(tmp_path / "file" / "run"), watch=[seen.append])
    assert not seen


def test_a_state_that_can_not_be_written_is_an_error_at_the_first_step(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state[self.param_groups[0]["params"][0]]["path"] = tmp_path

    with pytest.raises(fm.ArgumentError, match=r"optimizer/state/0/path is a PosixPath, which cannot be written"):
        fit(down(), TASKS, lambda meta: Odd([meta], lr=1.0), steps=50, folder=Folder(tmp_path, every=50))


# --- algorithms of one's own


def half_used() -> Algorithm:
    """An algorithm whose loss leaves a leaf out."""

    def init() -> Any:
        return {"used": torch.tensor(3.0, requires_grad=True), "unused": torch.tensor(5.0, requires_grad=True)}

    return Algorithm(
        init,
        lambda meta, tasks, seed=0: meta["used"].square() + 0 * tasks.support[0].sum(),
        lambda meta, task, seed=0, evaluate=False: meta,
    )


def test_a_leaf_that_is_not_used_stays_as_it_was() -> None:
    fitted = fit(half_used(), TASKS, adam, steps=3)
    assert fitted.meta["used"] < 3
    assert fitted.meta["unused"] == 5


def test_a_loss_of_nothing_that_is_learned_is_an_error() -> None:
    algorithm = half_used()._replace(loss=lambda meta, tasks, seed=0: meta["used"].detach() + 1)
    with pytest.raises(fm.DetachedError, match=r"depends on no leaf of meta that requires grad\. Compute it from meta"):
        fit(algorithm, TASKS, adam, steps=1)


def test_an_optimizer_may_hold_leaves_that_are_not_learned() -> None:
    meta = {"used": torch.tensor(3.0, requires_grad=True), "unused": torch.tensor(5.0)}
    fitted = fit(half_used(), TASKS, lambda meta: torch.optim.SGD(fm.tree.leaves(meta), lr=0.1), steps=2, meta=meta)
    assert fitted.meta["used"] < 3
    assert fitted.meta["unused"] == 5


def test_a_loss_of_other_leaves_than_those_of_meta_is_an_error() -> None:
    own = torch.ones((), requires_grad=True)
    algorithm = half_used()._replace(loss=lambda meta, tasks, seed=0: own * 2)
    with pytest.raises(fm.DetachedError, match="depends on no leaf of meta that requires grad"):
        fit(algorithm, TASKS, adam, steps=1)


def test_a_loss_that_is_no_tensor_is_an_error() -> None:
    with pytest.raises(fm.LossError, match="The loss of the algorithm is a float, expected a 0-d tensor"):
        fit(half_used()._replace(loss=lambda meta, tasks, seed=0: 1.0), TASKS, adam, steps=1)


@pytest.mark.parametrize(
    ("estimator", "spread", "message"),
    [
        (
            fm.EvolutionStrategies(0.1, 4, share=(1, 2)),
            "tasks",
            r"EvolutionStrategies has the shares \[\(1, 2\)\], .* 1",
        ),
        (fm.PersistentES(0.1, 4, 2, share=(0, 2)), "particles", r"has the shares \[\(0, 2\)\], .* need \[\(0, 1\)\]"),
        (
            fm.Truncated(1, fm.EvolutionStrategies(0.1, 4, share=(1, 2))),
            "tasks",
            r"Build it with share=\(rank, ranks\)",
        ),
        (fm.Reverse(), "particles", r"spread is 'particles', but Reverse has none, .* Pass spread='tasks'"),
    ],
)
def test_a_share_that_does_not_go_with_the_spread(estimator: Any, spread: Any, message: str, tmp_path: Path) -> None:
    case = plain(estimator=estimator)
    with pytest.raises(fm.ArgumentError, match=message):
        run(case, spread=spread, folder=Folder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_streams_are_shared_by_tasks_only() -> None:
    case = KINDS["reading"]()
    with pytest.raises(fm.ArgumentError, match="spread is 'particles', but of streams processes share tasks only"):
        run(case, spread="particles")


# --- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a positive integer"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"clip": 0.0}, "clip is 0.0, expected a positive number"),
        ({"alarm": Alarm("warn")}, "alarm.action is 'warn', expected one of 'stop', 'skip', 'lower'"),
        ({"alarm": Alarm(limit=-1.0)}, "limit is -1.0, expected a positive number"),
        ({"alarm": Alarm(limit=math.nan)}, "limit is nan, expected a positive number"),
        ({"spread": "all"}, "spread is 'all', expected one of 'tasks', 'particles'"),
        ({"validation": Validation(TASKS, every=0)}, "validation.every is 0"),
        ({"validation": Validation(TASKS, number=1)}, "validation.number is 1, expected an integer of at least 2"),
        ({"validation": Validation(TASKS, patience=0)}, "validation.patience is 0"),
        ({"folder": Folder("x", every=0)}, "every is 0"),
        ({"folder": Folder("x", keep=0)}, "keep is 0"),
        ({"folder": Folder("x", damaged="ignore")}, "damaged is 'ignore', expected one of 'raise', 'previous'"),
        ({"meta": {"lr": torch.tensor(1.0)}}, "No leaf of meta requires grad"),
        ({"meta": {"lr": 1.0}}, r"meta\['lr'\] is 1.0 \(float\), expected a tensor"),
        (
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "a ReduceLROnPlateau, which waits for a score",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.FuncmetaError, match=message):
        run(plain(), **options)


def test_bad_objects() -> None:
    with pytest.raises(fm.ArgumentError, match="algorithm is a int, expected what algorithms"):
        fit(3, TASKS, adam, steps=1)
    with pytest.raises(fm.ArgumentError, match="optimizer returned a list, expected an optimizer of torch"):
        fit(plain().algorithm, TASKS, lambda meta: [], steps=1)
    reading = KINDS["reading"]()
    with pytest.raises(fm.ArgumentError, match="tasks is a _Sinusoids, expected streams"):
        fit(reading.algorithm, TASKS, adam, steps=1)
    with pytest.raises(fm.ArgumentError, match="tasks are streams, which only dynamic_lm reads"):
        fit(plain().algorithm, reading.tasks, adam, steps=1)
    with pytest.raises(fm.ArgumentError, match="one article after the other, and there are 4"):
        evaluate(reading.algorithm, reading.algorithm.init(), reading.tasks, number=5)
    with pytest.raises(fm.ArgumentError, match="number is 1, expected an integer of at least 2"):
        evaluate(plain().algorithm, plain().algorithm.init(), TASKS, number=1)
