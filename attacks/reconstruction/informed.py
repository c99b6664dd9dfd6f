"""The informed adversary (Balle, Cherubin and Hayes 2022): all records but one are known, and the weights.

It trains shadow students on the known records and one of its own, and learns to read that one out of the
weights. Their reconstructor is a network on thousands of shadows; this one is a ridge regression, which tens
carry, with its penalty chosen by leaving one out.
"""

import numpy as np
from sklearn.linear_model import RidgeCV

from attacks.reconstruction.paired import Floats
from privkd.errors import InputError

_PENALTIES = np.logspace(-6, 4, 21)
_STILL = 1e-12


def rebuild_records(weights: Floats, shadow_weights: Floats, shadow_records: Floats) -> Floats:
    """The unknown record of each trial ``[trial, *shape]``.

    Args:
        weights: of the audited students ``[trial, weight]``.
        shadow_weights: of the adversary's own ``[shadow, weight]``.
        shadow_records: the record that each of these had beside the known ones ``[shadow, *shape]``.

    Raises:
        InputError: the shapes do not fit, or fewer than 3 shadows.
    """
    if len(shadow_weights) != len(shadow_records) or len(shadow_weights) < 3:
        raise InputError(
            f"{len(shadow_weights)} shadows for {len(shadow_records)} records: give equally many, 3 or more"
        )
    if weights.shape[1] != shadow_weights.shape[1]:
        raise InputError(f"{weights.shape[1]} weights, the shadows have {shadow_weights.shape[1]}")
    centre, spread = shadow_weights.mean(axis=0), float(shadow_weights.std())
    scale = max(spread, _STILL)
    model = RidgeCV(alphas=_PENALTIES).fit(
        (shadow_weights - centre) / scale, shadow_records.reshape(len(shadow_records), -1)
    )
    rebuilt = model.predict((weights - centre) / scale)
    return np.asarray(rebuilt, dtype=np.float64).reshape(len(weights), *shadow_records.shape[1:])
