"""Deltas and epsilons that promise little are called what they are, in the same words everywhere."""

import json
import math
from pathlib import Path

import pytest
from running import play, small

from audits.evidence import read_run
from audits.reports.compose import Words, report_on_run, run_page
from audits.reports.page import as_markdown
from audits.reports.sign_off import About
from privkd.errors import ConfigError
from privkd.plan import PublicFacts, make_plan
from privkd.prepared import forecast
from privkd.privacy.claims import LARGEST_DELTA, certainty, check_delta, warnings_on
from privkd.privacy.events import Unit
from privkd.terminal import show

FACTS = PublicFacts(devices=5, records_per_device=140, proxy=360, classes=10)


class TestDelta:
    @pytest.mark.parametrize("delta", [0.011, 0.1, 0.9])
    def test_a_large_one_is_refused_by_name(self, delta: float) -> None:
        with pytest.raises(
            ConfigError, match=rf"privacy\.delta={delta:g}: .*privacy\.allow_large_delta=true"
        ):
            make_plan(small(f"privacy.delta={delta}"), FACTS)

    def test_or_allowed_by_name_and_then_warned_of(self) -> None:
        plan = make_plan(small("privacy.delta=0.1", "privacy.allow_large_delta=true"), FACTS)
        assert len(plan.warnings) == 1
        assert "delta 0.1 per record is too large: above 1/n = 0.00714 (n = 140 records" in plan.warnings[0]

    def test_the_largest_that_needs_no_leave(self) -> None:
        check_delta(LARGEST_DELTA, allowed=False)
        with pytest.raises(ConfigError):
            check_delta(math.nextafter(LARGEST_DELTA, 1), allowed=False)

    @pytest.mark.parametrize(("records", "warned"), [(100, 0), (101, 1)])
    def test_is_warned_of_above_one_over_the_records(self, records: int, warned: int) -> None:
        assert len(warnings_on(Unit.RECORD, 3.0, 0.01, records)) == warned

    def test_devices_are_counted_where_a_device_is_protected(self) -> None:
        facts = PublicFacts(devices=500, records_per_device=140, proxy=360, classes=10)
        more = ("channel.kind=noised", "privacy.delta=5e-3", "data.devices=500")
        assert make_plan(small(*more), facts).warnings == ()
        plan = make_plan(small(*more, "privacy.device_epsilon=8"), facts)
        assert ["per device" in words for words in plan.warnings] == [True]

    def test_the_default_has_no_warning(self) -> None:
        assert make_plan(small(), FACTS).warnings == ()


class TestEpsilon:
    def test_above_twenty_it_says_how_sure_an_attacker_can_become(self) -> None:
        plan = make_plan(small("privacy.epsilon=25"), FACTS)
        assert len(plan.warnings) == 1
        assert f"{certainty(plan.training.high)} sure" in plan.warnings[0]
        assert make_plan(small("privacy.epsilon=19"), FACTS).warnings == ()

    def test_nothing_is_claimed_by_an_infinite_one(self) -> None:
        assert warnings_on(Unit.RECORD, math.inf, 0.5, 140) == ()

    @pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0, 20.0, 24.0])
    def test_certainty_is_told_from_certainty(self, epsilon: float) -> None:
        said = float(certainty(epsilon).removesuffix(" %")) / 100
        assert said < 1
        # To one digit of the doubt, three of the share.
        doubt = 1 / (1 + math.exp(epsilon))
        assert 1 - said == pytest.approx(doubt, rel=0.5, abs=6e-4 if epsilon < 6 else 0)

    def test_certainty_of_an_enormous_one(self) -> None:
        assert certainty(1e6) == certainty(math.inf) == "more than 99.9999999999 %"


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose epsilon and delta are both too large."""
    path = tmp_path_factory.mktemp("warned") / "run"
    play(path, *LARGE)
    return path


LARGE = ("rounds=1", "privacy.epsilon=30", "privacy.delta=0.05", "privacy.allow_large_delta=true")


class TestShown:
    def test_in_the_result_and_the_report(self, warned: Path) -> None:
        said = json.loads((warned / "result.json").read_text())["warnings"]
        assert ["delta" in said[0], "epsilon" in said[1], len(said)] == [True, True, 2]
        facts = read_run(warned)
        words = Words(About(), None, facts.files)
        assert list(facts.warnings) == said == report_on_run(facts, words).tree()["warnings"]
        assert as_markdown(run_page(facts, words)).count("Warning: ") == 2

    def test_on_the_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        show(forecast(small(*LARGE)), as_json=False)
        planned = " ".join(capsys.readouterr().out.split())
        result = play(tmp_path / "run", *LARGE)
        show(result, as_json=False)
        printed = " ".join(capsys.readouterr().out.split())
        for words in result.warnings:
            assert f"Warning: {words}." in planned
            assert f"Warning: {words}." in printed
