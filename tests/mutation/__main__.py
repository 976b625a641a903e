"""Break the library in small ways, one at a time, and count how often the tests notice.

``python tests/mutation optim --sample 60 --out mutation`` copies the repository, lets cosmic-ray change operators,
numbers and conditions of ``funcmeta/optim`` in the copy, runs the tests of that package for each change, and writes
those that survive, as diffs, into a JSON file. Without ``--sample`` every change is tried, which takes hours. The tests
that name the changed module come first, then the quickest, and the first that fails ends a run; ``--seconds`` leaves
out the slow ones. Each run is a fork of a process that has torch already, which saves more time than most runs take.
What does not compile is no change, as where the ``*`` of a signature becomes a ``+``.
Annotations are left alone: an ``|`` in one is no operator. Needs ``pip install cosmic-ray`` beside the extra ``test``.

``python tests/mutation --ignored`` tries another kind of change: one public parameter or field at a time has no effect
(see ``ignored.py``), and only the tests that reach it are run. Those that survive are options that no test watches.
"""

import argparse
import builtins
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
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis  # noqa: F401
import ignored
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
from ignored import Ignored

ROOT = Path(__file__).parents[2]

FOUND = "tests/fuzz/test_fuzz_found.py"
TESTS = {
    "optim": ("funcmeta/optim", ("tests/optim", "tests/testing/test_check_transform.py", FOUND)),
    "memory": ("funcmeta/memory", ("tests/memory", "tests/test_guard.py", FOUND)),
    "estimators": ("funcmeta/estimators", ("tests/estimators", "tests/test_unroll.py", FOUND)),
    "problem": ("funcmeta/problem.py", ("tests/test_problem.py", "tests/test_unroll.py", "tests/test_guard.py", FOUND)),
    "algorithms": ("funcmeta/algorithms", ("tests/algorithms",)),
    "cli": ("funcmeta/cli", ("tests/test_cli.py", "tests/test_cli_train.py")),
    "compare": ("funcmeta/compare", ("tests/test_compare.py",)),
    "compiled": ("funcmeta/compiled.py", ("tests/test_compiled.py",)),
    "evaluation": ("funcmeta/evaluation", ("tests/test_evaluation.py",)),
    "gradient": ("funcmeta/_gradient.py", ("tests/test_gradient.py",)),
    "horizon": ("funcmeta/horizon", ("tests/test_horizon.py",)),
    "inspect": ("funcmeta/inspect.py", ("tests/test_inspect.py",)),
    "learned": ("funcmeta/learned", ("tests/learned",)),
    "model": ("funcmeta/model.py", ("tests/test_model.py",)),
    "rng": ("funcmeta/rng.py", ("tests/test_rng.py",)),
    "tasks": ("funcmeta/tasks", ("tests/tasks",)),
    "testing": ("funcmeta/testing", ("tests/testing",)),
    "training": ("funcmeta/training", ("tests/training",)),
    "tree": ("funcmeta/tree.py", ("tests/test_tree.py",)),
    "unroll": ("funcmeta/unroll.py", ("tests/test_unroll.py", "tests/test_guard.py")),
    "unroll_batch": ("funcmeta/unroll_batch.py", ("tests/test_unroll_batch.py",)),
}
"""Where each package is, and its tests."""

SKIPPED = ("BitOr", "RemoveDecorator")
"""Operators whose changes mostly lie in annotations, or cannot be imported."""


class Change(NamedTuple):
    """One change of one file: the place that an operator of cosmic-ray finds so many places after its first."""

    file: str
    operator: str
    occurrence: int


