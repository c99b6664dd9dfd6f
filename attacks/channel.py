"""Membership attacks on what crosses the channel, as functions of one `ChannelEvidence`.

Each returns scores ``[target, candidate]``; higher means more likely a member.
"""

import numpy as np

from attacks.evidence import ChannelEvidence, Floats
from attacks.membership.lira import lira_online
from attacks.membership.shadows import Shadows, rescaled_logit
from attacks.release import ReleaseStatistics, matched_filter_log_ratio, whitened_filter

_CHUNK_ENTRIES = 1 << 24
"""Candidates times released entries at a time: bounds the memory of the shadow statistics."""


def matched_filter_attack(evidence: ChannelEvidence) -> Floats:
    """The matched filter's log-ratio: see `attacks.release.matched_filter_log_ratio`."""
    chunk = max(1, _CHUNK_ENTRIES // evidence.clean[0].size)
    parts = []
    for start in range(0, evidence.inside.shape[1], chunk):
        statistics = ReleaseStatistics.from_runs(evidence.clean, evidence.inside[:, start : start + chunk])
        parts.append(
            np.stack(
                [
                    matched_filter_log_ratio(seen, statistics, noise_std=evidence.noise_std)
                    for seen in evidence.released
                ]
            )
        )
    return np.concatenate(parts, axis=1)


def whitened_filter_attack(evidence: ChannelEvidence) -> Floats:
    """The whitened filter's log-ratio: see `attacks.release.whitened_filter`.

    It reads answers as they are under noise, which is added to those; else their logarithms.
    """
    seen, runs = (
        (evidence.released, evidence.shadows)
        if evidence.noise_std > 0
        else (evidence.log_released, evidence.log_shadows)
    )
    return whitened_filter(seen.reshape(len(seen), -1), runs.reshape(len(runs), -1), evidence.inside)


def distillation_lira(evidence: ChannelEvidence) -> Floats:
    """LiRA on surrogates that are distilled from the releases alone (Jagielski et al. 2023; Shi 2025)."""
    targets, shadows = (rescaled_logit(logits, evidence.labels) for logits in evidence.surrogates)
    learned = Shadows(shadows, evidence.inside)
    return np.stack([lira_online(target, learned) for target in targets])
