"""Can anyone rebuild what was on the device? Every view and attack of a finished run, beside the ceiling.

Two games are played on replays of the device side, as in ``audits.game``: the class game (which class, that
the public set lacks, does the device hold?) and the record game (which of some candidates is the device's
last record?). Their secrets are drawn uniformly, so a guess without the release has a known success.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attacks.reconstruction.similarity import is_image, nearest, ssim
from audits.evidence import RECONSTRUCTION
from audits.findings import ReconstructionFinding
from audits.game import ReplayContext, reopen_run
from audits.membership_audit import views_of
from audits.reconstructions.drawings import Drawn, GradientGame, draw_class, draw_record, simplex_scores
from audits.reconstructions.measures import (
    attribute_scores,
    image_scores,
    least_success,
    public_likeness,
    reconstruction_rate,
    reidentification,
)
from audits.reconstructions.replays import Floats, Replays, Secrets, lacks_classes, numbers
from audits.requests import (
    CLASS_ATTACKS,
    DECODERS,
    ReconstructionRequest,
    RunLike,
    folder_of,
    reconstruction_attacks_of,
)
from audits.style import blank, rendered
from audits.tables import ReconstructionReport
from privkd.errors import ConfigError, InputError
from privkd.prepared import Prepared
from privkd.privacy.events import PrivacyEvent, Unit
from privkd.privacy.ledger import Ledger
from privkd.privacy.randomness import derive_seed
from privkd.privacy.robustness import reconstruction_ceiling
from privkd.progress import Progress, Silent
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder
from privkd.training.vectorised import train_cohort

_EXAMPLES = 10
_SIDE = 0.85
_LETTERS = 14
_DOTS = 150
_TITLES = ("target", "nearest public", "reconstruction")


def write_grid(folder: RunFolder, finding: ReconstructionFinding, drawn: Drawn, public: Floats) -> str:
    """Draw some trials as a PNG in the run's folder, and return its name there."""
    name = f"audit/reconstruction-{finding.view}-{finding.attack}.png"
    folder.write_bytes(name, draw_grid(finding, drawn, public))
    return name


def draw_grid(finding: ReconstructionFinding, drawn: Drawn, public: Floats) -> bytes:
    """One column a trial, as PNG; trials with different targets come first.

    ``public`` are the public images ``[image, channel, height, width]``. Under each reconstruction stand its
    target's class, its structural similarity to the target, and whether the target was picked.
    """
    assert drawn.images is not None
    chosen = _varied(drawn.secrets)
    images, targets = drawn.images[chosen], drawn.targets[chosen]
    rows = (targets, public[nearest(images, public)], images)
    likeness = ssim(images, targets)
    right = drawn.table[chosen].argmax(axis=1) == drawn.secrets[chosen]
    marks = ["picked" if hit else "missed" for hit in right]
    captions = [f"{alike:.2f} {mark}" for alike, mark in zip(likeness, marks, strict=True)]
    if drawn.classes:
        names = [drawn.classes[secret] for secret in drawn.secrets[chosen]]
        captions = [f"{_short(name)}\n{words}" for name, words in zip(names, captions, strict=True)]
    success = finding.success
    title = (
        f"{finding.view}, {finding.attack}: picked {100 * success.estimate:.0f} % of {success.trials}, "
        f"chance {100 * success.chance:.0f} %"
    )
    return _rendered(np.stack(rows), captions, title)


def _short(name: str) -> str:
    """A class's name as far as it goes under a picture; nothing in it is a formula."""
    shown = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
    return shown.replace("$", r"\$")


def _rendered(pictures: Floats, captions: list[str], title: str) -> bytes:
    """All ``pictures`` ``[row, column, channel, height, width]`` as one image, with words around it."""
    rows, columns = pictures.shape[:2]
    mosaic, height, width = _mosaic(pictures)
    figure = blank(_SIDE * columns + 0.8, _SIDE * rows + 0.6)
    panel = figure.subplots()
    panel.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.set_xticks([(column + 0.5) * width - 1 for column in range(columns)], captions, fontsize=6)
    panel.set_yticks([(row + 0.5) * height - 1 for row in range(rows)], _TITLES, fontsize=7)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.set_title(title, fontsize=8)
    return rendered(figure, "png", dots=_DOTS)["png"]


def _mosaic(pictures: Floats) -> tuple[Floats, int, int]:
    """One image of all, with white seams; and the height and width of a picture with its seam."""
    shown = _pixels(pictures)
    seam = [(0, 0), (0, 0), (0, 1), (0, 1)] + [(0, 0)] * (shown.ndim - 4)
    padded = np.pad(shown, seam, constant_values=1.0)
    rows, columns, height, width = padded.shape[:4]
    whole = np.moveaxis(padded, 1, 2).reshape(rows * height, columns * width, *padded.shape[4:])
    return whole[:-1, :-1], height, width


