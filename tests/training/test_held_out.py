"""Training, validation and evaluation draw different tasks, each from the sampler that it was given."""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import KINDS, Case, adam, down, sgd, squared

import funcmeta as fm
from funcmeta.algorithms import dynamic_lm, maml
from funcmeta.tasks import Article
from funcmeta.training import Folder, Validation, _tree_file, evaluate, fit

SEED = 5


@dataclass
class Lines:
    """y = slope · x at points of the seed, in float64; it notes the seeds that it is asked for, one for each task."""

    slope: float = 1.0
    asked: list[int] = field(default_factory=list)

    def sample_batch(self, seed: int, tasks: int) -> fm.Task:
        self.asked += [fm.rng.fold(seed, index) for index in range(tasks)]
        x = torch.rand(tasks, 6, 1, generator=fm.rng.generator(seed), dtype=torch.float64)
        return fm.Task((x[:, :3], self.slope * x[:, :3]), (x[:, 3:], self.slope * x[:, 3:]))


def trained_by_hand(net: nn.Module, task: fm.Task) -> float:
    """The query loss after two steps of torch's SGD on the support."""
    params = {name: leaf.detach().clone().requires_grad_() for name, leaf in net.named_parameters()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)

    def loss(batch: Any) -> Tensor:
        x, y = (leaf[0] for leaf in batch)
        return (torch.func.functional_call(net, params, (x,)) - y).square().mean()

    for _ in range(2):
        optimizer.zero_grad()
        loss(task.support).backward()
        optimizer.step()
    return loss(task.query).item()


def few_shot() -> tuple[nn.Module, Any]:
    with fm.rng.forked(0):
        net = nn.Linear(1, 1).double()
    return net, maml.build(net, squared, steps=2, lr=0.1, strategy="loop")


def test_a_validation_judges_on_its_own_tasks() -> None:
    net, algorithm = few_shot()
    train, held_out = Lines(1.0), Lines(-20.0)
    fitted = fit(
        algorithm, train, adam, steps=1, seed=SEED, meta=algorithm.init(), validation=Validation(held_out, number=3)
    )
    tasks = [Lines(-20.0).sample_batch(fm.rng.fold(SEED, 1, index), 1) for index in range(3)]
    right = sum(trained_by_hand(net, task) for task in tasks) / 3
    assert fitted.records[0].validation.value == pytest.approx(right, rel=1e-12)
    assert len(held_out.asked) == 2 * 3
    assert not {*train.asked} & {*held_out.asked}


def test_an_evaluation_judges_on_its_own_tasks() -> None:
    net, algorithm = few_shot()
    found = evaluate(algorithm, algorithm.init(), Lines(-20.0), number=3, seed=SEED)
    tasks = [Lines(-20.0).sample_batch(fm.rng.fold(SEED, 3, index), 1) for index in range(3)]
    assert found.scores.tolist() == pytest.approx([trained_by_hand(net, task) for task in tasks], rel=1e-12)


@dataclass(frozen=True)
class Scaled:
    """The quadratics of another sampler, on another scale."""

    scale: float

    def sample_batch(self, seed: int, tasks: int) -> fm.Task:
        W, y = fm.tasks.quadratics().sample_batch(seed, tasks).support
        return fm.Task((self.scale * W, self.scale * y), (self.scale * W, self.scale * y))


def test_a_learned_optimizer_is_validated_on_the_tasks_of_the_validation() -> None:
    case = KINDS["windows"]()
    start = case.algorithm.init()
    held_out = Validation(Scaled(0.1), number=2)
    found = fit(case.algorithm, Scaled(1.0), adam, steps=1, meta=start, validation=held_out).records[0].validation
    totals = []
    for index in range(2):
        seed = fm.rng.fold(0, 1, index)
        losses = case.algorithm.windows(start, Scaled(0.1).sample_batch(seed, 1), seed=seed)
        totals.append(sum(loss.item() for loss in losses))
    assert found.value == pytest.approx(sum(totals) / 2, rel=1e-5)


