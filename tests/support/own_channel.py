"""A user's own channel: the example of ``docs/extend.md``, registered as long as a test needs it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pages import ROOT

from privkd.channels import KINDS
from privkd.plugins import load_plugins, plugin_module

NAME = "curated"
_BLOCK = re.compile(r"```python\n(?=\"{3}A curator)(.*?)```", flags=re.DOTALL)


@contextmanager
def own_channel() -> Iterator[None]:
    """Have a kind of channel called `NAME`."""
    kept = dict(KINDS._values), dict(KINDS._makers)
    (text,) = _BLOCK.findall((ROOT / "docs" / "extend.md").read_text())
    with TemporaryDirectory() as folder:
        file = Path(folder) / "own_channel.py"
        file.write_text(text)
        load_plugins([str(file)])
    yield
    del sys.modules[plugin_module(str(file))]
    KINDS._values, KINDS._makers = kept
