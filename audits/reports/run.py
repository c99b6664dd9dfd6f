"""The chapters of a run's report, each from the facts alone."""

import math
from collections.abc import Sequence

from audits.estimators import TprAtFpr
from audits.estimators.rates import Interval
from audits.evidence import Accuracies, RunRecord
from audits.findings import Finding, LabelFinding, Refused
from audits.reports.page import Figure, Section, Table, columns
from audits.reports.trust import trust_of
from audits.wording import counted, epsilon_text, event_text, percent, points
from privkd.channels.registry import known
from privkd.data.constants import in_words, unset
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement
from privkd.runs.result import ClassResult

_UNAUDITED = "Not audited: no attack was made on what the run shows of a device."


def trust(facts: RunRecord) -> Section:
    """Who trusts whom."""
    drawn = trust_of(facts.config, facts.elsewhere)
    return Section("trust", "Who trusts whom", drawn.words, (drawn,))


def ledger(facts: RunRecord) -> Section:
    """What was spent, by unit, then by round."""
    if not facts.statements:
        return Section("ledger", "Privacy spent", ("Nothing was charged yet.",))
    by_unit = Table(
        f"By unit, {facts.config.channel.kind} channel, {counted(facts.played, 'round')} together",
        columns(
            "unit",
            ">epsilon, upper bound [numerical bracket]",
            ">epsilon, lower bound [confidence]",
            ">budget",
            ">delta",
            "neighbouring relation",
            "view",
            "composition",
            ">devices",
        ),
        tuple(_statement(row) for row in facts.statements),
    )
    by_round = Table(
        "By round (epsilon is the total by the end of the round, for the worst device)",
        columns("unit", ">round", "event", ">devices", ">epsilon so far, upper bound"),
        tuple(
            (
                f"{row.unit}",
                f"{row.round}",
                event_text(row.event),
                f"{row.devices:,}",
                _so_far(facts, row.unit, row.round),
            )
            for row in facts.charges
        ),
    )
    words = (
        f"DP-SGD protects a {facts.unit}, channel noise a device. The two epsilons protect different things "
        "and are never added.",
        "Devices hold disjoint records, so a unit's epsilon is that of its worst device (parallel "
        "composition); rounds compose on each device.",
        *_closing(facts),
        *_unaudited(facts),
        *_silence(facts),
    )
    return Section("ledger", "Privacy spent", words, tables=(by_unit, by_round, *_of_owners(facts)))


def _of_owners(facts: RunRecord) -> tuple[Table, ...]:
    """What somebody gets who is more than one unit; nothing where the run does not say."""
    if not facts.joints:
        return ()
    persons = facts.persons
    known = (
        "whose each record is, is not known"
        if persons is None
        else f"nominally {counted(persons.per_device, 'person')} a device, each with at most "
        f"{counted(persons.most_records, 'record')} there"
    )
    title = f"Who is more than one {facts.unit}, or less ({known}): upper bounds, whole run, none is added"
    rows = tuple((joint.words, f"{epsilon_text(joint.epsilon)}") for joint in facts.joints)
    return (Table(title, columns("who", ">epsilon of all of it, added or removed together"), rows),)


def _closing(facts: RunRecord) -> tuple[str, ...]:
    """What the lower bounds rest on."""
    if not facts.closing.bounds:
        return ()
    paths = "; ".join(f"per {bound.unit} through {bound.path}" for bound in facts.closing.bounds)
    checked = len(facts.closing.checks)
    passed = sum(check.passed for check in facts.closing.checks)
    return (
        "The lower bounds come from canaries, the worst case that the accountant assumes, that went through "
        f"the run itself at its end: {paths}. No private record had a part in them. Of {checked} checks of "
        f"clipping, noise and batches on the same path, {passed} passed.",
    )


def _unaudited(facts: RunRecord) -> tuple[str, ...]:
    """Why there is no lower bound, where devices or the channel say it."""
    if facts.elsewhere is not None:
        return ("There are no lower bounds: not audited here, as the devices' records are elsewhere.",)
    why = known(facts.config.channel.kind).unaudited
    if not why or math.isinf(facts.spent(Unit.DEVICE)):
        return ()
    return (f"There is no lower bound per device: {why}.",)


