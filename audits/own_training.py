"""The game of `audits.model_audit`: canaries for a training that is not ours, and what models say of them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from attacks.membership.shadows import rescaled_logit, rescaled_logit_of_log_probabilities
from audits.estimators.validation import Floats
from audits.score_files import ScoreSet
from privkd.errors import DataError, InputError, one_line
from privkd.privacy.randomness import derive_seed
from privkd.progress import Progress

Labels: TypeAlias = NDArray[np.int64]
Train: TypeAlias = Callable[[Any, Any, int], Any]
"""``train(inputs, labels, seed)`` gives ``predict(inputs)``, or what has ``membership(inputs, labels)``."""

SHADOWS = 8
"""Fewer tell the attacks nothing."""
_MOST_MODELS = 10_000
_INSTANT = 1e-6
"""Seconds: a training that takes less is not timed."""
_SUMS_TO_ONE = 1e-3
_MOST_CANARIES, _MOST_OTHERS = 1_000, 500


@dataclass(frozen=True)
class Records:
    """Inputs ``[record, *shape]`` and class numbers ``[record]``."""

    inputs: NDArray[Any]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: NDArray[Any]) -> "Records":
        return Records(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Board:
    """Whose membership is guessed, and who is always or never in. But for ``always`` labels are wrong.

    Attributes:
        candidates: each in by its own fair coin.
        always: in every training.
        never: in none.
    """

    candidates: Records
    always: Records
    never: Records


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many models, or before the next one would end after so many seconds."""

    models: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        if self.models is not None and not 1 <= self.models <= _MOST_MODELS:
            raise InputError(f"models={self.models}: give 1 to {_MOST_MODELS:,}")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds={self.seconds!r}: give a positive number")