def _varied(secrets: Secrets) -> list[int]:
    """Indices of at most ten trials, one of each target before a second of any."""
    seen: dict[int, int] = {}
    ranks = []
    for secret in secrets.tolist():
        ranks.append((seen.get(secret, 0), secret))
        seen[secret] = seen.get(secret, 0) + 1
    return sorted(range(len(ranks)), key=ranks.__getitem__)[:_EXAMPLES]


def _pixels(pictures: Floats) -> Floats:
    """``[row, column, height, width, 3]`` for three channels, else their mean without the last axis."""
    clipped = np.clip(pictures, 0, 1)
    return np.moveaxis(clipped, 2, -1) if clipped.shape[2] == 3 else clipped.mean(axis=2)


_GRADIENT_TRIALS = 2000
_ATTRIBUTES = (
    "the records are no images: attributes are rebuilt, by class-prototype, prior-matching and "
    "informed-adversary in place of the image decoders"
)
_TOKENS = (
    "the records are token ids, which are no numbers to draw: run `privkd audit membership RUN`, which finds "
    "out how far a text's presence shows"
)
_NO_CLASS = "the public set lacks no class, so none can be drawn: train with --set data.gap=withheld"


@dataclass(frozen=True)
class _Ceiling:
    """The most success that the ledger allows: per ``unit``; ``None`` where it allows anything."""

    unit: Unit
    value: float | None


def audit_reconstruction(
    folder: RunFolder, request: ReconstructionRequest, progress: Progress
) -> ReconstructionReport:
    """Play both games on the run in ``folder``, and draw grids into it.

    Raises:
        InputError: the run is a deployment, unfinished or damaged, its data or code changed, or it
            lacks the view, or has too few records or classes.
    """
    run = reopen_run(folder)
    wanted, notes = plan_attacks(run, request)
    transcript = load_transcript(folder, run.cloud.untrained_teacher())
    if not transcript.exchanges:
        raise InputError(f"{folder.path}: no round was finished; resume it with --resume {folder.path}")
    ledger = Ledger.load(folder.ledger_path)
    progress.stage("audit: distilling public students")
    replays = Replays(ReplayContext.of(run, transcript), folder, request, progress)
    audit = _Audit(replays, ledger, error=(1 - request.confidence) / len(wanted))
    findings, grids = [], []
    for view, attack in wanted:
        progress.stage(f"audit: {view} ({attack})")
        drawn = audit.drawn(view, attack)
        finding = audit.finding(view, attack, drawn)
        findings.append(finding)
        if finding.ssim is not None:
            grids.append(write_grid(folder, finding, drawn, audit.public))
    return ReconstructionReport(
        run=str(folder.path),
        channel=run.config.channel.kind,
        findings=tuple(findings),
        grids=tuple(grids),
        notes=notes,
    )


def reconstruction(
    run: RunLike = None,
    request: ReconstructionRequest | None = None,
    *,
    progress: Progress | None = None,
    **asked: Any,
) -> ReconstructionReport:
    """Try to rebuild what the devices of ``run`` held, and keep the report in the run's folder.

    Args:
        run: a run, or its folder; the latest under ``runs/`` by default.
        request: what to audit; or ``asked``, its fields by name.
        progress: told of each stage.

    Raises:
        PrivkdError: as `audit_reconstruction`, or there is no such run.
    """
    wanted = request or ReconstructionRequest(**asked)
    with RunFolder.resume(folder_of(run, "run")) as folder:
        report = audit_reconstruction(folder, wanted, progress or Silent())
        folder.write_json(RECONSTRUCTION, report.tree())
    return report


