"""Every python block of the README, of CONTRIBUTING and of the site runs and prints what the page says.

The blocks of a page share one namespace and run in order, in an empty directory. A ``text`` block that follows a python
block at once is what that block prints; in it, ``...`` stands for anything.
"""

import contextlib
import doctest
import io
import re
import shlex
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
SECONDS = 20.0
"""How much processor time a page may take, far above the few seconds it should take."""


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts on, and where it stands in the page."""

    language: str
    text: str
    line: int
    start: int
    end: int


def blocks(page: str) -> list[Block]:
    return [
        Block(each[2], textwrap.dedent(each[3]), page.count("\n", 0, each.start(3)) + 1, each.start(), each.end())
        for each in FENCE.finditer(page)
    ]


def output_of(page: str, index: int) -> str | None:
    """What a page says that a block prints: the text block with nothing but white space before it."""
    found = blocks(page)
    if index + 1 < len(found) and found[index + 1].language == "text":
        between = page[found[index].end : found[index + 1].start]
        return found[index + 1].text if not between.strip() else None
    return None


def run_page(page: str, name: str) -> list[str]:
    """Run a page's python blocks; where a block prints something else than the page says, say so."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    wrong = []
    for index, block in enumerate(blocks(page)):
        if block.language != "python":
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, name, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        expected = output_of(page, index)
        if expected is not None and not agrees(expected, printed.getvalue()):
            wrong.append(f"{name}, line {block.line}, printed\n{printed.getvalue()}\nwhere the page says\n{expected}")
    return wrong


def agrees(expected: str, printed: str) -> bool:
    want, got = ("\n".join(line.rstrip() for line in text.rstrip().split("\n")) + "\n" for text in (expected, printed))
    return doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)


def commands(page: str) -> list[list[str]]:
    """The arguments of every call of ``funcmeta`` in a page's bash blocks and indented blocks."""
    indented = re.findall(r"^ {4}(.*bin/funcmeta .*)$", page, re.MULTILINE)
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.split("\n")] + indented
    found = []
    for part in (part for line in lines for part in line.split("&&")):
        words = shlex.split(part, comments=True)
        if words and Path(words[0]).name == "funcmeta":
            found.append(words[1:])
    return found


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _settings_kept() -> Iterator[None]:
    """A page may choose a default dtype for itself."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("path", PAGES, ids=identity)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    wrong = run_page(path.read_text(encoding="utf-8"), identity(path))
    assert not wrong, "\n".join(wrong)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("path", PAGES, ids=identity)
def test_command_lines_parse(path: Path) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    for arguments in found:
        parse(arguments)


def parse(arguments: list[str]) -> None:
    """Let the command line read its arguments, without running the command."""
    import typer.main

    from funcmeta.cli._app import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("funcmeta", list(arguments))
    if hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)


def test_the_readme_shows_the_main_job_first() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ["compare"] in commands(page)
    assert any(block.language == "python" for block in blocks(page))


PAGE = """
```python
x = 1
print("one", x)
```

```text
one 1
```

    .venv/bin/pip install ".[demo]" && .venv/bin/funcmeta compare --steps 3

1. nested
   ```python
   print(x + 1, 0.123456)
   ```
   ```text
   2 0.12...
   ```

```bash
funcmeta compare --help  # shows the options
ls
```
"""


def test_blocks_share_a_namespace_and_their_output_is_compared() -> None:
    assert run_page(PAGE, "page") == []


@pytest.mark.parametrize(("old", "new"), [("one 1", "one 2"), ("2 0.12...", "2 0.13..."), ("one 1", "")])
def test_another_output_is_found(old: str, new: str) -> None:
    (wrong,) = run_page(PAGE.replace(old, new), "page")
    assert "where the page says" in wrong


def test_a_failing_block_is_reported_at_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("text\n\n```python\ny = 1\n\ny / 0\n```\n", "page")
    assert caught.traceback[-1].lineno + 1 == 6


def test_text_after_prose_is_not_an_output() -> None:
    assert run_page('```python\nprint("a")\n```\n\nFor example:\n\n```text\nb\n```\n', "page") == []


def test_command_lines_are_found() -> None:
    assert commands(PAGE) == [["compare", "--help"], ["compare", "--steps", "3"]]
