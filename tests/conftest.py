"""Fixtures that every test may use."""

import os
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import tally
from hypothesis import settings

# Runs repeat bit for bit on one thread; on more, the order of sums may change with the load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more about the machine than about the code.
settings.register_profile("privkd", deadline=None)
settings.load_profile("privkd")

_BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", type=Path, help="folder of the real data sets (MNIST, cifar10, location30)"
    )
    parser.addoption(
        "--fault-rounds", type=int, default=25, help="rounds of the secure channel's randomised fault test"
    )
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=fuzzing.EXAMPLES,
        help="hostile inputs that each fuzzing test tries",
    )


def pytest_configure(config: pytest.Config) -> None:
    fuzzing.EXAMPLES = config.getoption("--fuzz-examples")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands what it counted to the process that prints the summary."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tally"] = tally.packed()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it up there."""
    tally.add(getattr(node, "workeroutput", {}).get("tally", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried by the tests of reliability, and how it ended."""
    lines = tally.lines()
    if lines:
        terminalreporter.section("reliability")
    for line in lines:
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of real data sets: ``--data-dir``, else ``PRIVKD_DATA_DIR``, else one beside the repository."""
    named = pytestconfig.getoption("--data-dir") or os.environ.get("PRIVKD_DATA_DIR")
    folder = Path(named) if named else _BESIDE_THE_REPOSITORY
    if not folder.is_dir():
        pytest.skip(f"no real data sets in {folder}; name their folder with --data-dir or PRIVKD_DATA_DIR")
    return folder
