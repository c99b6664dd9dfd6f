"""Paired-logits inversion (Takahashi, Liu and Liu, CVPR 2023), and its ancestor with one model's answers.

A decoder learns to draw public inputs from the answers to them. Asked with answers that a sure holder of the
class would give, it draws the class.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from attacks.reconstruction.decoder import train_decoders
from attacks.reconstruction.paired import Floats, PairedAnswers, normalised, softened
from attacks.reconstruction.similarity import ssim, total_variation

_TEMPERATURE, _UNSURE = 3.0, 5.0
"""tau and alpha of the paper."""
_PRIOR_WEIGHT = 0.03
_VARIATION_WEIGHT = 0.1
_CLEAREST = (3, 10, 30)
"""So many of the clearest public inputs give a query each, beside the ideal one."""
_KEPT = 4
"""Entries that a truncated answer keeps."""


def paired_logits_inversion(seen: PairedAnswers, *, seed: int) -> Floats:
    """Draw the slot from ``[softmax(server / tau), softmax(client / tau)]``, ``[trial, *shape]``.

    The ideal query pairs a server that is unsure, ``p_j = e^(1/alpha) / (n - 1 + e^(1/alpha))`` for the
    slot, with a client that is sure. Beside it stand the mean pairs of the inputs on which the client's
    probability of the slot rises most. Of their drawings the one that most resembles the others and varies
    least is taken.
    """

    def paired(server: Floats, client: Floats) -> Floats:
        return np.concatenate(
            [
                softened(np.broadcast_to(server, client.shape), _TEMPERATURE),
                softened(client, _TEMPERATURE),
            ],
            axis=-1,
        )

    return _drawn(seen, paired, seed)


def training_based_inversion(seen: PairedAnswers, *, seed: int) -> Floats:
    """Draw the slot from truncated answers of the client alone (Yang et al. 2019), ``[trial, *shape]``."""

    def truncated(_: Floats, client: Floats) -> Floats:
        least = np.sort(client, axis=-1)[..., -min(_KEPT, client.shape[-1]), None]
        return np.log(normalised(np.where(client >= least, client, 0.0)))

    return _drawn(seen, truncated, seed)


def least_varied(drawings: Floats) -> NDArray[np.int64]:
    """Index of the drawing to keep among several of each trial ``[trial, drawing, *shape]``.

    It has the largest mean structural similarity to the others, less a tenth of its total variation. (Where
    drawings stem from different devices, the paper takes the least similar one instead: it finds the
    holder of the class. Here all stem from one release.)
    """
    trials, several = drawings.shape[:2]
    images = drawings.reshape(-1, *drawings.shape[2:])
    table = np.zeros((trials, several, several))
    for first, second in zip(*np.triu_indices(several, 1), strict=True):
        table[:, first, second] = table[:, second, first] = ssim(drawings[:, first], drawings[:, second])
    likeness = table.sum(axis=2) / max(several - 1, 1)
    variation = total_variation(images).reshape(trials, several)
    return np.asarray((likeness - _VARIATION_WEIGHT * variation).argmax(axis=1), dtype=np.int64)


def _drawn(seen: PairedAnswers, features: Callable[[Floats, Floats], Floats], seed: int) -> Floats:
    client = seen.probabilities
    learned = features(seen.reference, client)
    decoders = train_decoders(
        learned, seen.inputs, seen.inputs.mean(axis=0), prior_weight=_PRIOR_WEIGHT, seed=seed
    )
    drawings = decoders.draw(np.concatenate([_ideal(seen, features), _clearest(seen, learned)], axis=1))
    return np.asarray(drawings[np.arange(len(drawings)), least_varied(drawings)], dtype=np.float64)


def _ideal(seen: PairedAnswers, features: Callable[[Floats, Floats], Floats]) -> Floats:
    """What a sure client and an unsure server would answer ``[trial, 1, feature]``."""
    classes = seen.reference.shape[1]
    raised = np.exp(1 / _UNSURE)
    server = np.full(classes, 1 / (classes - 1 + raised))
    server[seen.slot] = raised / (classes - 1 + raised)
    client = np.zeros((len(seen.released), 1, classes))
    client[:, :, seen.slot] = 1.0
    return features(server, normalised(client))


def _clearest(seen: PairedAnswers, learned: Floats) -> Floats:
    """Mean features of the inputs with the most excess of the slot ``[trial, query, feature]``."""
    order = np.argsort(-seen.excess, axis=1)
    ranked = np.take_along_axis(learned, order[:, : max(_CLEAREST), np.newaxis], axis=1)
    return np.stack([ranked[:, :count].mean(axis=1) for count in _CLEAREST], axis=1)
