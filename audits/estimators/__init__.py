"""Lower bounds on epsilon from what an attack got right, and the rates that describe an attack.

Every bound holds with the stated confidence whatever the attack: a better attack raises it, no attack makes
it wrong. Thresholds and numbers of guesses are chosen by rules that account for the choice.
"""

from audits.estimators.gaussian_dp import delta_of_mu, epsilon_of_mu, mu_of_epsilon
from audits.estimators.gaussian_pair import GaussianPair, gaussian_pair
from audits.estimators.one_run import (
    BandGuesses,
    BonferroniGuesses,
    FixedGuesses,
    GuessRule,
    OneRunEstimator,
    epsilon_lower_bound_one_run,
    f_dp_one_run,
    one_run,
)
from audits.estimators.rates import Auc, TprAtFpr, auc, balanced_accuracy, tpr_at_fpr
from audits.estimators.resampling import bootstrap, epsilon_of_counts, seen_epsilon
from audits.estimators.threshold import (
    BandThreshold,
    BonferroniThreshold,
    ConfusionEstimator,
    FixedThreshold,
    MultiSplitThreshold,
    SplitThreshold,
    ThresholdRule,
    clopper_pearson,
    epsilon_lower_bound,
    gaussian,
)

__all__ = [
    "Auc",
    "BandGuesses",
    "BandThreshold",
    "BonferroniGuesses",
    "BonferroniThreshold",
    "ConfusionEstimator",
    "FixedGuesses",
    "FixedThreshold",
    "GaussianPair",
    "GuessRule",
    "MultiSplitThreshold",
    "OneRunEstimator",
    "SplitThreshold",
    "ThresholdRule",
    "TprAtFpr",
    "auc",
    "balanced_accuracy",
    "bootstrap",
    "clopper_pearson",
    "delta_of_mu",
    "epsilon_lower_bound",
    "epsilon_lower_bound_one_run",
    "epsilon_of_counts",
    "epsilon_of_mu",
    "f_dp_one_run",
    "gaussian",
    "gaussian_pair",
    "mu_of_epsilon",
    "one_run",
    "seen_epsilon",
    "tpr_at_fpr",
]
