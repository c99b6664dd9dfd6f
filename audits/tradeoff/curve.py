"""A finished (or half finished) curve: its request, and what became of each cell."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audits.estimators import TprAtFpr
from audits.evidence.facts import RebuiltFacts, RunFacts
from audits.evidence.parsing import read_json
from audits.evidence.reading import is_run, read_run
from audits.tradeoff.request import Cell, CurveRequest, command_of, request_of
from audits.tradeoff.worker import is_done
from audits.verdict import Finding
from privkd.errors import ConfigError, PrivkdError, RunError

RECORD = "curve.json"
CELLS = "cells"
LEAK_FPR = 0.01
_LEAD = {"student": "lira-online", "teacher": "lira-online", "gradient": "canaries-many-trials"}
"""The attack whose rates stand for a view; elsewhere distillation LiRA. Fixed beforehand: the best of many
rates would need an interval of its own."""


@dataclass(frozen=True)
class Row:
    """One cell: ``facts`` of its run where it is done, else why it is not."""

    cell: Cell
    facts: RunFacts | None
    reason: str

    @property
    def done(self) -> bool:
        """Whether the cell was trained and audited."""
        return self.facts is not None

    def lead(self, view: str) -> Finding | None:
        """The finding whose rates stand for ``view``, if it was audited."""
        membership = self.facts.membership if self.facts else None
        found = membership.of(view) if membership else ()
        named = _LEAD.get(view, "distillation-lira")
        return next((finding for finding in found if finding.attack == named), found[0] if found else None)

    def leak_rate(self, view: str) -> TprAtFpr | None:
        """TPR at 1 % FPR on ``view``; ``None`` where it was not measured or refused."""
        lead = self.lead(view)
        rates = lead.tpr_at_fpr if lead else ()
        return next((r for r in rates if isinstance(r, TprAtFpr) and math.isclose(r.fpr, LEAK_FPR)), None)

    def rebuilt(self, view: str) -> RebuiltFacts | None:
        """The reconstruction attack on ``view``, the first if there are several."""
        found = self.facts.reconstruction.findings if self.facts and self.facts.reconstruction else ()
        return next((one for one in found if one.view == view), None)

    def lower(self, view: str) -> Finding | None:
        """The finding with the highest lower bound on ``view``."""
        membership = self.facts.membership if self.facts else None
        return membership.strongest(view) if membership and view in membership.views else None


@dataclass(frozen=True)
class Curve:
    """A grid of runs in ``path``."""

    path: Path
    request: CurveRequest
    rows: tuple[Row, ...]

    @property
    def command(self) -> str:
        """The command that makes an equal curve."""
        return command_of(self.request)

    @property
    def done(self) -> tuple[Row, ...]:
        """The rows of the cells that are done."""
        return tuple(row for row in self.rows if row.done)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rest."""
        return tuple(row for row in self.rows if not row.done)

    @property
    def views(self) -> tuple[str, ...]:
        """Every view that was audited in some cell, in the order of their first cell."""
        found = (row.facts.membership for row in self.rows if row.facts)
        return _each_once(view for facts in found if facts for view in facts.views)

    @property
    def rebuilt_views(self) -> tuple[str, ...]:
        """Every view from which a reconstruction was tried, likewise."""
        found = (row.facts.reconstruction for row in self.rows if row.facts)
        return _each_once(one.view for facts in found if facts for one in facts.findings)


def _each_once(views: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(views))


def cloud_view(channel: str) -> str:
    """What the cloud sees over a channel."""
    return "secure_sum" if channel == "secure" else "per_client_logits"


def is_curve(path: Path) -> bool:
    """Whether ``path`` is the folder of a curve."""
    return (path / RECORD).is_file()


def record_tree(request: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    """``curve.json``: the request, and why each cell that failed did, by its folder."""
    return {"format": 1, "request": dict(request), "failed": dict(reasons)}


def read_request(path: Path) -> tuple[CurveRequest, Mapping[str, str]]:
    """The request of the curve in ``path``, and why cells failed.

    Raises:
        RunError: not a curve, or damaged.
    """
    tree = read_json(path / RECORD)
    try:
        if tree["format"] != 1:
            raise ValueError(f"format {tree['format']!r}")
        return request_of(tree["request"]), {str(k): str(v) for k, v in tree["failed"].items()}
    except (AttributeError, LookupError, TypeError, ValueError, ConfigError) as error:
        raise RunError(f"{path / RECORD} is damaged or was changed ({error!r}): restore it") from None


def read_curve(path: Path) -> Curve:
    """All that lies in the folder of a curve.

    Raises:
        RunError: not a curve, or its request is damaged. A cell that is damaged has failed.
    """
    request, reasons = read_request(path)
    return Curve(path, request, tuple(_row(path, cell, reasons) for cell in request.cells))


def _row(path: Path, cell: Cell, reasons: Mapping[str, str]) -> Row:
    folder = path / CELLS / cell.folder
    if is_done(cell, folder):
        try:
            return Row(cell, read_run(folder), "")
        except PrivkdError as error:
            # The other cells are worth no less for it.
            return Row(cell, None, " ".join(str(error).split()))
    started = "was interrupted: go on with --resume" if is_run(folder) else "was not started"
    return Row(cell, None, reasons.get(cell.folder, started))
