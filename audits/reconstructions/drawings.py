"""From a view's replays to drawings and to the scores of the candidates, attack by attack."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from attacks.reconstruction.inversion import (
    PairedAnswers,
    class_prototypes,
    paired_logits_inversion,
    training_based_inversion,
)
from attacks.reconstruction.matching import (
    CandidateReplays,
    match_candidates,
    match_gradients,
    rebuild_records,
    simplex,
)
from audits.game import Pool
from audits.mechanisms.canaries import LOUD, DpSgdStep, noised_sums, probe, single_step
from audits.reconstructions.measures import resemblance
from audits.reconstructions.replays import Floats, Played, Replays, Secrets, by_candidate, numbers
from audits.requests import INFORMED, PAIRED, PROTOTYPE
from audits.views import learned_logits, rest_of
from privkd.channels.registry import KINDS
from privkd.data.scenario import LabelledSet
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import SeededRandomness, derive_seed, seeded_generator
from privkd.training.dpsgd import Mechanism
from privkd.training.fit import logits_of


@dataclass(frozen=True)
class Drawn:
    """What an attack made of its trials.

    Attributes:
        images: reconstructions ``[trial, *shape]``, or ``None`` where the attack only picks a candidate of a
            made-up kind.
        candidates: among which it picked ``[candidate, *shape]``, likewise.
        table: score of each candidate ``[trial, candidate]``.
        secrets: the true candidate ``[trial]``.
        classes: each candidate's class by name; none of a made-up kind.
    """

    images: Floats | None
    candidates: Floats | None
    table: Floats
    secrets: Secrets
    classes: tuple[str, ...] = ()

    @property
    def targets(self) -> Floats:
        """The true candidates ``[trial, *shape]``."""
        assert self.candidates is not None
        return self.candidates[self.secrets]


def draw_class(replays: Replays, view: str, attack: str) -> Drawn:
    """One of the attacks that draw the class which the public set lacks."""
    seen, seed = paired_answers(replays, view), replays.request.seed
    if attack == PROTOTYPE:
        images = class_prototypes(seen)
    elif attack == PAIRED:
        images = paired_logits_inversion(seen, seed=seed)
    else:
        images = training_based_inversion(seen, seed=seed)
    secret = replays.classes
    names = _named(replays, secret.classes)
    table = resemblance(images, secret.appearances)
    return Drawn(images, secret.appearances, table, secret.secrets, names)


def draw_record(replays: Replays, view: str, attack: str) -> Drawn:
    """One of the attacks on a single record of the device."""
    secret = replays.records
    candidates = numbers(secret.candidates.inputs)
    names = _named(replays, secret.candidates.labels.tolist())
    if attack == INFORMED:
        trials, shadows = replays.informed_trials, replays.informed_shadows
        images = rebuild_records(trials.weights, shadows.weights, numbers(secret.public.inputs))
        return Drawn(images, candidates, resemblance(images, candidates), secret.secrets, names)
    trials = replays.record_trials
    count, known = len(candidates), replays.record_candidates
    if view == "student":
        learned = CandidateReplays.of(by_candidate(known.logits, count))
        scores = match_candidates(trials.logits, learned, noise_std=0.0)
    else:
        others = replays.record_others
        seen = replays.released(view, trials, others, "record-trial")
        clean = replays.released(view, known, others, "record-candidate").clean
        learned = CandidateReplays.of(by_candidate(clean, count))
        scores = match_candidates(seen.answers, learned, noise_std=seen.noise_std)
    table = np.asarray(log_softmax(scores, axis=1), dtype=np.float64)
    return Drawn(candidates[table.argmax(axis=1)], candidates, table, secret.secrets, names)


def _named(replays: Replays, classes: Sequence[int]) -> tuple[str, ...]:
    labels = replays.side.run.scenario.labels
    return tuple(labels[number] for number in classes)


def paired_answers(replays: Replays, view: str) -> PairedAnswers:
    """What the view shows of the class run, beside a public model that has not seen the class."""
    first, played = replays.first_round, replays.class_trials
    question = first.question(0)
    queries, reference, noise_std = question.inputs, numbers(question.prior), 0.0
    if view == "student":
        start = first.tasks[0].start(replays.request.device)
        reference = softmax(numbers(logits_of(start, queries)), axis=-1)
        released = softmax(played.logits, axis=-1)
    elif view == "teacher":
        released = softmax(_learned(replays, played), axis=-1)
    else:
        seen = replays.released(view, played, replays.class_others, "class-trial")
        released = seen.answers[:, 0] + numbers(question.baseline)
        noise_std = seen.noise_std
    return PairedAnswers(numbers(queries), reference, released, noise_std, replays.classes.slot)


def _learned(replays: Replays, played: Played) -> Floats:
    """Logits on the queries of each trial's teacher, once it learned, ``[trial, query, class]``."""
    first, others = replays.first_round, replays.class_others
    view = KINDS[first.run.config.channel.kind].views[0]
    shown = replays.released(view, played, others, "class-trial")
    root = NoiseRoot.from_seed(derive_seed(replays.request.seed, "audit", "reconstruction", "rest"))
    rest = rest_of(first.run, others, root)
    queries = first.question(0).inputs
    asked = LabelledSet(queries, torch.zeros(len(queries), dtype=torch.int64))
    none = LabelledSet(queries[:0], asked.labels[:0])
    pool = Pool(candidates=asked, always=none, population=LabelledSet(queries[:1], asked.labels[:1]))
    return learned_logits(
        first, shown, rest, pool, replays.cache, "reconstruction", replays.progress.advance
    )[0]


