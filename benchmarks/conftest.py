"""What every benchmark shares: options, and a place for tables to be printed."""

from __future__ import annotations

import pytest

TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--toy", action="store_true", help="toy shapes: checks that benchmarks run, in seconds"
    )
    parser.addoption(
        "--cpu-time",
        action="store_true",
        help="one thread, measured by its CPU clock: for a machine that is busy with other things",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for table in config.stash[TABLES]:
        terminalreporter.write_line("")
        terminalreporter.write_line(table)


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest) -> bool:
    """Whether ``--toy`` was given: figures mean nothing."""
    return bool(request.config.getoption("--toy"))


@pytest.fixture(scope="session")
def cpu_time(request: pytest.FixtureRequest) -> bool:
    """Whether to measure the CPU time of one thread instead of the time that passes."""
    return bool(request.config.getoption("--cpu-time"))


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> list[str]:
    """Text appended here is printed when all tests are done."""
    return request.config.stash[TABLES]
