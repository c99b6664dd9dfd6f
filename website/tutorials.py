"""The notebooks as pages of the site, with what they show where they are run."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

_LONGEST = 600
"""Seconds that one cell may take."""
_HEAD = "---\nhide: [toc]\n---\n\n"
"""There are no sections, and tables are wide."""


@dataclass(frozen=True)
class Tutorial:
    """A notebook as Markdown.

    Attributes:
        name: of its file, without the suffix.
        page: the text.
        pictures: what cells drew, by the name under which the text shows it.
    """

    name: str
    page: str
    pictures: Mapping[str, bytes]


def read(path: Path, *, run: bool) -> Tutorial:
    """The notebook ``path``, run in an empty folder first if ``run``.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    if run:
        with tempfile.TemporaryDirectory() as folder:
            ExecutePreprocessor(timeout=_LONGEST).preprocess(notebook, {"metadata": {"path": folder}})
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    page, made = MarkdownExporter().from_notebook_node(notebook, resources)
    return Tutorial(path.stem, _HEAD + page, made["outputs"])
