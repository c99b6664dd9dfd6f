"""The verdicts in plain words: two questions of a run, one of a curve."""

import math
from collections.abc import Iterator

from audits.evidence import RunRecord
from audits.reports.page import Tone, Verdict
from audits.reports.sign_off import About
from audits.sweeps.sweep import Sweep
from audits.wording import counted, epsilon_text, percent
from privkd.privacy.claims import certainty
from privkd.privacy.events import Unit

CONSISTENT = "Is the evidence consistent?"
FIT = "Is this fit for release?"

_OF = dict.fromkeys(Unit, "all that the run shows of a device") | {Unit.DEVICE: "what crosses the channel"}
_THING = {Unit.RECORD: "A record", Unit.PERSON: "A person", Unit.DEVICE: "A device as a whole"}


def verdicts_on_run(facts: RunRecord, about: About) -> tuple[Verdict, Verdict]:
    """Whether the run may leave the house, and whether what was measured agrees with what is promised."""
    return _on_release(facts, about), _on_evidence(facts)


def _on_evidence(facts: RunRecord) -> Verdict:
    """What attacks found, beside what the ledger promises."""
    found = (*_evidence(facts), *_promises(facts))
    audits = tuple(
        f"privkd audit {name} {facts.path}"
        for name, made in (("membership", facts.membership), ("reconstruction", facts.reconstruction))
        if made is None
    )
    tone: Tone
    match facts.standing:
        case "ALARM":
            broken = (
                "An attack achieved what the ledger rules out, so the mechanism or its accounting is broken:"
            )
            word, tone = "ALARM", "bad"
            words: tuple[str, ...] = (broken, *(f"{words}." for words in facts.alarm_words), *found)
            audits = ()
        case "unfinished":
            played = f"{facts.played} of {counted(facts.config.rounds, 'round')} were played."
            word, tone = "Unfinished", "warn"
            words = (f"{played} What was spent is below; nothing can be said of the run as a whole.", *found)
            audits = (f"privkd train --resume {facts.path}",)
        case "no protection claimed":
            word, tone = "Nothing is claimed", "warn"
            words = (
                "Neither records nor devices have a finite epsilon, so no attack could contradict it.",
                *found,
            )
        case "not audited":
            word, tone = "Not audited", "warn"
            words = ("No attack was made on what the run shows of a device.", *found)
        case "within bound":
            # Green is for what may be released.
            word, tone = "Yes", "plain" if facts.config.privacy.noise == "seeded" else "good"
            words = ("No attack that was made contradicts what the ledger promises.", *found)
    return Verdict(CONSISTENT, word, tone, words, audits)


def _on_release(facts: RunRecord, about: About) -> Verdict:
    """What stands against a release, worst first. A simulation is never fit for one."""
    against = tuple(_against(facts, about))
    if not against:
        words = "Nothing that the program can see stands against it."
        return Verdict(FIT, "No objection", "good", (words, "Whether the purpose warrants it is for people."))
    tone: Tone = "bad" if any(grave for grave, _ in against) else "warn"
    return Verdict(FIT, "No" if tone == "bad" else "Not yet", tone, tuple(words for _, words in against))


def _against(facts: RunRecord, about: About) -> Iterator[tuple[bool, str]]:
    """Reasons against a release, and whether each forbids it."""
    if facts.standing == "ALARM":
        yield True, "Do not release: the evidence contradicts the promise."
    if facts.config.privacy.noise == "seeded":
        yield (
            True,
            "This run is a simulation: its noise comes from the seed, and whoever knows the seed can take "
            "it off. "
            "The bounds speak of the mechanism, not of these files.",
        )
    elif facts.elsewhere is None:
        yield (
            True,
            "One process played every party, so one owner saw all records in clear, whatever the drawing "
            "says. "
            "Devices of their own take part with privkd device and privkd cloud.",
        )
    if facts.standing == "unfinished":
        yield False, "The run is unfinished."
    if facts.standing == "no protection claimed":
        yield True, "No protection is claimed: neither records nor devices have a finite epsilon."
    yield from ((False, f"Warning: {words}.") for words in facts.warnings)
    yield from _shown(facts)
    if not facts.audited:
        yield (
            False,
            "No attack was made on it. The devices' records are elsewhere: audit a simulation with the "
            "same settings."
            if facts.elsewhere
            else "No attack was made on it.",
        )
    if about.missing:
        yield False, f"Not stated: {', '.join(about.missing)} (fill in about.toml beside the report)."


