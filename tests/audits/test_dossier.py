"""The report: what it says, in which order, what it refuses, and how a browser shows it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import measure
from evidence import audited, finding, rebuilt
from running import SMALL, StopAt, play
from typer.testing import CliRunner, Result

from audits.evidence import read_run
from audits.reports.compose import run_page
from audits.reports.page import as_html, as_markdown
from audits.requests import latest
from audits.sweeps.grid import DONE, TRIALS, Grid, Record
from audits.wording import counted
from cli import app
from privkd.errors import RunError
from privkd.privacy.events import Unit
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.folder import RunFolder

ORDER = ["trust", "ledger", "membership", "reconstruction", "gain", "unprotected", "provenance"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a device budget, whose noise is within reach of epsilon 3."""
    path = tmp_path_factory.mktemp("runs") / "one"
    play(path, "channel.kind=noised", "privacy.device_epsilon=8", "controls=true")
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return Path(shutil.copytree(original, tmp_path / "one"))


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_report_is_written_in_all_its_forms(run: Path) -> None:
    audited(run, finding("gradient", "canaries-many-trials", lower=2.8), finding())
    rebuilt(run)
    result = report(run)
    assert result.exit_code == 0, result.output
    assert "Within bound" in result.stdout
    html = (run / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', html) == ORDER
    assert "≥ 2.80" in html
    assert "data:image/png;base64," in html
    tree = json.loads((run / "report.json").read_text())
    assert tree["standing"] == "within bound"
    assert set(tree["ledger"]["units"]) == {"record", "device"}
    assert tree["accuracy"]["teacher"]["low"] <= tree["accuracy"]["teacher"]["estimate"]
    printed = report(run, "--json")
    assert json.loads(printed.stdout) == tree
    markdown = (run / "report.md").read_text()
    assert markdown.startswith("# Privacy report: one\n")
    assert "| view | attack |" in markdown


def test_what_the_answers_tell_of_classes_is_a_matter_of_the_device(run: Path) -> None:
    audited(run, labels=True)
    (table,) = run_page(read_run(run)).sections[2].tables
    told = ("secure_sum", "the classes show", "0.300 [0.200, 0.400] at 95 %", "0.900 nats", "16")
    assert table.rows[0][:-1] == told
    assert report(run).exit_code == 0


def test_exported_students_are_listed(run: Path) -> None:
    exported = CliRunner().invoke(app, ["export", str(run), "--device-index", "1", "--json"])
    assert exported.exit_code == 0, exported.output
    found = json.loads(exported.stdout)
    section = run_page(read_run(run)).sections[5]
    assert section.key == "exports"
    (row,) = section.tables[0].rows
    assert row[:3] == ("device-0001", "torch", f"{found['size_bytes']:,} bytes")
    assert row[4] == f"{found['check']['difference']:.1e} on {found['check']['records']} records"
    assert report(run).exit_code == 0
    tree = json.loads((run / "report.json").read_text())
    assert [row["latency_ms"] for row in tree["exports"]] == [found["latency_ms"]]
    assert "export/device-0001-torch.json" in tree["files"]
    _cut(run / "export" / "device-0001-torch.json")
    damaged = report(run)
    assert damaged.exit_code == 2
    assert "device-0001-torch.json" in damaged.stderr


def test_it_needs_nothing_from_elsewhere(run: Path) -> None:
    report(run)
    html = (run / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\((?!#)", html)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', html))
    assert not re.search(r'href="(?!#)', html)


def test_a_run_without_audits_says_so_and_names_the_commands(run: Path) -> None:
    page = run_page(read_run(run))
    assert page.verdict.word == "Not audited"
    assert page.verdict.sentences[0].startswith("No attack was made")
    assert page.verdict.commands == (f"privkd audit membership {run}", f"privkd audit reconstruction {run}")


def test_no_protection_is_said_to_be_none(tmp_path: Path) -> None:
    play(tmp_path / "open", "privacy.epsilon=inf")
    audited(tmp_path / "open", finding(lower=5.0))
    page = run_page(read_run(tmp_path / "open"))
    assert page.verdict.word == "No protection claimed"
    assert report(tmp_path / "open").exit_code == 0
    assert any("a single record" in point for point in page.sections[5].points)


def test_constants_read_from_private_records_are_said(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.random((400, 6)), y=rng.integers(0, 3, 400))
    play(tmp_path / "own", f"data.source={tmp_path / 'own.npz'}", "rounds=1", "data.classes=0,1,2")
    (said,) = [
        point for point in run_page(read_run(tmp_path / "own")).sections[5].points if "constants" in point
    ]
    assert "private ones too: public records, validation records, test records (" in said
    assert not any("constants" in point for point in run_page(read_run(run)).sections[5].points)


@pytest.mark.parametrize("kind", ["membership", "reconstruction"])
def test_an_alarm_ends_in_exit_code_3_after_all_was_written(run: Path, kind: str) -> None:
    if kind == "membership":
        # The audit's own verdict does not count: its bound is set beside the ledger's once more.
        audited(run, finding(lower=3.5, epsilon_upper=100.0))
    else:
        rebuilt(run, alarm_low=0.9)
    result = report(run)
    assert result.exit_code == 3
    assert "do not release" in result.stderr
    assert "ALARM" in (run / "report.html").read_text()


def test_a_simulation_is_called_one(run: Path) -> None:
    assert any("simulation" in sentence for sentence in run_page(read_run(run)).verdict.sentences)


def test_units_keep_apart_in_the_ledger(run: Path) -> None:
    section = run_page(read_run(run)).sections[1]
    by_unit, by_round = section.tables
    assert [row[0] for row in by_unit.rows] == ["record", "device"]
    assert [row[5] for row in by_unit.rows] == [unit.neighbouring_relation for unit in Unit]
    assert len(by_round.rows) == 2 * 3
    assert all(
        row[-1].endswith("per record" if row[0] == "record" else "per device") for row in by_round.rows
    )


def test_it_says_how_many_devices_fell_silent(run: Path, tmp_path: Path) -> None:
    quiet = "fell silent before uploading are charged all the same"
    report(run)
    assert quiet not in (run / "report.md").read_text()
    play(tmp_path / "few", "channel.dropout=0.4", "data.devices=5")
    report(tmp_path / "few")
    assert (
        f"3 or more of the 5 devices contributed; those that {quiet}"
        in (tmp_path / "few/report.md").read_text()
    )


def test_an_unfinished_run_is_reported_as_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "half", progress=StopAt(8))
    result = report(tmp_path / "half")
    assert result.exit_code == 0, result.output
    assert "Unfinished" in result.stdout
    assert f"privkd train --resume {tmp_path / 'half'}" in (tmp_path / "half" / "report.html").read_text()


def test_a_run_stopped_before_its_first_charge_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "early", progress=StopAt(0))
    assert report(tmp_path / "early").exit_code == 0


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def _swap(path: Path) -> None:
    path.write_text(path.read_text().replace("0.", "0.1", 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "config.toml": _swap,
    "journal.jsonl": _swap,
    "ledger.jsonl": _swap,
    "result.json": _swap,
    "versions.json": lambda path: path.write_text("[]"),
    "audit/membership.json": _cut,
    "audit/reconstruction.json": _cut,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_ends_in_one_line_that_names_the_file(run: Path, name: str) -> None:
    audited(run, finding())
    rebuilt(run)
    DAMAGE[name](run / name)
    result = report(run)
    assert result.exit_code == 2, result.output
    assert Path(name).name in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "{}",
        '{"target": "", "views": []}',
        '{"target": "", "views": [1]}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_any_audit_that_is_none_is_refused(run: Path, text: str) -> None:
    (run / "audit").mkdir()
    (run / "audit" / "membership.json").write_bytes(text.encode("latin-1"))
    assert report(run).exit_code == 2


@pytest.mark.parametrize("value", ["NaN", '"3"', "true", "null", "[]"])
def test_a_bound_that_is_no_number_is_refused(run: Path, value: str) -> None:
    audited(run, finding(lower=0.2))
    file = run / "audit" / "membership.json"
    file.write_text(file.read_text().replace('"epsilon_lower": 0.2', f'"epsilon_lower": {value}'))
    assert report(run).exit_code == 2


def test_a_ledger_that_was_cut_short_is_found_out(run: Path) -> None:
    ledger = run / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    result = report(run)
    assert result.exit_code == 2
    assert "lost charges" in result.stderr


def test_a_ledger_that_is_gone_is_missed(run: Path) -> None:
    (run / "ledger.jsonl").unlink()
    assert "what the run spent is unknown" in report(run).stderr


def test_pictures_come_from_the_run_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    rebuilt(run, grid="../secret.png")
    result = report(run)
    assert result.exit_code == 2
    assert "outside" in result.stderr
    rebuilt(run, grid="config.toml")
    assert "no PNG" in report(run).stderr


def test_what_a_run_says_of_itself_is_never_markup(original: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)<|script>"
    run = Path(shutil.copytree(original, tmp_path / f"<img src=x onerror=alert(1)>`{hostile}"))
    audited(run, finding("student", f"{hostile}</td>", estimator="`x` <b>"))
    rebuilt(run, target=hostile, prior='"><svg onload=alert(1)>')
    assert report(run).exit_code == 0
    html = (run / "report.html").read_text()
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "<svg onload" not in html
    assert "&lt;script&gt;alert(1)" in html
    markdown = as_markdown(run_page(read_run(run)))
    outside = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<(?!audit)", outside)


def test_the_registry_gets_one_record_a_unit(run: Path) -> None:
    audited(run, finding())
    report(run)
    records = list(yaml.safe_load_all((run / "registry.yaml").read_text()))
    assert [row["deployment"]["privacy_loss"]["privacy_unit"] for row in records] == [
        "record-level",
        "User-device-level",
    ]
    for row in records:
        deployment = row["deployment"]
        assert row["status"] == "Draft"
        assert deployment["product"]["data_curators"] == ["unknown"]
        assert deployment["dp_flavor"]["name"] == "Approximate DP"
        assert deployment["privacy_loss"]["privacy_parameters"]["epsilon"] <= 8
        assert deployment["model"]["model_name"] == "Local"


def test_the_registry_has_no_number_for_no_bound(tmp_path: Path) -> None:
    play(tmp_path / "plain")
    report(tmp_path / "plain")
    records = list(yaml.safe_load_all((tmp_path / "plain" / "registry.yaml").read_text()))
    assert records[1]["deployment"]["privacy_loss"]["privacy_parameters"] == {}
    assert "No bound" in records[1]["deployment"]["privacy_loss"]["privacy_parameters_description"]


def test_the_report_goes_where_it_is_asked_to(run: Path, tmp_path: Path) -> None:
    assert report(run, "--out", tmp_path / "elsewhere").exit_code == 0
    assert (tmp_path / "elsewhere" / "report.html").exists()
    assert not (run / "report.html").exists()
    (tmp_path / "file").touch()
    assert report(run, "--out", tmp_path / "file").exit_code == 2


def test_the_latest_is_the_default(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report().exit_code == 2
    assert report(tmp_path).exit_code == 2
    with pytest.raises(RunError, match="privkd train"):
        latest(Path("runs"), "run", "curve")
    shutil.copytree(run, "runs/a")
    assert report().exit_code == 0
    assert Path("runs/a/report.html").exists()


def test_the_command_in_it_starts_an_equal_run(run: Path, tmp_path: Path) -> None:
    import shlex

    facts = read_run(run)
    _, *words = shlex.split(facts.command)
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "again"), "--json"])
    assert result.exit_code == 0, result.output
    assert read_run(tmp_path / "again").config == facts.config


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's report over the secure channel, and a curve's with all three channels."""
    root = tmp_path_factory.mktemp("pages")
    settings = tuple(s for s in SMALL if not s.startswith("channel.kind"))
    grid = Grid(epsilons=(1.0,), seeds=1, audits=("membership",), overrides=settings)
    curve = root / "curve"
    for trial in grid.trials:
        folder = curve / TRIALS / trial.folder
        with RunFolder.create(folder, trial.config()) as opened:
            train_in(opened.config, opened, Silent())
        cloud = "secure_sum" if trial.channel == "secure" else "per_client_logits"
        audited(
            folder,
            finding(cloud, "distillation-lira"),
            finding("gradient", "canaries-many-trials"),
            finding(),
        )
        (folder / DONE).write_text(json.dumps({"key": trial.key}))
    (curve / "curve.json").write_text(Record(request=grid).model_dump_json())
    assert report(curve).exit_code == 0
    assert report(folder).exit_code == 0
    return {"run": folder / "report.html", "curve": curve / "report.html"}


def test_a_curve_s_report_has_all_figures_and_drawings(pages: dict[str, Path]) -> None:
    html = pages["curve"].read_text()
    assert html.count("data:image/svg+xml;base64,") == 3
    assert html.count('<svg class="trust"') == 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("kind", ["run", "curve"])
def test_a_browser_shows_it_well(
    pages: dict[str, Path], tmp_path: Path, kind: str, width: int, dark: bool
) -> None:
    found = measure(pages[kind], tmp_path, width=width, dark=dark)
    assert found.width == width
    assert found.scroll <= found.width
    assert found.out == []
    assert found.low == []
    assert found.texts > 100
    assert found.pictures == 0
    assert found.page == ("rgb(15, 20, 25)" if dark else "rgb(255, 255, 255)")


def test_the_browser_s_eye_is_good(pages: dict[str, Path], tmp_path: Path) -> None:
    """It sees text that is too pale and a box that sticks out."""
    page = tmp_path / "bad.html"
    bad = '<p style="color: #aaa">pale</p><div style="width: 900px">wide</div>'
    page.write_text(pages["run"].read_text().replace("<nav", f"{bad}<nav"))
    found = measure(page, tmp_path, width=400, dark=False)
    assert found.scroll > found.width
    assert any("pale" in text for text in found.low)
    assert any("wide" in element for element in found.out)


def test_html_is_the_same_for_the_same_run(run: Path) -> None:
    assert as_html(run_page(read_run(run))) == as_html(run_page(read_run(run)))


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 rounds"), (1, "1 round"), (2, "2 rounds"), (1000, "1,000 rounds")]
)
def test_things_are_counted_as_people_do(number: int, words: str) -> None:
    assert counted(number, "round") == words
