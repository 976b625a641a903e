"""Each option of ``funcmeta compare`` makes its difference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import funcmeta as fm
from funcmeta.cli import _run
from funcmeta.cli._app import app

KNOWN: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What ``funcmeta compare`` computes with, by its words; nothing is trained."""

    def once(*words: str) -> dict[str, Any]:
        if words not in KNOWN or "--out" in words:
            KNOWN[words] = run(*words)
        return KNOWN[words]

    def run(*words: str) -> dict[str, Any]:
        seen: dict[str, Any] = {"stops": 0, "judged": {}}
        keep, rate = _run.compare, fm.optim.sgd
        monkeypatch.setattr(_run, "sgd", lambda lr: seen.update(lr=lr) or rate(lr))

        def compare(problem: Any, meta: Any, task: Any, **options: Any) -> Any:
            seen.update(meta=meta, task=task, threads=torch.get_num_threads(), **options)
            return keep(problem, meta, task, **options) if "--out" in words else None

        def scores(plan: Any, params: Any, split: str, tasks: int, steps: int) -> torch.Tensor:
            seen["judged"][split] = (tasks, {*seen["judged"].get(split, (0, ()))[1], steps})
            return torch.arange(float(tasks))

        class Adam(torch.optim.Adam):
            def __init__(self, params: Any, lr: float) -> None:
                seen["meta_lr"] = lr
                super().__init__(params, lr)

            def step(self, closure: Any = None) -> None:
                seen["stops"] += 1

        monkeypatch.setattr(_run, "compare", compare)
        monkeypatch.setattr(_run.Plan, "scores", scores)
        monkeypatch.setattr("funcmeta.cli._training.torch.optim.Adam", Adam)
        build = fm.maml.build

        def built(net: Any, loss: Any, **options: Any) -> Any:
            seen["inner"] = options
            algorithm = build(net, loss, **options)
            return algorithm._replace(
                loss=lambda meta, tasks, seed: (
                    seen.update(batch=tasks) or sum(each.sum() for each in meta["params"].values())
                )
            )

        monkeypatch.setattr("funcmeta.cli._training.maml.build", built)
        out, threads = tmp_path / "out", torch.get_num_threads()
        if "--out" not in words:  # tables and a picture take longer than all else
            monkeypatch.setattr(_run.Report, "show", lambda report, console: None)
            monkeypatch.setattr(_run.Report, "save", lambda report, folder: None)
        try:
            given = () if "--out" in words else ("--out", str(out))
            result = CliRunner().invoke(app, ["compare", *words, *given])
        finally:
            torch.set_num_threads(threads)
            monkeypatch.undo()
        assert result.exit_code == 0, result.output
        return {**seen, "files": sorted(path.name for path in (tmp_path / "out").iterdir()), "output": result.output}

    return once


def conv(seen: dict[str, Any]) -> Any:
    return seen["meta"]["params"]["conv1.weight"].detach()


COMPARED: list[tuple[str, tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], Any], Any, Any]] = [
    ("data", (), ("sinusoids",), lambda seen: seen["task"].support[0].dim(), 4, 2),
    ("model", (), ("mlp",), lambda seen: "linear1.weight" in seen["meta"]["params"], False, True),
    (
        "estimators",
        (),
        ("first,reptile",),
        lambda seen: [*seen["estimators"].values()],
        [fm.Reverse(), fm.FirstOrder()],
        None,
    ),
    ("ways", (), ("4",), lambda seen: seen["task"].support[1].max().item() + 1, 5, 4),
    ("shots", (), ("2",), lambda seen: len(seen["task"].support[1]), 5, 10),
    ("queries", (), ("2",), lambda seen: len(seen["task"].query[1]), 25, 10),
    (
        "steps",
        (),
        ("2",),
        lambda seen: (seen["steps"], seen["inner"]["steps"], seen["judged"]["test"][1]),
        (5, 5, {5, 20}),
        (2, 2, {2, 8}),
    ),
    ("lr", (), ("0.2",), lambda seen: (seen["lr"], seen["inner"]["lr"]), (0.1, 0.1), (0.2, 0.2)),
    ("meta-lr", (), ("0.2",), lambda seen: seen["meta_lr"], 0.01, 0.2),
    ("tasks", (), ("3",), lambda seen: len(seen["batch"].support[0]), 4, 3),
    ("iterations", (), ("7",), lambda seen: seen["stops"], 2 * 60, 2 * 7),
    ("test-tasks", (), ("9",), lambda seen: seen["judged"]["test"][0], 80, 9),
    ("size", (), ("20",), lambda seen: seen["task"].support[0].shape[-1], 16, 20),
    ("filters", (), ("3",), lambda seen: len(conv(seen)), 2, 3),
    ("dtype", (), ("float64",), lambda seen: conv(seen).dtype, torch.float32, torch.float64),
    ("threads", (), ("2",), lambda seen: seen["threads"], 1, 2),
]


@pytest.mark.parametrize(("name", "words", "value", "probe", "without", "with_it"), COMPARED)
def test_an_option_of_compare_makes_its_difference(
    name: str,
    words: tuple[str, ...],
    value: tuple[str, ...],
    probe: Callable[[dict[str, Any]], Any],
    without: Any,
    with_it: Any,
    compared: Callable[..., dict[str, Any]],
) -> None:
    small = {"--filters": "2", "--steps": "1", "--queries": "1", "--iterations": "2"}
    if name in ("steps", "queries", "iterations"):
        del small[f"--{name}"]
    first = [each for pair in small.items() for each in pair]
    assert probe(compared(*first, *words)) == without
    if name in ("data", "model", "filters"):
        del small["--filters"]
    found = probe(compared(*[each for pair in small.items() for each in pair], *words, f"--{name}", *value))
    if name == "estimators":
        with_it = [fm.FirstOrder(), fm.Reptile()]
    assert found == with_it
    assert found != without


def test_the_default_number_of_channels_of_compare(compared: Callable[..., dict[str, Any]]) -> None:
    assert len(conv(compared("--steps", "1", "--queries", "1", "--iterations", "0"))) == 32


def test_the_seed_of_compare_draws_the_net_and_all_tasks(compared: Callable[..., dict[str, Any]]) -> None:
    words = ("--filters", "2", "--steps", "1", "--queries", "1", "--iterations", "2")
    first, other, again = (compared(*words, *more) for more in ((), ("--seed", "1"), ("--seed", "0")))
    for look in (conv, lambda seen: seen["task"].support[0], lambda seen: seen["batch"].support[0]):
        assert torch.equal(look(first), look(again))
        assert not torch.equal(look(first), look(other))
    assert (first["seed"], other["seed"]) == (0, 1)


def test_the_folder_of_compare(compared: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    small = ("--filters", "2", "--steps", "1", "--queries", "1", "--iterations", "0")
    found = compared(*small, "--out", str(tmp_path / "out" / "deeper"))
    assert found["files"] == ["deeper"]
    assert {path.name for path in (tmp_path / "out" / "deeper").iterdir()} == {"compare.png", "compare.json"}


def test_every_option_of_compare_is_tried() -> None:
    options = {each.opts[0].removeprefix("--") for each in typer.main.get_command(app).commands["compare"].params}
    assert {each[0] for each in COMPARED} | {"seed", "out"} == options
