"""``privkd audit membership``: what a run's views give away about who is in a device's records."""

from functools import cached_property
from pathlib import Path
from typing import Any

from attacks.evidence import ChannelEvidence, Evidence
from attacks.registry import LABELS, ONE_RUN
from audits.bounding import pair_bound, rate_or_refusal
from audits.estimators import (
    BonferroniGuesses,
    auc,
    epsilon_lower_bound_one_run,
    one_run,
)
from audits.evidence import MEMBERSHIP
from audits.findings import Bound, Finding, LabelFinding
from audits.game import Cache, GameKey, ReplayContext, draw_pool, reopen_run, traces
from audits.mechanisms.canaries import Scores, bound_many_trials, bound_one_run, dirac_scores
from audits.requests import (
    MembershipRequest,
    RunLike,
    attacks_of,
    folder_of,
    is_wire,
)
from audits.roc import write_curves
from audits.score_outputs import write_membership
from audits.scoring import Signals, evidence_on_models, scores_of
from audits.tables import MembershipReport, Scored
from audits.views import Replays, Wires
from privkd.channels.registry import KINDS
from privkd.errors import ConfigError, InputError
from privkd.messages import dealt
from privkd.prepared import Prepared
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Ledger
from privkd.privacy.randomness import derive_seed
from privkd.progress import Progress, Silent
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder
from privkd.training.vectorised import train_cohort

_RATES = (0.01, 0.001)
_ONE_RUN_CANARIES = 10_000
_TRIALS = 100_000
_BLOCK = 250


