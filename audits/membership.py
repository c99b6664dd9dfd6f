"""``privkd audit membership``: what a run's views give away about who is in a device's records."""

from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audits.absorption import absorbed_logits
from audits.canaries import Pool, draw_pool
from audits.distillation import log_probabilities, surrogate_logits
from audits.estimators import (
    BonferroniGuesses,
    TprAtFpr,
    auc,
    epsilon_lower_bound_one_run,
    one_run,
    tpr_at_fpr,
)
from audits.game import DeviceSide
from audits.gradient import Scores, bound_many_trials, bound_one_run, dirac_scores
from audits.release import Crowd, Floats, Released, per_client
from audits.request import ATTACKS_OF, ONE_RUN, MembershipRequest
from audits.scoring import (
    ScoreAll,
    Signals,
    matched_filter_scores,
    score_attacks,
    whitened_filter_scores,
)
from audits.traces import Cache, GameKey, Traces, others_answers, traces
from audits.verdict import Finding, Refused
from privkd.cohort import train_cohort
from privkd.errors import ConfigError, InputError
from privkd.events import Unit
from privkd.federation import Game, open_game
from privkd.ledger import Ledger
from privkd.noise import NoiseRoot
from privkd.progress import Progress
from privkd.randomness import derive_seed
from privkd.state import load_transcript
from privkd.store import RunFolder

_RATES = (0.01, 0.001)
_ONE_RUN_CANARIES = 10_000
_TRIALS = 100_000
_BLOCK = 250
_LEAST_PROBABILITY = 1e-4
"""The whitened filter looks at logarithms no smaller than this one's, which vary most and tell least."""


@dataclass(frozen=True)
class Scored:
    """One attack's scores, and which way the coins fell: float64 and bool ``[guess]``."""

    view: str
    attack: str
    values: Floats
    inside: NDArray[np.bool_]


@dataclass(frozen=True)
class MembershipReport:
    """All findings, and the scores behind those that rank."""

    run: str
    channel: str
    findings: tuple[Finding, ...]
    scored: tuple[Scored, ...] = field(repr=False)


def audit_membership(folder: RunFolder, request: MembershipRequest, progress: Progress) -> MembershipReport:
    """Play the game of ``audits.game`` on the run in ``folder``.

    Raises:
        InputError: the run is unfinished or damaged, lacks the view, or has too few records.
    """
    game = open_game(folder.config)
    views = views_of(game, request.view)
    wanted = [
        (view, attack) for view in views for attack in ATTACKS_OF[view] if request.attack in ("all", attack)
    ]
    if not wanted:
        raise ConfigError(
            f"attack={request.attack!r}: view {request.view} takes one of "
            f"{sorted({attack for view in views for attack in ATTACKS_OF[view]})}"
        )
    transcript = load_transcript(folder, game.blank()[0])
    if not transcript.exchanges:
        raise InputError(f"{folder.path}: no round was finished; resume it with --resume {folder.path}")
    ledger = Ledger.load(folder.ledger_path)
    progress.stage("audit: distilling public students")
    side = DeviceSide.of(game, transcript)
    audit = _Audit(side, folder, request, progress, each=1 - (1 - request.confidence) / len(wanted))
    findings, scored = [], []
    upper = ledger.spent(Unit.RECORD).high
    for view, attack in wanted:
        if view == "gradient":
            scores = audit.gradient(attack)
            findings.append(audit.gradient_finding(scores, upper))
        else:
            scores = audit.scored(view, attack)
            findings.append(audit.finding(scores, upper))
        scored.append(scores)
    return MembershipReport(str(folder.path), game.config.channel.kind, tuple(findings), tuple(scored))


def views_of(game: Game, view: str) -> tuple[str, ...]:
    """The views asked for that the run has.

    Raises:
        ConfigError: the run does not have it.
    """
    channel = game.config.channel.kind
    wires = ("secure_sum", "secure_sum_colluding") if channel == "secure" else ("per_client_logits",)
    steps = () if game.mechanism is None else ("gradient",)
    if view == "all":
        return (*wires, "student", *steps)
    if view in (*wires, "teacher", "student", *steps):
        return (view,)
    reason = (
        "the run trained without DP-SGD"
        if view == "gradient"
        else f"over the {channel} channel the cloud sees {' and '.join(wires)}"
    )
    raise ConfigError(f"view={view!r}: {reason}")


