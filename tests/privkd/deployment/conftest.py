"""What tests of this folder share."""

from collections.abc import Iterator

import pytest
from faults import Commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """One server for the commands of all modules."""
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server
