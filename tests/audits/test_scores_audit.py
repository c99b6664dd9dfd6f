"""Audits of scores from anywhere: what they find, what they hold against a claim, and what they refuse."""

import csv
import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import damaged, fuzzed, no_hang
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import audits
from attacks import lira_online
from attacks.membership.shadows import Shadows
from audits.bounding import Claim, bounds_of, claimed, pair_bound
from audits.estimators import mu_of_epsilon
from audits.findings import Refused
from audits.roc import spread
from audits.score_files import read_scores, score_set
from audits.tables import Scored, ScoresReport
from cli import app
from privkd.errors import DataError, InputError

DELTA = 1e-5
Floats = NDArray[np.float64]


def canaries(size: int, epsilon: float, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores of a Gaussian mechanism of this epsilon, by fair coins."""
    rng = np.random.default_rng(seed)
    member = rng.random(size) < 0.5
    mu = mu_of_epsilon(epsilon, DELTA) if epsilon else 0.0
    return rng.normal(size=size) + mu * member, member


def matrix(models: int, samples: int, seed: int = 0) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Signals of models that know their members a little, their coins, and signals on others."""
    rng = np.random.default_rng(seed)
    member = rng.random((models, samples)) < 0.5
    signals = rng.normal(size=samples) + rng.normal(size=(models, samples)) + 1.5 * member
    return signals, member, rng.normal(size=(models, 200))


def table(path: Path, scores: Floats, member: NDArray[np.bool_], **other: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["score", "member", *other])
        writer.writerows(
            [[repr(float(s)), int(m), *other.values()] for s, m in zip(scores, member, strict=True)]
        )
    return path


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app(["audit", "scores", *map(str, words)])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


# What it finds


def test_a_file_an_array_and_a_parquet_file_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    scores, member = canaries(400, 2.0)
    here = audits.scores(scores, member, epsilon=2.0, delta=DELTA).tree()
    parquet.write_table(pyarrow.table({"member": member, "score": scores}), tmp_path / "a.parquet")
    table(tmp_path / "a.csv", scores, member, note="kept out")
    np.savez(tmp_path / "a.npz", scores=scores, member=member.astype(np.int8))
    for name in ("a.csv", "a.parquet", "a.npz"):
        code, out, _ = command(capsys, tmp_path / name, "--epsilon", 2, "--delta", DELTA, "--json")
        found = json.loads(out)
        assert (code, found.pop("source")) == (0, str(tmp_path / name))
        assert found == {key: value for key, value in here.items() if key != "source"}


def test_a_claim_that_scores_beat_ends_in_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "a.csv", *canaries(2_000, 8.0))
    code, out, err = command(capsys, path, "--epsilon", 3, "--delta", DELTA, "--json")
    assert code == 3
    assert "epsilon is at least 3.6" in err
    assert "at most 3 is claimed" in err
    assert len(err.splitlines()) == 1
    found = ScoresReport.model_validate(json.loads(out))
    assert 3 < found.epsilon_lower < 8
    assert (found.best.estimator, found.best.verdict) == ("one_run", "ALARM")
    assert command(capsys, path, "--epsilon", 8, "--delta", DELTA)[0] == 0


def test_only_what_is_known_of_the_scores_counts() -> None:
    scores, member = canaries(2_000, 8.0)
    found = {
        (independent, gaussian): audits.scores(
            scores, member, epsilon=8.0, delta=DELTA, independent=independent, gaussian=gaussian
        )
        for independent in (False, True)
        for gaussian in (False, True)
    }
    counting = {
        known: {bound.estimator for bound in report.best.bounds if bound.counts}
        for known, report in found.items()
    }
    assert counting[False, False] == {"one_run"}
    assert counting[True, False] == {"one_run", "clopper_pearson"}
    assert counting[False, True] == {"one_run", "f_dp_one_run"}
    assert len(counting[True, True]) == 5
    assert found[True, True].epsilon_lower > 7 > found[False, True].epsilon_lower
    assert found[False, True].epsilon_lower > found[False, False].epsilon_lower
    for report in found.values():
        counted = [bound.epsilon_lower for bound in report.best.bounds if bound.counts]
        assert report.epsilon_lower == max(counted)  # type: ignore[type-var]


def test_bounds_that_count_share_the_error() -> None:
    scores, member = canaries(1_000, 4.0)
    scored = Scored("scores", "score", scores, member)
    alone = audits.scores(scores, member).best
    joint = audits.scores(scores, member, independent=True, gaussian=True).best
    assert alone.bounds == bounds_of(scored, Claim(), 0.95)
    assert joint.bounds == bounds_of(scored, Claim(independent=True, gaussian=True), 1 - 0.05 / 5)


def test_uneven_memberships_bound_nothing_until_scores_are_independent() -> None:
    rng = np.random.default_rng(0)
    scores, member = rng.normal(size=3_000), np.arange(3_000) < 600
    scores[member] += 4.0
    found = audits.scores(scores, member)
    assert (found.epsilon_lower, found.best.estimator) == (0.0, "none")
    assert "fair coin" in (found.best.bounds[0].reason or "")
    assert audits.scores(scores, member, independent=True).epsilon_lower > 3