_STUDENTS = 40


@dataclass(frozen=True)
class GradientGame:
    """How often, and among how many candidates: ``trials`` are rounded up to a multiple of 40."""

    trials: int
    candidates: int
    steps: int


def simplex_scores(
    step: DpSgdStep, mechanism: Mechanism, game: GradientGame, seed: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Play the game through ``step``: log-likelihoods ``[trial, candidate]``, and the secrets ``[trial]``."""
    groups, kappa = -(-game.trials // _STUDENTS), game.candidates
    generator = seeded_generator(seed, "audit", "simplex")
    secrets = torch.randint(kappa, (_STUDENTS, groups), generator=generator)
    gradients = simplex(kappa)
    loud = torch.from_numpy(gradients).to(torch.float32) * (LOUD * mechanism.recipe.clip_norm)
    shards = [_records(loud[row]) for row in secrets]
    sources = [SeededRandomness(seed, "audit", "simplex", student) for student in range(_STUDENTS)]
    one = Mechanism(
        single_step(mechanism.recipe), mechanism.noise_multiplier, mechanism.expected_batch_size, 0.0, 1.0
    )
    seen = []
    for _ in range(game.steps):
        trained = step([probe(groups * kappa)] * _STUDENTS, shards, None, one, sources)
        sums = noised_sums(trained, one).reshape(_STUDENTS, 2, groups * kappa)
        seen.append(((sums[:, 1] - sums[:, 0]) / 2**0.5).reshape(-1, kappa).numpy())
    scores = match_gradients(
        np.stack(seen, axis=1),
        gradients,
        noise_multiplier=mechanism.noise_multiplier,
        sampling_rate=mechanism.recipe.sampling_rate,
    )
    return scores, secrets.reshape(-1).numpy()


def _records(chosen: torch.Tensor) -> LabelledSet:
    """One record a group ``[group, candidate]``, each with features of its own group alone."""
    groups, kappa = chosen.shape
    inputs = torch.zeros(groups, groups, kappa)
    inputs[torch.arange(groups), torch.arange(groups)] = chosen
    return LabelledSet(inputs.reshape(groups, -1), torch.zeros(groups, dtype=torch.int64))
