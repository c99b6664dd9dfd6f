"""What a membership score knows of shadow models: their signals, and which sample each was trained on.

The signal that every score reads is the rescaled logit, near normal over retrained models.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from privkd.errors import InputError

Side = Literal["in", "out"]


@dataclass(frozen=True)
class Moments:
    """Signals of each sample over the shadow models of one side.

    Attributes:
        models: ``[sample]``, how many models the side has.
        mean: ``[sample]``.
        squares: ``[sample]``, the sum of squared deviations from the mean.
    """

    models: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """``[sample]`` unbiased variances.

        Raises:
            InputError: a sample has fewer than 2 models on this side.
        """
        if (self.models < 2).any():
            raise InputError(
                "a sample has fewer than 2 shadow models on one side: pool the variance or add some"
            )
        return self.squares / (self.models - 1)

    @property
    def pooled_variance(self) -> float:
        """One variance for all samples, around each one's own mean.

        Raises:
            InputError: no sample has 2 models on this side.
        """
        freedom = float((self.models - 1).sum())
        if freedom <= 0:
            raise InputError("no sample has 2 shadow models on one side: add shadow models")
        return float(self.squares.sum()) / freedom


@dataclass(frozen=True)
class Shadows:
    """Signals of shadow models on the candidates, and which of them each model was trained on.

    Attributes:
        signals: float64 ``[model, sample]``, rescaled logits, finite.
        member: bool ``[model, sample]``, whether the sample was in the model's training set.

    Raises:
        InputError: the shapes differ, are not matrices or empty, or a signal is not finite.
    """

    signals: NDArray[np.float64]
    member: NDArray[np.bool_]

    def __post_init__(self) -> None:
        signals = checked_matrix("signals", self.signals)
        member = np.asarray(self.member)
        if member.dtype != np.bool_ or member.shape != signals.shape:
            raise InputError(
                f"member has dtype {member.dtype} and shape {member.shape}: give bool {signals.shape}"
            )
        object.__setattr__(self, "signals", signals)
        object.__setattr__(self, "member", member)

    @property
    def models(self) -> int:
        """Number of shadow models."""
        return len(self.signals)

    def chosen(self, side: Side) -> NDArray[np.bool_]:
        """``[model, sample]``: which signals belong to ``side``.

        Raises:
            InputError: a sample has no model there.
        """
        mask = self.member if side == "in" else ~self.member
        if not (covered := mask.any(axis=0)).all():
            missing = int((~covered).sum())
            raise InputError(
                f"{missing} samples have no shadow model that was trained {_WITH[side]} them: "
                + ("use an offline score" if side == "in" else "add shadow models")
            )
        return mask

    def moments(self, side: Side) -> Moments:
        """Mean and spread of each sample's signals over the models of ``side``.

        Raises:
            InputError: a sample has no model there.
        """
        mask = self.chosen(side)
        models = mask.sum(axis=0, dtype=np.float64)
        mean = np.einsum("ms,ms->s", self.signals, mask) / models
        deviation = (self.signals - mean) * mask
        return Moments(models, mean, np.einsum("ms,ms->s", deviation, deviation))


_WITH: dict[Side, str] = {"in": "with", "out": "without"}


@dataclass(frozen=True)
class Population:
    """Signals of samples that neither the target nor any shadow model was trained on.

    Attributes:
        target: float64 ``[sample]``, of the target model.
        references: float64 ``[model, sample]``, of the shadow models.

    Raises:
        InputError: the shapes do not fit, are empty, or a signal is not finite.
    """

    target: NDArray[np.float64]
    references: NDArray[np.float64]

    def __post_init__(self) -> None:
        references = checked_matrix("references", self.references)
        object.__setattr__(self, "references", references)
        object.__setattr__(self, "target", checked_vector("target", self.target, length=references.shape[1]))


def checked_vector(name: str, values: ArrayLike, *, length: int | None = None) -> NDArray[np.float64]:
    """``values`` as a float64 vector: finite, not empty, of ``length`` if given.

    Raises:
        InputError: it is not.
    """
    return _checked_floats(name, values, shape=(length,))


def checked_matrix(name: str, values: ArrayLike, *, columns: int | None = None) -> NDArray[np.float64]:
    """``values`` as a float64 matrix: finite, not empty, with ``columns`` columns if given.

    Raises:
        InputError: it is not.
    """
    return _checked_floats(name, values, shape=(None, columns))


def _checked_floats(name: str, values: ArrayLike, *, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    floats = np.asarray(values, dtype=np.float64)
    fits = floats.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, floats.shape, strict=True)
    )
    if not fits or floats.size == 0:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{name} has shape {floats.shape}: give ({wanted}), not empty")
    if not np.isfinite(floats).all():
        raise InputError(f"{name} holds {int((~np.isfinite(floats)).sum())} values that are not finite")
    return floats


_LOG_FLOOR = float(np.log(np.finfo(np.float32).smallest_subnormal))
"""What a float32 probability that underflowed to zero may have been at most."""


def rescaled_logit(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """phi = z_y - logsumexp over the other classes of z, in float64 (Carlini et al. 2022, section IV.C).

    It equals log p_y - log(1 - p_y) without computing 1 - p_y, which rounds to 0 for confident models. The
    probability of the label is its logistic function.

    Args:
        logits: ``[..., class]``, finite; raw logits or log-probabilities, for shifts cancel.
        labels: whole numbers that broadcast to ``[...]``.

    Returns:
        ``[...]``; higher means the model is surer of the label.

    Raises:
        InputError: fewer than 2 classes, a value that is not finite, or labels that do not fit.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim < 1 or z.shape[-1] < 2:
        raise InputError(f"logits have shape {z.shape}: give at least 2 classes in the last axis")
    if not np.isfinite(z).all():
        raise InputError(
            "logits are not all finite: give finite ones, or log-probabilities to "
            "rescaled_logit_of_log_probabilities"
        )
    label = _checked_labels(labels, z.shape)[..., np.newaxis]
    others = z.copy()
    np.put_along_axis(others, label, -np.inf, axis=-1)
    own = np.take_along_axis(z, label, axis=-1)[..., 0]
    return np.asarray(own - logsumexp(others, axis=-1), dtype=np.float64)


def rescaled_logit_of_log_probabilities(
    log_probabilities: ArrayLike, labels: ArrayLike
) -> NDArray[np.float64]:
    """The same from log-probabilities ``[..., class]``, of which some may be minus infinity.

    A probability of zero is taken as the smallest that float32 holds, so the signal stays within about 103.

    Raises:
        InputError: fewer than 2 classes, NaN, a log-probability above 0, or labels that do not fit.
    """
    logs = np.asarray(log_probabilities, dtype=np.float64)
    # Softmax in float32 may leave a log-probability a few units of rounding above 0.
    if not (logs <= 1e-4).all():
        raise InputError("log_probabilities: give values of at most 0, without NaN")
    return rescaled_logit(np.maximum(logs, _LOG_FLOOR), labels)


def _checked_labels(labels: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.intp]:
    label = np.asarray(labels)
    if not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"labels have dtype {label.dtype}: give whole numbers")
    if label.size and (label.min() < 0 or label.max() >= shape[-1]):
        raise InputError(f"labels span {label.min()} to {label.max()}: give 0 to {shape[-1] - 1}")
    try:
        return np.broadcast_to(label, shape[:-1]).astype(np.intp)
    except ValueError:
        raise InputError(f"labels have shape {label.shape}: give one per entry of {shape[:-1]}") from None
