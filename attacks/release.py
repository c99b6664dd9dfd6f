"""Attacks on what crosses the distillation channel: the record under attack is never queried.

They are functions of arrays, so each view feeds its own: one device's answers, the sum of all, the sum less
what colluding devices know of it. The answers are those on the public proxy set, in every round. The matched
filter weighs each released entry by its own variance; the whitened one by the shadows' whole covariance, so
that no direction of it deceives.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr, softmax

from attacks.membership.lira import lira_online
from attacks.membership.shadows import Shadows, checked_matrix
from privkd.errors import InputError

Floats = NDArray[np.float64]

_LEAST_VARIANCE = 1e-12
_SUMS_TO_ONE = 1e-6


@dataclass(frozen=True)
class ReleaseStatistics:
    """What shadow runs say of the release with and without each candidate, before the channel's noise.

    Attributes:
        mean_in: float64 ``[candidate, query, class, round]``, mean release of runs whose device held the
            candidate. Any axes may stand for the last three, as long as all arrays agree.
        mean_out: of the runs without it, same shape.
        variance: around these means, same shape or one that broadcasts to it.

    Raises:
        InputError: shapes do not fit, a value is not finite, or a variance is negative.
    """

    mean_in: Floats
    mean_out: Floats
    variance: Floats

    def __post_init__(self) -> None:
        mean_in, mean_out = _checked("mean_in", self.mean_in), _checked("mean_out", self.mean_out)
        variance = _checked("variance", self.variance)
        if mean_in.ndim < 2 or mean_in.shape != mean_out.shape:
            raise InputError(
                f"mean_in has shape {mean_in.shape}, mean_out {mean_out.shape}: "
                "give both as [candidate, query, class, round]"
            )
        if (variance < 0).any():
            raise InputError(f"variance falls to {variance.min():g}: give variances of at least 0")
        for name, value in (("mean_in", mean_in), ("mean_out", mean_out)):
            object.__setattr__(self, name, value)
        try:
            object.__setattr__(self, "variance", np.broadcast_to(variance, mean_in.shape))
        except ValueError:
            raise InputError(f"variance has shape {variance.shape}: give {mean_in.shape}") from None

    @classmethod
    def from_runs(cls, releases: ArrayLike, member: ArrayLike) -> Self:
        """The statistics of shadow runs ``releases`` ``[run, query, class, round]``, before noise.

        ``member`` is bool ``[run, candidate]``: whether the run's device held the candidate. The variance is
        pooled over both sides of each candidate.

        Raises:
            InputError: shapes do not fit, or a candidate has fewer than 3 runs or none on a side.
        """
        runs = _checked("releases", releases)
        inside = np.asarray(member)
        if inside.dtype != np.bool_ or inside.ndim != 2 or runs.ndim < 2 or len(inside) != len(runs):
            raise InputError(
                f"member has dtype {inside.dtype} and shape {inside.shape}: give bool [run, candidate] "
                f"for releases of shape {runs.shape}"
            )
        n, n_in = len(runs), inside.sum(axis=0)[:, np.newaxis]
        if n < 3 or (n_in < 1).any() or (n_in > n - 1).any():
            raise InputError("a candidate needs 3 shadow runs, at least one with it and one without")
        flat = runs.reshape(n, -1)
        centre = flat.mean(axis=0)
        centred = flat - centre
        above_centre = inside.T.astype(np.float64) @ centred
        mean_in, mean_out = above_centre / n_in, -above_centre / (n - n_in)
        # The spread of all runs is that within the sides and that between their means.
        between = n_in * (n - n_in) / n * (mean_in - mean_out) ** 2
        variance = np.maximum((centred**2).sum(axis=0) - between, 0.0) / (n - 2)
        shape = (inside.shape[1], *runs.shape[1:])
        return cls(
            (centre + mean_in).reshape(shape), (centre + mean_out).reshape(shape), variance.reshape(shape)
        )


def matched_filter(released: ArrayLike, statistics: ReleaseStatistics, *, noise_std: float) -> Floats:
    """sum <l - mu_out, mu_in - mu_out> / (s_shadow^2 + s_noise^2) for each candidate.

    The best linear test of a known shift in normal noise: without the candidate it is N(0, mu^2), with it
    N(mu^2, mu^2), where mu is ``matched_filter_mu``.

    Args:
        released: ``[query, class, round]``, what the channel released; the same for all candidates.
        statistics: of shadow runs.
        noise_std: of the channel's noise on each entry of ``released``; public, 0 for the plain channel.

    Returns:
        ``[candidate]``; higher means more likely a member.

    Raises:
        InputError: shapes do not fit, a value is not finite, or ``noise_std`` is negative.
    """
    shift, weight = _weighted_shift(statistics, noise_std)
    seen, shape = _checked("released", released), statistics.mean_out.shape[1:]
    if seen.shape != shape:
        raise InputError(f"released has shape {seen.shape}: give {shape}, as the shadow runs do")
    return _inner(seen - statistics.mean_out, shift * weight)


def matched_filter_log_ratio(
    released: ArrayLike, statistics: ReleaseStatistics, *, noise_std: float
) -> Floats:
    """log p(released | in) - log p(released | out) under the normal law: the filter less mu^2 / 2.

    It puts candidates with large and small shifts on one scale, as one threshold for all of them needs.
    Arguments and errors are those of ``matched_filter``.
    """
    filtered = matched_filter(released, statistics, noise_std=noise_std)
    return filtered - matched_filter_mu(statistics, noise_std=noise_std) ** 2 / 2


def matched_filter_mu(statistics: ReleaseStatistics, *, noise_std: float) -> Floats:
    """How many standard deviations the filter moves when a candidate is added, ``[candidate]``.

    It is the mu of the Gaussian trade-off curve between both hypotheses. Means estimated from few runs differ
    by chance as well, which raises its square by about the number of entries times (1 / n_in + 1 / n_out)
    times the shadow's part of the variance.

    Raises:
        InputError: ``noise_std`` is negative.
    """
    shift, weight = _weighted_shift(statistics, noise_std)
    return np.sqrt(_inner(shift, shift * weight))


def label_distribution(answers: ArrayLike, reference: ArrayLike, prior: ArrayLike) -> Floats:
    """Guess each device's class histogram from its answers.

    A device whose records have class shares pi shifts its logits against a model whose records had the shares
    ``prior``: by Bayes' rule log p(y | x) moves by log pi_y - log prior_y and a constant of x. The mean shift
    over the queries therefore tells pi; noise of mean zero averages out of it.

    Args:
        answers: logits ``[device, query, class]``, averaged over rounds if there are several.
        reference: logits ``[query, class]`` of a model without the device's records, such as the public model
            that all devices start from, or the mean of the devices.
        prior: ``[class]``, class shares behind ``reference``, each above 0.

    Returns:
        Shares ``[device, class]``.

    Raises:
        InputError: shapes do not fit, a value is not finite, or ``prior`` is no histogram without zeros.
    """
    given = _checked("answers", answers)
    if given.ndim != 3 or given.shape[2] < 2:
        raise InputError(f"answers have shape {given.shape}: give logits [device, query, class]")
    base = _checked("reference", reference)
    if base.shape != given.shape[1:]:
        raise InputError(f"reference has shape {base.shape}: give {given.shape[1:]}, one row a query")
    shares = _checked("prior", prior)
    if shares.shape != given.shape[2:] or (shares <= 0).any() or abs(shares.sum() - 1) > _SUMS_TO_ONE:
        raise InputError(f"prior: give {given.shape[2]} class shares, each above 0, that sum to 1")
    shift = (given - base).mean(axis=1)
    return np.asarray(softmax(np.log(shares) + shift, axis=1), dtype=np.float64)


def label_divergence(true: ArrayLike, guess: ArrayLike) -> Floats:
    """KL(true || guess) in nats for each device: 0 for a perfect guess, infinite where it excludes the truth.

    Both are shares ``[device, class]``.

    Raises:
        InputError: shapes differ, a share is negative, or a row does not sum to 1.
    """
    p = checked_matrix("true", true)
    q = checked_matrix("guess", guess, columns=p.shape[1])
    if len(p) != len(q):
        raise InputError(f"guess has {len(q)} rows, true {len(p)}: give one a device")
    for name, shares in (("true", p), ("guess", q)):
        if (shares < 0).any() or (abs(shares.sum(axis=1) - 1) > _SUMS_TO_ONE).any():
            raise InputError(f"{name}: give class shares of at least 0 that sum to 1 in each row")
    # Shares that sum to 1 up to rounding may leave a hair below 0.
    return np.maximum(rel_entr(p, q).sum(axis=1), 0.0)


def _weighted_shift(statistics: ReleaseStatistics, noise_std: float) -> tuple[Floats, Floats]:
    """mu_in - mu_out and one over the variance of the release, each ``[candidate, query, class, round]``."""
    if not 0 <= noise_std < np.inf:
        raise InputError(f"noise_std={noise_std!r}: give a standard deviation of at least 0")
    variance = np.maximum(statistics.variance + noise_std**2, _LEAST_VARIANCE)
    return statistics.mean_in - statistics.mean_out, 1 / variance


def _inner(left: Floats, right: Floats) -> Floats:
    """The inner product of each candidate's entries."""
    count = len(left)
    return np.einsum("ce,ce->c", left.reshape(count, -1), right.reshape(count, -1))


def _checked(name: str, values: ArrayLike) -> Floats:
    floats = np.asarray(values, dtype=np.float64)
    if floats.size == 0:
        raise InputError(f"{name} is empty")
    if not np.isfinite(floats).all():
        raise InputError(f"{name} holds {int((~np.isfinite(floats)).sum())} values that are not finite")
    return floats


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
