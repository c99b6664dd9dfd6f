"""What is measured on a finished run beyond what it reports itself. Heavy imports wait until then."""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from privkd.errors import RunError

if TYPE_CHECKING:
    from torch import nn

    from privkd.progress import Progress
    from privkd.runs.folder import RunFolder

_TURNS = 501


@dataclass(frozen=True)
class Effort:
    """How much an audit may do: a membership audit's shadow devices and audited replays, and the trials of a
    reconstruction audit's games."""

    shadows: int = 64
    targets: int = 16
    trials: int = 50


FULL = Effort()


class Measurement(Protocol):
    """Something to measure on a run."""

    def name(self, effort: Effort) -> str:
        """Equal names on equal runs are equal measurements, made once."""
        ...

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """The figures by their dotted names.

        Raises:
            PrivkdError: as audits and exports do.
        """
        ...


@dataclass(frozen=True)
class Personal:
    """Means over the devices of accuracies on each device's own test set; devices without one are left out.

    ``personal.student`` is the student that each device is left with, ``personal.trained`` the one it trained
    in the last round, ``personal.teacher`` the last teacher, and ``personal.global`` the student that a
    device would start from in the next round: distilled from the last teacher on public data alone, the
    same for all. ``personal.worst`` is the first's worst device.
    """

    def name(self, effort: Effort) -> str:
        """See `Measurement.name`."""
        return "personal"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Measurement.measure`.

        Raises:
            RunError: the run is not finished, or no device has test records.
        """
        from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation
        from privkd.privacy.randomness import seeded_layers
        from privkd.progress import Silent
        from privkd.training.fit import accuracy

        progress.stage("papers: answers on the devices' own test sets")
        run = reopen_simulation(folder, HELD_BY_DEVICES)
        done = finished(run, folder)
        state = done.state
        devices = [number for number, device in enumerate(run.scenario.devices) if len(device.test)]
        if not devices:
            raise RunError(f"{folder.path}: no device has test records; set data.device_test_records")
        tests = [run.scenario.devices[number].test for number in devices]

        def accuracies(models: "Sequence[nn.Module]") -> list[float]:
            return [accuracy(m, test.inputs, test.labels) for m, test in zip(models, tests, strict=True)]

        own = accuracies(run.personalised(done, devices, Silent()))
        trained = accuracies([done.students[number] for number in devices])
        with seeded_layers(run.config.seed, "global"):
            shared = run.cloud.public_students(state.teacher, round=state.round)[0]
        return {
            "personal.student": statistics.fmean(own),
            "personal.trained": statistics.fmean(trained),
            "personal.worst": min(own),
            "personal.global": statistics.fmean(accuracies([shared] * len(tests))),
            "personal.teacher": statistics.fmean(accuracies([state.teacher] * len(tests))),
        }


@dataclass(frozen=True)
class Latency:
    """The exported student of the first device and the exported teacher, side by side.

    Median milliseconds for one record on one CPU thread, in turns, and the artefacts' sizes in bytes.
    """

    form: str

    def name(self, effort: Effort) -> str:
        """See `Measurement.name`."""
        return f"latency-{self.form}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Measurement.measure`."""
        from privkd.export.export import export_model
        from privkd.export.formats import format_named, suffix_of
        from privkd.models.latency import latencies_ms
        from privkd.prepared import HELD_BY_DEVICES, finished, reopen_simulation

        progress.stage("papers: exporting student and teacher")
        writer = format_named(self.form)
        run = reopen_simulation(folder, HELD_BY_DEVICES)
        done = finished(run, folder)
        scenario = run.scenario
        records, constants, names = scenario.public.inputs, scenario.constants, scenario.labels
        models = {"student": done.students[0], "teacher": done.state.teacher}
        with tempfile.TemporaryDirectory(prefix="privkd-papers-") as place:
            artefacts = [
                export_model(
                    model,
                    records,
                    constants,
                    names,
                    self.form,
                    Path(place) / f"{name}{suffix_of(self.form)}",
                )
                for name, model in models.items()
            ]
            raw = constants.raw(records[:1].cpu())
            times = latencies_ms(*((writer.load(Path(one.file)), raw) for one in artefacts), turns=_TURNS)
        figures: dict[str, float] = {}
        for name, milliseconds, artefact in zip(models, times, artefacts, strict=True):
            figures |= {f"export.{name}_ms": milliseconds, f"export.{name}_bytes": artefact.size_bytes}
        return figures


@dataclass(frozen=True)
class Membership:
    """``privkd audit membership`` on one ``view``, with one ``attack`` or ``all``, seeded as the run.

    A TPR that the audit refuses, since too few non-members would carry it, is NaN.
    """

    view: str
    attack: str = "all"

    def name(self, effort: Effort) -> str:
        """See `Measurement.name`."""
        return f"membership-{self.view}-{self.attack}-{effort.shadows}x{effort.targets}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Measurement.measure`."""
        from audits.estimators import TprAtFpr
        from audits.membership_audit import audit_membership
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
            figures[f"{start}.alarm"] = float(finding.verdict == "ALARM")
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
        """See `Measurement.name`."""
        return f"reconstruction-{self.view}-{self.attack}-{effort.trials}"

    def measure(self, folder: "RunFolder", progress: "Progress", effort: Effort) -> Mapping[str, float]:
        """See `Measurement.measure`."""
        from audits.reconstructions.audit import audit_reconstruction
        from audits.requests import ReconstructionRequest

        request = ReconstructionRequest(
            view=self.view, attack=self.attack, trials=effort.trials, seed=folder.config.seed
        )
        figures: dict[str, float] = {}
        for finding in audit_reconstruction(folder, request, progress).findings:
            start = f"{finding.view}.{finding.attack}"
            figures[f"{start}.success"] = finding.success.estimate
            figures[f"{start}.chance"] = finding.success.chance
            figures[f"{start}.ceiling"] = 1.0 if finding.ceiling is None else finding.ceiling
            figures[f"{start}.alarm"] = float(finding.verdict == "ALARM")
            if finding.ssim is not None:
                figures[f"{start}.ssim"] = finding.ssim
        return figures
