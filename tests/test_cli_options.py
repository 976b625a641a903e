"""Each setting of ``funcmeta train`` makes its difference; the help of each option says what is taken without it."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from typer.testing import CliRunner

import funcmeta as fm
from funcmeta.cli import _recipe, _train
from funcmeta.cli._app import app
from funcmeta.cli._settings import ALGORITHMS, READS, Settings, settings
from funcmeta.training import Validation

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def call(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


# --- help


def helped(command: str) -> dict[str, str]:
    """What the help says of each option, in one line."""
    text = call(command, "--help").output.partition("Options:")[2]
    parts = re.split(r"^  (--[a-z-]+)", text, flags=re.MULTILINE)[1:]
    return {name: " ".join(said.split()) for name, said in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_option_says_what_is_taken_without_it(command: str) -> None:
    told = helped(command)
    assert len(told) == len([each for each in COMMANDS[command].params if each.param_type_name == "option"]) + 1
    for name, said in told.items():
        is_flag = name in ("--help", "--resume", "--tensorboard")
        assert is_flag or re.search(r"Default: .*\.|\[default: .*\]", said), f"{name} {said}"


@pytest.mark.parametrize("name", [each.name for each in fields(Settings) if each.name != "algorithm"])
def test_what_the_help_says_is_what_is_taken(name: str) -> None:
    said = re.search(r"Default: (.*)\.$", helped("train")["--" + name.replace("_", "-")])
    assert said
    usual, *others = said[1].split(", ")
    own = dict(each.split(" ") for each in others)
    for algorithm in (each for each in ALGORITHMS if name in READS[each]):
        assert getattr(settings({"algorithm": algorithm}, None), name) == type(getattr(Settings, name))(
            own.get(algorithm, usual)
        )
    curves = settings({"algorithm": "maml", "tasks": "sinusoids"}, None)
    if name != "tasks" and name not in ("ways", "size", "filters"):
        assert str(getattr(curves, name)).removesuffix(".0") == own.get("sinusoids", usual)


# --- train: every setting reaches what it is about


class Told(NamedTuple):
    """What a command trains: how the algorithm was built, and what ``fit`` was given."""

    built: tuple[Any, ...]
    build: dict[str, Any]
    static: dict[str, Any]
    algorithm: Any
    tasks: Any
    optimizer: Any
    fit: dict[str, Any]
    threads: int

    @property
    def batch(self) -> fm.Task:
        return self.tasks.sample_batch(3, 2)  # type: ignore[no-any-return]

    @property
    def outer(self) -> torch.optim.Optimizer:
        return self.optimizer(self.algorithm.init())  # type: ignore[no-any-return]

    @property
    def weights(self) -> float:
        return sum(leaf.detach().double().abs().sum().item() for leaf in fm.tree.leaves(self.algorithm.init()))


class Enough(Exception):
    """The command came as far as it is wanted to."""


KNOWN: dict[tuple[str, ...], Told] = {}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """What ``funcmeta train`` makes of its words."""
    seen: dict[str, Any] = {}

    def noted(name: str, keep: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            seen[name] = args, kwargs
            return keep(*args, **kwargs)

        return made

    for algorithm in ALGORITHMS:
        module = getattr(_recipe, algorithm)
        monkeypatch.setattr(module, "build", noted("build", module.build))
    monkeypatch.setattr(_recipe.dynamic_lm, "train_static", noted("static", lambda *args, **kwargs: []))

    def fit(*args: Any, **kwargs: Any) -> None:
        seen["fit"], seen["threads"] = (args, kwargs), torch.get_num_threads()
        raise Enough

    monkeypatch.setattr(_train, "fit", fit)

    def once(*words: str) -> Told:
        if words not in KNOWN:
            KNOWN[words] = run(*words)
        return KNOWN[words]

    def run(algorithm: str, *words: str) -> Told:
        seen.clear()
        threads = torch.get_num_threads()
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        try:
            result = call("train", algorithm, "--out", str(out), *words)
        finally:
            torch.set_num_threads(threads)
        assert isinstance(result.exception, Enough), result.output
        (given, options), (built, build) = seen["fit"], seen["build"]
        return Told(built, build, seen.get("static", ((), {}))[1], *given, options, seen["threads"])

    return once


def inner_rate(told: Told) -> float:
    """The learning rate of the inner training."""
    if "lr" in told.build:
        return told.build["lr"]  # type: ignore[no-any-return]
    one = {"w": torch.ones(1)}
    transform = told.build["optimizer"]
    return -transform.update(one, transform.init(one), one)[0]["w"].item()  # type: ignore[no-any-return]


def rate_after_all_steps(told: Told) -> float:
    """The outer learning rate at the end of a run of four steps."""
    if told.fit["scheduler"] is None:
        return 1.0
    outer = told.outer
    scheduler = told.fit["scheduler"](outer)
    first = scheduler.get_last_lr()[0]
    for _ in range(told.fit["steps"]):
        outer.step()
        scheduler.step()
    return round(scheduler.get_last_lr()[0] / first, 9)  # type: ignore[no-any-return]


def shape(part: str, dim: int) -> Callable[[Told], int]:
    return lambda told: getattr(told.batch, part)[0].shape[dim]  # type: ignore[no-any-return]


GRADIENT = ("maml", "anil", "meta_sgd", "meta_lstm", "l2l", "dynamic_lm")
LOOPS = ("maml", "anil", "meta_sgd", "reptile", "meta_lstm")
READER = ("dynamic_lm",)
PES = ("--estimator", "pes:0.5:2")

Probe = Callable[[Told], Any]
DIFFERENCES: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...], Probe, Any, Any]] = [
    # option, algorithms, words in both, its words, what is looked at, without it, with it
    ("tasks", ("maml",), (), ("sinusoids",), lambda told: told.batch.support[0].dim(), 5, 3),
    ("model", ("maml",), (), ("mlp",), lambda told: "linear1.weight" in told.algorithm.init()["params"], False, True),
    ("ways", LOOPS, (), ("4",), lambda told: told.batch.support[1].max().item() + 1, 5, 4),
    ("shots", LOOPS, ("--ways", "3"), ("2",), shape("support", 1), 3, 6),
    ("queries", LOOPS, ("--ways", "3"), ("2",), shape("query", 1), 15, 6),
    ("size", LOOPS, (), ("20",), shape("query", -1), 16, 20),
    ("filters", ("maml",), (), ("3",), lambda told: len(told.algorithm.init()["params"]["conv1.weight"]), 32, 3),
    ("inner-steps", ("maml", "anil", "meta_sgd"), (), ("3",), lambda told: told.build["steps"], 5, 3),
    ("inner-steps", ("reptile",), (), ("3",), lambda told: told.build["steps"], 10, 3),
    ("inner-steps", ("meta_lstm",), (), ("3",), lambda told: told.build["steps"], 8, 3),
    ("inner-steps", ("l2l",), (), ("30",), lambda told: told.build["steps"], 100, 30),
    ("inner-lr", ("maml", "anil", "meta_sgd"), (), ("0.5",), inner_rate, 0.1, 0.5),
    ("inner-lr", ("reptile",), (), ("0.5",), inner_rate, pytest.approx(0.05), 0.5),
    ("estimator", LOOPS[:3], (), ("mixed",), lambda told: told.build["estimator"], fm.Reverse(), fm.MixedMode()),
    (
        *("estimator", GRADIENT[3:], (), ("truncated:3",)),
        *(lambda told: told.build["estimator"], fm.FirstOrder(), fm.Truncated(3)),
    ),
    (
        *("estimator", ("l2l",), (), ("es:0.5:3",)),
        *(lambda told: told.build["estimator"], fm.FirstOrder(), fm.EvolutionStrategies(0.5, 3)),
    ),
    ("memory", GRADIENT, (), ("segments:2",), lambda told: told.build["memory"], fm.StoreAll(), fm.Segments(2)),
    ("memory", ("maml",), (), ("revolve:2",), lambda told: told.build["memory"], fm.StoreAll(), fm.Revolve(2)),
    ("strategy", (*LOOPS, "l2l"), (), ("loop",), lambda told: told.build["strategy"], "vmap", "loop"),
    ("optimizer", ("l2l",), (), ("mlp",), lambda told: type(told.built[0]), type(fm.learned.lstm()), None),
    ("window", ("l2l", "dynamic_lm"), (), ("7",), lambda told: told.build["window"], 20, 7),
    ("window", ("maml", "l2l"), PES, ("7",), lambda told: told.build["estimator"], fm.PersistentES(0.5, 2, 20), None),
    ("vocabulary", READER, (), ("60",), lambda told: len(told.tasks.corpus.vocabulary), 2000, 60),
    ("width", READER, (), ("5",), lambda told: told.built[0].embedding.embedding_dim, 64, 5),
    ("segment", READER, (), ("30",), lambda told: len(told.tasks.alone(0).support(0)[0]), 20, 30),
    ("static-epochs", READER, (), ("2",), lambda told: told.static["epochs"], 6, 2),
    ("steps", ("maml",), (), ("7",), lambda told: told.fit["steps"], 1000, 7),
    ("batch-size", ("maml", "meta_lstm"), (), ("6",), lambda told: told.fit["batch_size"], 4, 6),
    ("batch-size", ("l2l",), (), ("6",), lambda told: told.fit["batch_size"], 32, 6),
    ("batch-size", READER, (), ("6",), lambda told: told.fit["batch_size"], 1, 6),
    ("accumulate", ("maml",), (), ("2",), lambda told: told.fit["accumulate"], 1, 2),
    ("meta-lr", ("maml",), (), ("0.5",), lambda told: told.outer.param_groups[0]["lr"], 0.001, 0.5),
    ("meta-lr", ("reptile", "dynamic_lm"), (), ("0.5",), lambda told: told.outer.param_groups[0]["lr"], 0.01, 0.5),
    ("schedule", ("maml",), ("--steps", "4"), ("cosine",), rate_after_all_steps, 1.0, 0.0),
    ("clip", ("maml",), (), ("2",), lambda told: told.fit["clip"], None, 2.0),
    ("clip", ("l2l",), (), ("2",), lambda told: told.fit["clip"], 1.0, 2.0),
    ("alarm", ("maml",), (), ("lower",), lambda told: told.fit["alarm"].action, "stop", "lower"),
    ("limit", ("maml",), (), ("8",), lambda told: told.fit["alarm"].limit, float("inf"), 8.0),
    ("validate-every", ("maml",), (), ("3",), lambda told: told.fit["validation"].every, 100, 3),
    ("validate-every", ("maml",), (), ("0",), lambda told: told.fit["validation"] is None, False, True),
    ("validation-tasks", ("maml",), (), ("5",), lambda told: told.fit["validation"].number, 40, 5),
    ("validation-tasks", READER, (), ("3",), lambda told: told.fit["validation"].number, 4, 3),
    ("patience", ("maml",), (), ("2",), lambda told: told.fit["validation"].patience, None, 2),
    ("checkpoint-every", ("maml",), (), ("9",), lambda told: told.fit["folder"].every, 100, 9),
    ("seed", ("maml", "l2l"), (), ("11",), lambda told: told.fit["seed"], 0, 11),
    (
        "dtype",
        (*LOOPS, "l2l"),
        (),
        ("float64",),
        lambda told: told.batch.support[0].dtype,
        *(torch.float32, torch.float64),
    ),
    (
        "dtype",
        ALGORITHMS,
        (),
        ("float64",),
        lambda told: fm.tree.leaves(told.algorithm.init())[0].dtype,
        torch.float32,
        torch.float64,
    ),
    ("threads", ("maml",), (), ("2",), lambda told: told.threads, 1, 2),
]


def test_every_setting_is_among_the_differences() -> None:
    assert {each[0].replace("-", "_") for each in DIFFERENCES} == {each.name for each in fields(Settings)} - {
        "algorithm"
    }


@pytest.mark.parametrize(
    ("name", "algorithm", "words", "value", "probe", "without", "with_it"),
    [(name, algorithm, *rest) for name, algorithms, *rest in DIFFERENCES for algorithm in algorithms],
)
def test_a_setting_makes_its_difference(
    name: str,
    algorithm: str,
    words: tuple[str, ...],
    value: tuple[str, ...],
    probe: Probe,
    without: Any,
    with_it: Any,
    told: Callable[..., Told],
) -> None:
    small = ("--width", "6") if algorithm == "dynamic_lm" and name != "width" else ()
    assert probe(told(algorithm, *small, *words)) == without
    found = probe(told(algorithm, *small, *words, f"--{name}", *value))
    if name == "optimizer":
        with_it = type(fm.learned.mlp())
    if name == "window" and words:
        with_it = fm.PersistentES(0.5, 2, 7)
    assert found == with_it
    assert found != without


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_seed_draws_the_initial_weights(algorithm: str, told: Callable[..., Told]) -> None:
    first, other, again = (told(algorithm, "--seed", seed).weights for seed in ("1", "2", "1"))
    assert first == again != other


def test_the_seed_parts_the_articles(told: Callable[..., Told]) -> None:
    first, other, again = (told("dynamic_lm", "--seed", seed).tasks.articles for seed in ("1", "2", "1"))
    assert first == again != other


def test_bfloat16_casts_the_products_of_the_inner_loss(told: Callable[..., Told]) -> None:
    seen = []
    for dtype in ("float32", "bfloat16"):
        run = told("maml", "--tasks", "sinusoids", "--dtype", dtype)
        batch = run.tasks.sample(1).support

        def predict(x: torch.Tensor) -> torch.Tensor:
            seen.append((x @ x.T).dtype)
            return x

        run.built[1]({}, predict, batch)
    assert seen == [torch.float32, torch.bfloat16]


# --- folders of WikiText


def text(titles: str) -> str:
    return "".join(f" \n = {title} = \n \n " + f"{title} b c d e " * 30 + "\n" for title in titles)


LAYOUTS = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
READ = ("--vocabulary", "20", "--width", "4", "--static-epochs", "1")


def folder_of(path: Path, layout: str, **parts: str) -> Path:
    path.mkdir()
    for part, titles in parts.items():
        (path / layout.format(part)).write_text(text(titles))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_wikitext_is_read_as_it_is_published(
    layout: str, tmp_path: Path, told: Callable[..., Told]
) -> None:
    folder = folder_of(tmp_path / "wikitext-2", layout, train="XYZ", valid="ABCDEFGHIJKLMNOP", test="QRS")
    run = told("dynamic_lm", *READ, "--tasks", f"wikitext:{folder}")
    judged: Validation = run.fit["validation"]
    titles = [{each.title for each in streams.articles} for streams in (run.tasks, judged.tasks)]  # type: ignore[union-attr]
    assert [len(each) for each in titles] == [2, 2]
    assert not titles[0] & titles[1]
    assert titles[0] | titles[1] < {*"ABCDEFGHIJKLMNOP"}
    assert [each.title for each in run.tasks.corpus.test] == ["Q", "R", "S"]


@pytest.mark.parametrize("layout", ["wiki.{}.tokens.zip", "{}.parquet"])
def test_another_folder_is_told_which_files_are_looked_for(layout: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "wikitext-2", layout, valid="ABC", test="DEF")
    (folder / "wiki.valid.tokens").write_text(text("ABC"))
    result = call("train", "dynamic_lm", *READ, "--tasks", f"wikitext:{folder}", "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    looked = (
        f"{folder} has no two files of WikiText, expected valid.txt and test.txt, or wiki.valid.tokens and "
        "wiki.test.tokens, or wiki.valid.raw and wiki.test.raw. Pass the folder"
    )
    assert looked in result.output


@pytest.mark.parametrize(("valid", "test"), [("ABCDEFGH", "QRS"), ("ABCDEFGHIJKLMNOP", "Q")])
def test_too_few_articles_are_told(valid: str, test: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "small", "{}.txt", valid=valid, test=test)
    result = call("train", "dynamic_lm", *READ, "--tasks", f"wikitext:{folder}", "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    said = f"which has {len(valid) // 4} articles to train the gates on and to validate with, and {len(test)} to be jud"
    assert said in result.output
