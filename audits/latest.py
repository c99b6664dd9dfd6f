"""The newest run or curve, for a command that was given no folder."""

from pathlib import Path
from typing import Literal, TypeAlias

from privkd.errors import RunError

Kind: TypeAlias = Literal["run", "curve"]

RUNS = Path("runs")
"""Where commands put what has no ``--out``."""

_RECORDS: dict[Kind, str] = {"run": "journal.jsonl", "curve": "curve.json"}


def latest(root: Path, *kinds: Kind) -> Path:
    """The folder under ``root`` of one of ``kinds`` whose record was written last.

    Raises:
        RunError: there is none.
    """
    found = [record for kind in kinds for record in root.glob(f"*/{_RECORDS[kind]}")] if root.is_dir() else []
    if not found:
        start = "privkd train" if "run" in kinds else "privkd curve"
        raise RunError(f"no {' or '.join(kinds)} under {root}/: name its folder, or start one with `{start}`")
    return max(found, key=lambda record: record.stat().st_mtime).parent