def _silence(facts: RunRecord) -> tuple[str, ...]:
    """How many devices took part, where not all did."""
    everyone = facts.config.data.devices
    fewest = min((len(row.devices) for row in facts.rounds if row.number), default=everyone)
    if fewest == everyone:
        return ()
    return (
        f"In a round {fewest:,} or more of the {everyone:,} devices contributed; those "
        "that fell silent before uploading are charged all the same.",
    )


def _statement(row: Statement) -> tuple[str, ...]:
    bound, lower = row.epsilon, row.lower_bound
    bracket = f"{epsilon_text(bound.high)} [{epsilon_text(bound.low)}, {epsilon_text(bound.high)}]"
    view = "what crosses the channel" if row.unit is Unit.DEVICE else "all that a run shows of a device"
    return (
        f"{row.unit}",
        f"{bracket} per {row.unit}",
        f"{lower.epsilon:.2f} per {row.unit} [{100 * lower.confidence:.4g} %]" if lower else "not measured",
        epsilon_text(row.budget),
        f"{row.delta:g}",
        row.neighbouring_relation,
        view,
        f"{row.method}, {row.charges} events",
        f"{row.parties:,}",
    )


def _so_far(facts: RunRecord, unit: Unit, number: int) -> str:
    """What the journal says was spent by the end of a round, if it ended."""
    found = next((row for row in facts.rounds if row.number == number), None)
    if found is None:
        return "round not finished"
    return f"{epsilon_text(found.figures.epsilon(unit))} per {unit}"


def membership(facts: RunRecord) -> Section:
    """Lower bounds, beside the upper ones."""
    title = "Can anyone tell who was in?"
    if facts.membership is None:
        return Section(
            "membership", title, (_UNAUDITED,), commands=(f"privkd audit membership {facts.path}",)
        )
    found = facts.membership
    tables, words = [], [found.target]
    if found.findings:
        tables.append(_guesses(found.findings))
        words.append(_relation(found.findings[0]))
        if any(isinstance(rate, Refused) for finding in found.findings for rate in finding.tpr_at_fpr):
            words.append("A rate is refused where fewer than 10 false positives would carry it.")
    if found.labels:
        tables.append(_classes(facts, found.labels))
        if facts.classes:
            words.append(f"The classes of the histogram: {', '.join(row.name for row in facts.classes)}.")
    alt = "ROC curves of the attacks: true-positive against false-positive rate, both axes logarithmic"
    drawn = (Figure("audit/roc.png", "png", facts.roc, alt),) if facts.roc else ()
    return Section("membership", title, tuple(words), tables=tuple(tables), figures=drawn)


def _relation(finding: Finding) -> str:
    return (
        f"Neighbouring relation: {finding.unit.neighbouring_relation}; delta {finding.delta:g}. All "
        f"lower bounds hold together with confidence {100 * finding.confidence:g} %: epsilon lies between "
        "the lower bound and the ledger's. AUC 0.5, and a true-positive rate equal to the false-positive "
        "rate, are chance."
    )


def _guesses(findings: Sequence[Finding]) -> Table:
    return Table(
        "Membership attacks, by view",
        columns(
            "view",
            "attack",
            "verdict",
            ">epsilon per record, attack",
            ">epsilon per record, ledger",
            ">AUC [95 %]",
            ">TPR at 1 % FPR [95 %]",
            ">TPR at 0.1 % FPR [95 %]",
            ">guesses: members, others",
            "estimator",
        ),
        tuple(_finding(finding) for finding in findings),
    )


def _classes(facts: RunRecord, labels: Sequence[LabelFinding]) -> Table:
    """What is told of a device's classes, beside the only bound that is about that."""
    upper = epsilon_text(facts.spent(Unit.DEVICE))
    return Table(
        "A device's class histogram, guessed from its answers (unit: device)",
        columns(
            "view",
            "what it tells",
            ">nats nearer than a blind guess [interval]",
            ">blind guess's divergence",
            ">devices",
            ">epsilon per device, ledger",
        ),
        tuple(
            (
                row.view,
                "the classes show" if row.reveals else "nothing shown",
                f"{row.gain:.3f} [{row.low:.3f}, {row.high:.3f}] at {100 * row.confidence:g} %",
                f"{row.blind:.3f} nats",
                f"{row.devices:,}",
                f"≤ {upper}",
            )
            for row in labels
        ),
    )


