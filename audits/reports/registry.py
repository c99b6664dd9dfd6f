"""A run as records of the differential-privacy deployments registry, one for each unit of privacy.

The fields are those of ``schemas/deployments-schema.yaml`` in
https://github.com/opendp/deployments-registry-data as of 15 July 2026, commit 3e9c812 (Nanayakkara, Ghazi,
Vadhan 2025, arXiv 2509.13509). What a run cannot know is taken from ``about.toml``, and is ``unknown`` where
that does not say. A record there has one privacy unit, so a run with two has two, and their epsilons are not
added.
"""

import math
import re
from typing import Any

import yaml

from audits.evidence import RunRecord
from audits.reports import run as chapters
from audits.reports.sign_off import About
from audits.reports.trust import trust_of
from audits.wording import counted, epsilon_text, event_text
from privkd.channels.registry import known
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement

_UNKNOWN = "unknown"
_MODELS = ("Local", "Central", "Shuffle", "Federated")


def registry_records(facts: RunRecord, about: About) -> list[dict[str, Any]]:
    """One record a unit that was charged."""
    return [_record(facts, row, about) for row in facts.statements if row.charges]


def as_yaml(facts: RunRecord, about: About) -> str:
    """The records as a stream of YAML documents, a file of the registry each; empty without a charge."""
    return yaml.safe_dump_all(registry_records(facts, about), sort_keys=False, allow_unicode=True, width=100)


def _record(facts: RunRecord, row: Statement, about: About) -> dict[str, Any]:
    return {
        "url_slug": f"{_slug(facts)}_{row.unit}",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": _basic(facts, row, about),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"Records of {counted(row.parties, 'device')}; data source: "
                f"{facts.config.data.source}",
                "unprotected_quantities": "; ".join(chapters.unprotected(facts).points),
            },
            "privacy_loss": _loss(facts, row),
            "deployment_model": _model(facts, row),
            "accounting": {
                "post_processing": "The teacher learns from the release; answers of DP-SGD students to "
                "public inputs are post-processing of the training.",
                "composition": f"{row.method}, over {counted(facts.played, 'round')} on each device; in "
                "parallel over devices, which hold disjoint records.",
            },
            "implementation": _implementation(facts, row, about),
            "administrative": {
                "sources": about.sources or _UNKNOWN,
                "registry_authors": list(about.authors) or [_UNKNOWN],
            },
        },
    }


def _slug(facts: RunRecord) -> str:
    """The folder's name as a part of an address."""
    return re.sub("[^a-z0-9]+", "_", facts.path.absolute().name.lower()).strip("_") or _UNKNOWN


def _basic(facts: RunRecord, row: Statement, about: About) -> dict[str, Any]:
    kind = facts.config.channel.kind
    sector = {"data_product_sector": about.sector} if about.sector else {}
    return {
        "name": f"{facts.path.name or facts.path} ({row.unit}-level guarantee)",
        "data_curators": list(about.curators) or [_UNKNOWN],
        "intended_use": about.purpose or _UNKNOWN,
        "data_product_type": "Machine learning model",
        "data_product_region": about.region or _UNKNOWN,
        "description": f"A teacher model that learned from students on devices, over the {kind} channel. "
        + ("" if about.published else "Not published; the date is when the run was started. ")
        + ("The run is a simulation." if facts.elsewhere is None else ""),
        "publication_date": about.published or facts.started,
        **sector,
    }


def _loss(facts: RunRecord, row: Statement) -> dict[str, Any]:
    infinite = math.isinf(row.epsilon.high)
    # The registry's parameters are numbers; no number says that there is no bound.
    parameters = {} if infinite else {"epsilon": row.epsilon.high, "delta": row.delta}
    words = (
        f"No bound: {'; '.join(row.reasons)}."
        if infinite
        else f"Upper bound over all rounds, between {row.epsilon.low:.6g} and {row.epsilon.high:.6g} by "
        f"numerics; budget {epsilon_text(row.budget)}."
    )
    return {
        "privacy_unit": f"{row.unit} level",
        "privacy_unit_details": row.neighbouring_relation,
        "privacy_parameters": parameters,
        "privacy_parameters_details": f"{words} {_audit_words(facts)}",
    }


def _audit_words(facts: RunRecord) -> str:
    best = facts.membership.best if facts.membership else None
    if best is None:
        return "Membership is unaudited."
    return (
        f"Audited: epsilon per {best.unit} is at least {best.epsilon_lower:.3g} at "
        f"{100 * best.confidence:g} % confidence (view {best.view}); verdict: {facts.standing}."
    )


def _model(facts: RunRecord, row: Statement) -> dict[str, Any]:
    """Noise on each device is the local model; the registry has no other word for what neither is."""
    trust = trust_of(facts.config, facts.elsewhere)
    on_device = row.unit is not Unit.DEVICE
    name = "Local" if on_device else known(facts.config.channel.kind).model
    told = "Noise is added on each device while its student trains." if on_device else " ".join(trust.words)
    actors = "\n".join(f"- {box.title}: {'; '.join(box.lines)}; {box.badge}" for box in trust.boxes)
    return {
        **({"model_name": name} if name in _MODELS else {}),
        "model_name_details": told,
        "actors": actors,
        "release_type": "Many releases" if facts.config.rounds > 1 else "One release",
        "release_type_details": f"One a round, {counted(facts.config.rounds, 'round')}, under one budget.",
        "data_source_type": "Static",
        "access_type": "Non-interactive",
    }


def _implementation(facts: RunRecord, row: Statement, about: About) -> dict[str, Any]:
    events = dict.fromkeys(event_text(charge.event) for charge in facts.charges if charge.unit is row.unit)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions)
    noise = (
        "the operating system's cryptographic source"
        if facts.config.privacy.noise == "system"
        else "the seed: this run is a simulation"
    )
    return {
        "preprocessing_and_hyperparameter_tuning": about.tuning or _UNKNOWN,
        "mechanisms": "\n".join(
            [
                *(f"- a round: {event}" for event in events),
                f"- noise comes from {noise}",
                f"- versions: {versions or _UNKNOWN}",
                f"- settings: {facts.command}",
            ]
        ),
        "justification": about.justification or _UNKNOWN,
    }
