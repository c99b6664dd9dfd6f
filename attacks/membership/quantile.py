"""Quantile-regression attack (Bertran et al. 2023): no shadow model, one regression on non-members."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.shadows import checked_matrix, checked_vector
from privkd.errors import InputError


def quantile_regression(
    target: ArrayLike,
    features: ArrayLike,
    *,
    nonmember_target: ArrayLike,
    nonmember_features: ArrayLike,
    false_positive_rate: float = 0.01,
    seed: int = 0,
) -> NDArray[np.float64]:
    """phi - q(x), where q(x) is the signal that a non-member like x exceeds with ``false_positive_rate``.

    q is gradient-boosted trees fitted with the pinball loss on non-members. The target model is queried once
    a sample; nothing is retrained.

    Args:
        target: ``[sample]``, the target model's rescaled logits.
        features: ``[sample, feature]``, what q may look at: the record, its label, public embeddings.
        nonmember_target: ``[nonmember]``, rescaled logits of known non-members.
        nonmember_features: ``[nonmember, feature]``.
        false_positive_rate: at threshold 0, in (0, 1).
        seed: of the trees.

    Returns:
        ``[sample]``; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, a value is not finite, or the rate lies outside (0, 1).
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate={false_positive_rate!r}: give a rate between 0 and 1")
    known = checked_matrix("nonmember_features", nonmember_features)
    asked = checked_matrix("features", features, columns=known.shape[1])
    phi = checked_vector("target", target, length=len(asked))
    model = HistGradientBoostingRegressor(
        loss="quantile", quantile=1 - false_positive_rate, random_state=seed, early_stopping=False
    )
    model.fit(known, checked_vector("nonmember_target", nonmember_target, length=len(known)))
    return np.asarray(phi - model.predict(asked), dtype=np.float64)
