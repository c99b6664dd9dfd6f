"""Who holds what: from settings and a seed to the frozen outcome of a split."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from privkd.config import DataConfig
from privkd.data.constants import (
    AS_THEY_CAME,
    PUBLIC_SOURCES,
    Constants,
    check_set,
    find_constants,
    in_words,
    label_space,
    numbered,
    numbered_test,
    unset,
)
from privkd.data.dataset import Indices, RawSet, Source
from privkd.data.encoding import encoded_source
from privkd.data.own_files import load_all, load_public
from privkd.data.partition import Split, public_indices, sets_of_all, split_indices
from privkd.data.persons import check_persons, numbered_persons, persons_as_set
from privkd.errors import ConfigError, DataError
from privkd.privacy.events import PartyId
from privkd.privacy.joint import Persons


@dataclass(frozen=True)
class LabelledSet:
    """Records with labels: ``inputs`` ``[record, *shape]``, float32 or token ids int64; ``labels`` int64
    ``[record]``.

    ``persons`` says whose each record is, by number, int64 ``[record]``; ``None`` where that is not known.
    """

    inputs: Tensor
    labels: Tensor
    persons: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        """The same records on another torch device."""
        persons = None if self.persons is None else self.persons.to(device)
        return type(self)(self.inputs.to(device), self.labels.to(device), persons)

    def part(self, chosen: Tensor | slice) -> Self:
        """Those of the records that an index, a mask ``[record]`` or a slice takes."""
        persons = None if self.persons is None else self.persons[chosen]
        return type(self)(self.inputs[chosen], self.labels[chosen], persons)


@dataclass(frozen=True)
class Device:
    """One device: its private training records and a test set of its own distribution."""

    name: PartyId
    train: LabelledSet
    test: LabelledSet


@dataclass(frozen=True)
class Scenario:
    """A data set split between the public, the devices and the tests. Everything but ``devices`` is public.

    Attributes:
        public: the public labelled data.
        validation: public labelled data of the same kind, for the gate.
        proxy: unlabelled public inputs ``[query, *shape]``.
        devices: the devices with their private shards.
        test: global test set, balanced as the source is.
        classes: number of classes.
        records_per_device: the nominal shard size, a public constant.
        gap_classes: the classes that the public data lack, if any.
        constants: how raw features became inputs.
        labels: the classes by name, in the order of their numbers.
        inferred: public constants that a simulation read from all records, private ones too, in words.
        taken: what in the data was taken for what, such as the label, in words by its name.
        persons: public constants about whose the records are, where that is known.
    """

    public: LabelledSet
    validation: LabelledSet
    proxy: Tensor
    devices: tuple[Device, ...]
    test: LabelledSet
    classes: int
    records_per_device: int
    gap_classes: tuple[int, ...]
    constants: Constants = AS_THEY_CAME
    labels: tuple[str, ...] = ()
    inferred: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)
    persons: Persons | None = None

    def to(self, device: torch.device) -> Self:
        """The same scenario on another torch device."""
        devices = tuple(Device(d.name, d.train.to(device), d.test.to(device)) for d in self.devices)
        return replace(
            self,
            public=self.public.to(device),
            validation=self.validation.to(device),
            proxy=self.proxy.to(device),
            devices=devices,
            test=self.test.to(device),
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the record axis."""
        return tuple(self.public.inputs.shape[1:])


_BINOMIAL = torch.tensor([1.0, 2.0, 1.0]) / 4


def restyle(images: Tensor) -> Tensor:
    """Contrast inverted, then a 3x3 binomial blur.

    ``images`` is ``[image, channel, height, width]`` in [0, 1], and so is the result.

    Raises:
        ConfigError: the inputs are not images.
        DataError: a value lies outside [0, 1], where inversion means nothing.
    """
    if images.ndim != 4:
        shape = tuple(images.shape[1:])
        raise ConfigError(
            f"gap='style' alters images [channel, height, width]; inputs of shape {shape} are none"
        )
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise DataError(f"gap='style' needs values in [0, 1], found {images.min():.4g} to {images.max():.4g}")
    if not len(images):
        return images
    channels = images.shape[1]
    kernel = torch.outer(_BINOMIAL, _BINOMIAL).expand(channels, 1, 3, 3)
    padded = F.pad(1 - images, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=channels).clamp_(0, 1)


def build_scenario(config: DataConfig, seed: int, *, deployment: bool = False) -> Scenario:
    """Load the source and split it. A pure function of its arguments and of the files they name.

    Nothing public depends on a private record, but for the constants that ``inferred`` names; a
    ``deployment`` infers none.

    Raises:
        ConfigError: settings that do not go together, or that a deployment must be given.
        DataError: the source is missing, malformed, or too small for the request.
    """
    return scenario_from(load_all(config), config, seed, deployment=deployment)


def public_scenario(config: DataConfig, seed: int) -> Scenario:
    """What a cloud holds whose devices are elsewhere: the public roles alone, and no device.

    Of a data set that all the world has these are those of `build_scenario`. Any other source is the cloud's
    own public data, so that every record of it may play one; where ``config.public`` names these, the
    source is not read at all. Nothing is said of what devices hold but the nominal size of a shard, which is
    set, or known of a data set of the world's.

    Raises:
        ConfigError: settings that do not go together, or ``data.records_per_device`` is not set.
        DataError: the source is missing, malformed, or too small for the request.
    """
    return scenario_from(load_public(config), config, seed, shards=False)


