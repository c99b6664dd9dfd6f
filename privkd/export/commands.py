"""What ``privkd export`` does, between the command line's parsing and the export."""

from dataclasses import dataclass
from pathlib import Path

from privkd.errors import ConfigError
from privkd.export.formats import check_installed, suffix_of
from privkd.stdout import print_json


@dataclass(frozen=True)
class ExportRequest:
    """``privkd export`` as it was typed; ``out`` is ``None`` for a file in the run's folder."""

    run: Path
    format: str
    device: int
    out: Path | None
    json: bool


def export_command(request: ExportRequest) -> None:
    """Export, and print what was written.

    Raises:
        PrivkdError: see its tree; the message is for people. Nothing was written.
    """
    suffix = suffix_of(request.format)
    if request.device < 0:
        raise ConfigError(f"device-index {request.device}: devices are numbered from 0")
    if request.out is not None and request.out.suffix != suffix:
        raise ConfigError(f"--out {request.out}: format {request.format!r} writes a {suffix} file; name one")
    check_installed(request.format)
    from privkd.export.console import print_exported
    from privkd.export.export import export_student, exported_tree
    from privkd.runs.folder import RunFolder

    with RunFolder.resume(request.run) as folder:
        exported = export_student(folder, request.format, request.device, request.out)
    if request.json:
        print_json(exported_tree(exported))
    else:
        print_exported(exported)
