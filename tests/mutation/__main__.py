"""Break the library in small ways, one at a time, and count how often the tests notice.

``python tests/mutation optim --sample 60 --out mutation`` copies the repository, lets cosmic-ray change operators,
numbers and conditions of ``funcmeta/optim`` in the copy, runs the tests of that package for each change, and writes
those that survive, as diffs, into a JSON file. Without ``--sample`` every change is tried, which takes hours. The tests
that name the changed module come first, then the quickest, and the first that fails ends a run; ``--seconds`` leaves
out the slow ones. Each run is a fork of a process that has torch already, which saves more time than most runs take.
What does not compile is no change, as where the ``*`` of a signature becomes a ``+``.
Annotations are left alone: an ``|`` in one is no operator. Needs ``pip install cosmic-ray`` beside the extra ``test``.
"""

import argparse
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[2]

FOUND = "tests/fuzz/test_fuzz_found.py"
TESTS = {
    "optim": ("funcmeta/optim", ("tests/optim", "tests/testing/test_check_transform.py", FOUND)),
    "memory": ("funcmeta/memory", ("tests/memory", "tests/test_guard.py", FOUND)),
    "estimators": ("funcmeta/estimators", ("tests/estimators", "tests/test_unroll.py", FOUND)),
    "problem": ("funcmeta/problem.py", ("tests/test_problem.py", "tests/test_unroll.py", "tests/test_guard.py", FOUND)),
}
"""Where each package is, and its tests."""

SKIPPED = ("BitOr", "RemoveDecorator")
"""Operators whose changes mostly lie in annotations, or can not be imported."""


class Change(NamedTuple):
    """One change of one file: the place that an operator of cosmic-ray finds so many places after its first."""

    file: str
    operator: str
    occurrence: int


def changes(copy: Path, module: str) -> list[Change]:
    """Every change, in an order that is always the same."""
    found = []
    path = copy / module
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        nodes = list(ast_nodes(get_ast(file.read_text())))
        for name in sorted(cosmic_ray.plugins.operator_names()):
            operator = cosmic_ray.plugins.get_operator(name)
            if not operator.arguments() and not any(each in name for each in SKIPPED):
                places = sum(len(list(operator().mutation_positions(node))) for node in nodes)
                found += [Change(str(file.relative_to(copy)), name, place) for place in range(places)]
    return found


def changed(copy: Path, change: Change) -> str | None:
    """The code after a change; None if it does not compile."""
    operator = cosmic_ray.plugins.get_operator(change.operator)()
    code: str = mutate_code((copy / change.file).read_text(), operator, change.occurrence)
    try:
        compile(code, change.file, "exec")
    except SyntaxError:
        return None
    return code


class Order:
    """Plugin of pytest: runs the tests that name a module first and then the quickest, and measures them."""

    def __init__(self, module: str, known: dict[str, float], seconds: float) -> None:
        self.module, self.known, self.seconds = module, known, seconds
        self.measured = Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort, and leave out what takes more than the seconds that are left."""
        items.sort(key=lambda item: (self.module not in item.nodeid, self.known.get(item.nodeid, 0.0)))
        if self.known:
            total, kept = 0.0, []
            for item in items:
                total += self.known.get(item.nodeid, 0.0)
                kept += [item] if total <= self.seconds else []
            items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up set-up, call and tear-down."""
        self.measured[report.nodeid] += report.duration


def outcome(copy: Path, tests: tuple[str, ...], order: Order, timeout: int, measure: Path | None = None) -> str:
    """Run the tests in a fork: "survived", "killed", or "timeout"."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        sys.dont_write_bytecode = measure is None
        with open(copy / "pytest.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[order])
        if measure:
            measure.write_text(json.dumps(order.measured))
        sys.stdout.flush()
        os._exit(status)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "killed" if status else "survived"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run(package: str, sample: int | None, seed: int, seconds: float, timeout: int) -> dict[str, Any]:
    """Try the changes of a package."""
    module, tests = TESTS[package]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "funcmeta"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "site", "*cache*"))
        every = changes(copy, module)
        drawn = every if sample is None else random.Random(seed).sample(every, len(every))
        tried = list(islice(((change, code) for change in drawn if (code := changed(copy, change))), sample))
        times = copy / "times.json"
        if outcome(copy, tests, Order("", {}, seconds), 10 * timeout, times) != "survived":
            raise SystemExit(f"The tests fail without a change:\n{(copy / 'pytest.log').read_text()[-3000:]}")
        known, outcomes, survivors = json.loads(times.read_text()), Counter[str](), []
        for number, (change, after) in enumerate(tried, 1):
            file, before = copy / change.file, (copy / change.file).read_text()
            stamp, began = file.stat().st_mtime_ns, time.monotonic()
            file.write_text(after)
            found = outcome(copy, tests, Order(file.stem.strip("_"), known, seconds), timeout)
            file.write_text(before)
            os.utime(file, ns=(stamp, stamp))
            outcomes[found] += 1
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{number}/{len(tried)} {found} after {took}: {' '.join(map(str, change))}", flush=True)
            if found == "survived":
                lines = [each.splitlines(keepends=True) for each in (before, after)]
                survivors.append("".join(difflib.unified_diff(*lines, change.file, change.file)))
                print(survivors[-1], flush=True)
    return {"package": package, "changes": len(every), **outcomes, "survivors": survivors}


def main() -> None:
    """Run it, and write what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", choices=list(TESTS))
    parser.add_argument("--sample", type=int, default=None, help="changes that are tried of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of tests for one change, the quickest")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for the tests of one change")
    parser.add_argument("--out", type=Path, default=Path("mutation"))
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    for package in told.packages:
        found = run(package, told.sample, told.seed, told.seconds, told.timeout)
        killed = found.get("killed", 0) + found.get("timeout", 0)
        tried = killed + len(found["survivors"])
        print(f"{package}: {killed} of {tried} killed, of {found['changes']} changes", flush=True)
        (told.out / f"{package}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
