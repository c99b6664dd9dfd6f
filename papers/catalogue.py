"""All studies, by name."""

import difflib

from papers.studies import device_level, du2022, membership, personalisation, reconstruction, training
from papers.study import Study
from privkd.errors import ConfigError

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
