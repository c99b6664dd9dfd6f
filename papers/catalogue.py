"""All studies, by name."""

import difflib
from typing import TYPE_CHECKING, Any

from papers.studies import device_level, du2022, membership, personalisation, reconstruction, training
from papers.study import Study
from privkd.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

STUDIES: tuple[Study, ...] = (
    du2022.STUDY,
    personalisation.STUDY,
    device_level.STUDY,
    training.ABADI,
    training.TRAMER,
    membership.CARLINI,
    membership.ZARIFZADEH,
    membership.STEINKE,
    membership.NASR,
    reconstruction.HAYES,
    reconstruction.TAKAHASHI,
)


def study_named(name: str) -> Study:
    """The study that ``name`` names.

    Raises:
        ConfigError: there is none.
    """
    found = next((study for study in STUDIES if study.name == name), None)
    if found is None:
        names = [study.name for study in STUDIES]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise ConfigError(f"paper {name!r}: {hint}")
    return found


def studies_tree() -> dict[str, Any]:
    """All studies as ``privkd papers list --json`` prints them."""
    rows = [{"name": s.name, "title": s.title, "scales": [x.name for x in s.scales]} for s in STUDIES]
    return {"papers": rows}


def studies_table() -> "Table":
    """One line for each study, and how to run it."""
    from rich.table import Table

    table = Table(title="privkd papers run NAME", title_justify="left")
    for name in ("name", "paper", "scales"):
        table.add_column(name)
    for study in STUDIES:
        table.add_row(study.name, study.title, ", ".join(scale.name for scale in study.scales))
    return table
