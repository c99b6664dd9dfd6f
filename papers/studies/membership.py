"""LiRA, RMIA and the audits of one run: pages over ``privkd audit membership``."""

from dataclasses import replace

from papers.measurements import Effort, Membership
from papers.studies.scales import DIGITS, QUICK
from papers.study import Case, Claim, Figure, Study

_SCALES = (replace(DIGITS, seeds=3), QUICK)
_MANY = (replace(DIGITS, seeds=3, effort=Effort(targets=76)), QUICK)
"""With as many audited replays as a TPR at 0.1 % FPR takes."""
_OPEN, _PRIVATE = ("privacy.epsilon=inf",), ("privacy.epsilon=3",)


def _gradient(epsilon: float, attack: str) -> Case:
    return Case(
        f"epsilon-{epsilon:g}",
        (f"privacy.epsilon={epsilon:g}",),
        measurements=(Membership("gradient", attack),),
    )


def _on_students(attack: str) -> tuple[Case, ...]:
    measured = (Membership("student", attack),)
    return (Case("open", _OPEN, measurements=measured), Case("private", _PRIVATE, measurements=measured))


def _scores(attack: str, auc: str, tpr: str) -> tuple[Claim, ...]:
    """With what was published for the AUC and for the TPR at 0.1 % FPR, both without DP."""
    name = f"student.{attack}"
    return (
        Claim("AUC, no DP", auc, Figure("open", f"{name}.auc"), "share"),
        Claim("TPR at 1 % FPR, no DP", "-", Figure("open", f"{name}.tpr_at_0.01"), "%"),
        Claim("TPR at 0.1 % FPR, no DP", tpr, Figure("open", f"{name}.tpr_at_0.001"), "%"),
        Claim("AUC, epsilon 3", "-", Figure("private", f"{name}.auc"), "share"),
        Claim("TPR at 1 % FPR, epsilon 3", "-", Figure("private", f"{name}.tpr_at_0.01"), "%"),
        Claim("TPR at 0.1 % FPR, epsilon 3", "-", Figure("private", f"{name}.tpr_at_0.001"), "%"),
        Claim("lower bound, epsilon 3", "-", Figure("private", f"{name}.epsilon_lower"), "epsilon"),
        Claim("the ledger's upper bound", "-", Figure("private", f"{name}.epsilon_upper"), "epsilon"),
    )


def _bounds(epsilon: float, attack: str, published: str) -> tuple[Claim, ...]:
    case, name = f"epsilon-{epsilon:g}", f"gradient.{attack}"
    return (
        Claim(
            f"lower bound, claimed {epsilon:g}", published, Figure(case, f"{name}.epsilon_lower"), "epsilon"
        ),
        Claim("the ledger's upper bound", "-", Figure(case, f"{name}.epsilon_upper"), "epsilon"),
    )


CARLINI = Study(
    name="carlini2022",
    title="Carlini et al. 2022: membership inference from first principles (LiRA)",
    scales=_MANY,
    cases=_on_students("lira-online"),
    claims=_scores("lira-online", ".6856 (TF-Privacy, CIFAR-10)", "5.93 % (the same)"),
)
ZARIFZADEH = Study(
    name="zarifzadeh2024",
    title="Zarifzadeh et al. 2024: low-cost high-power membership inference (RMIA)",
    scales=_MANY,
    cases=_on_students("rmia-offline"),
    claims=_scores("rmia-offline", ".7102, reproduced .6467 (CIFAR-10)", "-"),
)
STEINKE = Study(
    name="steinke2023",
    title="Steinke et al. 2023: privacy auditing with one training run",
    scales=_SCALES,
    cases=(_gradient(4, "canaries-one-run"),),
    claims=_bounds(4, "canaries-one-run", "1.8 at 4 (CIFAR-10)"),
)
NASR = Study(
    name="nasr2023",
    title="Nasr et al. 2023: tight auditing of differentially private machine learning",
    scales=_SCALES,
    cases=(_gradient(4, "canaries-many-trials"),),
    claims=_bounds(4, "canaries-many-trials", "near tight"),
)
