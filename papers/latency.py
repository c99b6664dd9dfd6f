"""How fast the exported student and the exported teacher answer, side by side."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from privkd.export.export import Artefact, export_model, raw_of
from privkd.export.formats import format_named, suffix_of
from privkd.latency import latencies_ms
from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
from privkd.runs.folder import RunFolder

_TURNS = 501


def latency_figures(folder: RunFolder, form: str) -> Mapping[str, float]:
    """Median milliseconds for one record on one CPU thread, in turns, and the artefacts' sizes in bytes.

    Raises:
        PrivkdError: as `privkd.export.export.export_student` does.
    """
    writer = format_named(form)
    prepared = reopen_simulation(folder, HELD_BY_DEVICES)
    done = finished(prepared, folder)
    records, divisor = prepared.scenario.public.inputs, prepared.scenario.divisor
    with tempfile.TemporaryDirectory(prefix="privkd-papers-") as place:

        def exported(name: str, model: nn.Module) -> Artefact:
            return export_model(model, records, divisor, form, Path(place) / f"{name}{suffix_of(form)}")

        student, teacher = exported("student", done.students[0]), exported("teacher", done.state.teacher)
        raw = raw_of(records[:1].cpu(), divisor)
        student_ms, teacher_ms = latencies_ms(
            *((writer.load(Path(artefact.file)), raw) for artefact in (student, teacher)), turns=_TURNS
        )
    return {
        "export.student_ms": student_ms,
        "export.student_bytes": student.size_bytes,
        "export.teacher_ms": teacher_ms,
        "export.teacher_bytes": teacher.size_bytes,
    }
