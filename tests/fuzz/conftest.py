"""How many cases were drawn, and how they ended, below the results."""

from collections.abc import Iterator
from typing import Any

import pytest
from fuzzing import COUNTS, OUTCOMES


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Note what this test adds to the counts; the report takes it along from the process that ran the test."""
    before = COUNTS.copy()
    yield
    request.node.user_properties.append(("fuzzing", {each: COUNTS[each] - before[each] for each in OUTCOMES}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up the counts of all tests."""
    reports = [
        each for some in terminalreporter.stats.values() for each in some if getattr(each, "when", "") == "teardown"
    ]
    found = [counts for each in reports for name, counts in each.user_properties if name == "fuzzing"]
    if found:
        cases, refused, right = (sum(counts[each] for counts in found) for each in OUTCOMES)
        terminalreporter.write_line(
            f"fuzzing: {cases} cases in {len(found)} tests; {refused} calls refused by an error of the library, "
            f"{right} with a right result"
        )
