"""The repository keeps its habits: style, types, the set-up lines, the sizes, and what the wheel carries."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "funcmeta"
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"),
    *("funcmeta", "tests", "examples", "docs"),
}
SET_UP = (
    'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ".[demo]" && .venv/bin/funcmeta compare',
    'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/pytest',
)
LONGEST_MODULE = 400

FORBIDDEN = [
    re.compile(first + second)
    for first, second in (
        (r"(?<![\w.*])/wo", r"rk/"),
        (r"(?<![\w.*])/ro", r"ot/"),
        (r"(?<![\w.*])/ho", r"me/\w"),
        (r"/Us", r"ers/\w"),
        (r"pip install func", r"meta"),
        (r"<<<<", r"<<<"),
        (r"\bFIX", r"ME\b"),
        (r"\bXX", r"X\b"),
        (r"\bTO", r"DO\b"),
        (r"\bbreak", r"point\(\)"),
        (r"no", r"qa(?!: [A-Z]+\d+)"),
        (r"# type: ig", r"nore(?!\[)"),
    )
]
"""What no file may say, in two parts so that this file does not say it: paths of one machine, and leftovers."""


def files() -> list[Path]:
    """Every file that git knows or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def check(*command: str) -> None:
    """Run a tool of this environment as a module and show what it says when it is not content."""
    done = run(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def forbidden(text: str) -> list[str]:
    return [found[0] for pattern in FORBIDDEN for found in pattern.finditer(text)]


def test_ruff_finds_nothing() -> None:
    check("ruff", "check", ".")


def test_files_are_formatted() -> None:
    check("ruff", "format", "--check", ".")


def test_types_are_clean() -> None:
    check("mypy")


def test_types_are_checked_strictly() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["strict"] is True
    assert not any("ignore_errors" in each for each in settings.get("overrides", []))


def test_the_tests_that_the_docs_name_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(tests/[\w/.]*)`", page.read_text(encoding="utf-8"))}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("line", SET_UP, ids=["demo", "test"])
def test_the_readme_gives_the_set_up_lines(line: str) -> None:
    lines = [each.strip() for each in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert lines.count(line) == 1


def test_continuous_integration_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert run("git", "ls-files", "--stage", ".ci/run").stdout.startswith("100755")


def test_the_top_level_is_as_agreed() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_says_what_is_forbidden() -> None:
    readable = [path for path in files() if path.name != "LICENSE" and path.suffix != ".png"]
    texts = {path: path.read_bytes().decode("utf-8", errors="ignore") for path in readable}
    found = {str(path.relative_to(ROOT)): forbidden(text) for path, text in texts.items()}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "text",
    [
        "cd /wo" + "rk/main",
        "'/ro" + "ot/.cache'",
        "/ho" + "me/someone",
        "/Us" + "ers/someone",
        "pip install func" + "meta",
        "# TO" + "DO later",
        "x = 1  # no" + "qa",
        "x = 1  # type: ig" + "nore",
    ],
)
def test_what_is_forbidden_is_found(text: str) -> None:
    assert forbidden(text)


def test_what_is_allowed_is_not_found() -> None:
    assert (
        forbidden("my/wo" + "rk/x, x  # no" + "qa: B008, x  # type: ig" + "nore[attr-defined], pip install -e .") == []
    )


def test_modules_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_declared_files_exist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for pattern in settings["project"]["license-files"]:
        assert list(ROOT.glob(pattern)), pattern
    for pattern in settings["tool"]["setuptools"]["package-data"]["funcmeta"]:
        assert list(PACKAGE.glob(pattern)), pattern


def test_the_wheel_carries_data_types_and_licences(tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77")
    source = tmp_path / "source"
    source.mkdir()
    for path in files():
        if path.is_relative_to(PACKAGE) or path.parent == ROOT:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    wanted = {str(path.relative_to(ROOT)) for path in files() if path.is_relative_to(PACKAGE) and path.suffix != ".pyc"}
    assert wanted - names == set()
    assert "funcmeta/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert [name for name in names if name.endswith("OFL.txt")]
    assert "License-Expression: Apache-2.0" in text
    assert not [name for name in names if name.startswith(("tests", "docs", "examples"))]
    assert sum(1 for name in names if name.startswith("funcmeta/tasks/data/"))
