"""The report: what it says, in which order, what it refuses, and how a browser shows it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml
from browser import measure
from evidence import audited, finding, rebuilt
from jsonschema import Draft7Validator
from registry_schema import SCHEMA
from running import SMALL, StopAt, play
from typer.testing import CliRunner, Result

from audits.evidence import read_run
from audits.reports.compose import Words, run_page
from audits.reports.page import Page, Section, as_html, as_markdown
from audits.reports.sign_off import ABOUT, About
from audits.reports.verdicts import verdicts_on_run
from audits.requests import latest
from audits.sweeps.grid import DONE, TRIALS, Grid, Record
from audits.wording import counted
from cli import app
from privkd.errors import RunError
from privkd.privacy.accounting import compose
from privkd.privacy.claims import certainty
from privkd.privacy.events import Unit
from privkd.progress import Silent
from privkd.run import train_in
from privkd.runs.elsewhere import Elsewhere
from privkd.runs.folder import RunFolder

ORDER = [
    "stated",
    "trust",
    "ledger",
    "meaning",
    "membership",
    "reconstruction",
    "gain",
    "unprotected",
    "provenance",
    "sign",
    "glossary",
]


ABOUT_IT = About(
    purpose="Reads handwriting.", curators=("The Office",), region="Everywhere", justification="A few units."
)
STATED = """
purpose = "Reads handwriting."
curators = ["The Office"]
sector = "Education"
published = "2026-12-01"
authors = ["A. Person"]
"""
DEPLOYED = (
    "privacy.noise=system",
    "data.records_per_device=20",
)


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


def page_of(run: Path, about: About | None = None) -> Page:
    facts = read_run(run)
    return run_page(facts, Words(about or About(), None, facts.files))


def section(page: Page, key: str) -> Section:
    return next(section for section in page.sections if section.key == key)


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_report_is_written_in_all_its_forms(run: Path) -> None:
    audited(run, finding("gradient", "canaries-many-trials", lower=2.8), finding())
    rebuilt(run)
    result = report(run)
    assert result.exit_code == 0, result.output
    assert "Is the evidence consistent? Yes" in result.stdout
    assert "Is this fit for release? No" in result.stdout
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
    (table,) = section(page_of(run), "membership").tables
    told = ("secure_sum", "the classes show", "0.300 [0.200, 0.400] at 95 %", "0.900 nats", "16")
    assert table.rows[0][:-1] == told
    assert report(run).exit_code == 0


def test_exported_students_are_listed(run: Path) -> None:
    exported = CliRunner().invoke(app, ["export", str(run), "--device-index", "1", "--json"])
    assert exported.exit_code == 0, exported.output
    found = json.loads(exported.stdout)
    (row,) = section(page_of(run), "exports").tables[0].rows
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
    _, evidence = page_of(run).verdicts
    assert evidence.word == "Not audited"
    assert evidence.sentences[0].startswith("No attack was made")
    assert evidence.commands == (f"privkd audit membership {run}", f"privkd audit reconstruction {run}")


def test_no_protection_is_said_to_be_none(tmp_path: Path) -> None:
    play(tmp_path / "open", "privacy.epsilon=inf")
    audited(tmp_path / "open", finding(lower=5.0))
    page = page_of(tmp_path / "open")
    release, evidence = page.verdicts
    assert (evidence.word, evidence.tone) == ("Nothing is claimed", "warn")
    assert (release.word, release.tone) == ("No", "bad")
    assert any("No protection is claimed" in words for words in release.sentences)
    assert report(tmp_path / "open").exit_code == 0
    assert any("a single record" in point for point in section(page, "unprotected").points)


def test_constants_read_from_private_records_are_said(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.random((400, 6)), y=rng.integers(0, 3, 400))
    play(tmp_path / "own", f"data.source={tmp_path / 'own.npz'}", "rounds=1", "data.classes=0,1,2")
    (said,) = [
        point for point in section(page_of(tmp_path / "own"), "unprotected").points if "constants" in point
    ]
    assert "private ones too: public records, validation records, test records (" in said
    assert not any("constants" in point for point in section(page_of(run), "unprotected").points)


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


def test_a_simulation_is_never_fit_for_release(run: Path, tmp_path: Path) -> None:
    audited(run, finding())
    release, evidence = page_of(run, ABOUT_IT).verdicts
    assert (release.tone, evidence.tone, evidence.word) == ("bad", "plain", "Yes")
    assert any("simulation" in words for words in release.sentences)
    play(tmp_path / "drawn", *DEPLOYED)
    release, _ = page_of(tmp_path / "drawn", ABOUT_IT).verdicts
    assert release.tone == "bad"
    assert any("One process played every party" in words for words in release.sentences)


def test_devices_elsewhere_may_be_fit_for_release(run: Path) -> None:
    audited(run, finding())
    facts = read_run(run)
    privacy = facts.config.privacy.model_copy(update={"noise": "system"})
    config = facts.config.model_copy(update={"privacy": privacy})
    apart = replace(facts, config=config, elsewhere=Elsewhere.model_construct(words="devices of their own"))
    release, evidence = verdicts_on_run(apart, ABOUT_IT)
    assert evidence.tone == "good"
    assert (release.word, release.tone) == ("No objection", "good")
    release, _ = verdicts_on_run(apart, About())
    assert release.tone == "warn"
    assert "purpose, curators, region, justification" in release.sentences[0]


def test_whatever_shows_reaches_the_verdict(run: Path) -> None:
    audited(run, finding(), labels=True)
    rebuilt(run)
    facts = read_run(run)
    assert facts.reconstruction is not None
    release, _ = page_of(run).verdicts
    assert any("The classes show" in words and "secure_sum" in words for words in release.sentences)
    picked = any(one.success.low > one.success.chance for one in facts.reconstruction.findings)
    assert any("Secrets were rebuilt" in words for words in release.sentences) == picked


def test_what_the_figures_are_worth(run: Path) -> None:
    """Full batches under noise: the ceilings are those of the Gaussian mechanism, by the definition."""
    audited(run, finding())
    facts = read_run(run)
    (table,) = section(page_of(run), "meaning").tables
    assert [row[0] for row in table.rows] == ["record"] * 3 + ["device"] * 3
    composed = compose(facts.events[Unit.RECORD])
    assert composed.mu_squared
    for row, kappa in zip(table.rows[1:3], (0.01, 0.1), strict=True):
        most = NormalDist().cdf(NormalDist().inv_cdf(kappa) + composed.mu_squared**0.5)
        assert row[2].startswith(f"{100 * most:.1f} %")
    assert table.rows[0][2] == certainty(facts.spent(Unit.RECORD))


def test_units_keep_apart_in_the_ledger(run: Path) -> None:
    by_unit, by_round, of_owners = section(page_of(run), "ledger").tables
    assert [row[0] for row in by_unit.rows] == ["record", "device"]
    assert [row[5] for row in by_unit.rows] == [
        unit.neighbouring_relation for unit in (Unit.RECORD, Unit.DEVICE)
    ]
    assert len(by_round.rows) == 2 * 3
    assert all(
        row[-1].endswith("per record" if row[0] == "record" else "per device") for row in by_round.rows
    )
    assert [row[0] for row in of_owners.rows][:3] == [
        f"somebody with {count} records on one device" for count in (2, 5, 10)
    ]


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
    markdown = as_markdown(page_of(run))
    outside = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<(?!audit)", outside)


def registry(run: Path) -> list[dict[str, Any]]:
    """The records, each valid as the registry's own check has it."""
    records = list(yaml.safe_load_all((run / "registry.yaml").read_text()))
    check = Draft7Validator(SCHEMA, format_checker=Draft7Validator.FORMAT_CHECKER)
    assert [error.message for row in records for error in check.iter_errors(row)] == []
    return [row["deployment"] for row in records]


