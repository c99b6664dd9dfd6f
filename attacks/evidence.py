"""What attacks look at: records of arrays, one for models and one for what crosses the channel."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attacks.membership.shadows import Population, Shadows
from privkd.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """What is public about the records, for a regression of the signal on it.

    Attributes:
        candidates: float64 ``[sample, feature]``.
        population: likewise ``[nonmember, feature]``.
    """

    candidates: Floats
    population: Floats


@dataclass(frozen=True)
class Evidence:
    """All that a score of one target model looks at.

    Attributes:
        target: float64 ``[sample]``, the target model's rescaled logits on the candidates.
        shadows: the shadow models' on the same candidates, and which they were trained on.
        others: both models' on further non-members, where there are any.
        public: what is public about the records, where it is known.
    """

    target: Floats
    shadows: Shadows
    others: Population | None = None
    public: Features | None = None

    @property
    def population(self) -> Population:
        """Both models' signals on further non-members.

        Raises:
            InputError: there are none.
        """
        if self.others is None:
            raise InputError("the evidence has no population of further non-members: give it one")
        return self.others

    @property
    def features(self) -> Features:
        """What is public about the records.

        Raises:
            InputError: it is not known.
        """
        if self.public is None:
            raise InputError("the evidence has no public features of the records: give it some")
        return self.public


@dataclass(frozen=True)
class ChannelEvidence:
    """All that an attack on the channel looks at: it never queries a device's model on a record.

    Attributes:
        view: what the adversary sees: one device's answers, a sum, what is left of it for colluders.
        released: float64 ``[target, round, query, class]``, what the channel released of each target.
        shadows: likewise of shadow devices ``[shadow, round, query, class]``.
        clean: the shadows' before the channel's noise, same shape.
        log_released: log-probabilities that ``released`` stand for, of at least 1e-4, same shape.
        log_shadows: likewise of ``shadows``.
        noise_std: public standard deviation of the channel's noise on each entry, 0 for none.
        inside: bool ``[shadow, candidate]``, whether a shadow device held the candidate.
        labels: int64 ``[candidate]``, the candidates' classes.
        distil: makes ``surrogates``.
    """

    view: str
    released: Floats
    shadows: Floats
    clean: Floats
    log_released: Floats
    log_shadows: Floats
    noise_std: float
    inside: NDArray[np.bool_]
    labels: NDArray[np.int64]
    distil: Callable[[], tuple[Floats, Floats]] = field(repr=False)

    @cached_property
    def surrogates(self) -> tuple[Floats, Floats]:
        """Logits on the candidates of models distilled from each release alone.

        Of the targets ``[target, candidate, class]``, and of the shadows ``[shadow, candidate, class]``. They
        are trained when they are first asked for.
        """
        return self.distil()