def _finding(finding: Finding) -> tuple[str, ...]:
    area = finding.auc
    rates = dict.fromkeys((0.01, 0.001), "not measured")
    for rate in finding.tpr_at_fpr:
        rates[rate.fpr] = _rate(rate)
    return (
        finding.view,
        finding.attack,
        finding.verdict,
        f"≥ {finding.epsilon_lower:.2f}",
        f"≤ {epsilon_text(finding.epsilon_upper)}",
        "no ranking" if area is None else f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]",
        rates[0.01],
        rates[0.001],
        f"{finding.members:,}, {finding.nonmembers:,}",
        finding.estimator,
    )


def _rate(rate: TprAtFpr | Refused) -> str:
    return "refused" if isinstance(rate, Refused) else percent(rate)


def reconstruction(facts: RunRecord) -> Section:
    """What could be rebuilt."""
    title = "Can anyone rebuild what was on a device?"
    found = facts.reconstruction
    if found is None:
        words = ("Not audited: no reconstruction was tried.",)
        return Section(
            "reconstruction", title, words, commands=(f"privkd audit reconstruction {facts.path}",)
        )
    table = Table(
        "Reconstruction attacks, by view",
        columns(
            "view",
            "attack",
            "unit",
            "what is rebuilt",
            "prior",
            ">picked right [interval]",
            ">chance",
            ">ceiling from the ledger",
            ">trials",
            "verdict",
        ),
        tuple(
            (
                row.view,
                row.attack,
                f"{row.unit}",
                row.target,
                row.prior,
                f"{percent(row.success)} at {100 * row.success.confidence:g} %",
                f"{100 * row.success.chance:.1f} %",
                "none claimed" if row.ceiling is None else f"{100 * row.ceiling:.1f} %",
                f"{row.success.trials:,}",
                row.verdict,
            )
            for row in found.findings
        ),
    )
    grids = tuple(
        Figure(name, "png", data, f"Targets and reconstructions: {name}") for name, data in facts.grids
    )
    return Section("reconstruction", title, found.notes, tables=(table,), figures=grids)


def gain(facts: RunRecord) -> Section:
    """Accuracy, beside its controls."""
    title = "What it was good for"
    measured = facts.accuracies
    if measured is None:
        return Section("gain", title, (_no_accuracies(facts),))
    table = Table(
        f"Accuracy on the global test set ({measured.teacher.n:,} records, view: the cloud) [95 %]",
        columns("model", ">accuracy", "what it is"),
        tuple((name, percent(share), meaning) for name, share, meaning in _accuracies(measured)),
    )
    better = "better" if measured.gain.low > 0 else "not clearly better"
    students = measured.student_gain
    words = (
        f"Through the devices the teacher gained {points(measured.gain)} over its control with zero devices: "
        f"it is {better} at 95 % confidence.",
        "How well the students do was not measured: it is not the cloud's to know."
        if students is None
        else f"The students gained {points(students)} over public distillation alone.",
        "All were measured on the same records; the intervals take them as independent, which widens them. "
        "They "
        "vary over test records alone: another seed, or other devices, may differ by more.",
    )
    by_class = [_by_class(facts.classes)] if facts.classes else []
    return Section("gain", title, words, tables=(table, *by_class))


def _by_class(classes: Sequence[ClassResult]) -> Table:
    """How well the teacher knows each class: what a mean over all hides of a rare one."""
    rows = tuple((row.name, f"{row.records:,}", _share(row.before), _share(row.after)) for row in classes)
    return Table(
        "The teacher by class, on the global test set (view: the cloud)",
        columns("class", ">records", ">teacher before", ">teacher after the run"),
        rows,
    )


def _share(value: float) -> str:
    return "no record" if math.isnan(value) else f"{100 * value:.2f} %"


