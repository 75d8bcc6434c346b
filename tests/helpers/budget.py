"""A budget for each test file: process time, of this process and of those that it started and waited for.

Wall-clock time says how busy the machine is, process time what a file costs. Each worker sums what its tests
take, fixtures included; the process that started the workers adds the sums up, and where the quick tier ran
and a file has taken more than the ini option `budget` (seconds; without it nothing is judged), the run fails
and names it. `--seconds-by-file` shows them all.

    pytest --seconds-by-file              the table
    pytest -o budget=8                    files above 8 seconds fail the run
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

SECONDS = pytest.StashKey[Counter]()  # file → process time
SENT = "seconds by file"  # as a worker hands it over


def process_time() -> float:
    """Of every thread, in user and system mode, and of children that have ended; seconds."""
    return sum(os.times()[:4])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("budget", "process time that a file of the quick tier may take, seconds", default="")
    parser.addoption("--seconds-by-file", action="store_true", help="show each test file's process time")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECONDS] = Counter()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    before = process_time()
    try:
        return (yield)
    finally:
        item.config.stash[SECONDS][item.nodeid.split("::")[0]] += process_time() - before


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    """A worker has ended: add its sums. One that crashed has sent none."""
    node.config.stash[SECONDS].update(getattr(node, "workeroutput", {}).get(SENT, {}))


def too_slow(config: pytest.Config) -> dict[str, float]:
    """Files above the budget, where the tier that addopts chooses ran and a budget is set."""
    chosen = config.getoption("markexpr")
    if not (budget := config.getini("budget")) or chosen not in config.getini("addopts"):
        return {}
    return {file: spent for file, spent in config.stash[SECONDS].items() if spent > float(budget)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput[SENT] = dict(config.stash[SECONDS])
    elif session.exitstatus == pytest.ExitCode.OK and too_slow(config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    spent = config.stash[SECONDS]
    if config.getoption("seconds_by_file"):
        terminalreporter.section(f"process time by file: {sum(spent.values()):.1f} s")
        for file, seconds in spent.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} s  {file}")
    for file, seconds in sorted(too_slow(config).items()):
        terminalreporter.write_line(
            f"{file}: took {seconds:.1f} s of process time, and a file of the quick tier has"
            f" {config.getini('budget')} s: share shapes and models, or mark tests for another tier",
            red=True,
        )
