"""A run as records of the differential-privacy deployments registry, one for each unit of privacy.

The fields are those of ``deployments/*.yaml`` and ``schemas/deployments-schema.yaml`` in
https://github.com/opendp/deployments-registry-data, as of November 2025 (Nanayakkara, Ghazi, Vadhan 2025,
arXiv 2509.13509), the registry that was proposed to NIST. What a run cannot know is ``unknown``, for people
to fill in. A record there has one privacy unit, so a run with two has two, and their epsilons are not added.
"""

import math
from typing import Any

import yaml

from audits.evidence import RunRecord
from audits.reports import run as chapters
from audits.reports.trust import trust_of
from audits.wording import counted, epsilon_text, event_text
from privkd.channels.registry import known
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Statement

_UNKNOWN = "unknown"


def registry_records(facts: RunRecord) -> list[dict[str, Any]]:
    """One record a unit that was charged."""
    return [_record(facts, row) for row in facts.statements if row.charges]


def as_yaml(facts: RunRecord) -> str:
    """The records as a stream of YAML documents, which the registry's own form is; empty without a charge."""
    return yaml.safe_dump_all(registry_records(facts), sort_keys=False, allow_unicode=True, width=100)


def _record(facts: RunRecord, row: Statement) -> dict[str, Any]:
    return {
        "url_slug": _UNKNOWN,
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "product": _product(facts, row),
            "dp_flavor": {
                "name": "Approximate DP",
                "input_metric": row.neighbouring_relation,
                "bound_on_input_distance": f"one {row.unit}",
                "output_measure": "hockey-stick divergence",
                "bound_on_output_distance": _distance(row),
                "data_domain": f"records of {counted(row.parties, 'device')}; data source: "
                f"{facts.config.data.source}",
                "unprotected_quantities": "; ".join(chapters.unprotected(facts).points),
            },
            "privacy_loss": _loss(facts, row),
            "model": _model(facts, row),
            "accounting": {
                "post_processing": "The teacher learns from the release; answers of DP-SGD students to "
                "public inputs are post-processing of the training.",
                "composition": f"{row.method}, over {counted(facts.played, 'round')} on each device; in "
                "parallel over devices, which hold disjoint records.",
            },
            "implementation": _implementation(facts, row),
            "resources": {"sources": _UNKNOWN, "registry_authors": [_UNKNOWN]},
        },
    }


def _product(facts: RunRecord, row: Statement) -> dict[str, Any]:
    kind = facts.config.channel.kind
    return {
        "name": f"{facts.path.name or facts.path} ({row.unit}-level guarantee)",
        "data_curators": [_UNKNOWN],
        "intended_use": _UNKNOWN,
        "data_product_type": "Machine learning model",
        "data_product_region": _UNKNOWN,
        "description": f"A teacher model that learned from students on devices, over the {kind} channel.",
        "publication_date": _UNKNOWN,
        "data_product_sector": _UNKNOWN,
    }


def _distance(row: Statement) -> str:
    if math.isinf(row.epsilon.high):
        return "none: no bound is claimed"
    return f"delta {row.delta:g} at epsilon {epsilon_text(row.epsilon.high)}"


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
        "privacy_unit": "record-level" if row.unit is Unit.RECORD else "User-device-level",
        "privacy_unit_description": row.neighbouring_relation,
        "privacy_parameters": parameters,
        "privacy_parameters_description": f"{words} {_audit_words(facts)}",
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
    trust = trust_of(facts.config, facts.elsewhere)
    on_device = row.unit is Unit.RECORD
    return {
        "model_name": "Local" if on_device else known(facts.config.channel.kind).model,
        "model_name_description": "Noise is added on each device while its student trains."
        if on_device
        else " ".join(trust.words),
        "actors": "\n".join(f"- {box.title}: {'; '.join(box.lines)}; {box.badge}" for box in trust.boxes),
        "release_type": "Many releases" if facts.config.rounds > 1 else "One release",
        "release_type_description": f"One a round, {counted(facts.config.rounds, 'round')}, "
        "under one budget.",
        "data_source_type": "Static",
        "access_type": "Non-interactive",
    }


def _implementation(facts: RunRecord, row: Statement) -> dict[str, Any]:
    events = dict.fromkeys(event_text(charge.event) for charge in facts.charges if charge.unit is row.unit)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions)
    noise = (
        "the operating system's cryptographic source"
        if facts.config.privacy.noise == "system"
        else "the seed: this run is a simulation"
    )
    return {
        "pre_processing_eda_hyperparameter_tuning": _UNKNOWN,
        "mechanisms": "\n".join(
            [
                *(f"- a round: {event}" for event in events),
                f"- noise comes from {noise}",
                f"- versions: {versions or _UNKNOWN}",
                f"- settings: {facts.command}",
            ]
        ),
        "justification": _UNKNOWN,
    }
