"""Audits of a training that is not ours: the game, its budget, what it takes and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pages import ROOT
from scipy.special import logsumexp

import audits
from audits.own_training import SHADOWS, Board, Budget, Records, board_of, play
from cli import app
from privkd.errors import DataError, InputError
from privkd.progress import Silent

DELTA = 1e-5
Floats = NDArray[np.float64]


def records(count: int = 300, classes: int = 3, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Records that a linear model tells apart, mostly."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    return np.eye(classes)[labels] + 0.3 * rng.normal(size=(count, classes)), labels


class Nearest:
    """It remembers all: the label of the nearest record that it was trained on."""

    def __init__(self, inputs: Floats, labels: NDArray[np.int64]) -> None:
        self._inputs, self._labels = inputs, labels

    def __call__(self, inputs: Floats) -> Floats:
        nearest = np.linalg.norm(inputs[:, None] - self._inputs, axis=2).argmin(axis=1)
        return np.eye(3)[self._labels[nearest]]


def remembering(inputs: Floats, labels: NDArray[np.int64], seed: int) -> Callable[[Floats], Floats]:
    return Nearest(inputs, labels)


def guessing(inputs: Floats, labels: NDArray[np.int64], seed: int) -> Callable[[Floats], Floats]:
    """It learned nothing: its answers are noise."""
    rng = np.random.default_rng(seed)
    return lambda asked: rng.normal(size=(len(asked), 3))


def in_torch(inputs: Floats, labels: NDArray[np.int64], seed: int) -> Callable[[Floats], torch.Tensor]:
    """Means of the classes, as logits that still have their gradient."""
    means = torch.stack([torch.tensor(inputs[labels == one]).mean(dim=0) for one in range(3)])
    means.requires_grad_()
    return lambda asked: torch.tensor(asked) @ means.T


class Marks:
    """Noised scores of its own, of each record that it has seen by its bytes."""

    def __init__(self, inputs: Floats, labels: NDArray[np.int64], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seen = {
            row.tobytes() + bytes([label]) for row, label in zip(inputs, labels.tolist(), strict=True)
        }

    def membership(self, inputs: Floats, labels: NDArray[np.int64]) -> Floats:
        keys = [row.tobytes() + bytes([label]) for row, label in zip(inputs, labels.tolist(), strict=True)]
        return np.array([key in self._seen for key in keys]) + self._rng.normal(size=len(keys))


# The game


def test_canaries_are_wrong_and_apart() -> None:
    inputs, labels = records()
    board = board_of(Records(inputs, labels), None, 0)
    assert (len(board.candidates), len(board.always), len(board.never)) == (100, 150, 50)
    truth = {row.tobytes(): label for row, label in zip(inputs, labels.tolist(), strict=True)}
    for part, wrong in ((board.candidates, True), (board.always, False), (board.never, True)):
        known = [truth[row.tobytes()] for row in part.inputs]
        assert ((np.array(known) != part.labels) == wrong).all()
        assert ((part.labels >= 0) & (part.labels < 3)).all()
    parts = [part.inputs for part in (board.candidates, board.always, board.never)]
    assert len({row.tobytes() for part in parts for row in part}) == 300


class _Watched:
    """Notes what each training was given, on a clock of its own."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.now, self.given, self._seconds = 0.0, list[set[bytes]](), seconds

    def clock(self) -> float:
        return self.now

    def train(self, inputs: Floats, labels: NDArray[np.int64], seed: int) -> Callable[[Floats], Floats]:
        # The first one pays for imports.
        self.now += self._seconds * (1 if self.given else 3)
        self.given.append({row.tobytes() for row in inputs})
        return guessing(inputs, labels, seed)

    def play(self, board: Board, **budget: Any) -> Any:
        return play(self.train, "train", board, Budget(**budget, clock=self.clock), 0, Silent())


@pytest.fixture
def board() -> Board:
    return board_of(Records(*records()), 40, 0)


@pytest.mark.parametrize(("seconds", "models"), [(1.0, 1), (3.5, 1), (6.1, 4), (12.5, 10), (100.0, 98)])
def test_time_ends_the_game_before_it_is_over(board: Board, seconds: float, models: int) -> None:
    watched = _Watched()
    played = watched.play(board, seconds=seconds)
    assert len(watched.given) == models
    assert played.stopped
    assert models == 1 or played.seconds <= seconds


def test_models_end_the_game_and_half_of_many_are_shadows(board: Board) -> None:
    few, many = _Watched(), _Watched()
    assert few.play(board, models=15).scores.shadows == 0
    played = many.play(board, models=40)
    assert not played.stopped
    assert (played.scores.targets, played.scores.shadows) == (20, 20)
    assert (played.scores.member[20:].sum(axis=0) == 10).all(), "each canary is in half of the shadows"
    assert not (played.scores.member[:20].sum(axis=0) == 10).all(), "the audited ones' coins are free"


