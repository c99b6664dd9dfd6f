"""The channel's views of one audit: what each shows of replayed devices, and the attacks on it."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from audits.absorption import absorbed_logits
from audits.canaries import Pool
from audits.distillation import FLOOR, log_probabilities, surrogate_logits
from audits.game import DeviceSide, Role
from audits.labels import LabelFinding, infer_labels, uneven_devices
from audits.release import Crowd, Floats, Released, per_client
from audits.scoring import (
    ScoreAll,
    Signals,
    matched_filter_scores,
    score_attacks,
    whitened_filter_scores,
)
from audits.traces import Cache, Traces, others_answers
from privkd.noise import NoiseRoot
from privkd.progress import Progress
from privkd.randomness import derive_seed

_LEAST_DEVICES = 16


@dataclass(frozen=True)
class Replays:
    """The replays of both roles, on one pool."""

    pool: Pool
    targets: Traces
    shadows: Traces


class Wires:
    """What the channel's views show; the other devices are replayed once for all of them."""

    def __init__(self, side: DeviceSide, cache: Cache, progress: Progress) -> None:
        self._side = side
        self._cache = cache
        self._seed = cache.key.seed
        self._progress = progress

    def attacks(self, view: str, replays: Replays) -> dict[str, ScoreAll]:
        """The membership attacks on one of these views."""
        seen = self._released(view, replays.targets.answers, "target")
        learned = self._released(view, replays.shadows.answers, "shadow")
        inside = replays.shadows.inside
        return {
            "matched-filter": partial(matched_filter_scores, seen, learned, inside),
            "whitened-filter": lambda: whitened_filter_scores(
                self._signals(seen), self._signals(learned), inside
            ),
            "distillation-lira": partial(self._distillation, seen, learned, replays),
        }

    def labels(self, view: str, pool: Pool, devices: int, epsilon_upper: float) -> LabelFinding:
        """Label-distribution inference on so many devices, learned from as many others."""
        count = max(devices, _LEAST_DEVICES)
        self._progress.stage(f"audit: devices of uneven classes ({view})")
        found = []
        for role in ("target", "shadow"):
            uneven = uneven_devices(self._side, pool, self._cache, role, count, self._progress.advance)
            released = self._released(view, uneven.answers, f"labels-{role}")
            found.append((uneven.shares, log_probabilities(self._side, released, FLOOR)))
        return infer_labels(view, found[0], found[1], epsilon_upper)

    def teacher_signals(self, replays: Replays) -> Signals:
        """The teacher after it learned from each replay's release."""
        plan, root = self._side.game.plan, NoiseRoot.from_seed(derive_seed(self._seed, "audit", "rest"))
        rest = per_client(self._others, plan, root).answers if len(self._others) else self._others.numpy()
        secure = self._side.game.config.channel.kind == "secure"
        view = "secure_sum" if secure else "per_client_logits"

        def absorbed(role: Role, models: Traces) -> tuple[Floats, Floats]:
            released = self._released(view, models.answers, role)
            self._progress.stage(f"audit: teachers of the {role}s")
            return absorbed_logits(
                self._side, released, rest, replays.pool, self._cache, role, self._progress.advance
            )

        (targets, seen), (shadows, there) = (
            absorbed("target", replays.targets),
            absorbed("shadow", replays.shadows),
        )
        return Signals(targets, shadows, seen, there, replays.shadows.inside)

    def _released(self, view: str, answers: Tensor, role: str) -> Released:
        game = self._side.game
        root = NoiseRoot.from_seed(derive_seed(self._seed, "audit", "channel", role))
        if view == "per_client_logits":
            return per_client(answers, game.plan, root, game.config.channel.kind)
        others = self._others[None].expand(len(answers), *self._others.shape)
        crowd = Crowd(game.plan, game.config.channel.aggregators, others)
        total = crowd.secure_sum(answers, root)
        return total if view == "secure_sum" else crowd.colluding(answers, total)

    def _signals(self, released: Released) -> Tensor:
        """The answers as they are under noise, which is added to those; else their logarithms."""
        if released.noise_std > 0:
            return torch.from_numpy(released.answers)
        return log_probabilities(self._side, released, FLOOR)

    def _distillation(self, seen: Released, learned: Released, replays: Replays) -> Floats:
        """LiRA on surrogates that are distilled from the releases alone."""
        pool = replays.pool
        candidates, shadows = (
            self._surrogates(released, pool, role)
            for role, released in (("target", seen), ("shadow", learned))
        )
        # LiRA reads no population; the candidates stand in for it.
        signals = Signals(candidates, shadows, candidates, shadows, replays.shadows.inside)
        labels = pool.candidates.labels.cpu().numpy()
        return score_attacks(signals, labels, labels, ("lira-online",))["lira-online"]()

    def _surrogates(self, released: Released, pool: Pool, role: str) -> Floats:
        """Logits of one surrogate a model on the candidates ``[model, candidate, class]``."""
        count = len(released.answers)

        def compute() -> dict[str, Tensor]:
            self._progress.stage(f"audit: surrogates of the {role}s ({released.view})")
            advance = partial(self._progress.advance, total=count)
            inputs = pool.candidates.inputs
            return {"logits": surrogate_logits(self._side, released, inputs, self._seed, advance)}

        what: dict[str, str | int] = {"what": f"surrogate-{role}", "view": released.view, "models": count}
        return self._cache.tensors(what, compute)["logits"].to(torch.float64).numpy()

    @cached_property
    def _others(self) -> Tensor:
        self._progress.stage("audit: the other devices")
        return others_answers(self._side, self._cache, self._progress.advance)
