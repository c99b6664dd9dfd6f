"""Many students of one architecture as one vectorised program, equal to `student` step for step."""

from privkd.architecture import group_by_architecture, same_architecture
from privkd.cohort.answers import cohort_answers
from privkd.cohort.chunks import DEFAULT_MEMORY_BUDGET
from privkd.cohort.formulations import FormulationName
from privkd.cohort.planning import formulation
from privkd.cohort.train import fit_cohort, is_vectorised, train_cohort

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "FormulationName",
    "cohort_answers",
    "fit_cohort",
    "formulation",
    "group_by_architecture",
    "is_vectorised",
    "same_architecture",
    "train_cohort",
]