def test_rates_are_refused_on_too_few_samples() -> None:
    few, many = (audits.scores(*canaries(size, 2.0)).best for size in (400, 4_000))
    assert all(isinstance(rate, Refused) for rate in few.tpr_at_fpr)
    assert [isinstance(rate, Refused) for rate in many.tpr_at_fpr] == [False, True]


def test_a_matrix_carries_the_attacks_on_models() -> None:
    signals, member, population = matrix(33, 300)
    found = audits.scores(signals, member, population=population)
    assert {"lira-online", "lira-offline", "rmia-online", "rmia-offline", "bavaria-online", "attack-r"} <= {
        finding.attack for finding in found.findings
    }
    assert found.refused == (
        "quantile-regression: the evidence has no public features of the records: give it some",
    )
    (lira,) = [one for one in found.scored if one.attack == "lira-online"]
    assert np.array_equal(lira.values, lira_online(signals[0], Shadows(signals[1:], member[1:])))
    assert (lira.inside == member[0]).all()
    without = audits.scores(signals, member)
    assert {"rmia-online", "attack-p"} <= {reason.partition(":")[0] for reason in without.refused}


def test_several_targets_are_audited_together() -> None:
    signals, member, population = matrix(24, 100)
    found = audits.scores(signals, member, population=population, targets=8)
    assert found.best.members + found.best.nonmembers == 800
    assert found.best.members == member[:8].sum()
    alone = audits.scores(signals, member, targets=24)
    assert [finding.attack for finding in alone.findings] == ["score"]
    assert alone.best.members == member.sum()


def test_the_report_comes_back_and_shows_itself(tmp_path: Path) -> None:
    found = audits.scores(*canaries(300, 2.0), epsilon=2.0, delta=DELTA, out=tmp_path / "new" / "folder")
    assert ScoresReport.read(tmp_path / "new" / "folder" / "scores.json") == found.model_copy(
        update={"scored": (), "written": ()}
    )
    assert {Path(name).name for name in found.written} >= {"scores.json", "roc.png", "roc.svg"}
    assert len(found.rows()) == 5
    assert "balanced accuracy" in found._repr_html_()


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    scores, member = canaries(300, 2.0)
    found = audits.scores(scores, member, epsilon=2.0, delta=DELTA, out=tmp_path)
    with (tmp_path / "scores.csv").open() as file:
        raw = list(csv.DictReader(file))
    assert [float(row["score"]) for row in raw] == scores.tolist()
    assert [row["member"] == "1" for row in raw] == member.tolist()
    again = read_scores(tmp_path / "scores.csv")
    assert np.array_equal(again.scores[0], scores)
    with (tmp_path / "roc.csv").open() as file:
        rates = [[float(row[f"{kind}_positive_rate"]) for row in csv.DictReader(file)] for kind in ("false",)]
    assert rates[0] == sorted(rates[0])
    assert rates[0][-1] == 1.0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert f"| {found.epsilon_lower:.2f} | 2 |" in lines[2]
    latex = (tmp_path / "table.tex").read_text()
    assert latex.count(r"\\") == 2
    assert r"one\_run" in latex
    assert b"score</text>" in (tmp_path / "roc.svg").read_bytes()
    assert (tmp_path / "roc.pdf").read_bytes().startswith(b"%PDF")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).map(sorted))
def test_names_of_curves_never_overprint(starts: list[float]) -> None:
    heights = spread(starts, 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(heights))
    assert max(heights) <= max(1.0, 0.05 * (len(starts) - 1)) + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]


def test_a_pair_stands_beside_and_never_counts() -> None:
    found = pair_bound(Scored("gradient", "x", *canaries(1_000, 4.0)), DELTA, 0.95)
    assert (found.estimator, found.counts) == ("gaussian_pair", False)
    assert found.reason is not None
    assert found.reason.startswith("tested: normal (p = ")
    assert 2.5 < (found.epsilon_lower or 0) < 5


def test_a_pure_guess_accuses_nobody() -> None:
    """60 audits of nothing at 95 % each: over 11 alarms have a probability of 3 in 10^5."""
    beaten = [
        audits.scores(*canaries(200, 0.0, seed), epsilon=0.0, delta=DELTA, independent=True).alarm is not None
        for seed in range(60)
    ]
    assert sum(beaten) <= 11


