"""``funcmeta compare``: tables, picture, figures and errors, in runs as small as can be; the default run is slow."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from funcmeta import cli
from funcmeta.cli._app import app
from funcmeta.cli._report import Report
from funcmeta.cli._subject import subject

SMALL = ("--queries", "1", "--steps", "1", "--tasks", "2", "--iterations", "2", "--test-tasks", "3")
PNG = b"\x89PNG\r\n"


def compare(out: Path, *options: str) -> Any:
    net = () if {"sinusoids", "mlp"} & {*options} else ("--filters", "2")
    return CliRunner().invoke(app, ["compare", *SMALL, *net, "--out", str(out), *options], env={"COLUMNS": "80"})


def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "compare.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("small") / "new" / "folder"
    result = compare(out, "--estimators", "second,first,reptile")
    assert result.exit_code == 0, result.output
    return out, result.output


def test_the_tables(small: tuple[Path, str]) -> None:
    out, text = small
    assert "5-way 1-shot glyphs, conv4, 1 inner step of SGD at 0.1" in text
    assert "Meta-gradients after 1 inner step, float32 on cpu, against 'second order'." in text
    assert re.search(r"second order.*first order.*Reptile", text)
    for measure in ("cosine", "norm ratio", "worst leaf", "finite differences", "time", "memory", "evaluations"):
        assert measure in text
    assert "3 held-out tasks after 2 iterations of 2 tasks" in text
    assert re.search(r"random +│ +4 │ +\d\.\d{3} ± \d\.\d{3} │ +│", text)
    assert re.search(r"first order +│ +1 │ +\d\.\d{3} ± \d\.\d{3} │ +[+-]\d\.\d{3} ± \d\.\d{3} │ +[\d.]+ m?s │", text)
    *tables, last = text.splitlines()
    assert max(len(line) for line in tables) <= 80
    assert last.startswith(f"Wrote {out / 'compare.png'} and {out / 'compare.json'} after ")


def test_the_picture(small: tuple[Path, str]) -> None:
    out, _ = small
    assert (out / "compare.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]


def test_the_figures(small: tuple[Path, str]) -> None:
    found = content(small[0])
    assert found["options"]["estimators"] == "second,first,reptile"
    assert [row["name"] for row in found["comparison"]["rows"]] == ["second order", "first order", "Reptile"]
    assert found["comparison"]["dtype"] == "float32"
    assert found["comparison"]["rows"][0]["fd_error"] < 0.05
    training = found["training"]
    assert training["score"] == "query accuracy"
    assert [each["name"] for each in training["estimators"]] == ["second order", "first order", "Reptile"]
    for each in training["estimators"]:
        assert len(each["losses"]) == 2
        assert [point["iteration"] for point in each["validation"]] == [0, 1, 2]
        assert each["validation"][0]["value"] == training["estimators"][0]["validation"][0]["value"]
        assert each["seconds_per_iteration"] > 0
    assert [(each["name"], each["steps"]) for each in training["test"]] == [
        *(("random", 4), ("random", 1)),
        *(("second order", 1), ("first order", 1), ("Reptile", 1)),
    ]
    assert training["test"][0]["difference"] is None
    scores = [each["score"]["value"] for each in training["test"]]
    assert training["test"][2]["difference"]["value"] == pytest.approx(scores[2] - scores[0], abs=1e-6)
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == 1
    assert found["seconds"] > 0


def test_the_same_seed_gives_the_same_training(small: tuple[Path, str], tmp_path: Path) -> None:
    assert compare(tmp_path, "--estimators", "first").exit_code == 0
    (again,) = content(tmp_path)["training"]["estimators"]
    assert again["losses"] == pytest.approx(content(small[0])["training"]["estimators"][1]["losses"], rel=1e-4)


def test_another_seed_gives_another_training(small: tuple[Path, str], tmp_path: Path) -> None:
    assert compare(tmp_path, "--estimators", "first", "--seed", "1").exit_code == 0
    (other,) = content(tmp_path)["training"]["estimators"]
    assert other["losses"] != pytest.approx(content(small[0])["training"]["estimators"][1]["losses"], rel=1e-2)


def test_sinusoids_are_scored_by_their_error(tmp_path: Path) -> None:
    result = compare(
        tmp_path, "--data", "sinusoids", "--shots", "5", "--lr", "0.01", "--dtype", "float64", "--iterations", "9"
    )
    assert result.exit_code == 0, result.output
    assert "5-shot sinusoids, mlp" in result.output
    assert "query error" in result.output
    assert content(tmp_path)["comparison"]["dtype"] == "float64"
    assert content(tmp_path)["comparison"]["rows"][0]["fd_error"] < 1e-5


def test_without_meta_training(tmp_path: Path) -> None:
    result = compare(tmp_path, "--iterations", "0", "--model", "mlp")
    assert result.exit_code == 0, result.output
    assert "held-out" not in result.output
    assert content(tmp_path)["training"] is None
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)


def test_omniglot_is_read_from_its_folder(tmp_path: Path) -> None:
    from PIL import Image

    for alphabet in ("Greek", "Early_Aramaic", "Tagalog"):
        for character in range(1, 4):
            folder = tmp_path / "images_background" / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawer in range(1, 4):
                picture = Image.new("1", (105, 105), 1)
                picture.putpixel((30 * character, 30 * drawer), 0)
                picture.save(folder / f"{character:04}_{drawer:02}.png")
    result = compare(tmp_path / "out", "--data", f"omniglot:{tmp_path}", "--ways", "3", "--estimators", "second")
    assert result.exit_code == 0, result.output
    assert "3-way 1-shot omniglot" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "glyphz"], "data is 'glyphz', expected glyphs, omniglot:PATH or sinusoids. Pass one of them."),
        (["--data", "omniglot"], "data is 'omniglot', expected glyphs, omniglot:PATH"),
        (["--data", "glyphs:here"], "data is 'glyphs:here', expected glyphs, omniglot:PATH"),
        (["--data", "omniglot:not/there"], "not/there does not exist, expected a zip or a folder"),
        (["--model", "resnet"], "model is 'resnet', expected conv4 or mlp. Pass one of them."),
        (["--data", "sinusoids", "--ways", "3"], "ways is 3, which sinusoids does not read. Leave --ways out."),
        (["--data", "sinusoids", "--size", "20"], "size is 20, which sinusoids does not read. Leave --size out."),
        (["--model", "mlp", "--filters", "4"], "filters is 4, which mlp does not read. Leave --filters out."),
        (["--data", "sinusoids", "--model", "conv4"], "but sinusoids are points. Pass --model mlp."),
        (["--size", "15"], "size is 15, expected at least 16: conv4 halves an image four times. Pass --size 16."),
        (["--estimators", "second,third"], "estimators is 'second,third', expected some of second, first, reptile"),
        (["--estimators", "first,first"], "each once, with commas between. Pass e.g. --estimators second,first."),
        (["--lr", "-1"], "lr is -1.0, expected a positive number. Pass e.g. --lr 0.1."),
        (["--meta-lr", "nan"], "meta-lr is nan, expected a positive number. Pass e.g. --meta-lr 0.1."),
        (["--ways", "99999"], "ways is 99999, expected at most 3937, the number of classes"),
        (["--lr", "1e30"], "is nan"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--dtype", "float16"], "Invalid value for '--dtype'"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path) -> None:
    result = compare(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_output_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = compare(tmp_path / "file")
    assert result.exit_code == 2
    assert "which cannot be a folder (File exists). Pass another." in result.output


def test_an_output_folder_that_can_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funcmeta.cli._run.os.access", lambda path, mode: mode != os.W_OK)
    result = compare(tmp_path)
    assert result.exit_code == 2
    assert "a folder that cannot be written to. Pass another." in result.output


def test_an_interrupted_run_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(report: Report) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "to_dict", interrupted)
    result = compare(tmp_path, "--iterations", "0")
    assert result.exit_code not in (0, 2)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_missing_matplotlib_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("funcmeta.cli._run.compared", lambda *arguments: pytest.fail("the run began"))
    result = compare(tmp_path)
    assert result.exit_code == 2
    assert 'Run pip install ".[demo]" in a checkout.' in result.output


def test_the_console_script_is_called_funcmeta(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "compare", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Usage: funcmeta compare [OPTIONS]" in capsys.readouterr().out


def test_a_missing_typer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "funcmeta.cli._app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=re.escape('needs typer. Run pip install ".[demo]" in a checkout of funcmeta')):
        cli.main()


def test_another_missing_module_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "funcmeta.cli._app")
    monkeypatch.setitem(sys.modules, "funcmeta.cli._run", None)
    with pytest.raises(ModuleNotFoundError, match=r"funcmeta\.cli\._run"):
        cli.main()


def test_python_m_funcmeta() -> None:
    done = subprocess.run([sys.executable, "-m", "funcmeta", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: funcmeta" in done.stdout
    assert "compare" in done.stdout


def test_the_net_is_made_by_its_seed_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    nets = [
        subject("glyphs", "conv4", ways=5, shots=1, queries=1, size=16, filters=2, seed=seed).net for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (net.get_parameter("conv1.weight") for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_the_default_run_learns_what_it_promises(tmp_path: Path) -> None:
    """Held-out scripts: MAML after the default meta-training beats the net trained from scratch, by 8 % at least."""
    result = CliRunner().invoke(app, ["compare", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = content(tmp_path)
    exact, first = found["comparison"]["rows"]
    assert exact["fd_error"] < 0.01
    assert first["fd_error"] > 0.1
    tests = {(each["name"], each["steps"]): each for each in found["training"]["test"]}
    ahead = tests["second order", 5]["difference"]
    assert ahead["value"] - ahead["margin"] > 0.08
    assert tests["random", 20]["score"]["value"] > tests["random", 5]["score"]["value"]


@pytest.mark.timing
def test_the_default_run_takes_less_than_a_minute(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert content(tmp_path)["seconds"] < 60


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "funcmeta", "compare", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--estimators" in shown.stdout
