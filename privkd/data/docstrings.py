"""The embedded data set of text: what libraries say of their own functions, to be told apart by library.

Read out of the sources of libraries that are installed anyway, in a fixed order and without importing them,
so the records are those of their versions (``constraints.txt`` pins them), and public like these.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from privkd.data.dataset import RawSet, Source, make_source, texts_of
from privkd.errors import DataError

LIBRARIES = {
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "skimage": "skimage",
    "sklearn": "sklearn",
    "sympy": "sympy",
    "torch": "torch/nn",
}
"""The classes, and the folder that each is read from."""
EACH = 400
"""Records of each class."""

_FEWEST_WORDS = 12
# Where the prose ends: at a section of parameters and the like, a doctest, or a directive.
_END = re.compile(
    r"^\s*(?:-{3,}|={3,}|>>>|\.\. |:\w+|"
    r"(?:parameters|args|arguments|keyword args|other parameters|attributes|returns?|yields?|raises|notes?|"
    r"examples?|references|see also|shape|explanation)\s*(?::.*)?$)",
    re.IGNORECASE | re.MULTILINE,
)


def load_docstrings() -> Source:
    """`EACH` docstrings of each of `LIBRARIES`, without their sections of parameters and examples.

    Raises:
        DataError: a library is not installed, or not with its sources.
    """
    texts, labels, names = [], [], []
    for library, folder in LIBRARIES.items():
        for name, text in _docstrings(folder):
            texts.append(text)
            labels.append(library)
            names.append(name)
    taken = {"label": "the library", "text": "what it says of its functions and classes"}
    return make_source(
        "docstrings", RawSet(texts_of(texts), np.array(labels)), names=tuple(names), taken=taken
    )


@functools.cache
def _docstrings(folder: str) -> tuple[tuple[str, str], ...]:
    """Names and texts of a library's records, no text twice."""
    package, _, inner = folder.partition("/")
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found is not None else None
    seen: dict[str, str] = {}
    for place in places or ():
        for name, text in _prose(Path(place) / inner):
            seen.setdefault(text, f"{folder}/{name}")
            if len(seen) == EACH:
                return tuple((name, text) for text, name in seen.items())
    raise DataError(
        f"source 'docstrings': {package} is not installed with its sources; run: pip install 'privkd[lab]'"
    )


def _prose(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and prose of every documented function and class in the modules below ``folder``, in order."""
    for path in sorted(folder.rglob("*.py")):
        if "test" in path.relative_to(folder).as_posix():
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in _defined(tree.body):
            text = ast.get_docstring(node) or ""
            end = _END.search(text)
            words = text[: end.start() if end else None].split()
            if len(words) >= _FEWEST_WORDS:
                yield f"{path.relative_to(folder).as_posix()}:{node.name}", " ".join(words)


def _defined(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module's or a class's ``body``."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from _defined(node.body)