def test_coins_say_who_was_trained_on(board: Board) -> None:
    watched = _Watched()
    played = watched.play(board, models=20)
    order = [n for n in range(20) if n % 4 not in (1, 2)] + [n for n in range(20) if n % 4 in (1, 2)]
    for row, number in enumerate(order):
        inside = [record.tobytes() in watched.given[number] for record in board.candidates.inputs]
        assert inside == played.scores.member[row].tolist()
        assert all(record.tobytes() in watched.given[number] for record in board.always.inputs)
        assert not any(record.tobytes() in watched.given[number] for record in board.never.inputs)


def test_of_one_canary_each_model_is_a_trial() -> None:
    found = audits.model(Marks, records(), models=40, canaries=1)
    assert "40 models audited, each a trial of one canary" in found.target
    assert found.independent
    assert found.best.members + found.best.nonmembers == 40
    with pytest.raises(InputError, match="give more models"):
        audits.model(Marks, records(), models=3, canaries=1)


# What it finds


def test_a_model_that_remembers_beats_a_claim() -> None:
    found = audits.model(remembering, records(), epsilon=1.0, delta=DELTA, models=1)
    assert "one run with 100 canaries" in found.target
    assert "probabilities" in found.target
    assert found.alarm is not None
    assert 1.5 < found.epsilon_lower < 5


def test_a_model_that_learned_nothing_does_not() -> None:
    """20 audits at 95 %: over 5 alarms have a probability of 3 in 10^4."""
    alarms = [
        audits.model(guessing, records(), epsilon=0.0, delta=DELTA, models=2, seed=seed).alarm
        for seed in range(20)
    ]
    assert sum(alarm is not None for alarm in alarms) <= 5


def test_shadows_bring_the_attacks_on_models() -> None:
    found = audits.model(remembering, records(), models=2 * SHADOWS + 4)
    assert {"lira-offline", "rmia-offline", "attack-r"} <= {finding.attack for finding in found.findings}
    assert "10 models audited with 10 shadow models" in found.target


def test_tensors_and_scores_of_its_own_are_taken() -> None:
    assert "logits, rescaled" in audits.model(in_torch, records(), models=1).target
    own = audits.model(Marks, records(1_500), models=4, independent=True, gaussian=True)
    assert "scores of its own" in own.target
    assert 2 < own.epsilon_lower < 5


