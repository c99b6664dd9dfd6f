"""What is measured on a finished run beyond what it reports itself. Heavy imports wait until then."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from privkd.progress import Progress
    from privkd.runs.folder import RunFolder


@dataclass(frozen=True)
class Effort:
    """How much an audit may do: a membership audit's shadow devices and audited replays, and the trials of a
    reconstruction audit's games."""

    shadows: int = 64
    targets: int = 16
    trials: int = 50


FULL = Effort()


class Probe(Protocol):
    """A measurement on a run."""

    def name(self, effort: Effort) -> str:
        """Equal names on equal runs are equal measurements, made once."""
        ...

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """The figures by their dotted names."""
        ...


@dataclass(frozen=True)
class Personal:
    """Students, the global student and the teacher, each on the devices' own test sets."""

    def name(self, effort: Effort) -> str:
        """See `Probe.name`."""
        return "personal"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Probe.measure`."""
        from papers.personal import personal_figures

        progress.stage("papers: answers on the devices' own test sets")
        return personal_figures(folder)


@dataclass(frozen=True)
class Latency:
    """The exported student of the first device and the exported teacher, one answer on one CPU thread."""

    form: str

    def name(self, effort: Effort) -> str:
        """See `Probe.name`."""
        return f"latency-{self.form}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Probe.measure`."""
        from papers.latency import latency_figures

        progress.stage("papers: exporting student and teacher")
        return latency_figures(folder, self.form)


@dataclass(frozen=True)
class Membership:
    """``privkd audit membership`` on one ``view``, with one ``attack`` or ``all``, seeded as the run.

    A TPR that the audit refuses, since too few non-members would carry it, is NaN.
    """

    view: str
    attack: str = "all"

    def name(self, effort: Effort) -> str:
        """See `Probe.name`."""
        return f"membership-{self.view}-{self.attack}-{effort.shadows}x{effort.targets}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Probe.measure`."""
        from audits.estimators import TprAtFpr
        from audits.membership_inference import audit_membership
        from audits.requests import MembershipRequest

        request = MembershipRequest(
            view=self.view,
            attack=self.attack,
            shadows=effort.shadows,
            targets=effort.targets,
            seed=folder.config.seed,
        )
        figures: dict[str, float] = {}
        for finding in audit_membership(folder, request, progress).findings:
            start = f"{finding.view}.{finding.attack}"
            figures[f"{start}.epsilon_lower"] = finding.epsilon_lower
            figures[f"{start}.epsilon_upper"] = finding.epsilon_upper
            if finding.auc is not None:
                figures[f"{start}.auc"] = finding.auc.estimate
            for rate in finding.tpr_at_fpr:
                found = rate.estimate if isinstance(rate, TprAtFpr) else math.nan
                figures[f"{start}.tpr_at_{rate.fpr:g}"] = found
        return figures


@dataclass(frozen=True)
class Reconstruction:
    """``privkd audit reconstruction`` on one ``view``, with one ``attack`` of it, seeded as the run."""

    view: str
    attack: str

    def name(self, effort: Effort) -> str:
        """See `Probe.name`."""
        return f"reconstruction-{self.view}-{self.attack}-{effort.trials}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Probe.measure`."""
        from audits.reconstructions.audit import audit_reconstruction
        from audits.reconstructions.request import ReconstructionRequest

        request = ReconstructionRequest(
            view=self.view, attack=self.attack, trials=effort.trials, seed=folder.config.seed
        )
        figures: dict[str, float] = {}
        for finding in audit_reconstruction(folder, request, progress).findings:
            start = f"{finding.view}.{finding.attack}"
            figures[f"{start}.success"] = finding.success.estimate
            figures[f"{start}.chance"] = finding.success.chance
            figures[f"{start}.ceiling"] = finding.ceiling
            if finding.images is not None:
                figures[f"{start}.ssim"] = finding.images.ssim
        return figures