def _shown(facts: RunRecord) -> Iterator[tuple[bool, str]]:
    """What attacks learned although no bound forbids it."""
    for row in facts.membership.labels if facts.membership else ():
        if row.reveals:
            upper = epsilon_text(row.epsilon_upper)
            yield (
                math.isinf(row.epsilon_upper),
                f"The classes show: a device's class histogram can be told from view {row.view} "
                f"({row.gain:.2f} of "
                f"{row.blind:.2f} nats nearer than a blind guess; epsilon per device is at most {upper}).",
            )
    for one in facts.reconstruction.findings if facts.reconstruction else ():
        if one.success.low > one.success.chance:
            yield (
                one.ceiling is None,
                f"Secrets were rebuilt: view {one.view}, {one.attack} picked the right {one.target} in "
                f"{percent(one.success)} of the trials, where chance is {100 * one.success.chance:.1f} %.",
            )


def _promises(facts: RunRecord) -> tuple[str, ...]:
    """What the ledger promises for each unit, in words."""
    return tuple(_promise(facts, unit) for unit in Unit if facts.statement(unit))


def _promise(facts: RunRecord, unit: Unit) -> str:
    row = facts.statement(unit)
    epsilon = facts.spent(unit)
    if row is None or math.isinf(epsilon):
        reasons = "; ".join(row.reasons) if row else "nothing was charged"
        return f"{_THING[unit]}: nothing is promised (epsilon per {unit} is infinite: {reasons})."
    if row.charges == 0:
        return f"{_THING[unit]}: nothing was released yet."
    return (
        f"{_THING[unit]}: epsilon is at most {epsilon_text(epsilon)} per {unit} at delta {row.delta:g}, "
        "over all "
        f"rounds, in {_OF[unit]} ({row.neighbouring_relation}). Who held it to be as likely in as out can "
        "become "
        f"{certainty(epsilon)} sure at most, but for a chance of about delta."
    )


def _evidence(facts: RunRecord) -> tuple[str, ...]:
    """The strongest finding of each kind."""
    said = [
        f"{bound.canaries:,} canaries through the run's own mechanism show that epsilon is at least "
        f"{bound.epsilon:.2f} per {bound.unit} ({100 * bound.confidence:.4g} % confidence)."
        for bound in facts.closing.bounds
    ]
    best = facts.membership.best if facts.membership else None
    if facts.membership and best:
        said.append(
            f"The strongest of {len(facts.membership.findings)} membership attacks ({best.attack}, view "
            f"{best.view}) shows that epsilon is at least {best.epsilon_lower:.2f} per {best.unit} "
            f"({100 * best.confidence:g} % confidence, {best.members:,} members and {best.nonmembers:,} "
            "non-members guessed)."
        )
    elif facts.finished:
        said.append("Membership was not audited.")
    if facts.reconstruction:
        said.append(f"Attacks that rebuild: {len(facts.reconstruction.findings)}; see below.")
    return tuple(said)


def verdict_on_curve(curve: Sweep) -> Verdict:
    """What the cells come to together."""
    done = [row.facts for row in curve.outcomes if row.facts]
    alarms = curve.alarms
    failed = f"{len(curve.failed)} of {len(curve.outcomes)} cells are not done." if curve.failed else ""
    resume = (f"privkd curve --resume --out {curve.path}",) if curve.failed else ()
    if alarms:
        words = ("Do not release. In some cells an attack achieved what the ledger rules out:",)
        return Verdict(CONSISTENT, "ALARM", "bad", (*words, *(f"{one}." for one in alarms), failed), resume)
    audited = [facts for facts in done if facts.audited]
    if not done:
        return Verdict(CONSISTENT, "Nothing is done", "warn", (failed,), resume)
    if not audited:
        words = ("The bounds of all cells are unaudited: no attack has tried them.",)
        audit = f"privkd curve --resume --audit membership --out {curve.path}"
        return Verdict(CONSISTENT, "Not audited", "warn", (*words, failed), (*resume, audit))
    kept = [facts for facts in audited if facts.standing == "within bound"]
    claimless = [facts for facts in done if facts.standing == "no protection claimed"]
    said = (
        f"Audited runs: {len(audited)}. In none does an attack contradict what the ledger promises.",
        f"{len(kept)} of them promise something; {len(claimless)} of {len(done)} promise nothing for any "
        "unit, and are there to compare with.",
        "A curve's runs are simulations, to choose settings by; none of them is for release.",
        failed,
    )
    sentences = tuple(one for one in said if one)
    if curve.failed:
        return Verdict(CONSISTENT, "Incomplete", "warn", sentences, resume)
    return Verdict(CONSISTENT, "Yes", "plain", sentences)