def board_of(records: Records, canaries: int | None, seed: int) -> Board:
    """Draw the canaries and those set aside, and give them a wrong label each.

    Raises:
        DataError: too few records, or fewer than two classes.
        InputError: fewer than one canary, or more than half of the records.
    """
    count, classes = len(records), int(records.labels.max()) + 1 if len(records) else 0
    if count < 4 or classes < 2:
        raise DataError(f"{count} records of {classes} classes: give at least 4 records of two classes")
    chosen = min(_MOST_CANARIES, count // 3) if canaries is None else canaries
    if not 1 <= chosen <= count // 2:
        raise InputError(f"canaries={chosen}: give 1 to {count // 2}, half of the records")
    rng = np.random.default_rng(derive_seed(seed, "own", "board"))
    order = rng.permutation(count)
    set_aside = min(_MOST_OTHERS, count // 6)
    wrong = (records.labels + rng.integers(1, classes, size=count)) % classes
    mislabelled = Records(records.inputs, wrong)
    return Board(
        candidates=mislabelled[order[:chosen]],
        always=records[order[chosen + set_aside :]],
        never=mislabelled[order[chosen : chosen + set_aside]],
    )


@dataclass(frozen=True)
class Played:
    """What the models said.

    Attributes:
        scores: those of the audited models first.
        seconds: that all took.
        stopped: whether time ended it.
        signal: what the scores are, in words.
    """

    scores: ScoreSet
    seconds: float
    stopped: bool
    signal: str


def play(train: Train, name: str, board: Board, budget: Budget, seed: int, progress: Progress) -> Played:
    """Train models, each on canaries by its own coins, until the budget ends.

    The first model is audited. Where there is room for enough of them every second one after it is a shadow,
    trained with all canaries that the shadow before it was trained without, so that each is in half of them.

    Raises:
        InputError: the training fails, or returns what gives no scores.
    """
    table = _Table(train, name, board, seed)
    began, most = budget.clock(), budget.models or _MOST_MODELS
    fastest, planned, stopped = math.inf, 1, False
    progress.stage("audit: the first model")
    for number in range(most):
        before = budget.clock()
        if number:
            left = (budget.seconds or math.inf) - (before - began)
            if left < fastest:
                stopped = True
                break
            # The first model may pay for imports: the fastest tells how many will do.
            planned = int(min(most, number + left / max(fastest, _INSTANT)))
            _tell(progress, number, planned, fastest)
        table.add(number, shadow=number > 0 and _is_shadow(number, planned, board))
        fastest = min(fastest, budget.clock() - before)
    return Played(table.score_set(), budget.clock() - began, stopped, table.signal)


def _is_shadow(number: int, planned: int, board: Board) -> bool:
    """Two of four models, one after the other; of one canary alone each model is a trial."""
    return planned >= 2 * SHADOWS and len(board.candidates) > 1 and number % 4 in (1, 2)


def _tell(progress: Progress, done: int, planned: int, each: float) -> None:
    # At powers of two, so that a log does not grow by a line a model.
    if done & (done - 1) == 0:
        left = max(0.0, planned - done) * each
        progress.stage(f"audit: {done} of about {planned} models, {_duration(left)} to go")
    progress.advance(done, planned)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Table:
    """The models trained so far: their coins, and their signals on canaries and others."""

    def __init__(self, train: Train, name: str, board: Board, seed: int) -> None:
        self._train, self._name, self._board, self._seed = train, name, board, seed
        self._rows: list[tuple[bool, NDArray[np.bool_], Floats, Floats]] = []
        self._complement: NDArray[np.bool_] | None = None
        self.signal = ""

    def add(self, number: int, *, shadow: bool) -> None:
        """Train one more model."""
        rng = np.random.default_rng(derive_seed(self._seed, "own", "model", number))
        inside = self._coins(rng, shadow=shadow)
        records, always = self._board.candidates[np.flatnonzero(inside)], self._board.always
        inputs = np.concatenate([records.inputs, always.inputs])
        labels = np.concatenate([records.labels, always.labels])
        order = rng.permutation(len(labels))
        seed = int(rng.integers(2**31))
        with _blamed(f"{self._name} failed on model {number + 1}"):
            trained = self._train(inputs[order], labels[order], seed)
        self._rows.append(
            (
                shadow,
                inside,
                self._signals(trained, self._board.candidates),
                self._signals(trained, self._board.never),
            )
        )

    def score_set(self) -> ScoreSet:
        """The audited models', and the shadows' below; without these where they are too few."""
        audited = [row for row in self._rows if not row[0]]
        # The last one may lack the shadow that has the other half of the canaries.
        shadows = [row for row in self._rows if row[0]]
        shadows = shadows[: len(shadows) // 2 * 2]
        rows = audited + (shadows if len(shadows) >= SHADOWS else [])
        _, inside, scores, others = zip(*rows, strict=True)
        population = np.stack(others) if others[0].size else None
        return ScoreSet(np.stack(scores), np.stack(inside), population, len(audited))

    def _coins(self, rng: np.random.Generator, *, shadow: bool) -> NDArray[np.bool_]:
        if shadow and self._complement is not None:
            inside, self._complement = self._complement, None
            return inside
        inside = rng.random(len(self._board.candidates)) < 0.5
        if shadow:
            self._complement = ~inside
        return inside

    def _signals(self, trained: Any, records: Records) -> Floats:
        if not len(records):
            return np.empty(0)
        of_its_own = getattr(trained, "membership", None)
        if of_its_own is None and not callable(trained):
            raise InputError(
                f"{self._name} returned {type(trained).__name__}: return predict(inputs), or an object with "
                "membership(inputs, labels)"
            )
        with _blamed(f"what {self._name} returned failed on {len(records)} records"):
            said = (
                trained(records.inputs) if of_its_own is None else of_its_own(records.inputs, records.labels)
            )
            values = _array(said)
        scores, self.signal = _scores_of(values, records.labels, self._name)
        return scores


def _scores_of(values: Floats, labels: Labels, name: str) -> tuple[Floats, str]:
    """A score a record, and what it is: as given, or the label's rescaled logit."""
    if values.ndim not in (1, 2) or len(values) != len(labels):
        raise InputError(
            f"what {name} returned gave shape {values.shape} for {len(labels)} records: give "
            "[record, class], or [record] scores"
        )
    if np.isnan(values).any() or (values.ndim == 1 and not np.isfinite(values).all()):
        raise InputError(
            f"what {name} returned gave values that are not finite: a model must score every record"
        )
    if values.ndim == 1:
        return values, "scores of its own"
    if values.shape[1] <= labels.max():
        raise InputError(
            f"what {name} returned gave {values.shape[1]} classes, but a record is of class {labels.max()}: "
            "give a column for each class"
        )
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=_SUMS_TO_ONE):
        with np.errstate(divide="ignore"):
            logs = np.minimum(np.log(values), 0.0)
        return rescaled_logit_of_log_probabilities(
            logs, labels
        ), "the label's probabilities, as rescaled logits"
    return rescaled_logit(values, labels), "the label's logits, rescaled"


def _array(said: Any) -> Floats:
    detached = said.detach().cpu() if hasattr(said, "detach") else said
    return np.asarray(detached, dtype=np.float64)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Within, whatever a user's code raises is one line about it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} ({one_line(error)})") from error