def membership(
    run: RunLike = None,
    request: MembershipRequest | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> MembershipReport:
    """Audit ``run``, and keep the report and its ROC curves in the run's folder.

    Args:
        run: a run, or its folder; the latest under ``runs/`` by default.
        request: what to audit; or ``asked``, its fields by name.
        out: folder for tables, raw scores and figures as well.
        progress: told of each stage.

    Raises:
        PrivkdError: as `audit_membership`, or there is no such run.
    """
    wanted = request or MembershipRequest(**asked)
    with RunFolder.resume(folder_of(run, "run")) as folder:
        found = keep_membership(folder, audit_membership(folder, wanted, progress or Silent()))
    return found if out is None else write_membership(found, Path(out))


def keep_membership(folder: RunFolder, report: MembershipReport) -> MembershipReport:
    """Write the report and its ROC curves to the run's folder."""
    kept = report.model_copy(update={"curves": write_curves(folder, report.scored)})
    folder.write_json(MEMBERSHIP, kept.tree())
    return kept


def audit_membership(folder: RunFolder, request: MembershipRequest, progress: Progress) -> MembershipReport:
    """Play the game of ``audits.game`` on the run in ``folder``.

    Raises:
        InputError: the run is a deployment, unfinished or damaged, its data or code changed, or it
            lacks the view, or has too few records.
    """
    run = reopen_run(folder)
    views = views_of(run, request.view)
    wanted = [
        (view, attack) for view in views for attack in attacks_of(view) if request.attack in ("all", attack)
    ]
    guessed = [view for view in views if is_wire(view) and request.attack in ("all", LABELS)]
    if not (wanted or guessed):
        known = {attack for view in views for attack in attacks_of(view)}
        known |= {LABELS for view in views if is_wire(view)}
        raise ConfigError(f"attack={request.attack!r}: view {request.view} takes one of {sorted(known)}")
    transcript = load_transcript(folder, run.cloud.untrained_teacher())
    if not transcript.exchanges:
        raise InputError(f"{folder.path}: no round was finished; resume it with --resume {folder.path}")
    ledger = Ledger.load(folder.ledger_path)
    progress.stage("audit: distilling public students")
    side = ReplayContext.of(run, transcript)
    audit = _Audit(side, folder, request, progress, each=1 - (1 - request.confidence) / max(1, len(wanted)))
    upper = ledger.spent(Unit.RECORD).high
    scored = tuple(audit.scored(view, attack) for view, attack in wanted)
    return MembershipReport(
        run=str(folder.path),
        channel=run.config.channel.kind,
        findings=tuple(audit.finding(scores, upper) for scores in scored),
        scored=scored,
        labels=tuple(audit.labels(view, ledger.spent(Unit.DEVICE).high) for view in guessed),
    )


def views_of(run: Prepared, view: str) -> tuple[str, ...]:
    """The views asked for that the run has.

    Raises:
        ConfigError: the run does not have it.
    """
    channel = run.config.channel.kind
    wires = KINDS[channel].views
    if run.plan.votes is not None:
        return _views_of_votes(run, view)
    steps = () if run.mechanism is None else ("gradient",)
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


def _views_of_votes(run: Prepared, view: str) -> tuple[str, ...]:
    """What a vote shows is not replayed, nor what the teacher learned from it."""
    views = ("student",) if run.mechanism is None else ("student", "gradient")
    if view == "all":
        return views
    if view in views:
        return (view,)
    raise ConfigError(f"view={view!r}: under channel.aggregation 'votes' the views are {' and '.join(views)}")


class _Audit:
    """One audit under way: what several views need is computed once."""

    def __init__(
        self,
        side: ReplayContext,
        folder: RunFolder,
        request: MembershipRequest,
        progress: Progress,
        each: float,
    ) -> None:
        self._side = side
        self._request = request
        self._progress = progress
        self._each = each
        self._cache = Cache(folder, GameKey(request.canaries, request.device, request.seed))
        self._wires = Wires(side, self._cache, progress)
        self._evidence: dict[str, tuple[Evidence, ...] | ChannelEvidence] = {}

    def scored(self, view: str, attack: str) -> Scored:
        """One attack's scores over all targets, or over its own canaries."""
        if view == "gradient":
            return self._gradient(attack)
        if view not in self._evidence:
            self._evidence[view] = self._evidence_of(view)
        values = scores_of(attack, self._evidence[view])
        return Scored(view, attack, values.reshape(-1), self._replays.targets.inside.reshape(-1))

    def finding(self, scored: Scored, upper: float) -> Finding:
        """The finding in one attack's scores, beside the ledger's ``upper`` bound."""
        if scored.view == "gradient":
            return self._gradient_finding(scored, upper)
        return self._replay_finding(scored, upper)

    def labels(self, view: str, upper: float) -> LabelFinding:
        """How much a view of the channel tells about devices' class histograms."""
        request = self._request
        pool = draw_pool(self._side.run.scenario, request.device, "natural", request.seed)
        return self._wires.labels(view, pool, request.targets, upper)

    def _replay_finding(self, scored: Scored, upper: float) -> Finding:
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

    def _gradient(self, attack: str) -> Scored:
        """White box: gradient canaries through the run's own mechanism, over all of its steps."""
        self._progress.stage(f"audit: gradient ({attack})")
        plan, mechanism = self._side.run.plan, self._side.run.mechanism
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

    def _gradient_finding(self, scored: Scored, upper: float) -> Finding:
        """The bound of the canaries' own game: one run, or each canary as a trial."""
        scores, rate = Scores(scored.values, scored.inside), self._side.run.plan.sampling_rate
        # Full batches are Gaussian, and orthogonal canaries do not meet.
        beside = (pair_bound(scored, self._delta, self._each),) if rate == 1 else ()
        if scored.attack == ONE_RUN:
            lower = bound_one_run(scores, sampling_rate=rate, delta=self._delta, confidence=self._each)
            return self._finding(scored, lower, upper, "f_dp_one_run" if rate == 1 else "one_run", beside)
        lower = bound_many_trials(
            scores, sampling_rate=rate, delta=self._delta, confidence=self._each, seed=self._request.seed
        )
        return self._finding(scored, lower, upper, "gaussian" if rate == 1 else "clopper_pearson", beside)

    def _finding(
        self, scored: Scored, lower: float, upper: float, estimator: str, bounds: tuple[Bound, ...] = ()
    ) -> Finding:
        members, nonmembers = scored.members, scored.nonmembers
        return Finding(
            view=scored.view,
            attack=scored.attack,
            unit=Unit.RECORD,
            auc=auc(members, nonmembers),
            tpr_at_fpr=tuple(rate_or_refusal(scored, fpr) for fpr in _RATES),
            epsilon_lower=lower,
            epsilon_upper=upper,
            delta=self._delta,
            confidence=self._request.confidence,
            members=len(members),
            nonmembers=len(nonmembers),
            estimator=estimator,
            bounds=bounds,
        )

    def _evidence_of(self, view: str) -> tuple[Evidence, ...] | ChannelEvidence:
        replays, side = self._replays, self._side
        if is_wire(view):
            return self._wires.evidence(view, replays)
        if view == "teacher":
            signals, public = self._wires.teacher_signals(replays), side.transcript.exchanges[-1].teacher
        else:
            signals = _student_signals(replays)
            public = dealt(side.last_starts, self._request.device)
        return evidence_on_models(signals, replays.pool, public)

    @cached_property
    def _replays(self) -> Replays:
        request, side, advance = self._request, self._side, self._progress.advance
        pool = draw_pool(side.run.scenario, request.device, request.canaries, request.seed)
        self._progress.stage("audit: replaying the audited device")
        targets = traces(side, pool, self._cache, "target", request.targets, advance)
        self._progress.stage("audit: shadow devices")
        shadows = traces(side, pool, self._cache, "shadow", request.shadows, advance)
        return Replays(pool, targets, shadows)

    @property
    def _delta(self) -> float:
        return self._side.run.plan.delta


def _student_signals(replays: Replays) -> Signals:
    targets, shadows = replays.targets, replays.shadows
    return Signals(
        targets.candidates, shadows.candidates, targets.population, shadows.population, shadows.inside
    )