# What it refuses


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "column 'score' is missing"),
        ("score\n1\n", "column 'member' is missing"),
        ("member,score,score\n1,2,3\n", "'score' is there twice"),
        ("score,member\n", "no scores"),
        ("score,member\n1,0\n2,1\n3,1\nnan,0\n", "1 of 4 are not finite"),
        ("score,member\n1,0\n2,1\n3,1\ninf,0\n", "not finite"),
        ("score,member\n1,0\n2,1\n3,1\n,0\n", "not all numbers"),
        ("score,member\n1,0\n2,1\n3,1\nx,0\n", "not all numbers"),
        ("score,member\n1,0\n2,1\n3,1\n4,2\n", "'2' is none of 0, 1, true, false"),
        ("score,member\n1,0\n2,1\n3,1\n4,\n", "'' is none of 0, 1, true, false"),
        ("score,member\n1,1\n2,1\n3,1\n", "0 non-members"),
        ("score,member\n1,0\n2,0\n3,1\n", "1 members"),
        ("score,member\n1,0\n2,1,7\n", "record 3 has 3 cells"),
        ("1,0\n2,1\n", "the first line names the columns"),
    ],
)
def test_bad_tables_are_refused_in_one_line(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    code, out, err = command(capsys, path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert why in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({}, "'scores' is missing"),
        ({"scores": np.ones(4)}, "'member' is missing"),
        ({"scores": np.ones(4), "member": np.eye(4)}, "member has shape"),
        ({"scores": np.ones((2, 2, 2)), "member": np.ones((2, 2, 2))}, "[model, sample]"),
        ({"scores": np.ones(4), "member": np.array([0, 1, 2, 0])}, "other than 0 and 1"),
        ({"scores": np.array(["a", "b"]), "member": np.array([0, 1])}, "not all numbers"),
        ({"scores": np.ones(4) * 1j, "member": np.array([0, 1, 1, 0])}, "complex"),
        ({"scores": np.ones((3, 4)), "member": np.eye(4)[:3], "targets": np.array(4)}, "targets=4"),
        ({"scores": np.ones((3, 4)), "member": np.eye(4)[:3], "targets": np.array(1.5)}, "one number"),
        ({"scores": np.ones((3, 4)), "member": np.eye(4)[:3], "population": np.ones((2, 9))}, "(3, others)"),
        ({"scores": np.ones(4), "member": np.array([0, 1, 1, 0]), "label": np.ones(4)}, "'label' is unknown"),
        ({"scores": np.array([{}, 1]), "member": np.array([0, 1])}, "pickled objects"),
    ],
)
def test_bad_archives_are_refused_in_one_line(
    arrays: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    code, out, err = command(capsys, tmp_path / "bad.npz")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert why in err


def test_bad_parquet_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for columns, why in (
        ({"score": [1.0, 2.0]}, "'member' is missing"),
        ({"score": [1.0, None], "member": [0, 1]}, "1 missing values"),
        ({"score": [[1.0], [2.0]], "member": [0, 1]}, "names no values"),
        ({"score": [1.0, 2.0, 3.0, 4.0], "member": ["0", "yes", "1", "1"]}, "'yes' is none of"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "bad.parquet")
        code, _, err = command(capsys, tmp_path / "bad.parquet")
        assert (code, len(err.splitlines())) == (2, 1)
        assert why in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--epsilon", "3"], "without its delta"),
        (["--epsilon", "-1", "--delta", "1e-5"], "epsilon=-1.0"),
        (["--epsilon", "nan", "--delta", "1e-5"], "epsilon=nan"),
        (["--epsilon", "3", "--delta", "2"], "delta=2.0"),
        (["--delta", "0"], "delta=0"),
    ],
)
def test_bad_claims_are_refused_before_the_file_is_read(
    words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, tmp_path / "none.csv", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert why in err


def test_what_is_no_score_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("score,member\n")
    for name, why in (
        ("a.txt", "unknown format '.txt'"),
        ("none.csv", "no such file"),
        (".", "unknown format"),
    ):
        code, _, err = command(capsys, tmp_path / name)
        assert (code, len(err.splitlines())) == (2, 1)
        assert why in err


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "a.csv", *canaries(100, 0.0))
    code, _, err = command(capsys, path, "--out", path / "below")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "name another folder with --out" in err


def test_arrays_are_refused_as_files_are() -> None:
    with pytest.raises(DataError, match="not finite"):
        audits.scores([1.0, math.nan, 3.0, 4.0], [0, 1, 1, 0])
    with pytest.raises(DataError, match="0 members"):
        score_set([1.0, 2.0], [False, False])
    with pytest.raises(InputError, match="delta"):
        audits.scores([1.0, 2.0, 3.0, 4.0], [0, 1, 1, 0], epsilon=1.0)
    assert claimed(None, None) == Claim(math.inf, 1e-5)


def _whole() -> dict[str, bytes]:
    scores, member = canaries(20, 0.0)
    text = "score,member\n" + "".join(f"{s},{int(m)}\n" for s, m in zip(scores, member, strict=True))
    archive = io.BytesIO()
    signals, inside, population = matrix(6, 8)
    np.savez(archive, scores=signals, member=inside, population=population, targets=2)
    return {".csv": text.encode(), ".npz": archive.getvalue()}


@fuzzed()
@given(st.data(), st.sampled_from([".csv", ".npz"]))
def test_hostile_files_are_read_or_refused(tmp_path_factory: Any, data: st.DataObject, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"hostile{kind}"
    path.write_bytes(data.draw(damaged(_whole()[kind])))
    refused = "-"
    with no_hang():
        try:
            read_scores(path)
        except DataError as error:
            refused = str(error)
    assert refused
    assert "\n" not in refused
