"""How fast the exported student and the exported teacher answer, side by side."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from privkd.controls import latency_ms
from privkd.export.artefact import Deployable, check_equal
from privkd.export.export import raw_of, written
from privkd.export.formats import format_named
from privkd.federation import Game, open_game
from privkd.store import RunFolder
from privkd.students import finished_state


def latency_figures(folder: RunFolder, form: str) -> Mapping[str, float]:
    """Median milliseconds for one record on one CPU thread, and the artefacts' sizes in bytes.

    Raises:
        PrivkdError: as `privkd.export.export.export_student` does.
    """
    game = open_game(folder.config)
    state = finished_state(game, folder)
    figures: dict[str, float] = {}
    for name, model in (("student", state.students[0]), ("teacher", state.teacher)):
        figures[f"export.{name}_ms"], figures[f"export.{name}_bytes"] = _exported(game, model, form)
    return figures


def _exported(game: Game, model: nn.Module, form: str) -> tuple[float, float]:
    scaled = game.scenario.public.inputs.cpu()
    raw = raw_of(scaled, game.scenario.divisor)
    writer = format_named(form)
    with tempfile.TemporaryDirectory(prefix="privkd-papers-") as place:
        path = Path(place) / f"model{writer.suffix}"
        answer = written(writer, Deployable(model.cpu(), game.scenario.divisor), raw, path)
        check_equal(model, answer, scaled[:32], raw[:32])
        return latency_ms(answer, raw), float(path.stat().st_size)
