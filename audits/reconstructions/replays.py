"""The games' replays: what is hidden, and what device, shadows and others did, kept in the run's folder.

The secrets are drawn by the challenger before anything is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audits.game import Cache, GameKey, ReplayContext, others_answers
from audits.requests import ReconstructionRequest
from audits.scoring import Released
from audits.views import released
from privkd.data.scenario import LabelledSet, Scenario
from privkd.errors import ConfigError, DataError
from privkd.models.zoo import trained_parameters
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import derive_seed, seeded_generator
from privkd.progress import Progress
from privkd.runs.folder import RunFolder

Floats = NDArray[np.float64]
Secrets = NDArray[np.int64]

_LEAST_RECORDS = 2


@dataclass(frozen=True)
class ClassSecrets:
    """One device holds a class that the public set lacks; which one is the secret of each trial.

    The records are filed under one label, the ``slot``, whatever they show, so that no label tells. Every one
    of the ``classes`` is as likely: a guess without the release is right in one of ``len(classes)`` trials.

    Attributes:
        slot: the label under which the secret class is filed.
        classes: the candidates.
        secrets: index of each trial's class among them, int64 ``[trial]``.
        shards: the device's training records in each trial.
        appearances: mean record of each candidate, of held-out records ``[candidate, *shape]``.
    """

    slot: int
    classes: tuple[int, ...]
    secrets: Secrets
    shards: tuple[LabelledSet, ...]
    appearances: Floats


@dataclass(frozen=True)
class RecordSecrets:
    """One record of the device is secret, drawn uniformly among the candidates; all others are known.

    Attributes:
        known: the device's other records.
        candidates: ``[candidate]``, held-out records.
        secrets: index of each trial's record among them, int64 ``[trial]``.
        public: labelled public records, of which the adversary makes shadows ``[shadow]``.
    """

    known: LabelledSet
    candidates: LabelledSet
    secrets: Secrets
    public: LabelledSet

    def shard(self, record: LabelledSet) -> LabelledSet:
        """The device's records with this one for the secret."""
        return LabelledSet(
            torch.cat([self.known.inputs, record.inputs]), torch.cat([self.known.labels, record.labels])
        )


def lacks_classes(scenario: Scenario) -> bool:
    """Whether the public set lacks, or holds rarely, enough classes for `ClassSecrets`."""
    return len(scenario.gap_classes) >= 2


def draw_classes(scenario: Scenario, device: int, trials: int, seed: int) -> ClassSecrets:
    """The class game: each trial's secret class among those that the public set lacks or holds rarely.

    Raises:
        ConfigError: no such device, or fewer than two such classes.
        DataError: a class has no records to play with.
    """
    _check_device(scenario, device)
    if not lacks_classes(scenario):
        raise ConfigError(
            f"the public set lacks {len(scenario.gap_classes)} classes, and the game takes 2 or more: "
            "train with --set data.gap=withheld"
        )
    classes, slot = scenario.gap_classes, scenario.gap_classes[0]
    concerned = torch.tensor(classes)
    held = LabelledSet(
        torch.cat([holder.train.inputs for holder in scenario.devices]),
        torch.cat([holder.train.labels for holder in scenario.devices]),
    )
    own = scenario.devices[device].train
    always = _part(own, ~torch.isin(own.labels, concerned.to(own.labels.device)))
    places = [(held.labels == c).nonzero().flatten().cpu() for c in classes]
    count = min(max(1, scenario.records_per_device // scenario.classes), *(len(found) for found in places))
    if not count or not all(bool((scenario.test.labels == c).any()) for c in classes):
        raise DataError(
            f"of the classes {[scenario.labels[c] for c in classes]}, one has no private or no held-out "
            "record to play with"
        )
    generator = seeded_generator(seed, "audit", "class secrets")
    secrets = torch.randint(len(classes), (trials,), generator=generator)
    shards = []
    for secret in secrets.tolist():
        order = torch.randperm(len(places[secret]), generator=generator)[:count]
        hidden = held.inputs[places[secret][order].to(held.inputs.device)]
        labels = torch.cat([always.labels, always.labels.new_full((count,), slot)])
        shards.append(LabelledSet(torch.cat([always.inputs, hidden]), labels))
    return ClassSecrets(slot, classes, secrets.numpy(), tuple(shards), _appearances(scenario))


def without_classes(records: LabelledSet, classes: tuple[int, ...]) -> LabelledSet:
    """The records of all other classes."""
    return _part(records, ~torch.isin(records.labels, torch.tensor(classes, device=records.labels.device)))


def draw_records(
    scenario: Scenario, device: int, *, candidates: int, trials: int, shadows: int, seed: int
) -> RecordSecrets:
    """The record game: each trial's secret record, and public records for ``shadows``.

    Raises:
        ConfigError: no such device.
        DataError: too few records.
    """
    _check_device(scenario, device)
    own = scenario.devices[device].train
    if len(scenario.test) < candidates or len(own) < _LEAST_RECORDS:
        raise DataError(
            f"candidates={candidates}: {len(scenario.test)} held-out records, and device {device} has "
            f"{len(own)}; it takes as many of the first as candidates, and 2 of the second"
        )
    generator = seeded_generator(seed, "audit", "record secrets")
    chosen = torch.randperm(len(scenario.test), generator=generator)[:candidates]
    lent = torch.randperm(len(scenario.public), generator=generator)[:shadows]
    kept = torch.randperm(len(own), generator=generator)[1:]
    secrets = torch.randint(candidates, (trials,), generator=generator)
    return RecordSecrets(
        known=_part(own, kept),
        candidates=_part(scenario.test, chosen),
        secrets=secrets.numpy(),
        public=_part(scenario.public, lent),
    )


def numbers(inputs: Tensor) -> Floats:
    """Records as float64 on the CPU."""
    return np.asarray(inputs.detach().to("cpu", torch.float64).numpy(), dtype=np.float64)


def _appearances(scenario: Scenario) -> Floats:
    test = scenario.test
    return np.stack([numbers(test.inputs[test.labels == c]).mean(axis=0) for c in scenario.gap_classes])


def _check_device(scenario: Scenario, device: int) -> None:
    if device >= len(scenario.devices):
        raise ConfigError(f"device={device}: expected 0 to {len(scenario.devices) - 1}")


def _part(records: LabelledSet, chosen: Tensor) -> LabelledSet:
    place = chosen.to(records.labels.device)
    return LabelledSet(records.inputs[place], records.labels[place])


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
        return released(run, view, played.answers, lambda: others, root)

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