def test_the_registry_gets_one_record_a_unit(run: Path) -> None:
    audited(run, finding())
    report(run)
    records = registry(run)
    assert [row["privacy_loss"]["privacy_unit"] for row in records] == ["record level", "device level"]
    for row in records:
        assert row["basic"]["data_curators"] == ["unknown"]
        assert row["dp_variant"]["variant_name"] == "Approximate DP"
        assert row["privacy_loss"]["privacy_parameters"]["epsilon"] <= 8
        assert row["deployment_model"]["model_name"] == "Local"


def test_the_registry_is_told_what_people_state(run: Path) -> None:
    (run / ABOUT).write_text(STATED)
    report(run)
    for row in registry(run):
        assert row["basic"]["data_curators"] == ["The Office"]
        assert row["basic"]["publication_date"] == "2026-12-01"
        assert row["basic"]["data_product_sector"] == "Education"
        assert row["administrative"]["registry_authors"] == ["A. Person"]


def test_the_schema_refuses_what_the_registry_renamed() -> None:
    check = Draft7Validator(SCHEMA, format_checker=Draft7Validator.FORMAT_CHECKER)
    old = {"url_slug": "a", "status": "Draft", "tier": 1, "deployment": {"product": {}}}
    assert not check.is_valid(old)
    assert not Draft7Validator({"format": "date"}, format_checker=check.format_checker).is_valid("1/1/2026")


