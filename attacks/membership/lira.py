"""LiRA, the likelihood-ratio attack (Carlini et al. 2022): a normal law per sample and side.

Below 64 shadow models one variance is pooled over all samples, as the paper advises; the pooled variance is
that around each sample's own mean.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.shadows import Moments, Shadows, checked_vector
from privkd.errors import InputError

Variance = Literal["auto", "sample", "pooled"]

_MODELS_FOR_OWN_VARIANCE = 64
_LEAST_VARIANCE = 1e-12
"""Keeps a score finite where all shadow models agree to the last digit."""


def lira_online(target: ArrayLike, shadows: Shadows, *, variance: Variance = "auto") -> NDArray[np.float64]:
    """log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out), per sample (Algorithm 1).

    Args:
        target: ``[sample]``, the target model's signals phi.
        shadows: models with and without every sample.
        variance: per ``"sample"``, ``"pooled"`` over samples, or by the number of models.

    Returns:
        ``[sample]``; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, or a sample lacks shadow models on a side.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    inside, outside = shadows.moments("in"), shadows.moments("out")
    pooled = _is_pooled(variance, shadows.models)
    return _log_density(phi, inside, pooled) - _log_density(phi, outside, pooled)


def lira_offline(target: ArrayLike, shadows: Shadows, *, variance: Variance = "auto") -> NDArray[np.float64]:
    """(phi - mu_out) / s_out, per sample: only models without the sample are used.

    The paper's score is the normal distribution function of this one. That orders samples alike, but rounds
    to 1 beyond 8 standard deviations, where the surest members would tie.

    Args and errors are those of ``lira_online``; the shadows need no model with the sample.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    outside = shadows.moments("out")
    return (phi - outside.mean) / np.sqrt(_variance(outside, _is_pooled(variance, shadows.models)))


def _is_pooled(variance: Variance, models: int) -> bool:
    if variance not in ("auto", "sample", "pooled"):
        raise InputError(f"variance={variance!r}: expected one of ['auto', 'pooled', 'sample']")
    return variance == "pooled" or (variance == "auto" and models < _MODELS_FOR_OWN_VARIANCE)


def _variance(moments: Moments, pooled: bool) -> NDArray[np.float64]:
    return np.maximum(moments.pooled_variance if pooled else moments.variance, _LEAST_VARIANCE)


def _log_density(phi: NDArray[np.float64], moments: Moments, pooled: bool) -> NDArray[np.float64]:
    """Up to a constant that cancels in the ratio."""
    variance = _variance(moments, pooled)
    return -0.5 * (np.log(variance) + (phi - moments.mean) ** 2 / variance)
