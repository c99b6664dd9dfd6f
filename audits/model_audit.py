"""``privkd audit model``: the membership game on a training of the user's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from audits.bounding import Claim, claimed
from audits.own_training import Board, Budget, Played, Records, Train, board_of, play
from audits.score_outputs import write_scores
from audits.scores_audit import audit_scores
from audits.tables import ScoresReport
from audits.wording import counted
from privkd.config import DataConfig
from privkd.data.constants import find_constants, label_space, numbered
from privkd.data.encoding import encoded_source
from privkd.data.sources import load
from privkd.errors import DataError, InputError
from privkd.plugins import name_of, users_callable
from privkd.progress import Progress, Silent

SECONDS = 60.0


def model(
    train: Train | str,
    data: str | Path | DataConfig | tuple[Any, Any],
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    seconds: float | None = None,
    models: int | None = None,
    canaries: int | None = None,
    independent: bool = False,
    gaussian: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoresReport:
    """Audit a training function: who was in its data can be told how well from what it returns?

    Canaries are records with a wrong label; each is in or out by its own fair coin. One model and many
    canaries are one run; of more models those that are audited are one mechanism together, and where there
    are enough the others are shadows. With one canary each model is a trial of its own.

    Args:
        train: ``train(inputs, labels, seed)``, or its name ``package.module:train``. It returns
            ``predict(inputs)``, which gives probabilities or logits ``[record, class]`` or scores
            ``[record]``, or an object with ``membership(inputs, labels)``, which gives scores ``[record]``,
            higher for members. Arrays, tensors and lists will do.
        data: ``(inputs, labels)``, or what ``data.source`` may name.
        epsilon: claimed, per record; by default nothing is.
        delta: of the claim.
        seconds: no model is begun that would end later; by default 60, unless ``models`` is given.
        models: at most so many.
        canaries: by default a third of the records, at most 1,000.
        independent: the canaries do not meet in a model, as orthogonal ones: see `Claim`. One canary alone
            cannot.
        gaussian: see `Claim`.
        confidence: with which all bounds that count hold together.
        seed: of the coins, and of the trainings' seeds.
        out: folder for the report, tables and figures.
        progress: told of the models.

    Raises:
        DataError: the data cannot be read, or are too few.
        InputError: an argument is wrong, or the training fails.
        RunError: a file cannot be written.
    """
    claim = claimed(epsilon, delta, independent=independent, gaussian=gaussian, confidence=confidence)
    budget = Budget(models, SECONDS if seconds is None and models is None else seconds)
    name = name_of(train, "train")
    function: Train = users_callable(name, "train", InputError)
    board = board_of(_records(data), canaries, seed)
    played = play(function, name, board, budget, seed, progress or Silent())
    found = _audited(played, board, claim, name, budget)
    return found if out is None else write_scores(found, Path(out))


def _audited(played: Played, board: Board, claim: Claim, name: str, budget: Budget) -> ScoresReport:
    given = played.scores
    if len(board.candidates) == 1:
        if given.targets < 4:
            raise InputError(
                f"one canary in {counted(given.targets, 'model')} tells nothing: give more models"
            )
        claim = replace(claim, independent=True)
    return audit_scores(given, claim, name, _words(played, board, budget))


def _words(played: Played, board: Board, budget: Budget) -> str:
    """What was played and why it ended."""
    given, canaries = played.scores, counted(len(board.candidates), "canary").replace("canarys", "canaries")
    trained = f"{counted(given.targets, 'model')} audited"
    if given.shadows:
        game = f"{trained} with {counted(given.shadows, 'shadow model')}, {canaries} in each"
    elif len(board.candidates) == 1:
        game = f"{trained}, each a trial of one canary"
    elif given.targets == 1:
        game = f"one run with {canaries}"
    else:
        game = f"{trained} as one mechanism, {canaries} in each"
    limit = f" of {budget.seconds:g}" if budget.seconds is not None else ""
    ended = f"{played.seconds:.3g}{limit} s" + (", stopped by the time" if played.stopped else "")
    return (
        f"{game}, mislabelled, beside {len(board.always):,} records that are always in; scores: "
        f"{played.signal}; {ended}."
    )


def _records(data: str | Path | DataConfig | tuple[Any, Any]) -> Records:
    if isinstance(data, tuple):
        return _of_arrays(*data)
    config = data if isinstance(data, DataConfig) else DataConfig(source=str(data))
    if config.standardise == "auto":
        # Their training is given numbers as they are, and scales them as it does at home.
        config = config.model_copy(update={"standardise": "no"})
    source = load(config)
    labels = numbered(source.records.labels, label_space(source, config))
    constants = find_constants(source, np.arange(len(labels)), config)
    inputs = constants.features(encoded_source(source, constants.columns).records.inputs)
    return Records(inputs.numpy(), labels)


def _of_arrays(inputs: Any, labels: Any) -> Records:
    arrays = [
        value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for value in (inputs, labels)
    ]
    if arrays[1].dtype.kind not in "iu" or arrays[1].ndim != 1 or len(arrays[0]) != len(arrays[1]):
        raise DataError(
            f"data: labels of type {arrays[1].dtype} and shape {arrays[1].shape} beside {len(arrays[0])} "
            "inputs: give a class number of each"
        )
    if arrays[1].size and arrays[1].min() < 0:
        raise DataError("data: a label is negative: give class numbers 0, 1, 2, ...")
    return Records(arrays[0], arrays[1].astype(np.int64))
