"""The first look: what it shows is what its two runs and their audits say."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from audits.beside import Demo, demo
from audits.evidence import read_run
from cli import app
from privkd.privacy.events import Unit


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return demo(tmp_path_factory.mktemp("demo") / "both")


def test_it_shows_what_its_runs_say(shown: Demo) -> None:
    for side in shown.sides:
        facts = read_run(Path(side.run))
        assert facts.result is not None
        assert facts.membership is not None
        assert (side.before, side.after) == (facts.result.teacher.before, facts.result.teacher.after)
        assert side.epsilon == facts.spent(Unit.RECORD)
        assert side.attack in {one.attack for one in facts.membership.findings}
        assert facts.membership.findings[0].auc is not None


def test_protection_is_seen_and_so_is_the_gain(shown: Demo) -> None:
    """One seed, so these are facts of two runs that repeat bit by bit, not statistics."""
    bare, kept = shown.sides
    assert math.isinf(bare.epsilon)
    assert kept.epsilon <= 3
    assert bare.allowed == 1
    assert bare.found is not None
    assert kept.found is not None
    assert kept.found.estimate < kept.allowed < bare.found.estimate
    assert kept.after > kept.before + 0.1
    assert shown.alarm is None


def test_it_is_one_table_and_three_commands(shown: Demo) -> None:
    html = shown._repr_html_()
    assert "no limit" in html
    assert html.count("privkd ") >= 3
    assert len(shown.to_frame()) == 2
    assert Demo.model_validate(json.loads(json.dumps(shown.tree()))) == shown


def test_a_folder_that_is_taken_is_refused(shown: Demo) -> None:
    taken = Path(shown.sides[0].run).parent
    result = CliRunner().invoke(app, ["demo", "--out", str(taken)])
    assert result.exit_code == 2
    assert "no-protection" in result.stderr
