"""The verdict in plain words, for a run and for a curve."""

import math

from audits.evidence import RunRecord
from audits.reports.page import Verdict
from audits.sweeps.sweep import Sweep
from audits.wording import counted, epsilon_text
from privkd.privacy.claims import certainty
from privkd.privacy.events import Unit

_SIMULATED = (
    "This run is a simulation: its noise comes from the seed, and whoever knows the seed can take it off. "
    "The bounds speak of the mechanism; a deployment sets privacy.noise=system."
)


def verdict_on_run(facts: RunRecord) -> Verdict:
    """What the run comes to, what is promised for each unit, and what to do next."""
    match facts.standing:
        case "ALARM":
            return Verdict(
                "ALARM",
                "bad",
                (
                    "Do not release. An attack achieved what the ledger rules out, so the mechanism or its "
                    "accounting is broken:",
                    *(f"{words}." for words in facts.alarm_words),
                    *_promises(facts),
                ),
            )
        case "unfinished":
            return Verdict(
                "Unfinished",
                "warn",
                (
                    f"{facts.played} of {counted(facts.config.rounds, 'round')} were played. What was spent "
                    "is below; nothing can be said of the run as a whole.",
                    *_promises(facts),
                ),
                (f"privkd train --resume {facts.path}",),
            )
        case "no protection claimed":
            words = ("No protection is claimed: neither records nor devices have a finite epsilon.",)
            return Verdict(
                "No protection claimed", "bad", (*words, *_promises(facts), *_evidence(facts)), _audits(facts)
            )
        case "not audited":
            words = ("No attack was made on what the run shows of a device.",)
            return Verdict(
                "Not audited", "warn", (*words, *_promises(facts), *_closing(facts)), _audits(facts)
            )
        case "within bound":
            words = ("No attack that was made contradicts what the ledger promises.",)
            return Verdict(
                "Within bound", "good", (*words, *_promises(facts), *_evidence(facts)), _audits(facts)
            )


def _promises(facts: RunRecord) -> tuple[str, ...]:
    """What the ledger promises for each unit, in words, and what a simulation's promise is worth."""
    said = [_promise(facts, unit) for unit in Unit if facts.statement(unit)]
    warnings = [f"Warning: {words}." for words in facts.warnings]
    return (*said, *warnings, *((_SIMULATED,) if facts.config.privacy.noise == "seeded" else ()))


def _promise(facts: RunRecord, unit: Unit) -> str:
    row = facts.statement(unit)
    epsilon = facts.spent(unit)
    thing = "A record" if unit is Unit.RECORD else "A device as a whole"
    if row is None or math.isinf(epsilon):
        reasons = "; ".join(row.reasons) if row else "nothing was charged"
        return f"{thing}: nothing is promised (epsilon per {unit} is infinite: {reasons})."
    if row.charges == 0:
        return f"{thing}: nothing was released yet."
    view = "all that the run shows of a device" if unit is Unit.RECORD else "what crosses the channel"
    return (
        f"{thing}: epsilon is at most {epsilon_text(epsilon)} per {unit} at delta {row.delta:g}, over all "
        f"rounds, in {view} ({row.neighbouring_relation}). Who held it to be as likely in as out can become "
        f"{certainty(epsilon)} sure at most, but for a chance of about delta."
    )


def _evidence(facts: RunRecord) -> tuple[str, ...]:
    """The strongest finding of each kind."""
    said = [*_closing(facts)]
    best = facts.membership.best if facts.membership else None
    if facts.membership and best:
        said.append(
            f"The strongest of {len(facts.membership.findings)} membership attacks ({best.attack}, view "
            f"{best.view}) shows that epsilon is at least {best.epsilon_lower:.2f} per {best.unit} "
            f"({100 * best.confidence:g} % confidence, {best.members:,} members and {best.nonmembers:,} "
            "non-members guessed)."
        )
    else:
        said.append("Membership was not audited.")
    if facts.reconstruction:
        said.append(f"{len(facts.reconstruction.findings)} reconstruction attacks were made; see below.")
    return tuple(said)


def _closing(facts: RunRecord) -> tuple[str, ...]:
    """What the audit shows that the run ended with."""
    return tuple(
        f"{bound.canaries:,} canaries through the run's own mechanism show that epsilon is at least "
        f"{bound.epsilon:.2f} per {bound.unit} ({100 * bound.confidence:.4g} % confidence)."
        for bound in facts.closing.bounds
    )


def _audits(facts: RunRecord) -> tuple[str, ...]:
    """Commands for the audits that were not made."""
    made = {"membership": facts.membership, "reconstruction": facts.reconstruction}
    return tuple(f"privkd audit {name} {facts.path}" for name, found in made.items() if found is None)


def verdict_on_curve(curve: Sweep) -> Verdict:
    """What the cells come to together."""
    done = [row.facts for row in curve.outcomes if row.facts]
    alarms = curve.alarms
    failed = f"{len(curve.failed)} of {len(curve.outcomes)} cells are not done." if curve.failed else ""
    resume = (f"privkd curve --resume --out {curve.path}",) if curve.failed else ()
    if alarms:
        words = ("Do not release. In some cells an attack achieved what the ledger rules out:",)
        return Verdict("ALARM", "bad", (*words, *(f"{one}." for one in alarms), failed), resume)
    audited = [facts for facts in done if facts.audited]
    if not done:
        return Verdict("Nothing is done", "warn", (failed,), resume)
    if not audited:
        words = ("The bounds of all cells are unaudited: no attack has tried them.",)
        audit = f"privkd curve --resume --audit membership --out {curve.path}"
        return Verdict("Not audited", "warn", (*words, failed), (*resume, audit))
    kept = [facts for facts in audited if facts.standing == "within bound"]
    claimless = [facts for facts in done if facts.standing == "no protection claimed"]
    said = (
        f"Audited runs: {len(audited)}. In none does an attack contradict what the ledger promises.",
        f"{len(kept)} of them promise something; {len(claimless)} of {len(done)} promise nothing for any "
        "unit, and are there to compare with.",
        failed,
    )
    sentences = tuple(one for one in said if one)
    if curve.failed:
        return Verdict("Incomplete", "warn", sentences, resume)
    return Verdict("Within bound", "good", sentences)