class _Audit:
    """One audit under way: what several views need is computed once."""

    def __init__(
        self, side: DeviceSide, folder: RunFolder, request: MembershipRequest, progress: Progress, each: float
    ) -> None:
        self._side = side
        self._request = request
        self._progress = progress
        self._each = each
        self._cache = Cache(folder, GameKey(request.canaries, request.device, request.seed))
        self._signals: dict[str, dict[str, ScoreAll]] = {}

    def scored(self, view: str, attack: str) -> Scored:
        """One attack's scores over all targets."""
        if view not in self._signals:
            self._signals[view] = self._attacks(view)
        values = self._signals[view][attack]()
        return Scored(view, attack, values.reshape(-1), self._targets.inside.reshape(-1))

    def finding(self, scored: Scored, upper: float) -> Finding:
        """The finding in one attack's scores.

        Every coin of every target is one guess of one mechanism: the targets' replays, side by side, which
        are as private for each coin as one of them.
        """
        m = len(scored.values)
        lower = epsilon_lower_bound_one_run(
            scored.values,
            scored.inside,
            rule=BonferroniGuesses(tuple(sorted({max(2, m // 100), max(2, m // 20), max(2, m // 4)}))),
            estimator=one_run,
            delta=self._delta,
            confidence=self._each,
        )
        return self._finding(scored, lower, upper, "one_run")

    def gradient(self, attack: str) -> Scored:
        """White box: gradient canaries through the run's own mechanism, over all of its steps."""
        self._progress.stage(f"audit: gradient ({attack})")
        plan, mechanism = self._side.game.plan, self._side.game.mechanism
        assert mechanism is not None
        scores = dirac_scores(
            train_cohort,
            mechanism,
            plan.steps * self._side.rounds,
            canaries=_ONE_RUN_CANARIES if attack == ONE_RUN else _TRIALS,
            block=_BLOCK,
            seed=derive_seed(self._request.seed, "gradient", attack),
        )
        return Scored("gradient", attack, scores.values, scores.inside)

    def gradient_finding(self, scored: Scored, upper: float) -> Finding:
        """The bound of the canaries' own game: one run, or each canary as a trial."""
        scores, rate = Scores(scored.values, scored.inside), self._side.game.plan.sampling_rate
        if scored.attack == ONE_RUN:
            lower = bound_one_run(scores, sampling_rate=rate, delta=self._delta, confidence=self._each)
            return self._finding(scored, lower, upper, "f_dp_one_run" if rate == 1 else "one_run")
        lower = bound_many_trials(
            scores, sampling_rate=rate, delta=self._delta, confidence=self._each, seed=self._request.seed
        )
        return self._finding(scored, lower, upper, "gaussian" if rate == 1 else "clopper_pearson")

    def _finding(self, scored: Scored, lower: float, upper: float, estimator: str) -> Finding:
        members, nonmembers = scored.values[scored.inside], scored.values[~scored.inside]
        return Finding(
            view=scored.view,
            attack=scored.attack,
            unit=Unit.RECORD,
            auc=auc(members, nonmembers),
            tpr_at_fpr=tuple(_rate(members, nonmembers, fpr) for fpr in _RATES),
            epsilon_lower=lower,
            epsilon_upper=upper,
            delta=self._delta,
            confidence=self._request.confidence,
            members=len(members),
            nonmembers=len(nonmembers),
            estimator=estimator,
        )

    def _attacks(self, view: str) -> dict[str, ScoreAll]:
        targets, shadows = self._targets, self._shadows
        if view == "student":
            return score_attacks(
                Signals(
                    targets.candidates,
                    shadows.candidates,
                    targets.population,
                    shadows.population,
                    shadows.inside,
                ),
                *self._labels,
            )
        if view == "teacher":
            return score_attacks(self._teacher_signals(), *self._labels)
        seen, learned = self._released(view, targets), self._released(view, shadows)
        return {
            "matched-filter": partial(matched_filter_scores, seen, learned, shadows.inside),
            "whitened-filter": partial(self._whitened, seen, learned),
            "distillation-lira": partial(self._distillation, seen, learned),
        }

    def _whitened(self, seen: Released, learned: Released) -> Floats:
        """On the answers as they are under noise, which is added to those; else on their logarithms."""
        answers = [
            torch.from_numpy(released.answers)
            if released.noise_std > 0
            else log_probabilities(self._side, released, _LEAST_PROBABILITY)
            for released in (seen, learned)
        ]
        return whitened_filter_scores(answers[0], answers[1], self._shadows.inside)

    def _distillation(self, seen: Released, learned: Released) -> Floats:
        """LiRA on surrogates that are distilled from the releases alone."""
        inputs = self._pool.candidates.inputs

        def logits(released: Released, role: str) -> Floats:
            count = len(released.answers)

            def compute() -> dict[str, Tensor]:
                self._progress.stage(f"audit: surrogates of the {role}s ({released.view})")
                advance = partial(self._progress.advance, total=count)
                return {"logits": surrogate_logits(self._side, released, inputs, self._request.seed, advance)}

            what: dict[str, str | int] = {"what": f"surrogate-{role}", "view": released.view, "models": count}
            return self._cache.tensors(what, compute)["logits"].to(torch.float64).numpy()

        candidates, shadows = logits(seen, "target"), logits(learned, "shadow")
        # LiRA reads no population; the candidates stand in for it.
        signals = Signals(candidates, shadows, candidates, shadows, self._shadows.inside)
        labels = self._labels[0]
        return score_attacks(signals, labels, labels, ("lira-online",))["lira-online"]()

    def _released(self, view: str, models: Traces) -> Released:
        game, role = self._side.game, "target" if models is self._targets else "shadow"
        root = NoiseRoot.from_seed(derive_seed(self._request.seed, "audit", "channel", role))
        if view == "per_client_logits":
            return per_client(models.answers, game.plan, root, game.config.channel.kind)
        crowd = self._crowd(len(models.answers))
        total = crowd.secure_sum(models.answers, root)
        return total if view == "secure_sum" else crowd.colluding(models.answers, total)

    def _crowd(self, models: int) -> Crowd:
        game = self._side.game
        others = self._others[None].expand(models, *self._others.shape)
        return Crowd(game.plan, game.config.channel.aggregators, others)

    def _teacher_signals(self) -> Signals:
        found = []
        plan, root = (
            self._side.game.plan,
            NoiseRoot.from_seed(derive_seed(self._request.seed, "audit", "rest")),
        )
        rest = per_client(self._others, plan, root).answers if len(self._others) else self._others.numpy()
        for models in (self._targets, self._shadows):
            role = "target" if models is self._targets else "shadow"
            secure = self._side.game.config.channel.kind == "secure"
            released = self._released("secure_sum" if secure else "per_client_logits", models)
            self._progress.stage(f"audit: teachers of the {role}s")
            found.append(
                absorbed_logits(
                    self._side, released, rest, self._pool, self._cache, role, self._progress.advance
                )
            )
        (targets, seen), (shadows, there) = found
        return Signals(targets, shadows, seen, there, self._shadows.inside)

    @cached_property
    def _pool(self) -> Pool:
        request = self._request
        return draw_pool(self._side.game.scenario, request.device, request.canaries, request.seed)

    @cached_property
    def _targets(self) -> Traces:
        self._progress.stage("audit: replaying the audited device")
        return traces(
            self._side, self._pool, self._cache, "target", self._request.targets, self._progress.advance
        )

    @cached_property
    def _shadows(self) -> Traces:
        self._progress.stage("audit: shadow devices")
        return traces(
            self._side, self._pool, self._cache, "shadow", self._request.shadows, self._progress.advance
        )

    @cached_property
    def _others(self) -> Tensor:
        self._progress.stage("audit: the other devices")
        return others_answers(self._side, self._cache, self._progress.advance)

    @property
    def _labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pool = self._pool
        return pool.candidates.labels.cpu().numpy(), pool.population.labels.cpu().numpy()

    @property
    def _delta(self) -> float:
        return self._side.game.plan.delta


def _rate(members: Floats, nonmembers: Floats, fpr: float) -> TprAtFpr | Refused:
    try:
        return tpr_at_fpr(members, nonmembers, fpr)
    except InputError as error:
        return Refused(fpr, str(error))
