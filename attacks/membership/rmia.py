"""RMIA, the robust membership inference attack (Zarifzadeh, Liu and Shokri 2024).

Each candidate x is compared with every sample z of a population: how many are dominated by the likelihood
ratio LR(x, z) = [p(x | target) / p(x)] / [p(z | target) / p(z)]? Only the order of the population's ratios
matters, so they are sorted once and no matrix of pairs is formed: O((samples + population) log population)
time and linear memory.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.shadows import Population, Shadows, checked_vector
from privkd.errors import InputError

_LEAST_SIGNAL = -700.0
"""Below it the exponential overflows; the probability is 0 for every purpose."""


def rmia_online(
    target: ArrayLike, shadows: Shadows, population: Population, *, gamma: float = 1.0
) -> NDArray[np.float64]:
    """Share of the population that each sample dominates, with p(x) = (P_in + P_out) / 2.

    Args:
        target: ``[sample]``, the target model's rescaled logits.
        shadows: models with and without every sample.
        population: non-members under the target and the shadow models.
        gamma: how far x must exceed z to dominate it.

    Returns:
        ``[sample]`` in [0, 1]; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, a sample lacks shadow models on a side, or ``gamma`` is not positive.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    probabilities = probability(shadows.signals)
    inside = _mean_over(probabilities, shadows.chosen("in"))
    outside = _mean_over(probabilities, shadows.chosen("out"))
    return _dominated(phi, (inside + outside) / 2, population, gamma)


def rmia_offline(
    target: ArrayLike, shadows: Shadows, population: Population, *, gamma: float = 1.0, a: float = 0.3
) -> NDArray[np.float64]:
    """The same without models trained on the sample: p(x) = ((1 + a) P_out + (1 - a)) / 2.

    ``a`` in [0, 1] says how P_in grows with P_out: near 0 for models that fit their training data, 1 for P_in
    = P_out. Other arguments and errors are those of ``rmia_online``; the shadows need no model with the
    sample.
    """
    if not 0 <= a <= 1:
        raise InputError(f"a={a!r}: give a number from 0 to 1")
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    outside = _mean_over(probability(shadows.signals), shadows.chosen("out"))
    return _dominated(phi, ((1 + a) * outside + (1 - a)) / 2, population, gamma)


def dominated_share(
    ratios: NDArray[np.float64], population_ratios: NDArray[np.float64], gamma: float
) -> NDArray[np.float64]:
    """For each ratio ``[sample]`` the share of the population's ratios ``[population]`` with LR >= gamma."""
    thresholds = np.sort(gamma * population_ratios)
    # Searching in ascending order walks memory forwards: twice as fast, its sort included.
    ascending = np.argsort(ratios)
    share = np.empty(len(ratios))
    share[ascending] = np.searchsorted(thresholds, ratios[ascending], side="right")
    share /= len(thresholds)
    return share


def probability(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of the label whose rescaled logit is given; never 0, so that ratios exist."""
    return 1 / (1 + np.exp(-np.maximum(signals, _LEAST_SIGNAL)))


def _mean_over(probabilities: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.einsum("ms,ms->s", probabilities, mask) / mask.sum(axis=0)


def _dominated(
    phi: NDArray[np.float64], evidence: NDArray[np.float64], population: Population, gamma: float
) -> NDArray[np.float64]:
    """``evidence`` is p(x) ``[sample]``; p(z) is the mean over all models, for none was trained on z."""
    if not 0 < gamma < np.inf:
        raise InputError(f"gamma={gamma!r}: give a positive number")
    population_ratios = probability(population.target) / probability(population.references).mean(axis=0)
    return dominated_share(probability(phi) / evidence, population_ratios, gamma)
