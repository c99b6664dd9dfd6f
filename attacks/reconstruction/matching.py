"""Which of some candidates the release speaks of: prior-aware matching, and the informed adversary.

Prior-aware matching (Hayes et al. 2023): the adversary knows everything but which of ``kappa`` candidates it
was. In the channel's and the student's views it learns each candidate's release from replays of its own; in
the gradient view it knows each candidate's clipped gradient. The informed adversary (Balle, Cherubin and
Hayes 2022) knows all records but one and the weights, and learns from shadow students to read that one out.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import RidgeCV

from attacks.reconstruction.inversion import Floats
from privkd.errors import InputError

_RIDGE = 1e-2
"""Share of the mean variance that is added to every direction: few replays know few directions well."""
_TINY = 1e-18


@dataclass(frozen=True)
class CandidateReplays:
    """Replays with each candidate, seen as coordinates in the space that all of them span.

    Attributes:
        centre: mean release, float64 ``[entry]``.
        basis: orthonormal directions ``[direction, entry]``.
        means: each candidate's mean ``[candidate, direction]``.
        covariance: around these means, before the channel's noise ``[direction, direction]``.
    """

    centre: Floats
    basis: Floats
    means: Floats
    covariance: Floats

    @classmethod
    def of(cls, releases: ArrayLike) -> Self:
        """From clean releases ``[candidate, replay, ...]``, before the channel's noise.

        Equal randomness in equally numbered replays of all candidates sharpens the differences of the means.

        Raises:
            InputError: fewer than 2 candidates or 2 replays of each, or a value that is not finite.
        """
        runs = np.asarray(releases, dtype=np.float64)
        if runs.ndim < 3 or min(runs.shape[:2]) < 2 or not np.isfinite(runs).all():
            raise InputError(
                f"releases of shape {runs.shape}: give finite [candidate, replay, ...], 2 of each"
            )
        candidates, replays = runs.shape[:2]
        flat = runs.reshape(candidates * replays, -1)
        centre = flat.mean(axis=0)
        coordinates, basis = _spanned(flat - centre)
        grouped = coordinates.reshape(candidates, replays, -1)
        means = grouped.mean(axis=1)
        within = (grouped - means[:, np.newaxis]).reshape(candidates * replays, -1)
        covariance = within.T @ within / (candidates * (replays - 1))
        return cls(centre, basis, means, covariance)


def match_candidates(released: ArrayLike, replays: CandidateReplays, *, noise_std: float) -> Floats:
    """Log-likelihood of each candidate, up to a constant of each trial, by normal laws of equal covariance.

    Args:
        released: ``[trial, ...]``, what the adversary saw, of the replays' shape.
        replays: what it learned beforehand.
        noise_std: of the channel's noise on every entry; public, 0 for none.

    Returns:
        ``[trial, candidate]``; the highest is the best guess.

    Raises:
        InputError: the shapes do not fit.
    """
    seen = np.asarray(released, dtype=np.float64)
    flat = seen.reshape(len(seen), -1)
    if flat.shape[1] != len(replays.centre):
        raise InputError(f"a release has {flat.shape[1]} entries, the replays' {len(replays.centre)}")
    directions = len(replays.basis)
    ridge = _RIDGE * float(np.trace(replays.covariance)) / max(directions, 1) + noise_std**2 + _TINY
    covariance = replays.covariance + ridge * np.eye(directions)
    coordinates = (flat - replays.centre) @ replays.basis.T
    weights = np.linalg.solve(covariance, replays.means.T)
    bias = 0.5 * np.einsum("cd,dc->c", replays.means, weights)
    return np.asarray(coordinates @ weights - bias, dtype=np.float64)


def match_gradients(
    sums: ArrayLike, gradients: ArrayLike, *, noise_multiplier: float, sampling_rate: float
) -> Floats:
    """Log-likelihood of each candidate given noised gradient sums without the known records' part.

    With full batches it is ``sum_t -||clip(g_t(z)) - g~_t||^2 / (2 s^2)`` (Hayes et al. 2023) up to a
    constant; with Poisson sampling each step is a mixture of with and without the candidate.

    Args:
        sums: ``[trial, step, parameter]``, in clip norms.
        gradients: clipped, of each candidate ``[candidate, parameter]``, in clip norms.
        noise_multiplier: standard deviation of the noise on each entry, in clip norms, above 0.
        sampling_rate: probability with which the record joins a step.

    Returns:
        ``[trial, candidate]``.

    Raises:
        InputError: the shapes do not fit, or the noise multiplier is not positive.
    """
    seen, known = np.asarray(sums, dtype=np.float64), np.asarray(gradients, dtype=np.float64)
    if seen.ndim != 3 or known.ndim != 2 or seen.shape[2] != known.shape[1]:
        raise InputError(
            f"sums of shape {seen.shape} and gradients of shape {known.shape}: "
            "give [trial, step, parameter] and [candidate, parameter]"
        )
    if not noise_multiplier > 0:
        raise InputError(f"noise_multiplier={noise_multiplier!r}: expected a positive number")
    energy = (known**2).sum(axis=1)
    exponent = (seen @ known.T - energy / 2) / noise_multiplier**2
    if sampling_rate < 1:
        exponent = np.logaddexp(np.log1p(-sampling_rate), np.log(sampling_rate) + exponent)
    return np.asarray(exponent.sum(axis=1), dtype=np.float64)


def simplex(candidates: int) -> Floats:
    """Unit vectors that lie as far apart as so many can ``[candidate, candidate]``, and sum to zero.

    Candidates whose gradients form it are easier to tell apart than any others of the same norm.
    """
    centred = np.eye(candidates) - 1 / candidates
    return np.asarray(centred / np.linalg.norm(centred[0]), dtype=np.float64)


def _spanned(rows: Floats) -> tuple[Floats, Floats]:
    """Coordinates ``[row, direction]`` in an orthonormal basis ``[direction, entry]`` of the rows' space."""
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values > max(float(values[-1]), _TINY) * 1e-12
    scale = np.sqrt(values[kept])
    basis = (vectors[:, kept] / scale).T @ rows
    return vectors[:, kept] * scale, basis


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
