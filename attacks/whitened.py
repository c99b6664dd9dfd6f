"""The matched filter with the shadows' whole covariance: the linear test that no direction of it deceives.

The filter of ``attacks.channel`` weighs each released entry by its own variance. But entries move together:
what one record does to an answer, the other records and the training's chance do to all answers at once. Here
the filter is whitened by the covariance that shadow runs show, shrunk towards a multiple of the identity as
there are fewer runs than entries. In the span of the runs that is ridge regression of membership on the
release, so one eigendecomposition of their Gram matrix serves all candidates and all shrinkages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.lira import lira_online
from attacks.shadows import Shadows, checked_matrix
from privkd.errors import InputError

Floats = NDArray[np.float64]

_SHRINKAGES = np.geomspace(1e-2, 1e2, 13)
"""Tried, in units of the runs' mean squared norm; the left-out outputs that follow membership best decide."""
_LEAST_RUNS = 4
_TINY = 1e-300
_FLAT = 1e-10
"""Eigenvalues below this share of the largest are rounding."""


def whitened_filter(released: ArrayLike, runs: ArrayLike, member: ArrayLike) -> Floats:
    """Log-ratio of each candidate's membership under the whitened filter.

    The filter's output on a run that helped to estimate it means nothing, so each candidate's law with and
    without it is learned from every run's output under the filter of all other runs (in closed form); the
    score is LiRA's on these outputs.

    Args:
        released: ``[target, entry]``, what each target's channel released.
        runs: ``[run, entry]``, the same of shadow runs, noise included.
        member: bool ``[run, candidate]``, whether a run's device held the candidate.

    Returns:
        ``[target, candidate]``; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, a value is not finite, all runs are alike, there are fewer than 4, or a
            candidate lacks runs on a side.
    """
    x = checked_matrix("runs", runs)
    seen = checked_matrix("released", released, columns=x.shape[1])
    inside = np.asarray(member)
    if inside.dtype != np.bool_ or inside.ndim != 2 or len(inside) != len(x):
        raise InputError(
            f"member has dtype {inside.dtype} and shape {inside.shape}: give bool ({len(x)}, candidates)"
        )
    if len(x) < _LEAST_RUNS:
        raise InputError(f"runs holds {len(x)} shadow runs: give at least {_LEAST_RUNS}")
    span = _Span.of(x)
    wanted = inside.astype(np.float64)
    fits = [span.fit(wanted, shrinkage) for shrinkage in _SHRINKAGES]
    best = max(fits, key=lambda fit: _correlation(fit.left_out, wanted))
    shadows = Shadows(best.left_out, inside)
    return np.stack([lira_online(output, shadows) for output in span.inner(seen) @ best.weights])


@dataclass(frozen=True)
class _Fit:
    """One shrinkage: the ``weights`` of the runs and the ``left_out`` outputs, each ``[run, candidate]``."""

    weights: Floats
    left_out: Floats


@dataclass(frozen=True)
class _Span:
    """The centred runs and their Gram matrix ``vectors diag(values) vectors'``."""

    centre: Floats
    centred: Floats
    values: Floats
    vectors: Floats

    @classmethod
    def of(cls, runs: Floats) -> "_Span":
        centre = runs.mean(axis=0)
        centred = runs - centre
        values, vectors = np.linalg.eigh(centred @ centred.T)
        if values[-1] <= 0:
            raise InputError("runs: all shadow runs released the same; there is nothing to learn from them")
        # The centred runs sum to zero: one direction is empty, and those of rounding are left out with it.
        kept = values > _FLAT * values[-1]
        return cls(centre, centred, values[kept], vectors[:, kept])

    def inner(self, released: Floats) -> Floats:
        """Inner products with the centred runs ``[target, run]``."""
        return (released - self.centre) @ self.centred.T

    def fit(self, wanted: Floats, shrinkage: float) -> _Fit:
        """Ridge regression of ``wanted`` ``[run, candidate]`` with a free constant."""
        n = len(wanted)
        ridge = shrinkage * self.values.sum() / n
        about = wanted - wanted.mean(axis=0)
        along = self.vectors.T @ about
        fitted = self.vectors @ (along * (self.values / (self.values + ridge))[:, None])
        leverage = (self.vectors**2 @ (self.values / (self.values + ridge)) + 1 / n)[:, None]
        # Of a linear smoother: the error of a left-out run is its residual over 1 - leverage. The mean of the
        # runs that are left betrays which side the missing one was on, and no target has it: it goes.
        without = (n * wanted.mean(axis=0) - wanted) / (n - 1)
        left_out = wanted - (about - fitted) / (1 - leverage) - without
        return _Fit(self.vectors @ (along / (self.values + ridge)[:, None]), left_out)


def _correlation(outputs: Floats, wanted: Floats) -> float:
    away, about = outputs - outputs.mean(axis=0), wanted - wanted.mean(axis=0)
    return float((away * about).sum() / np.sqrt((away**2).sum() * (about**2).sum() + _TINY))
