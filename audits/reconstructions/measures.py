"""How good reconstructions are: re-identification, image metrics, attributes, and what was public before."""

import numpy as np
from numpy.typing import NDArray

from attacks.reconstruction.similarity import mse, nearest, psnr, ssim
from audits.estimators import TprAtFpr, tpr_at_fpr
from audits.estimators.rates import CONFIDENCE, mean_of
from audits.estimators.threshold import upper_confidence_bound
from audits.estimators.validation import Floats
from audits.findings import (
    RECONSTRUCTION_FPR,
    AttributeScores,
    ImageScores,
    PublicLikeness,
    Refused,
    Success,
)
from privkd.errors import InputError

Secrets = NDArray[np.int64]

_TINY = 1e-12


def resemblance(drawn: Floats, candidates: Floats) -> Floats:
    """Cosine of each drawing with each candidate, the candidates' mean off both: ``[trial, candidate]``.

    What all candidates share says nothing about which of them it is. Shapes are ``[trial, *shape]`` and
    ``[candidate, *shape]``.
    """
    rows, others = drawn.reshape(len(drawn), -1), candidates.reshape(len(candidates), -1)
    centre = others.mean(axis=0)
    return _unit(rows - centre) @ _unit(others - centre).T


def reidentification(table: Floats, secrets: Secrets) -> Success:
    """How often the best-scoring candidate ``[trial, candidate]`` is the secret one ``[trial]``."""
    trials, candidates = table.shape
    right = int((table.argmax(axis=1) == secrets).sum())
    error = (1 - CONFIDENCE) / 2
    return Success(
        estimate=right / trials,
        low=_lower(right, trials, error),
        high=upper_confidence_bound(right, trials, error=error),
        chance=1 / candidates,
        trials=trials,
        confidence=CONFIDENCE,
    )


def least_success(table: Floats, secrets: Secrets, *, error: float) -> float:
    """What the success rate exceeds but with probability ``error`` (Clopper and Pearson, one-sided)."""
    return _lower(int((table.argmax(axis=1) == secrets).sum()), len(table), error)


def reconstruction_rate(table: Floats, secrets: Secrets) -> TprAtFpr | Refused:
    """True candidates that score above all but a fixed share of the false ones (arXiv 2505.14323).

    A reconstruction's scores with its true candidate are the positives, those with all others the negatives.
    """
    chosen = np.zeros(table.shape, dtype=bool)
    chosen[np.arange(len(table)), secrets] = True
    try:
        return tpr_at_fpr(table[chosen], table[~chosen], RECONSTRUCTION_FPR)
    except InputError as error:
        return Refused(RECONSTRUCTION_FPR, str(error))


def image_scores(drawn: Floats, targets: Floats) -> ImageScores:
    """Means over the trials; both are ``[trial, channel, height, width]``."""
    return ImageScores(
        ssim=float(ssim(drawn, targets).mean()),
        psnr=float(psnr(drawn, targets).mean()),
        mse=float(mse(drawn, targets).mean()),
    )


def public_likeness(drawn: Floats, targets: Floats, public: Floats) -> PublicLikeness:
    """Set the drawings beside the public images ``[image, *shape]`` that are nearest to them."""
    own, found = ssim(drawn, targets), ssim(public[nearest(drawn, public)], targets)
    return PublicLikeness(float(own.mean()), float(found.mean()), float((found >= own).mean()))


def attribute_scores(drawn: Floats, targets: Floats, public: Floats) -> AttributeScores:
    """Attributes guessed right, on average over trials and attributes.

    An attribute is right if it lies on the target's side of the middle of its public range, which for binary
    attributes is equality; one that never varies in public is not counted. The constant guess is the side of
    most public records. ``drawn`` and ``targets`` are ``[trial, *shape]``, ``public`` ``[record, *shape]``.
    """
    flat = public.reshape(len(public), -1)
    low, high = flat.min(axis=0), flat.max(axis=0)
    kept = high > low
    middle = (low + high)[kept] / 2
    truth = targets.reshape(len(targets), -1)[:, kept] > middle
    guess = drawn.reshape(len(drawn), -1)[:, kept] > middle
    constant = (flat[:, kept] > middle).mean(axis=0) > 0.5
    right, blind = (guess == truth).mean(axis=1), (constant == truth).mean(axis=1)
    gained = mean_of(right - blind)
    return AttributeScores(float(right.mean()), float(blind.mean()), gained.estimate, gained.low, gained.high)


def _lower(right: int, trials: int, error: float) -> float:
    return 1 - upper_confidence_bound(trials - right, trials, error=error)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY))
