"""Meta-LSTM beside MAML: each is ahead of the untrained network, and the picture shows what the gates do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from real_data import OMNIGLOT, needs

SCRIPT = "meta_lstm.py"
Load = Callable[[str], ModuleType]


def run(example: Load, out: Path, **options: Any) -> dict[str, tuple[float, float]]:
    example(SCRIPT).main(out=out, **options)
    assert (out / "picture.png").stat().st_size > 10_000
    figures = json.loads((out / "figures.json").read_text())
    assert len(figures["gates"]) == 5
    for gates in figures["gates"]:
        assert all(0 < low <= middle <= high < 1 for low, middle, high in gates.values())
    return {row["method"]: tuple(row["accuracy"]) for row in figures["rows"]}


def test_it_runs_from_end_to_end(example: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = example(SCRIPT)
    monkeypatch.setattr(script, "QUICK", (2, 4))
    assert list(run(lambda _: script, tmp_path, quick=True)) == ["untrained, SGD", *script.METHODS]


def test_data_that_is_not_there_is_asked_for(example: Load) -> None:
    for data in ("omniglot", "pictures"):
        with pytest.raises(typer.BadParameter, match="omniglot needs --path"):
            example(SCRIPT).main(data=data)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["glyphs", pytest.param("omniglot", marks=needs(OMNIGLOT))])
def test_each_is_ahead_of_the_untrained_network(data: str, example: Load, tmp_path: Path) -> None:
    rows = run(example, tmp_path, data=data, path=OMNIGLOT, quick=True)
    untrained, margin = rows.pop("untrained, SGD")
    assert all(accuracy - own > untrained + margin for accuracy, own in rows.values())
