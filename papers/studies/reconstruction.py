"""Hayes et al. 2023 and Takahashi et al. 2023: pages over ``privkd audit reconstruction``."""

from dataclasses import replace

from papers.measurements import Reconstruction
from papers.studies.scales import DIGITS, QUICK
from papers.study import Case, Claim, Figure, Study, Unit

_SCALES = (replace(DIGITS, seeds=3), QUICK)
_BOUNDS = {1: ".155", 2: ".218", 4: ".361", 8: ".650"}
_MATCHING = Reconstruction("gradient", "prior-matching")
_PAIRED = Reconstruction("per_client_logits", "paired-logits")
_PICKED: tuple[tuple[str, str, Unit], ...] = (
    ("right class picked", "success", "share"),
    ("by chance", "chance", "share"),
    ("SSIM", "ssim", "similarity"),
)
_OPEN = ("channel.kind=plain", "data.gap=withheld", "privacy.epsilon=inf")


def _robustness(epsilon: int, bound: str) -> tuple[Claim, ...]:
    name = "gradient.prior-matching"
    return (
        Claim(
            f"epsilon {epsilon}: ceiling, prior 1/10",
            f"{bound} for one Gaussian release",
            Figure(f"epsilon-{epsilon}", f"{name}.ceiling"),
            "share",
        ),
        Claim(
            f"epsilon {epsilon}: success, prior 1/10",
            "below it",
            Figure(f"epsilon-{epsilon}", f"{name}.success"),
            "share",
        ),
    )


HAYES = Study(
    name="hayes2023",
    title="Hayes et al. 2023: bounding training data reconstruction in DP-SGD",
    scales=_SCALES,
    cases=tuple(Case(f"epsilon-{e}", (f"privacy.epsilon={e}",), measurements=(_MATCHING,)) for e in _BOUNDS),
    claims=tuple(claim for epsilon, bound in _BOUNDS.items() for claim in _robustness(epsilon, bound)),
)

TAKAHASHI = Study(
    name="takahashi2023",
    title="Takahashi et al. 2023: breaching FedMD by paired-logits inversion",
    scales=_SCALES,
    cases=(
        Case("open", _OPEN, measurements=(_PAIRED,)),
        Case("private", (*_OPEN, "privacy.epsilon=3"), measurements=(_PAIRED,)),
    ),
    claims=tuple(
        Claim(f"{figure}, {about}", "-", Figure(case, f"per_client_logits.paired-logits.{key}"), unit)
        for case, about in (("open", "no DP"), ("private", "epsilon 3"))
        for figure, key, unit in _PICKED
    ),
)
