"""A module of the user's in a folder that is imported from."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def own_module(code: str, stem: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with this ``code``; no other test's, and forgotten afterwards."""
    name = f"{stem}_{scratch.name.replace('-', '_')}"
    folder = scratch / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    yield name
    sys.modules.pop(name, None)