def scenario_from(
    source: Source, config: DataConfig, seed: int, *, deployment: bool = False, shards: bool = True
) -> Scenario:
    """Split a source that is already loaded; ``config.source`` still says whether it is a public data set.

    Without ``shards`` all of it is public: see `public_scenario`.

    Raises:
        ConfigError: settings that do not go together, or that a deployment must be given.
        DataError: the source is too small for the request, or a public record's label is no class.
    """
    given_test = source.test is not None
    if shards:
        check_persons(config)
    if deployment:
        check_set(config, given_test=given_test)
    shown = source.public or source
    classes = label_space(shown, config)
    sets = _Numbered.of(shown, classes)
    own = sets if source.public is None else _Numbered.of(source, classes)
    split = _split(source, own, sets, config, seed, classes=len(classes), shards=shards)
    constants = find_constants(shown, split.shown, config)
    source = encoded_source(source, constants.columns)
    sets, own = sets.by((source.public or source).records), own.by(source.records)
    style = config.simulated_gap == "style"

    def select(
        records: _Numbered, indices: Indices, *, altered: bool = False, private: bool = False
    ) -> LabelledSet:
        inputs = constants.features(records.raw.inputs[indices])
        if altered:
            # A private value out of range must not stop the run where everybody sees it.
            inputs = restyle(inputs.clamp_(0, 1) if private else inputs)
        groups = records.raw.groups if private else None
        persons = None if groups is None else torch.from_numpy(numbered_persons(groups[indices]))
        return LabelledSet(inputs, torch.from_numpy(records.labels[indices]), persons)

    proxy = (
        select(sets, split.proxy, altered=style).inputs
        if source.proxy is None
        else _styled(constants.features(source.proxy.inputs), config)
    )
    return Scenario(
        public=select(sets, split.public),
        validation=select(sets, split.validation),
        proxy=proxy,
        devices=tuple(
            Device(
                name=f"device-{number:04d}",
                train=select(own, train, altered=style, private=True),
                test=select(own, test, altered=style, private=True),
            )
            for number, (train, test) in enumerate(zip(split.device_train, split.device_test, strict=True))
        ),
        test=(
            select(sets, split.test, altered=style)
            if source.test is None
            else _given(shown, source.test, constants, classes, config)
        ),
        classes=len(classes),
        records_per_device=split.records_per_device,
        gap_classes=split.gap_classes,
        constants=constants,
        labels=classes,
        inferred=in_words(unset(config, given_test=given_test)) if shards else (),
        taken={**source.taken, "scale": constants.said, **_gap(config, split, classes)},
        persons=split.persons if shards else persons_as_set(config),
    )


def _gap(config: DataConfig, split: Split, classes: tuple[str, ...]) -> dict[str, str]:
    """What the public sets of a user's own data are made to lack, in words."""
    gap = config.simulated_gap
    if gap == "none" or config.source in PUBLIC_SOURCES:
        return {}
    named = ", ".join(repr(classes[number]) for number in split.gap_classes)
    what = {"rare": f"{named} rare", "withheld": f"none of {named}", "style": "the devices' style unseen"}
    return {"gap": f"simulated in the public sets: {what[gap]}; data.gap='none' leaves it out"}


def _given(
    source: Source, test: RawSet, constants: Constants, classes: tuple[str, ...], config: DataConfig
) -> LabelledSet:
    """The test split that came with the data, whole."""
    labels = numbered_test(source, test, classes, config)
    inputs = constants.features(test.inputs)
    return LabelledSet(_styled(inputs, config), torch.from_numpy(labels))


def _styled(inputs: Tensor, config: DataConfig) -> Tensor:
    return restyle(inputs) if config.simulated_gap == "style" else inputs


@dataclass(frozen=True)
class _Numbered:
    """Records as they were read, and their class numbers ``[record]``: see `numbered`."""

    raw: RawSet
    labels: Indices

    @classmethod
    def of(cls, source: Source, classes: tuple[str, ...]) -> Self:
        """Those of a source, but for its test split."""
        return cls(source.records, numbered(source.records.labels, classes))

    def by(self, raw: RawSet) -> Self:
        """The same with features as ``raw`` has them."""
        return replace(self, raw=raw)


def _split(
    source: Source,
    own: _Numbered,
    sets: _Numbered,
    config: DataConfig,
    seed: int,
    *,
    classes: int,
    shards: bool,
) -> Split:
    """Who holds which record: devices of ``own``, the public of ``sets``, which is the same unless ``source``
    has a file of public records. Without ``shards`` there are no devices."""
    given_test = source.test is not None
    if not shards:
        return public_indices(sets.labels, config, seed, classes=classes, given_test=given_test)
    split = split_indices(
        own.labels,
        config,
        seed,
        classes=classes,
        given_test=given_test,
        names=source.names,
        groups=own.raw.groups,
    )
    if source.public is None:
        return split
    if not (own.labels < classes).any():
        raise DataError(
            f"{source.name}: no label is one of the {classes} classes of {config.public!r}; spell them "
            "alike, or name all classes with --classes"
        )
    shown, gap = sets_of_all(sets.labels, config, seed, classes=classes, given_test=given_test)
    return replace(split, **vars(shown), gap_classes=gap)