def test_a_seed_repeats_the_game() -> None:
    first, again, other = (audits.model(Marks, records(), models=2, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.scored[0].values, again.scored[0].values)
    assert not np.array_equal(first.scored[0].values, other.scored[0].values)


# What it refuses


def _raises(inputs: Any, labels: Any, seed: int) -> Any:
    raise KeyError("a\nb")


def _leaves(inputs: Any, labels: Any, seed: int) -> Any:
    sys.exit("gone")


@pytest.mark.parametrize(
    ("train", "why"),
    [
        (_raises, "_raises failed on model 1 (KeyError"),
        (_leaves, "_leaves failed on model 1 (SystemExit: gone)"),
        (lambda x, y: None, "failed on model 1 (TypeError"),
        (lambda x, y, s: None, "returned NoneType: return predict"),
        (lambda x, y, s: lambda asked: 1 / 0, "returned failed on 100 records (ZeroDivisionError"),
        (lambda x, y, s: lambda asked: "text", "returned failed on 100 records (ValueError"),
        (lambda x, y, s: lambda asked: np.ones(7), "shape (7,) for 100 records"),
        (
            lambda x, y, s: lambda asked: np.ones((len(asked), 2)),
            "gave 2 classes, but a record is of class 2",
        ),
        (lambda x, y, s: lambda asked: np.full((len(asked), 3), np.nan), "not finite"),
        (lambda x, y, s: lambda asked: np.full(len(asked), np.inf), "not finite"),
    ],
)
def test_a_training_that_fails_is_named_in_one_line(train: Any, why: str) -> None:
    with pytest.raises(InputError) as refused:
        audits.model(train, records(), models=1)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"models": 0}, "models=0"),
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"canaries": 0, "models": 1}, "canaries=0"),
        ({"canaries": 151, "models": 1}, "canaries=151"),
        ({"epsilon": 1.0}, "without its delta"),
    ],
)
def test_impossible_games_are_refused(words: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        audits.model(guessing, records(), **words)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ((np.ones((3, 2)), np.array([0, 1, 0])), "at least 4 records"),
        ((np.ones((9, 2)), np.zeros(9, dtype=int)), "of two classes"),
        ((np.ones((9, 2)), np.zeros(8, dtype=int)), "class number of each"),
        ((np.ones((9, 2)), np.zeros(9)), "class number of each"),
        ((np.ones((9, 2)), np.arange(9) - 1), "negative"),
        ("nowhere.csv", "nowhere.csv"),
    ],
)
def test_data_that_carry_no_game_are_refused(data: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        audits.model(guessing, data, models=1)


# The command


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's in the working folder."""
    (tmp_path / "own_knn.py").write_text(
        "from sklearn.neighbors import KNeighborsClassifier\n\n\n"
        "def train(inputs, labels, seed):\n"
        "    assert inputs.dtype == 'float32' and inputs.max() <= 1\n"
        "    model = KNeighborsClassifier(1).fit(inputs.reshape(len(inputs), -1), labels)\n"
        "    return lambda asked: model.predict_proba(asked.reshape(len(asked), -1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_knn", raising=False)
    return "own_knn:train"


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app(["audit", "model", *map(str, words)])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_command_audits_a_module_of_the_users(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(
        capsys,
        mine,
        "--data",
        "digits",
        "--epsilon",
        1,
        "--delta",
        DELTA,
        "--models",
        2,
        "--json",
        "--out",
        "here",
    )
    assert code == 3
    found = json.loads(out)
    assert (found["source"], found["epsilon_upper"]) == (mine, 1.0)
    assert found["epsilon_lower"] > 3
    assert "at most 1 is claimed" in err.splitlines()[-1]
    assert json.loads(Path("here/scores.json").read_text()) == found
    code, out, err = command(capsys, "own_knn:missing", "--models", 1)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "own_knn:missing" in err


# The walk


def walked(name: str, models: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    source = "audit_opacus"
    code, out, _ = command(
        capsys, f"{source}:{name}", "--data", f"{source}:records", "--epsilon", "0.73", "--delta", DELTA,
        "--canaries", 1, "--models", models, "--json",
    )  # fmt: skip
    return code, json.loads(out)


def test_a_table_with_text_comes_as_runs_read_it(tmp_path: Path) -> None:
    """Text by category and numbers in their own units: no value is lost on the way to the training."""
    rows = [f"{100 + n},{'red' if n % 3 else 'blue'},{n % 2}" for n in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["size,colour,label", *rows]))
    seen: list[np.ndarray[Any, Any]] = []

    def train(inputs: Any, labels: Any, seed: int) -> Any:
        seen.append(inputs)
        return lambda records: np.zeros(len(records))

    audits.model(train, tmp_path / "t.csv", models=1)
    assert seen[0].dtype == np.float32
    assert seen[0].shape[1] == 3
    assert seen[0][:, 0].min() >= 100
    np.testing.assert_array_equal(seen[0][:, 1:].sum(1), 1)


def test_the_walks_claim_is_opacus_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import audit_opacus

    assert audit_opacus.claimed_epsilon() == pytest.approx(0.728, abs=2e-3)
    page = (ROOT / "docs" / "audit-anything.md").read_text()
    assert "--epsilon 0.73 --delta 1e-5 --canaries 1 --models 300" in page
    seen = audit_opacus.train(*(part[:499] for part in audit_opacus.records()), 0)
    assert seen.sums.shape == (100, 2, 4)


def played_by_hand(shuffled: bool, rng: np.random.Generator, trials: int = 300) -> tuple[Floats, Any]:
    """The walk's game without a model: the sums of its steps, and the score that it takes of them."""
    inside = rng.random(trials) < 0.5
    if shuffled:
        sums = np.full((trials, 100), -5.0)
        sums[~inside, -1] += 1
        sums[np.flatnonzero(inside), rng.integers(100, size=inside.sum())] += 2
    else:
        sums = -rng.binomial(499, 0.01, size=(trials, 100)).astype(np.float64)
        sums += (rng.random((trials, 100)) < 0.01) * inside[:, None]
    above = sums + rng.normal(size=sums.shape) + 5
    return logsumexp(2 * above - 2, axis=1) - (above[:, -1] - 0.5), inside


def bound_by_hand(shuffled: bool, seed: int) -> float:
    scores, inside = played_by_hand(shuffled, np.random.default_rng(seed))
    return audits.scores(scores, inside, epsilon=0.73, delta=DELTA, independent=True).epsilon_lower


def test_the_walks_fault_shows_and_its_sound_twin_does_not() -> None:
    """Over 99 % of seeds show it; a sound one is accused with 5 % at most, and far from it here."""
    assert min(bound_by_hand(True, seed) for seed in range(3)) > 0.73
    assert max(bound_by_hand(False, seed) for seed in range(3)) < 0.73


@pytest.mark.slow
def test_the_walk_simulated_many_times() -> None:
    found, sound = ([bound_by_hand(shuffled, seed) for seed in range(200)] for shuffled in (True, False))
    assert np.mean(np.array(found) > 0.73) >= 0.97
    assert max(sound) < 0.73


@pytest.mark.slow
def test_the_walk_accuses_the_shuffled_training_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is found in over 99 % of seeds; this one is fixed, and so is what it found."""
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    code, found = walked("train_shuffled", 300, capsys)
    assert code == 3
    assert found["epsilon_lower"] > 0.9
    code, found = walked("train", 300, capsys)
    assert code == 0
    assert found["epsilon_lower"] < 0.73
