"""Runs that protect persons: what is planned, spent, kept, reported, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Shown
from mutants.settings import PERSONS, SMALL
from typer.testing import CliRunner

from cli import app
from privkd.config import load_config
from privkd.errors import ConfigError
from privkd.prepared import prepare
from privkd.privacy.accounting import group_upper_bound
from privkd.privacy.events import DpSgd, Unit
from privkd.privacy.ledger import Ledger
from privkd.runs.result import Result

PERSON = (*SMALL, *PERSONS)
RECORD = (*PERSON, "privacy.unit=record")


def asked(*words: str) -> Shown:
    shown = CliRunner().invoke(app, list(words))
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown


def trained(folder: Path, settings: tuple[str, ...]) -> Path:
    words = [word for setting in settings for word in ("--set", setting)]
    shown = asked("train", *words, "--out", str(folder))
    assert shown.exit_code == 0, shown.output
    return folder


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("person") / "run", PERSON)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("record") / "run", RECORD)


def test_the_budget_is_the_persons(person: Path) -> None:
    result, ledger = Result.read(person / "result.json"), Ledger.load(person / "ledger.jsonl")
    row = result.statement(Unit.PERSON)
    assert 2.9 < row.high <= row.budget == 3.0
    assert row.neighbouring_relation == "add or remove one person: all of its records on one device"
    assert {statement.unit for statement in result.ledger} == {Unit.PERSON, Unit.DEVICE}
    assert not ledger.parties(Unit.RECORD)
    assert row.lower_bound is not None
    assert 0.5 < row.lower_bound.epsilon <= row.high
    assert row.lower_bound.path.endswith("5 records a person")
    assert all(check.passed for check in result.checks)
    last = result.rounds[-1]
    assert last.epsilon_person == row.high
    assert last.epsilon_record != last.epsilon_record, "it is of no record"


def test_the_normaliser_is_public(person: Path) -> None:
    """Fewer persons than the nominal number leave it as it is."""
    nominal = (*PERSON, "data.persons_per_device=17", "student.dp.sampling_rate=0.25")
    prepared = prepare(load_config(None, nominal))
    assert prepared.plan.expected_batch_size == 17 * 0.25
    assert prepared.mechanism is not None
    assert (prepared.mechanism.unit, prepared.mechanism.expected_batch_size) == (Unit.PERSON, 17 * 0.25)
    assert isinstance(prepared.plan.training_event, DpSgd)


def test_what_records_and_owners_get_is_said(person: Path, record: Path) -> None:
    of_person, of_record = (Result.read(folder / "result.json") for folder in (person, record))
    assert of_person.persons == of_record.persons
    assert of_person.persons is not None
    assert of_person.persons.most_records == 5
    counts = [j.count for j in of_record.joints if j.unit is Unit.RECORD and j.devices == 1]
    assert counts == [2, 5]
    event = prepare(load_config(None, RECORD)).plan.training_event
    five = next(joint for joint in of_record.joints if joint.count == 5)
    assert five.epsilon == pytest.approx(group_upper_bound([event] * 2, 1e-5, 5))
    (one,) = (joint for joint in of_person.joints if joint.unit is Unit.RECORD)
    assert one.words == "one record of a person whose others stay"


def test_the_plan_says_it_beforehand() -> None:
    words = [word for setting in PERSON for word in ("--set", setting)]
    plan = json.loads(asked("train", *words, "--dry-run", "--json").stdout)
    assert plan["plan"]["unit"] == "person"
    assert plan["plan"]["persons"]["most_records"] == 5
    assert plan["joints"]
    shown = " ".join(asked("train", *words, "--dry-run").output.split())
    assert "epsilon per person, whole run" in shown
    assert "each with at most 5 records there" in shown


def test_the_option_is_the_setting(tmp_path: Path) -> None:
    words = [word for setting in (*SMALL, *PERSONS[:-1]) for word in ("--set", setting)]
    plan = json.loads(asked("train", *words, "--unit", "person", "--dry-run", "--json").stdout)
    assert plan["plan"]["unit"] == "person"


def test_the_report_knows_the_unit(person: Path, record: Path, tmp_path: Path) -> None:
    for folder, unit in ((person, "person"), (record, "record")):
        target = tmp_path / unit
        assert asked("report", str(folder), "--out", str(target)).exit_code == 0
        page = (target / "report.html").read_text()
        assert f"Who is more than one {unit}" in page
        assert f"DP-SGD protects a {unit}" in page
    assert "A person: epsilon is at most" in (tmp_path / "person" / "report.html").read_text()
    assert "somebody with 5 records on one device" in (tmp_path / "record" / "report.html").read_text()


@pytest.mark.parametrize("audit", ["membership", "reconstruction"])
def test_what_guesses_records_is_refused(audit: str, person: Path) -> None:
    shown = asked("audit", audit, str(person))
    assert shown.exit_code == 2
    assert "guesses single records" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("privacy.unit=person",), "--group COLUMN"),
        (("privacy.unit=person", "data.persons_per_device=4"), "--group COLUMN"),
    ],
)
def test_persons_must_be_known(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(load_config(None, settings))


def test_devices_elsewhere_do_not_take_it() -> None:
    settings = ("data.records_per_device=40", "data.persons_per_device=4", "data.records_per_person=9")
    with pytest.raises(ConfigError, match="for simulations"):
        prepare(load_config(None, ("privacy.unit=person", *settings)), public=True)


def test_a_curve_is_not_drawn_of_it(tmp_path: Path) -> None:
    shown = asked("curve", "--set", "privacy.unit=person", "--out", str(tmp_path / "c"))
    assert shown.exit_code == 2
    assert "a curve attacks single records" in " ".join(shown.output.split())


def test_a_run_goes_on_and_repeats(person: Path, tmp_path: Path) -> None:
    again = trained(tmp_path / "run", PERSON)

    def released(folder: Path) -> Any:
        rows = (json.loads(line)["record"] for line in (folder / "journal.jsonl").read_text().splitlines())
        return [row["files"]["wire"] for row in rows if row.get("step") == "round" and row["round"]]

    assert released(again) == released(person)


def test_engines_release_the_same_teacher_but_for_rounding(person: Path, tmp_path: Path) -> None:
    other = Result.read(trained(tmp_path / "run", (*PERSON, "student.engine=opacus")) / "result.json")
    ours = Result.read(person / "result.json")
    assert other.statement(Unit.PERSON).high == ours.statement(Unit.PERSON).high
    assert other.teacher.after == pytest.approx(ours.teacher.after, abs=0.05)
