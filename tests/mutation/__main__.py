"""Break the library in small ways, one at a time, and count how often the tests notice.

``python tests/mutation optim --sample 60 --out mutation`` copies the repository, lets cosmic-ray change operators,
numbers and conditions of ``funcmeta/optim`` in the copy, runs the tests of that package for each change, and writes
those that survive, as diffs, into a JSON file. Without ``--sample`` every change is tried, which takes hours.
Annotations are left alone: an ``|`` in one is no operator. Needs ``pip install cosmic-ray`` beside the extra ``test``.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TESTS = {
    "optim": ("funcmeta/optim", "tests/optim tests/testing/test_check_transform.py"),
    "memory": ("funcmeta/memory", "tests/memory"),
    "estimators": ("funcmeta/estimators", "tests/estimators tests/test_unroll.py tests/test_contract.py"),
    "problem": ("funcmeta/problem.py", "tests/test_problem.py tests/test_unroll.py tests/test_guard.py"),
}

SKIPPED = ("core/ReplaceBinaryOperator_BitOr_.*", "core/ReplaceBinaryOperator_.*_BitOr", "core/RemoveDecorator")
"""Operators whose changes mostly lie in annotations, or can not be imported."""

CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -n 0 -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {skipped}
"""


def ray(copy: Path, *words: str) -> str:
    """What a command of cosmic-ray prints."""
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def sampled(session: Path, number: int | None, seed: int) -> int:
    """Keep a random sample of the changes in a session; how many there were."""
    with sqlite3.connect(session) as base:
        done = {job for (job,) in base.execute("select job_id from work_results")}  # those that are filtered out
        jobs = sorted(job for (job,) in base.execute("select job_id from work_items") if job not in done)
        kept = set(jobs if number is None else random.Random(seed).sample(jobs, min(number, len(jobs))))
        for job in [*done, *jobs]:
            if job not in kept:
                for table in ("work_results", "mutation_specs", "work_items"):
                    base.execute(f"delete from {table} where job_id = ?", (job,))
    return len(jobs)


def run(package: str, sample: int | None, seed: int, timeout: int) -> dict[str, Any]:
    """Try the changes of a package."""
    module, tests = TESTS[package]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "funcmeta"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "site", "*cache*"))
        (copy / "session.toml").write_text(
            CONFIG.format(module=module, timeout=timeout, python=sys.executable, tests=tests, skipped=list(SKIPPED))
        )
        ray(copy, "cosmic_ray.cli", "init", "session.toml", "session.sqlite")
        ray(copy, "cosmic_ray.tools.filters.operators_filter", "session.sqlite", "session.toml")
        every = sampled(copy / "session.sqlite", sample, seed)
        ray(copy, "cosmic_ray.cli", "exec", "session.toml", "session.sqlite")
        lines = ray(copy, "cosmic_ray.cli", "dump", "session.sqlite").splitlines()
    results = [result for _, result in map(json.loads, lines) if result is not None]
    survivors = [result["diff"] for result in results if result["test_outcome"] == "survived"]
    return {"package": package, "changes": every, "tried": len(results), "survivors": survivors}


def main() -> None:
    """Run it, and write what survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", choices=list(TESTS))
    parser.add_argument("--sample", type=int, default=None, help="changes that are tried of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=600, help="seconds for the tests of one change")
    parser.add_argument("--out", type=Path, default=Path("mutation"))
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    for package in told.packages:
        found = run(package, told.sample, told.seed, told.timeout)
        killed = found["tried"] - len(found["survivors"])
        print(f"{package}: {killed} of {found['tried']} killed, of {found['changes']} changes", flush=True)
        (told.out / f"{package}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
