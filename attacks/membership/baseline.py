"""Baselines that any stronger score must beat: a global threshold, and ranks without a model of the
signal."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_expit

from attacks.membership.shadows import Shadows, checked_vector


def global_loss(target: ArrayLike) -> NDArray[np.float64]:
    """Minus the cross-entropy of each sample under the target model (Yeom et al. 2018).

    Args:
        target: ``[sample]``, the target model's rescaled logits.

    Returns:
        ``[sample]``; higher means more likely a member.

    Raises:
        InputError: not a vector of finite numbers.
    """
    return np.asarray(log_expit(checked_vector("target", target)), dtype=np.float64)


def attack_p(target: ArrayLike, population: ArrayLike) -> NDArray[np.float64]:
    """Share of a population of non-members whose loss under the target model is at least the sample's.

    Ye et al. 2022, attack P. ``target`` ``[sample]`` and ``population`` ``[population]`` are rescaled logits
    of the target model; a lower loss is a higher logit.

    Raises:
        InputError: not vectors of finite numbers.
    """
    phi = checked_vector("target", target)
    reference = np.sort(checked_vector("population", population))
    return np.searchsorted(reference, phi, side="right") / len(reference)


def attack_r(target: ArrayLike, shadows: Shadows) -> NDArray[np.float64]:
    """Share of the models not trained on the sample whose loss on it is at least the target's.

    Ye et al. 2022, attack R. ``target`` is ``[sample]``, rescaled logits of the target model.

    Raises:
        InputError: shapes do not fit, or every shadow model was trained on some sample.
    """
    phi = checked_vector("target", target, length=shadows.signals.shape[1])
    outside = shadows.chosen("out")
    return ((shadows.signals <= phi) & outside).sum(axis=0) / outside.sum(axis=0)
