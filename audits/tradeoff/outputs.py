"""What a curve leaves in its folder: the table and the figures."""

from typing import Any

from audits.files import write_whole
from audits.tradeoff.curve import Curve
from audits.tradeoff.figures import draw_figures
from audits.tradeoff.request import request_tree
from audits.tradeoff.table import as_csv, rows_of
from privkd.result import plain

TABLE = "curve.csv"


def write_outputs(curve: Curve) -> tuple[str, ...]:
    """Write ``curve.csv`` and ``figures/``; returns the names of the files."""
    files = {TABLE: as_csv(rows_of(curve)).encode()}
    for name, kinds in draw_figures(curve).items():
        files |= {f"figures/{name}.{kind}": data for kind, data in kinds.items()}
    for name, data in files.items():
        write_whole(curve.path / name, data)
    return tuple(files)


def curve_tree(curve: Curve, files: tuple[str, ...]) -> dict[str, Any]:
    """What ``privkd curve --json`` prints; infinity is ``"inf"``, what was not measured ``null``."""
    tree = {
        "curve": str(curve.path),
        "request": request_tree(curve.request),
        "done": len(curve.done),
        "failed": len(curve.failed),
        "cells": rows_of(curve),
        "files": list(files),
    }
    return {key: plain(value) for key, value in tree.items()}
