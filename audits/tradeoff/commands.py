"""What ``privkd curve`` does, between the command line's parsing and the cells."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audits.latest import RUNS, latest
from audits.tradeoff.request import Cell, CurveRequest
from privkd.errors import AuditAlarm, ConfigError, PrivkdError, RunError
from privkd.plugins import load_plugins
from privkd.secure.installed import check_channel
from privkd.stdout import print_json

if TYPE_CHECKING:
    from audits.tradeoff.curve import Curve

_GIB = 2**30


@dataclass(frozen=True)
class CurveOptions:
    """``privkd curve`` as it was typed; what was not typed is ``None`` or empty.

    Attributes:
        epsilons: comma-separated; ``inf`` is allowed.
        channels: comma-separated.
        audits: comma-separated; ``none`` is allowed.
        seeds: see `CurveRequest`; so are ``device_epsilon``, ``shadows`` and ``targets``.
        settings: of every run, by dotted name.
        overrides: likewise, as ``a.b=value``.
        jobs: cells at once. ``None``: as many as there are cores.
        memory: GiB for all cells together. ``None``: what is free.
        out: folder of the curve.
        resume: whether to go on with it.
        json: whether to print JSON.
    """

    epsilons: str | None
    channels: str | None
    audits: str | None
    seeds: int | None
    device_epsilon: str | None
    shadows: int | None
    targets: int | None
    settings: Mapping[str, str]
    overrides: tuple[str, ...]
    jobs: int | None
    memory: float | None
    out: Path | None
    resume: bool
    json: bool


def curve_command(options: CurveOptions) -> None:
    """Train and audit all cells, write table and figures, and print.

    Raises:
        AuditAlarm: a cell's lower bound lies above its upper one; all was printed first.
        PrivkdError: bad input, or some cells failed; those that are done were written first.
    """
    for name, value in (("jobs", options.jobs), ("memory", options.memory)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value:g}: expected a number above 0")
    request, path = _request(options)
    from audits.tradeoff.console import print_curve, progress_of
    from audits.tradeoff.outputs import curve_tree, write_outputs
    from audits.tradeoff.play import play_curve, unfinished
    from audits.tradeoff.runner import Limits, free_memory, usable_cores

    memory = free_memory() if options.memory is None else options.memory * _GIB
    limits = Limits(options.jobs or usable_cores(), memory)
    with progress_of(path, len(unfinished(path, request))) as watcher:
        curve = play_curve(path, request, limits, watcher)
    files = write_outputs(curve)
    if options.json:
        print_json(curve_tree(curve, files))
    else:
        print_curve(curve, files)
    _raise_for(curve)


def _raise_for(curve: "Curve") -> None:
    alarms = [(row, words) for row in curve.done if row.facts for words in row.facts.alarm_words]
    if alarms:
        row, words = alarms[0]
        raise AuditAlarm(f"{len(alarms)} alarms; in {row.cell.label}, {words}; do not release")
    if curve.failed:
        first = curve.failed[0]
        raise PrivkdError(
            f"{len(curve.failed)} of {len(curve.rows)} cells failed, such as {first.cell.label}: "
            f"{first.reason}; try them again with `privkd curve --resume --out {curve.path}`"
        )


def _request(options: CurveOptions) -> tuple[CurveRequest, Path]:
    """The grid that is asked for, and its folder; under ``--resume`` on top of the one that was."""
    path = options.out
    if options.resume:
        from audits.tradeoff.curve import read_request

        path = path or latest(RUNS, "curve")
        request = _changed(read_request(path)[0], options)
        _check_trusted(request, options)
        _check(request.cells)
        return request, path
    request = _changed(CurveRequest(), options)
    _check(request.cells)
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        from audits.tradeoff.curve import is_curve

        hint = f"go on with it: --resume --out {path}" if is_curve(path) else "name another --out"
        raise RunError(f"{path} is not empty: {hint}")
    return request, path or RUNS / datetime.now().astimezone().strftime("curve-%Y%m%d-%H%M%S")


def _changed(request: CurveRequest, options: CurveOptions) -> CurveRequest:
    given: dict[str, Any] = {
        "epsilons": _epsilons(options.epsilons),
        "channels": _words(options.channels),
        "audits": () if options.audits == "none" else _words(options.audits),
        "seeds": options.seeds,
        "device_epsilon": _number("device-epsilon", options.device_epsilon),
        "shadows": options.shadows,
        "targets": options.targets,
        "settings": tuple(sorted({**dict(request.settings), **options.settings}.items())),
        "overrides": (*request.overrides, *options.overrides),
    }
    return replace(request, **{name: value for name, value in given.items() if value is not None})


def _check_trusted(request: CurveRequest, options: CurveOptions) -> None:
    """Whoever made the curve's folder chose its plug-ins: only what is named again now is run."""
    kept = request.cells[0].config().plugins
    if kept and "plugins" not in options.settings:
        again = " ".join(f"--plugin {name}" for name in kept)
        raise ConfigError(f"the curve has plug-ins: go on with {again}, if you trust them")


def _check(cells: tuple[Cell, ...]) -> None:
    """Refuse settings that are bad in any cell, or lack CrypTen, before the first is started."""
    for cell in cells:
        config = cell.config()
        check_channel(config.channel)
        load_plugins(config.plugins)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _epsilons(text: str | None) -> tuple[float, ...] | None:
    words = _words(text)
    return None if words is None else tuple(_float("epsilons", word) for word in words)


def _number(name: str, text: str | None) -> float | None:
    return None if text is None else _float(name, text)


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--{name} {text!r}: expected a number, or inf") from None
