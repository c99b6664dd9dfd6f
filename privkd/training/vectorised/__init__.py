"""Many students of one architecture as one vectorised program, equal to `student` step for step."""

from privkd.models.architecture import group_by_architecture, same_architecture
from privkd.training.vectorised.cohort import formulation
from privkd.training.vectorised.gradients import FormulationName
from privkd.training.vectorised.memory import DEFAULT_MEMORY_BUDGET
from privkd.training.vectorised.train import cohort_answers, fit_cohort, is_vectorised, train_cohort

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