def plan_attacks(
    run: Prepared, request: ReconstructionRequest
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """The views and attacks that the run has, and remarks on what was left out.

    Raises:
        ConfigError: the run does not have the view, or the view not the attack; or its records are tokens.
    """
    if run.scenario.constants.tokens is not None:
        raise ConfigError(_TOKENS)
    views = views_of(run, request.view)
    offered = [(view, attack) for view in views for attack in reconstruction_attacks_of(view)]
    wanted = [pair for pair in offered if request.attack in ("all", pair[1])]
    if not wanted:
        names = sorted({attack for _, attack in offered})
        raise ConfigError(f"attack={request.attack!r}: view {request.view} takes one of {names}")
    notes = []
    if not is_image(run.scenario.input_shape):
        wanted = [pair for pair in wanted if pair[1] not in DECODERS]
        notes.append(_ATTRIBUTES)
        if not wanted:
            raise ConfigError(f"attack={request.attack!r}: {_ATTRIBUTES}")
    if not lacks_classes(run.scenario):
        wanted = [pair for pair in wanted if pair[1] not in CLASS_ATTACKS]
        notes.append(_NO_CLASS)
        if not wanted:
            raise ConfigError(f"attack={request.attack!r}: {_NO_CLASS}")
    return wanted, tuple(notes)


class _Audit:
    """One audit under way."""

    def __init__(self, replays: Replays, ledger: Ledger, *, error: float) -> None:
        self._replays = replays
        self._game = replays.side.run
        self._ledger = ledger
        self._error = error
        scenario = self._game.scenario
        self.public: Floats = numbers(torch.cat([scenario.public.inputs, scenario.proxy]))

    def drawn(self, view: str, attack: str) -> Drawn:
        """What the attack makes of the view."""
        if view == "gradient":
            return self._gradient()
        draw = draw_class if attack in CLASS_ATTACKS else draw_record
        return draw(self._replays, view, attack)

    def finding(self, view: str, attack: str, drawn: Drawn) -> ReconstructionFinding:
        """The finding in an attack's drawings."""
        images = attributes = likeness = None
        if drawn.images is not None and is_image(drawn.images.shape[1:]):
            images = image_scores(drawn.images, drawn.targets)
            likeness = public_likeness(drawn.images, drawn.targets, self.public)
        elif drawn.images is not None:
            attributes = attribute_scores(drawn.images, drawn.targets, self.public)
        kappa = 1 / drawn.table.shape[1]
        of_class = attack in CLASS_ATTACKS
        ceiling = self._ceiling(view, kappa, of_class=of_class)
        return ReconstructionFinding(
            view=view,
            attack=attack,
            target=_target(view, of_class),
            unit=ceiling.unit,
            prior=f"uniform over {drawn.table.shape[1]} {'classes' if of_class else 'records'}",
            success=reidentification(drawn.table, drawn.secrets),
            ceiling=ceiling.value,
            ssim=images and images.ssim,
            psnr=images and images.psnr,
            mse=images and images.mse,
            attributes=attributes,
            tpr_at_fpr=reconstruction_rate(drawn.table, drawn.secrets),
            likeness=likeness,
            alarm_low=least_success(drawn.table, drawn.secrets, error=self._error),
        )

    def _gradient(self) -> Drawn:
        plan, mechanism = self._game.plan, self._game.mechanism
        assert mechanism is not None
        request = self._replays.request
        game = GradientGame(_GRADIENT_TRIALS, request.candidates, plan.steps * self._replays.side.rounds)
        seed = derive_seed(request.seed, "reconstruction", "gradient")
        table, secrets = simplex_scores(train_cohort, mechanism, game, seed)
        return Drawn(None, None, table, secrets)

    def _ceiling(self, view: str, kappa: float, *, of_class: bool) -> _Ceiling:
        """What the ledger allows of this view: the lesser of the units' ceilings, where both speak of it.

        A class is many records, so only the device's unit speaks of it; the student and the gradients lie
        before the channel, so only the record's unit speaks of these.
        """
        found = []
        if not of_class:
            found.append(self._of_unit(Unit.RECORD, kappa, rounds=self._replays.side.rounds))
        if view not in ("student", "gradient"):
            found.append(
                self._of_unit(Unit.DEVICE, kappa, rounds=1 if of_class else self._replays.side.rounds)
            )
        nothing = _Ceiling(Unit.DEVICE if of_class else Unit.RECORD, None)
        claimed = [(ceiling.value, ceiling) for ceiling in found if ceiling.value is not None]
        return min(claimed, key=lambda pair: pair[0], default=(1.0, nothing))[1]

    def _of_unit(self, unit: Unit, kappa: float, *, rounds: int) -> _Ceiling:
        """From the audited device's charges, of the ``rounds`` that were replayed."""
        name = self._game.scenario.devices[self._replays.request.device].name
        events = self._ledger.events(unit, name)
        played = events[: math.ceil(len(events) * rounds / self._replays.side.rounds)]
        return _ceiling_of(unit, played, kappa)


def _ceiling_of(unit: Unit, events: tuple[PrivacyEvent, ...], kappa: float) -> _Ceiling:
    value = reconstruction_ceiling(events, kappa)
    return _Ceiling(unit, value if value < 1 else None)


def _target(view: str, of_class: bool) -> str:
    if view == "gradient":
        return "worst-case records of a probe"
    return "the class that the public set lacks" if of_class else "one record of the device"
