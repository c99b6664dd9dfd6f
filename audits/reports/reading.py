"""How to read a report: what its figures are worth to a person, what is stated and signed, and its words."""

import math
from collections.abc import Sequence

from audits.evidence import FileDigest, RunRecord
from audits.reports.page import Section, Table, columns
from audits.reports.sign_off import ABOUT, SIGNATURE, About, Signature, digest_of
from audits.wording import percent
from privkd.privacy.claims import certainty
from privkd.privacy.events import Unit

_FPR, _ONE_OF_TEN = 0.01, 0.1
_UNMEASURED = "not measured"
_UNSTATED = "not stated"


def meaning(facts: RunRecord) -> Section:
    """What the two bounds allow an attacker, in words, beside what attackers reached."""
    title = "What the figures are worth"
    units = [unit for unit in Unit if math.isfinite(facts.spent(unit))]
    if not units:
        none = "No unit has a finite epsilon, so nothing limits what an attacker can do."
        return Section("meaning", title, (none,))
    table = Table(
        "The most that anybody can do, and the most that was reached",
        columns("unit", "what an attacker could do", ">at most, from the ledger", ">reached [interval]"),
        tuple(row for unit in units for row in _worth(facts, unit)),
    )
    words = (
        "The middle column holds for any attacker, who may know everything but the one unit in question; "
        "the last "
        "is what the attacks of this report did, and a better one may do more.",
        *(
            f"Per {unit}, all of this may fail with a probability of about delta {row.delta:g}, one in "
            f"{1 / row.delta:,.0f}."
            for unit in units
            if (row := facts.statement(unit)) and row.delta
        ),
    )
    return Section("meaning", title, words, tables=(table,))


def _worth(facts: RunRecord, unit: Unit) -> list[tuple[str, str, str, str]]:
    row = facts.statement(unit)
    lower = row.lower_bound if row else None
    return [
        (
            f"{unit}",
            "be sure that it was in, having held both to be equally likely",
            certainty(facts.spent(unit)),
            f"{certainty(lower.epsilon)}, by canaries" if lower else _UNMEASURED,
        ),
        (
            f"{unit}",
            "find members while falsely accusing 1 % of the others",
            f"{100 * facts.ceiling(unit, _FPR):.1f} % of them",
            _most_found(facts, unit),
        ),
        (
            f"{unit}",
            "pick the true one of ten equally likely secrets",
            f"{100 * facts.ceiling(unit, _ONE_OF_TEN):.1f} % of the times",
            _most_picked(facts, unit),
        ),
    ]


def _most_found(facts: RunRecord, unit: Unit) -> str:
    rates = [
        rate
        for finding in (facts.membership.findings if facts.membership else ())
        if finding.unit is unit and (rate := finding.rate(_FPR))
    ]
    best = max(rates, key=lambda rate: rate.estimate, default=None)
    return _UNMEASURED if best is None else percent(best)


def _most_picked(facts: RunRecord, unit: Unit) -> str:
    found = [
        one.success
        for one in (facts.reconstruction.findings if facts.reconstruction else ())
        if one.unit is unit and math.isclose(one.success.chance, _ONE_OF_TEN)
    ]
    best = max(found, key=lambda success: success.estimate, default=None)
    return _UNMEASURED if best is None else percent(best)


def stated(about: About) -> Section:
    """What people say of the run."""
    table = Table(
        f"Stated in {ABOUT}, by people",
        columns("what", "stated"),
        tuple(
            (name, ", ".join(value) if isinstance(value, tuple) else value)
            for name, value in ((name, getattr(about, name)) for name in About.model_fields)
            if value
        ),
    )
    missing = [name for name in About.model_fields if not getattr(about, name)]
    words = (
        (f"Not stated: {', '.join(missing)}. Fill in {ABOUT} beside this report and write it again.",)
        if missing
        else ()
    )
    return Section(
        "stated", "What it is for, and who answers for it", words, tables=(table,) if table.rows else ()
    )


def signing(files: Sequence[FileDigest], signed: Signature | None) -> Section:
    """What is signed, and where."""
    digest = digest_of(files)
    names = " ".join(file.name for file in files)
    table = Table(
        "Signed",
        columns("name", "date", "digest of what was signed"),
        ((signed.name, signed.date, signed.digest),) if signed else (("", "", digest),),
    )
    words = (
        _standing_of(signed, digest),
        f"The digest is the SHA-256 of what this prints in the report's folder, and it is now {digest}:",
    )
    return Section("sign", "Signature", words, tables=(table,), commands=(f"sha256sum {names} | sha256sum",))


def _standing_of(signed: Signature | None, digest: str) -> str:
    if signed is None:
        return (
            "Nobody has signed. Sign on paper below, or with privkd report RUN --sign NAME, which writes "
            f"{SIGNATURE} for every later report to check."
        )
    if signed.digest != digest:
        return (
            f"{signed.name} signed on {signed.date}, and the run, an audit of it or what is stated has "
            "changed "
            "since: the signature does not hold for this report."
        )
    return f"Signed by {signed.name} on {signed.date}; nothing that it rests on has changed since."


_GLOSSARY = (
    (
        "AUC",
        "how often an attack ranks a member above somebody who was not in: 0.5 is chance, 1 is always",
    ),
    (
        "canary",
        "a record, or a device, made for the audit, in or out by the toss of a coin that the attack must "
        "guess",
    ),
    (
        "control",
        "the same training without any device, or without privacy: what a gain is measured against",
    ),
    (
        "delta",
        "a small probability with which the promise of epsilon may fail",
    ),
    (
        "epsilon",
        "how much the result may tell about one unit: 0 nothing, a few units little; each more lets an "
        "attacker's "
        "odds grow by a factor of up to 2.7",
    ),
    (
        "interval",
        "where the true value lies with the confidence that is said. Accuracies vary over test records, "
        "attacks over "
        "who was in and out; neither says how another seed or other data would come out",
    ),
    (
        "ledger",
        "the book on disk in which every release was paid for before it was made",
    ),
    (
        "lower bound",
        "an epsilon that an attack has shown to be spent: the truth is no less, with the confidence that "
        "is said",
    ),
    (
        "neighbouring relation",
        "which two worlds an attacker cannot tell apart: with and without one unit",
    ),
    (
        "reconstruction",
        "picking or rebuilding somebody's data from what the run shows",
    ),
    (
        "TPR at 1 % FPR",
        "the share of members that an attack finds while it falsely accuses 1 % of the others: 1 % is chance",
    ),
    (
        "unit",
        "what is protected: one record, or all that one device contributes. Their epsilons are never added",
    ),
    (
        "upper bound",
        "an epsilon that no attack can pass, if the run did what it says: from theory",
    ),
    ("view", "what an attacker sees: the answers of each device, their sum, or a student"),
)


def glossary() -> Section:
    """The words of a report, for a reader who meets them here."""
    table = Table("In the sense of this report", columns("word", "what it means"), _GLOSSARY)
    return Section("glossary", "Words", tables=(table,))
