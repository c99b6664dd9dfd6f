"""What ``privkd report`` does, between the command line's parsing and the pages."""

import json
from pathlib import Path

from audits.latest import RUNS, latest
from privkd.errors import AuditAlarm
from privkd.stdout import print_json


def report_command(path: Path | None, out: Path | None, *, as_json: bool) -> None:
    """Write the report of the run or curve in ``path``, the latest by default, and print where it is.

    Raises:
        AuditAlarm: an audit in it is an alarm; all was written first.
        RunError: neither a run nor a curve, or damaged.
    """
    from audits.dossier.composing import curve_page, run_page
    from audits.dossier.html import as_html
    from audits.dossier.markdown import as_markdown
    from audits.dossier.registry import as_yaml
    from audits.dossier.tree import curve_report_tree, run_tree
    from audits.evidence.reading import read_run
    from audits.sweeps.grid import is_sweep
    from audits.sweeps.sweep import read_sweep

    path = path or latest(RUNS, "run", "curve")
    if is_sweep(path):
        curve = read_sweep(path)
        page, tree, registry = curve_page(curve), curve_report_tree(curve), ""
        alarms = curve.alarms
    else:
        facts = read_run(path)
        page, tree, registry = run_page(facts), run_tree(facts), as_yaml(facts)
        alarms = facts.alarm_words
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    files = {"report.html": as_html(page), "report.md": as_markdown(page), "report.json": text}
    if registry:
        files["registry.yaml"] = registry
    _write(out or path, files)
    if as_json:
        print_json(tree)
    else:
        _print(page.verdict.word, page.verdict.sentences, [str((out or path) / name) for name in files])
    if alarms:
        raise AuditAlarm(f"{path}: {alarms[0]}; do not release")


def _write(folder: Path, files: dict[str, str]) -> None:
    from audits.files import write_whole

    for name, text in files.items():
        write_whole(folder / name, text.encode(errors="replace"))


def _print(word: str, sentences: tuple[str, ...], files: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(word, style="bold"))
    for sentence in sentences:
        console.print(Text(sentence))
    for file in files:
        console.print(file, highlight=False, markup=False, soft_wrap=True)
