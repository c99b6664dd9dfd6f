"""LiRA with a normal-inverse-gamma prior on each sample's mean and variance, in the manner of BaVarIA.

From the source (arXiv 2603.11799) is the idea alone, of which its abstract tells: LiRA, RMIA and BASE are one
log-likelihood ratio, and such a prior on its variances helps where shadow models are few. The predictive law
is the textbook's. **How the prior is fitted is ours**, not the paper's, whose choice was not at hand: figures
of this score are no reproduction of its.

A few shadow models give a poor variance per sample, and one variance for all is wrong in another way. The
conjugate prior lies between: with little data each sample borrows from all, with much it stands alone. The
signal's law is then a Student t, whose tails carry the uncertainty that is left. The prior is fitted to all
samples (empirical Bayes), so nothing is tuned: its variance by the moments of the log-variances (Smyth 2004,
section 6.2), its mean by the spread of the samples' means.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import digamma, gammaln, polygamma, stdtr

from attacks.membership.shadows import Moments, Shadows, checked_vector

_MOST_FREEDOM = 1e6
"""Degrees of freedom at which a Student t is normal for every purpose."""
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Prior:
    """Normal-inverse-gamma law of a sample's mean and variance.

    Attributes:
        mean: centre of the means.
        mean_strength: the mean's prior is worth so many models.
        variance: scale of the variances.
        variance_strength: the variance's prior is worth so many models.
    """

    mean: float
    mean_strength: float
    variance: float
    variance_strength: float


@dataclass(frozen=True)
class PredictiveLaw:
    """A Student t for each sample's signal: ``freedom``, ``centre`` and squared ``scale``, each
    ``[sample]``."""

    freedom: NDArray[np.float64]
    centre: NDArray[np.float64]
    variance: NDArray[np.float64]

    def log_density(self, phi: NDArray[np.float64]) -> NDArray[np.float64]:
        """log p(phi), up to a constant common to all samples and sides."""
        v = self.freedom
        normaliser = gammaln((v + 1) / 2) - gammaln(v / 2) - 0.5 * np.log(v * self.variance)
        distance = (phi - self.centre) ** 2 / (v * self.variance)
        return np.asarray(normaliser - (v + 1) / 2 * np.log1p(distance), dtype=np.float64)

    def surprise(self, phi: NDArray[np.float64]) -> NDArray[np.float64]:
        """-log P[signal > phi]."""
        distance = (phi - self.centre) / np.sqrt(self.variance)
        return -np.log(np.maximum(stdtr(self.freedom, -distance), np.finfo(np.float64).tiny))


def bavaria_online(target: ArrayLike, shadows: Shadows) -> NDArray[np.float64]:
    """Log-ratio of the predictive densities with and without the sample.

    Args:
        target: ``[sample]``, the target model's rescaled logits.
        shadows: models with and without every sample; one a side is enough for some of the samples.

    Returns:
        ``[sample]``; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, a sample lacks a model on a side, or no sample has two.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    inside, outside = predictive(shadows.moments("in")), predictive(shadows.moments("out"))
    return inside.log_density(phi) - outside.log_density(phi)


def bavaria_offline(target: ArrayLike, shadows: Shadows) -> NDArray[np.float64]:
    """How surprising the signal is for a model trained without the sample: -log P[signal > phi].

    Arguments and errors are those of ``bavaria_online``; the shadows need no model with the sample.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    return predictive(shadows.moments("out")).surprise(phi)


def predictive(moments: Moments) -> PredictiveLaw:
    """The law of one more signal of each sample, given those seen and the prior that all samples share."""
    prior = fitted_prior(moments)
    strength = prior.mean_strength + moments.models
    centre = (prior.mean_strength * prior.mean + moments.models * moments.mean) / strength
    freedom = prior.variance_strength + moments.models
    pulled = prior.mean_strength * moments.models / strength * (moments.mean - prior.mean) ** 2
    spread = (prior.variance_strength * prior.variance + moments.squares + pulled) / freedom
    return PredictiveLaw(freedom, centre, np.maximum(spread, _LEAST_VARIANCE) * (1 + 1 / strength))


def fitted_prior(moments: Moments) -> Prior:
    """The prior under which the samples' means and variances are what one would expect.

    Raises:
        InputError: no sample has two models.
    """
    average = moments.pooled_variance
    several = moments.models >= 2
    half_freedom = (moments.models[several] - 1) / 2
    variances = np.maximum(moments.squares[several] / (2 * half_freedom), _LEAST_VARIANCE)
    centred = np.log(variances) - digamma(half_freedom) + np.log(half_freedom)
    excess = float(centred.var() - polygamma(1, half_freedom).mean())
    half_strength = _inverse_trigamma(excess)
    variance = float(np.exp(centred.mean() + digamma(half_strength) - np.log(half_strength)))
    # A mean has variance sigma^2 / mean_strength, a mean of n models sigma^2 / n more; the pooled variance
    # estimates the average sigma^2, of which ``variance`` is no average but the prior's scale.
    between = float(moments.mean.var() - average * (1 / moments.models).mean())
    mean_strength = min(average / between, _MOST_FREEDOM) if between > 0 else _MOST_FREEDOM
    return Prior(float(moments.mean.mean()), mean_strength, variance, 2 * half_strength)


def _inverse_trigamma(excess: float) -> float:
    """The argument at which the trigamma function is ``excess``, within what a strength may be."""
    least, most = 0.5, _MOST_FREEDOM / 2
    if excess <= float(polygamma(1, most)):
        return most
    if excess >= float(polygamma(1, least)):
        return least
    return float(
        np.exp(brentq(lambda log: float(polygamma(1, np.exp(log))) - excess, np.log(least), np.log(most)))
    )