def _no_accuracies(facts: RunRecord) -> str:
    if not facts.finished:
        return "The run is unfinished: there is no result yet."
    return "The run does not say on how many test records it was measured, so no accuracy has an interval."


def _accuracies(measured: Accuracies) -> list[tuple[str, Interval, str]]:
    own = "not covered by the ledger"
    rows = [
        ("teacher after the run", measured.teacher, "the result"),
        ("teacher before", measured.before, "trained on public data alone"),
        (
            "control: teacher, zero devices",
            measured.control,
            "the better of self-distilled and public labels only",
        ),
        ("students, mean", measured.students, "on the devices, after the run"),
        ("students, public distillation only", measured.public_only, "before any private record"),
        ("student trained directly, same budget", measured.direct_private, own),
        ("student trained directly, no DP", measured.direct, own),
    ]
    return [(name, share, meaning) for name, share, meaning in rows if share is not None]


def exports(facts: RunRecord) -> Section:
    """The students that left as files."""
    table = Table(
        "Exported students, with their preprocessing (times: one record, one CPU thread, median)",
        columns(
            "device",
            "format",
            ">size",
            ">parameters",
            ">largest difference of a logit",
            ">one answer",
            ">the original's",
        ),
        tuple(
            (
                row.device,
                row.format,
                f"{row.size_bytes:,} bytes",
                f"{row.parameters:,}",
                f"{row.check.difference:.1e} on {counted(row.check.records, 'record')}",
                f"{row.latency_ms:.3g} ms",
                f"{row.original_ms:.3g} ms",
            )
            for row in facts.exports
        ),
    )
    bound = facts.spent(facts.unit)
    promised = "nothing is promised" if math.isinf(bound) else f"that is within epsilon {epsilon_text(bound)}"
    words = (
        "Each file holds the weights of one device's student, and who has it can ask it anything. For a "
        f"{facts.unit} {promised}; for the device as a whole nothing is promised.",
    )
    return Section("exports", "What runs on the device", words, tables=(table,))


def unprotected(facts: RunRecord) -> Section:
    """What nobody promises."""
    found = []
    for unit in (facts.unit, Unit.DEVICE):
        if math.isinf(facts.spent(unit)):
            row = facts.statement(unit)
            why = "; ".join(row.reasons) if row else "nothing was charged"
            thing = (
                "a device as a whole, its labels and class histogram among it"
                if unit is Unit.DEVICE
                else f"a single {unit}"
            )
            found.append(f"{thing}: no differential privacy ({why})")
    found += [
        "the number of devices, and which of them took part in a round",
        "timing and traffic",
        "what is learned by tuning settings on private data: only the runs themselves are accounted for",
        "what is true of everybody's records: differential privacy hides who took part, not what all share",
    ]
    if facts.config.controls and facts.config.privacy.noise == "seeded":
        found.append("the simulation's controls, which train on device records outside the ledger")
    inferred = in_words(unset(facts.config.data, given_test=False))
    if inferred and facts.config.privacy.noise == "seeded":
        found.append(
            "public constants that this simulation read from all records of its file, private ones too: "
            f"{', '.join(inferred)} (test records only where the file brought no test split); a deployment "
            "is given them as settings"
        )
    found += trust_of(facts.config, facts.elsewhere).unprotected
    if facts.config.privacy.noise == "seeded":
        found.append("anything, from whoever knows the seed: this run's noise can be computed from it")
    return Section("unprotected", "What is not protected", points=tuple(found))


def provenance(facts: RunRecord) -> Section:
    """What made the run, and what this report rests on."""
    files = Table(
        "SHA-256 of the files that this report was read from",
        columns("file", "digest"),
        tuple((file.name, file.digest) for file in facts.files),
    )
    versions = Table("Versions that computed the run", columns("library", "version"), facts.versions)
    taken = Table("What in the data was taken for what", columns("what", "taken"), tuple(facts.taken.items()))
    words = ("The command that starts an equal run:",)
    tables = tuple(table for table in (taken, files, versions) if table.rows)
    return Section("provenance", "Where it comes from", words, tables=tables, commands=(facts.command,))