def changes(copy: Path, module: str) -> list[Change]:
    """Every change, in an order that is always the same."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

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
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    operator = cosmic_ray.plugins.get_operator(change.operator)()
    code: str = mutate_code((copy / change.file).read_text(), operator, change.occurrence)
    try:
        compile(code, change.file, "exec")
    except SyntaxError:
        return None
    return code


class Order:
    """Plugin of pytest: chooses and sorts the tests, measures them, and notes which of them reach what.

    Tests that name the changed module come first and then the quickest; ``only`` leaves out all others than these.
    """

    def __init__(
        self, module: str = "", known: dict[str, float] | None = None, seconds: float = 0.0, only: Iterable[str] = ()
    ) -> None:
        self.module, self.known, self.seconds, self.only = module, known or {}, seconds, frozenset(only)
        self.measured = Counter[str]()
        self.failed: set[str] = set()
        self.reached: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort, and leave out what takes more than the seconds that are left."""
        items[:] = [item for item in items if not self.only or item.nodeid in self.only]
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
        if report.failed:
            self.failed.add(report.nodeid)

    def note(self, key: str) -> None:
        """Something was reached by the test that runs."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        self.reached.setdefault(key, set()).add(test)

    def figures(self) -> dict[str, Any]:
        """What was measured and noted, of the tests that passed."""
        reached = {key: sorted(tests - self.failed) for key, tests in self.reached.items()}
        return {"seconds": self.measured, "failed": sorted(self.failed), "reached": reached}


def outcome(copy: Path, tests: Iterable[str], order: Order, timeout: int, measure: Path | None = None) -> str:
    """Run the tests in a fork: "survived", "killed", or "timeout"; when measuring, all of them, whatever fails."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        sys.dont_write_bytecode = measure is None
        builtins._reached = order.note  # type: ignore[attr-defined]
        with open(copy / "pytest.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        stop = [] if measure else ["-x"]
        status = pytest.main([*stop, "-q", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[order])
        if measure:
            measure.write_text(json.dumps(order.figures()))
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


class Trial(NamedTuple):
    """One change to be tried: what it is called, the file and its code after it, and the tests to be run."""

    name: str
    file: Path
    code: str
    order: Order


def operators(copy: Path, package: str, sample: int | None, seed: int, seconds: float, timeout: int) -> list[Trial]:
    """Changed operators, numbers and conditions."""
    module, tests = TESTS[package]
    figures = measured(copy, tests, timeout)
    if figures["failed"]:
        raise SystemExit(f"The tests fail without a change:\n{(copy / 'pytest.log').read_text()[-3000:]}")
    every = changes(copy, module)
    drawn = every if sample is None else random.Random(seed).sample(every, len(every))
    pairs = ((change, code) for change in drawn if (code := changed(copy, change)))
    return [
        Trial(
            " ".join(map(str, change)),
            copy / change.file,
            code,
            Order(Path(change.file).stem.strip("_"), figures["seconds"], seconds),
        )
        for change, code in islice(pairs, sample)
    ]


def arguments(copy: Path, package: str, sample: int | None, seed: int, seconds: float, timeout: int) -> list[Trial]:
    """Ignored parameters and fields, each with the tests that reach it."""
    module, tests = TESTS[package]
    places = ignored.parameters(copy, module)
    before = {copy / place.file: (copy / place.file).read_text() for place in places}
    for file, code in before.items():
        file.write_text(ignored.instrumented(code, str(file.relative_to(copy))))
    figures = measured(copy, tests, timeout)
    for file, code in before.items():
        file.write_text(code)
    if figures["failed"]:
        print(f"left out, as they fail when what they reach is noted: {', '.join(figures['failed'])}")
    drawn = places if sample is None else random.Random(seed).sample(places, min(sample, len(places)))

    def reaching(place: Ignored) -> list[str]:
        return figures["reached"].get(f"{place.file}: {place.owner}") or ["no test"]

    return [
        Trial(
            str(place),
            copy / place.file,
            ignored.without(copy, place),
            Order("", figures["seconds"], seconds, reaching(place)),
        )
        for place in drawn
        if ignored.without(copy, place) != before[copy / place.file]
    ]


def measured(copy: Path, tests: tuple[str, ...], timeout: int) -> dict[str, Any]:
    """Run all tests once: the seconds of each, those that failed, and those that reach what was instrumented."""
    found = copy / "figures.json"
    outcome(copy, tests, Order(), 10 * timeout, found)
    return dict(json.loads(found.read_text()))


def run(package: str, trials: Any, sample: int | None, seed: int, seconds: float, timeout: int) -> dict[str, Any]:
    """Try the changes of a package."""
    _, tests = TESTS[package]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "funcmeta"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "site", "*cache*"))
        outcomes, survivors = Counter[str](), []
        tried = trials(copy, package, sample, seed, seconds, timeout)
        for number, trial in enumerate(tried, 1):
            file, before = trial.file, trial.file.read_text()
            stamp, began = file.stat().st_mtime_ns, time.monotonic()
            file.write_text(trial.code)
            paths = sorted({each.partition("::")[0] for each in trial.order.only}) or tests
            found = "survived" if paths == ["no test"] else outcome(copy, paths, trial.order, timeout)
            file.write_text(before)
            os.utime(file, ns=(stamp, stamp))
            outcomes[found] += 1
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{number}/{len(tried)} {found} after {took}: {trial.name}", flush=True)
            if found == "survived":
                lines = [each.splitlines(keepends=True) for each in (before, trial.code)]
                reach = f"{len(trial.order.only - {'no test'})} tests reach it\n" if trial.order.only else ""
                survivors.append(reach + "".join(difflib.unified_diff(*lines, trial.name, trial.name)))
    return {"package": package, "changes": len(tried), **outcomes, "survivors": survivors}


def main() -> None:
    """Run it, and write what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", choices=[*TESTS, []], help="all of them, if none is named")
    parser.add_argument("--ignored", action="store_true", help="ignore arguments, and change nothing else")
    parser.add_argument("--sample", type=int, default=None, help="changes that are tried of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of tests for one change, the quickest")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for the tests of one change")
    parser.add_argument("--out", type=Path, default=Path("mutation"))
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    trials = arguments if told.ignored else operators
    for package in told.packages or TESTS:
        found = run(package, trials, told.sample, told.seed, told.seconds, told.timeout)
        killed = found.get("killed", 0) + found.get("timeout", 0)
        tried = killed + len(found["survivors"])
        print(f"{package}: {killed} of {tried} killed, of {found['changes']} changes", flush=True)
        (told.out / f"{package}{'_ignored' * told.ignored}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
