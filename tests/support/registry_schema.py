"""The differential-privacy deployments registry's form of a record, as its documentation states it.

Source: https://github.com/opendp/deployments-registry-data, ``schemas/deployments-schema.yaml`` of 15 July
2026, commit 3e9c812: names, types, what is required, and what is an enumeration. Nothing else may
stand there.
"""

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}


def _one_of(*names: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(names)}


def _fields(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": fields,
    }


_BASIC = _fields(
    (
        "name",
        "data_curators",
        "description",
        "intended_use",
        "data_product_type",
        "data_product_region",
        "publication_date",
    ),
    name=_TEXT,
    data_curators=_TEXTS,
    intended_use=_TEXT,
    data_product_type=_one_of(
        "Summary statistics",
        "Machine learning model",
        "Dataset",
        "Synthetic data",
        "Interactive API",
        "SQL queries",
    ),
    data_product_region=_TEXT,
    description=_TEXT,
    publication_date={"type": "string", "format": "date"},
    data_product_sector=_one_of("Technology", "Healthcare", "Education", "Government", "Energy", "Finance"),
)

_LOSS = _fields(
    privacy_unit=_TEXT,
    privacy_unit_details=_TEXT,
    privacy_parameters=_fields(
        epsilon={"type": "number"}, delta={"type": ["number", "string"]}, rho={"type": "number"}
    ),
    privacy_parameters_details={},
)

_MODEL = _fields(
    model_name=_one_of("Local", "Central", "Shuffle", "Federated", "Varies"),
    model_name_details=_TEXT,
    actors=_TEXT,
    release_type=_one_of("One release", "Many releases"),
    release_type_details=_TEXT,
    data_source_type=_one_of("Static", "Dynamic"),
    data_source_type_details=_TEXT,
    access_type=_one_of("Interactive", "Non-interactive"),
    access_type_details=_TEXT,
)

SCHEMA = _fields(
    ("url_slug", "status", "tier", "deployment"),
    url_slug=_TEXT,
    status=_one_of(
        "Converted",
        "Draft",
        "Pending",
        "Changes Required",
        "Approved",
        "Approved (Update Requested)",
        "Approved (Pending)",
    ),
    tier={"type": "integer", "enum": [1, 2, 3]},
    deployment=_fields(
        ("basic",),
        basic=_BASIC,
        dp_variant=_fields(
            variant_name=_one_of("Pure DP", "Approximate DP", "Zero-concentrated DP", "Renyi DP", "Custom"),
            data_domain=_TEXT,
            unprotected_quantities=_TEXT,
        ),
        privacy_loss=_LOSS,
        deployment_model=_MODEL,
        accounting=_fields(post_processing=_TEXT, composition=_TEXT),
        implementation=_fields(
            preprocessing_and_hyperparameter_tuning=_TEXT, mechanisms=_TEXT, justification=_TEXT
        ),
        administrative=_fields(("registry_authors",), sources=_TEXT, notes=_TEXT, registry_authors=_TEXTS),
    ),
)
