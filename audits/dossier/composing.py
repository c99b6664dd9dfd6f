"""Pages from facts: of a run, and of a curve."""

from audits.dossier import chapters
from audits.dossier.curve import curve_sections
from audits.dossier.page import Page
from audits.dossier.verdicts import verdict_on_curve, verdict_on_run
from audits.evidence.facts import RunFacts
from audits.evidence.wording import counted, epsilon_text
from audits.sweeps.sweep import Sweep

_FOOTER = (
    "Written by privkd. Lower bounds come from attacks, upper bounds from the ledger. A bound that no attack "
    "reaches is not thereby proven; a bound that one passes is broken."
)


def run_page(facts: RunFacts) -> Page:
    """The report of one run."""
    config = facts.config
    subtitle = (
        f"{config.data.source}, {counted(config.data.devices, 'device')}, {counted(config.rounds, 'round')}, "
        f"{config.channel.kind} channel, record-level budget epsilon {epsilon_text(config.privacy.epsilon)}; "
        f"started {facts.started}"
    )
    return Page(
        title=f"Privacy report: {facts.path.name or facts.path}",
        subtitle=subtitle,
        verdict=verdict_on_run(facts),
        sections=(
            chapters.trust(facts),
            chapters.ledger(facts),
            chapters.membership(facts),
            chapters.reconstruction(facts),
            chapters.gain(facts),
            *([chapters.exports(facts)] if facts.exports else []),
            chapters.unprotected(facts),
            chapters.provenance(facts),
        ),
        footer=_FOOTER,
    )


def curve_page(curve: Sweep) -> Page:
    """The report of a curve."""
    request = curve.grid
    budgets = ", ".join(epsilon_text(value) for value in request.epsilons)
    subtitle = (
        f"{len(curve.done)} of {len(curve.outcomes)} runs: record-level budgets epsilon {budgets}; channels "
        f"{', '.join(request.channels)}; {request.seeds} seeds"
    )
    return Page(
        title=f"Privacy-utility curve: {curve.path.name or curve.path}",
        subtitle=subtitle,
        verdict=verdict_on_curve(curve),
        sections=curve_sections(curve),
        footer=_FOOTER,
    )
