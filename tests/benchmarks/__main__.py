"""``python tests/benchmarks``: the five workloads, against the libraries that people would use otherwise."""

import argparse
from pathlib import Path

import machine
import report
from contest import Settings
from rich.console import Console
from workloads import WORKLOADS, load


def main() -> None:
    """Measure what was asked for, show it, and write it where it belongs."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which workloads")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run other libraries too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn each: does everything work?")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for a contestant's turns (default 10)")
    parser.add_argument("--output", type=Path, help="folder whose performance.md is brought up to date, e.g. docs")
    options = parser.parse_args()
    if options.quick and options.output:
        parser.error("--quick runs in tiny sizes, whose figures belong on no page: leave out --quick or --output")

    machine.use_cores(options.threads)
    here = machine.describe()
    console = Console()
    console.print(here)
    settings = Settings(options.quick, options.peers, options.seconds)
    for name in options.only:
        result = load(name).measure(settings, here)
        report.show(result, console)
        if options.output:
            report.save({name: result}, options.output)


if __name__ == "__main__":
    main()