def test_the_registry_has_no_number_for_no_bound(tmp_path: Path) -> None:
    play(tmp_path / "plain")
    report(tmp_path / "plain")
    loss = registry(tmp_path / "plain")[1]["privacy_loss"]
    assert loss["privacy_parameters"] == {}
    assert "No bound" in loss["privacy_parameters_details"]


def test_what_is_stated_survives(run: Path) -> None:
    """The form is laid out once, read every time, and never written over."""
    assert report(run).exit_code == 0
    assert "purpose" in (run / ABOUT).read_text()
    (run / ABOUT).write_text(STATED)
    for _ in range(2):
        assert report(run).exit_code == 0
        assert (run / ABOUT).read_text() == STATED
    assert "Reads handwriting." in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("purpose = 3", "purpose=3"),
        ("purposes = 'x'", "did you mean 'purpose'?"),
        ("published = '1/2/26'", "published="),
        ("sector = 'Sports'", "sector='Sports'"),
        ("= =", "is not TOML"),
    ],
)
def test_a_bad_statement_is_refused_in_one_line(run: Path, text: str, said: str) -> None:
    (run / ABOUT).write_text(text)
    result = report(run)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_signature_holds_until_something_changes(run: Path, tmp_path: Path) -> None:
    (run / ABOUT).write_text(STATED)
    assert "Nobody has signed" in _signed(run)
    assert report(run, "--sign", "B. Officer").exit_code == 0
    assert "Signed by B. Officer" in _signed(run)
    assert "nothing that it rests on has changed" in _signed(run)
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    assert "nothing that it rests on has changed" in _signed(moved)
    command = re.findall(r"<pre>(sha256sum [^<]*)</pre>", (run / "report.html").read_text())[0]
    printed = subprocess.run(command, shell=True, cwd=run, capture_output=True, text=True, check=True)
    assert printed.stdout.split()[0] == json.loads((run / "report.json").read_text())["digest"]
    audited(run, finding(lower=1.0))
    assert "does not hold for this report" in _signed(run)
    (moved / ABOUT).write_text(STATED.replace("Reads", "Sells"))
    assert "does not hold for this report" in _signed(moved)


def _signed(run: Path) -> str:
    assert report(run).exit_code == 0
    return (run / "report.html").read_text()


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
    assert as_html(page_of(run)) == as_html(page_of(run))


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 rounds"), (1, "1 round"), (2, "2 rounds"), (1000, "1,000 rounds")]
)
def test_things_are_counted_as_people_do(number: int, words: str) -> None:
    assert counted(number, "round") == words
