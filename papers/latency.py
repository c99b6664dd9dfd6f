"""How fast the exported student and the exported teacher answer, side by side."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from privkd.export.export import export_model
from privkd.export.formats import suffix_of
from privkd.federation import open_game
from privkd.store import RunFolder
from privkd.students import finished_state


def latency_figures(folder: RunFolder, form: str) -> Mapping[str, float]:
    """Median milliseconds for one record on one CPU thread, and the artefacts' sizes in bytes.

    Raises:
        PrivkdError: as `privkd.export.export.export_student` does.
    """
    game = open_game(folder.config)
    state = finished_state(game, folder)
    records, divisor = game.scenario.public.inputs, game.scenario.divisor
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="privkd-papers-") as place:
        for name, model in (("student", state.students[0]), ("teacher", state.teacher)):
            found = export_model(model, records, divisor, form, Path(place) / f"{name}{suffix_of(form)}")
            figures[f"export.{name}_ms"], figures[f"export.{name}_bytes"] = found.latency_ms, found.size_bytes
    return figures