def test_a_language_model_is_validated_on_the_articles_of_the_validation() -> None:
    read, held_out = ([Article(word, (word, "b", "<eos>") * size) for size in (9, 5, 7)] for word in ("a", "c"))
    corpus = fm.tasks.corpus(read + held_out, [], [])
    with fm.rng.forked(0):
        net = dynamic_lm.LanguageModel(len(corpus.vocabulary), 4)
    algorithm = dynamic_lm.build(net, fm.learned.gates(copy=0.99, update=0.1, flush=0.01), window=3)
    start = algorithm.init()
    validation = Validation(corpus.streams(held_out, 5), number=3)
    fitted = fit(algorithm, corpus.streams(read, 5), adam, steps=1, batch_size=1, meta=start, validation=validation)
    losses = [torch.cat(algorithm.adapt(start, corpus.stream([each], 5)).losses).mean().item() for each in held_out]
    assert fitted.records[0].validation.value == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_best_is_the_best_on_held_out_tasks() -> None:
    """In training lower is better: 3, 2, 1, 0, −1. Held-out tasks are best at 1."""
    validation = Validation(Lines(1.0), every=1, number=2, score=lambda predict, task: distance(predict, task))

    def distance(predict: Tensor, task: fm.Task) -> Tensor:
        x, y = task.query
        return (predict - (y / x).mean()).abs()

    fitted = fit(down(), Lines(-50.0), sgd, steps=4, validation=validation)
    assert fitted.meta.item() == 1.0
    assert [record.step for record in fitted.records if record.best] == [0, 1, 2]


SEEDS = (*range(12), 2**62, 2**63 - 1, *(fm.rng.fold(0, *path) for path in [(0,), (1,), (3,), (0, 0), (1, 0), (3, 0)]))


def test_streams_never_overlap_whatever_the_seeds() -> None:
    """One sampler for everything: no task of any training, validation or evaluation is one of another kind."""
    drawn: dict[str, list[int]] = {"training": [], "validation": [], "evaluation": []}
    for seed in SEEDS:
        train, validation, test = Lines(), Lines(), Lines()
        judged = Validation(validation, every=2, number=5)
        fit(down(), train, sgd, steps=4, batch_size=3, accumulate=2, seed=seed, validation=judged)
        evaluate(down(), torch.tensor(1.0), test, number=20, seed=seed)
        for name, sampler in zip(drawn, (train, validation, test), strict=True):
            drawn[name] += {*sampler.asked}
    assert [len(each) for each in drawn.values()] == [len(SEEDS) * number for number in (8 * 3, 5, 20)]
    assert all(len({*each}) == len(each) for each in drawn.values())
    for one, other in combinations(drawn, 2):
        assert not {*drawn[one]} & {*drawn[other]}, f"{one} and {other}"


class Draws:
    """A sampler that draws from torch's global generator, as many are written."""

    def sample_batch(self, seed: int, tasks: int) -> fm.Task:
        x = torch.rand(tasks, 3, 1)
        return fm.Task((x, x), (x, x))


def test_held_out_tasks_are_the_same_each_time_though_the_global_generator_draws_them() -> None:
    state = torch.get_rng_state()
    seen = []
    validation = Validation(Draws(), every=1, number=2, score=lambda predict, task: task.query[0].mean())
    for _ in range(2):
        torch.rand(7)
        fitted = fit(down(), Lines(), sgd, steps=2, validation=validation)
        seen += [record.validation.value for record in fitted.records]
    assert len({*seen}) == 1
    torch.set_rng_state(state)
    scores = [evaluate(down(), torch.tensor(1.0), Draws(), number=4, score=validation.score).scores for _ in range(2)]
    assert torch.equal(*scores)
    assert len({*scores[0].tolist()}) == 4
    assert torch.equal(torch.get_rng_state(), state)


# --- what cannot be judged on


