"""``privkd export``: from a finished run to one device's student as an artefact that answers as it does."""

import copy
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from privkd.data.constants import Constants
from privkd.data.preprocessing import Column
from privkd.data.tokens import TOKENIZER_FILE
from privkd.errors import ModelError, RunError, one_line
from privkd.export.artefact import Answering, Deployable, Format, check_equal
from privkd.export.formats import format_named, suffix_of
from privkd.export.record import Artefact, Exported
from privkd.models.features import Parted
from privkd.models.latency import latencies_ms
from privkd.models.lora import merged
from privkd.models.zoo import parameter_count
from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
from privkd.progress import Silent
from privkd.runs.folder import RunFolder

_CHECKED = 256


def export(run: Path, form: str, device: int, out: Path | None = None) -> Exported:
    """`export_student` of the run in the folder ``run``."""
    with RunFolder.resume(run) as folder:
        return export_student(folder, form, device, out)


def export_student(folder: RunFolder, form: str, device: int, out: Path | None) -> Exported:
    """Write what device number ``device`` is left with by a finished simulation, as `export_model` does.

    ``out`` is ``export/<device><suffix>`` in the run's folder where it is ``None``.

    Raises:
        ConfigError: an unknown format, or one whose packages are missing.
        ModelError: the student cannot be exported, or the artefact answers otherwise.
        RunError: the run is unfinished, damaged or a deployment, its data or code changed, it has no such
            device, or ``out`` cannot be written.
    """
    suffix = suffix_of(form)
    prepared = reopen_simulation(folder, HELD_BY_DEVICES)
    scenario = prepared.scenario
    count = len(scenario.devices)
    if device >= count:
        raise RunError(f"device-index {device}: {folder.path} has {count} devices, 0 to {count - 1}")
    done = finished(prepared, folder)
    name = scenario.devices[device].name
    path = out or folder.path / "export" / f"{name}{suffix}"
    student = prepared.personalised(done, [device], Silent())[0]
    artefact = export_model(student, scenario.public.inputs, scenario.constants, scenario.labels, form, path)
    exported = Exported(
        run=str(folder.path),
        device=name,
        round=done.state.round,
        delivered=prepared.config.student.delivers,
        **dict(artefact),
    )
    folder.write_json(f"export/{name}-{form}.json", exported.tree())
    return exported


def export_model(
    student: nn.Module, records: Tensor, constants: Constants, classes: Sequence[str], form: str, path: Path
) -> Artefact:
    """Write ``student`` with its preprocessing to ``path``, whole or not at all: what a device calls.

    The artefact is read back and put beside the student before it takes the place of ``path``.

    Of a table, its columns are written beside it, as ``<path>.columns``: JSON.

    Args:
        student: from inputs to logits.
        records: public ones as inputs of training, ``[record, *shape]``, at least one.
        constants: how raw features became inputs.
        classes: by name, in the order of the logits.
        form: of `formats.FORMATS`.
        path: of the artefact; a tokenizer goes beside it.

    Raises:
        ConfigError: an unknown format, or one whose packages are missing.
        ModelError: the student cannot be exported, or the artefact answers otherwise.
        RunError: ``path`` cannot be written.
    """
    writer = format_named(form)
    student = merged(Parted.of(copy.deepcopy(student).cpu().eval()).opened())
    raw = constants.raw(records[:_CHECKED].cpu())
    if any(column.fill is not None for column in constants.columns):
        raw[-1] = math.nan
    with torch.no_grad():
        # Not the records themselves: what was rounded on the way back must not count as the artefact's fault.
        inputs = constants.module()(raw)
    with _replacing(path) as temporary:
        answer = written(writer, Deployable(student, constants.module(), classes), raw, temporary)
        check = check_equal(student, answer, inputs, raw)
        latency, original = latencies_ms((answer, raw), (student, inputs))
        if constants.columns:
            _write_columns(constants.columns, path)
    tokenizer = _with_tokenizer(path, constants)
    return Artefact(
        format=form,
        file=str(path),
        size_bytes=path.stat().st_size,
        parameters=parameter_count(student),
        input_shape=tuple(raw.shape[1:]),
        preprocessing=constants.words,
        columns=tuple(column.tree() for column in constants.columns),
        vocabulary=constants.vocabulary,
        tokenizer=tokenizer,
        classes=answer(raw[:1]).shape[-1],
        class_names=tuple(classes),
        check=check,
        latency_ms=latency,
        original_ms=original,
    )


def _with_tokenizer(path: Path, constants: Constants) -> str | None:
    """Where the tokenizer of text lies, beside the artefact at ``path``."""
    tokens = constants.tokens
    if tokens is None or tokens.tokenizer is None:
        return None
    beside = path.with_name(f"{path.stem}-{TOKENIZER_FILE}")
    with _replacing(beside) as temporary:
        temporary.write_text(tokens.tokenizer, encoding="utf-8")
    return str(beside)


def _write_columns(columns: Sequence[Column], artefact: Path) -> None:
    """Say beside the artefact what the raw features of a record are, in their order."""
    tree = {"columns": [column.tree() for column in columns]}
    artefact.with_name(f"{artefact.name}.columns").write_text(json.dumps(tree, indent=2))


def written(writer: Format, model: Deployable, raw: Tensor, path: Path) -> Answering:
    """Write ``model``, traced on the first ``raw`` records, to ``path``, and read it back.

    Raises:
        ModelError: the exporter cannot follow the model.
    """
    example = raw[:2] if len(raw) > 1 else raw.expand(2, *raw.shape[1:])
    try:
        writer.write(model.eval(), example.clone(), path)
        return writer.load(path)
    except Exception as error:  # Exporters raise almost anything on a graph that they cannot follow.
        raise ModelError(
            f"the student cannot be written as {path.suffix}: {one_line(error)}; take another --format, or "
            "write its forward without branches on values"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file of the same name that takes the place of ``path`` if all goes well, and vanishes if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; name another --out") from None
