"""The games' replays: what audited device, shadows and other devices did, kept in the run's folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from audits.game import Cache, GameKey, ReplayContext, others_answers
from audits.reconstructions.secrets import (
    ClassSecrets,
    Floats,
    RecordSecrets,
    draw_classes,
    draw_records,
    numbers,
    without_classes,
)
from audits.requests import ReconstructionRequest
from audits.scoring import Released
from audits.views import Crowd, per_client
from privkd.data.scenario import LabelledSet
from privkd.models.zoo import trained_parameters
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import derive_seed
from privkd.progress import Progress
from privkd.runs.folder import RunFolder


@dataclass(frozen=True)
class Played:
    """What replayed devices did.

    Attributes:
        answers: bounded, before the channel ``[model, round, query, class]``.
        logits: of the students after the last round, on the game's inputs ``[model, input, class]``.
        weights: those that training moves, after the last round ``[model, weight]``.
    """

    answers: Tensor
    logits: Floats
    weights: Floats


class Replays:
    """All replays of one audit, each played once and read back afterwards."""

    def __init__(
        self, side: ReplayContext, folder: RunFolder, request: ReconstructionRequest, progress: Progress
    ) -> None:
        self.side = side
        self.request = request
        self.progress = progress
        self.cache = Cache(folder, GameKey("reconstruction", request.device, request.seed))

    @cached_property
    def first_round(self) -> ReplayContext:
        """The class game's part of the run: later teachers have learned the classes."""
        transcript = replace(self.side.transcript, exchanges=self.side.transcript.exchanges[:1])
        return replace(self.side, transcript=transcript, tasks=self.side.tasks[:1])

    @cached_property
    def classes(self) -> ClassSecrets:
        """The secrets of the class game."""
        request = self.request
        return draw_classes(self.side.run.scenario, request.device, request.trials, request.seed)

    @cached_property
    def records(self) -> RecordSecrets:
        """The secrets of the record game."""
        request = self.request
        return draw_records(
            self.side.run.scenario,
            request.device,
            candidates=request.candidates,
            trials=request.trials,
            shadows=request.candidates * request.shadows,
            seed=request.seed,
        )

    @cached_property
    def class_trials(self) -> Played:
        """The audited device with each trial's secret class."""
        first = self.first_round
        return self._played("class-trial", first, self.classes.shards, first.question(0).inputs)

    @cached_property
    def class_others(self) -> Tensor:
        """The other devices without the classes in question ``[other, round, query, class]``."""
        devices = self.side.run.scenario.devices
        chosen = [number for number in range(len(devices)) if number != self.request.device]
        if not chosen:
            return torch.zeros((0, *self.class_trials.answers.shape[1:]))
        gap = self.classes.classes
        shards = [without_classes(devices[number].train, gap) for number in chosen]

        def compute() -> dict[str, Tensor]:
            replayed = self.first_round.replay(
                shards, chosen, self.request.seed, "class-other", self.progress.advance
            )
            return {"answers": replayed.answers}

        self.progress.stage("audit: the other devices, without the secret classes")
        answers = self.cache.tensors({"what": "class-others"}, compute)["answers"]
        return self.first_round.beside(chosen, answers)

    @cached_property
    def record_trials(self) -> Played:
        """The audited device with each trial's secret record."""
        return self._played("record-trial", self.side, self._secret_shards, self.records.candidates.inputs)

    @cached_property
    def record_candidates(self) -> Played:
        """``shadows`` replays with each candidate in turn, with equal randomness for all candidates."""
        secret, count = self.records, self.request.shadows
        rows = range(len(secret.candidates))
        shards = [secret.shard(_one(secret.candidates, row)) for row in rows for _ in range(count)]
        places = [shadow for _ in rows for shadow in range(count)]
        return self._played("record-candidate", self.side, shards, secret.candidates.inputs, places)

    @cached_property
    def informed_trials(self) -> Played:
        """`record_trials` as the informed adversary sees them, who knows all but the record and the noise.

        Without DP there is no noise, and it knows the batches too: all replays draw the same.
        """
        if self.side.run.mechanism is not None:
            return self.record_trials
        shards, inputs = self._secret_shards, self.records.candidates.inputs
        return self._played("informed-trial", self.side, shards, inputs, [0] * len(shards))

    @cached_property
    def informed_shadows(self) -> Played:
        """Replays with one public record each in the place of the secret one, as `informed_trials`."""
        secret = self.records
        shards = [secret.shard(_one(secret.public, row)) for row in range(len(secret.public))]
        places = None if self.side.run.mechanism is not None else [0] * len(shards)
        return self._played("informed", self.side, shards, secret.candidates.inputs, places)

    @property
    def _secret_shards(self) -> list[LabelledSet]:
        secret = self.records
        return [secret.shard(_one(secret.candidates, int(index))) for index in secret.secrets]

    @cached_property
    def record_others(self) -> Tensor:
        """The run's other devices on their own records."""
        self.progress.stage("audit: the other devices")
        return others_answers(self.side, self.cache, self.progress.advance)

    def released(self, view: str, played: Played, others: Tensor, role: str) -> Released:
        """What a view of the channel shows of ``played`` beside ``others``."""
        run = self.side.run
        root = NoiseRoot.from_seed(derive_seed(self.request.seed, "audit", "reconstruction", role))
        if view == "per_client_logits":
            return per_client(played.answers, run.plan, root)
        count = len(played.answers)
        crowd = Crowd(run.plan, run.config.channel.aggregators, others[None].expand(count, *others.shape))
        total = crowd.secure_sum(played.answers, root)
        return total if view == "secure_sum" else crowd.colluding(played.answers, total)

    def _played(
        self,
        what: str,
        side: ReplayContext,
        shards: Sequence[LabelledSet],
        inputs: Tensor,
        places: Sequence[int] | None = None,
    ) -> Played:
        request = self.request

        def compute() -> dict[str, Tensor]:
            # Without DP, the informed adversary's trials and shadows share one stream: one role for both.
            role = "informed" if what.startswith("informed") else what
            devices = [request.device] * len(shards)
            replayed = side.replay(shards, devices, request.seed, role, self.progress.advance, places)
            return {
                "answers": replayed.answers,
                "logits": side.answer(replayed.students, inputs),
                "weights": self._moved(replayed.students),
            }

        self.progress.stage(f"audit: replays ({what})")
        key: dict[str, str | int] = {
            "what": f"reconstruction-{what}",
            "trials": request.trials,
            "shadows": request.shadows,
            "candidates": request.candidates,
        }
        found = self.cache.tensors(key, compute)
        return Played(found["answers"], numbers(found["logits"]), numbers(found["weights"]))

    def _moved(self, students: Sequence[nn.Module]) -> Tensor:
        mechanism = self.side.run.mechanism
        part = "all" if mechanism is None else mechanism.recipe.part
        rows = [torch.cat([w.detach().flatten() for w in trained_parameters(s, part)]) for s in students]
        return torch.stack(rows)


def _one(records: LabelledSet, index: int) -> LabelledSet:
    return LabelledSet(records.inputs[index : index + 1], records.labels[index : index + 1])


def by_candidate(values: Floats | Tensor, candidates: int) -> Floats:
    """Replays ``[candidate * replay, ...]`` as ``[candidate, replay, ...]``."""
    rows = np.asarray(values)
    return np.asarray(rows.reshape(candidates, -1, *rows.shape[1:]), dtype=np.float64)