@pytest.mark.parametrize(
    ("kind", "validation", "message"),
    [
        ("few shot", Validation("nonsense"), r"validation.tasks is a str, expected a sampler\. Pass e\.g\. tasks"),  # type: ignore[arg-type]
        ("windows", Validation([1, 2]), r"validation.tasks is a list, expected a sampler"),  # type: ignore[arg-type]
        ("few shot", "streams", r"validation.tasks are streams, which only dynamic_lm reads\. Pass a sampler"),
        ("reading", Validation(Lines()), r"validation.tasks is a Lines, expected streams\. Pass Corpus\.streams"),
        ("reading", "streams", r"one article after the other, and there are 4\. Leave score out, and judge on no more"),
    ],
)
def test_a_validation_of_what_can_not_be_judged_on_is_refused_before_work(
    kind: str, validation: Any, message: str, tmp_path: Path
) -> None:
    case: Case = KINDS[kind]()
    judged = Validation(KINDS["reading"]().tasks, number=5) if validation == "streams" else validation
    with pytest.raises(fm.ArgumentError, match=message):
        fit(case.algorithm, case.tasks, adam, steps=1, validation=judged, folder=Folder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_language_model_has_no_score() -> None:
    case = KINDS["reading"]()
    judged = Validation(case.tasks, number=2, score=lambda predict, task: 0.0)
    with pytest.raises(fm.ArgumentError, match=r"judged by its loss on one article .* Leave score out"):
        fit(case.algorithm, case.tasks, adam, steps=1, batch_size=1, validation=judged)


def test_a_held_out_sampler_returns_a_stack_too() -> None:
    class One:
        def sample_batch(self, seed: int, tasks: int) -> fm.Task:
            return fm.tasks.sinusoids(shots=4).sample(seed)

    with pytest.raises(fm.ArgumentError, match=r"sample_batch\(\d+, 1\) has a .*, expected 1 tasks along the first"):
        fit(down(), Lines(), sgd, steps=1, validation=Validation(One()))


# --- runs that are resumed


def test_a_run_is_resumed_with_the_validation_that_it_was_begun_with(tmp_path: Path) -> None:
    judged = Validation(Lines(2.0), every=1, number=2)
    fit(down(), Lines(), sgd, steps=1, validation=judged, folder=Folder(tmp_path))
    resumed = Folder(tmp_path, resume=True)
    was = "begun with other settings: validation 'of 2 tasks, the lowest mean of loss is best', now"
    with pytest.raises(fm.ArgumentError, match=rf"{was} 'of 3 tasks, the lowest mean of loss is best'\. Resume it"):
        fit(down(), Lines(), sgd, steps=2, validation=judged._replace(number=3), folder=resumed)
    with pytest.raises(fm.ArgumentError, match=rf"{was} 'of 2 tasks, the highest mean of loss is best'"):
        fit(down(), Lines(), sgd, steps=2, validation=judged._replace(higher_is_better=True), folder=resumed)
    with pytest.raises(fm.ArgumentError, match=rf"{was} None"):
        fit(down(), Lines(), sgd, steps=2, folder=resumed)
    more = judged._replace(every=2, patience=9)
    assert fit(down(), Lines(), sgd, steps=2, validation=more, folder=resumed).step == 2


def made_before(folder: Path) -> None:
    """Make the newest checkpoint one of an earlier version, which did not note the validation."""
    path = max((folder / "checkpoints").glob("step-*"))
    found = _tree_file.read(path, "checkpoint")
    del found["settings"]["validation"]
    _tree_file.write(path, "checkpoint", found)


@pytest.mark.parametrize("validation", [None, Validation(Lines(2.0), number=2)])
def test_a_run_whose_best_was_chosen_by_training_tasks_is_not_resumed(
    validation: Validation | None, tmp_path: Path
) -> None:
    fit(down(), Lines(), sgd, steps=2, validation=Validation(Lines(2.0), number=2), folder=Folder(tmp_path))
    made_before(tmp_path)
    with pytest.raises(fm.ArgumentError, match=r"validated on the training tasks .* Begin it again in another folder"):
        fit(down(), Lines(), sgd, steps=3, validation=validation, folder=Folder(tmp_path, resume=True))


def test_a_run_of_before_that_had_no_validation_goes_on(tmp_path: Path) -> None:
    fit(down(), Lines(), sgd, steps=2, folder=Folder(tmp_path))
    made_before(tmp_path)
    fitted = fit(down(), Lines(), sgd, steps=3, folder=Folder(tmp_path, resume=True))
    assert (fitted.step, fitted.meta.item()) == (3, 0.0)
