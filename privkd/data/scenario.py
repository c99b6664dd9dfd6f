"""Who holds what: the frozen outcome of a split."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from privkd.events import PartyId


@dataclass(frozen=True)
class LabelledSet:
    """Records with labels: ``inputs`` float32 ``[record, *shape]``, ``labels`` int64 ``[record]``."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        """The same records on another torch device."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))


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
        divisor: what the whole numbers of the raw data were divided by; 1 where features are as they came.
        inferred: public constants that a simulation read from all records, private ones too, in words.
        taken: what in the data was taken for what, such as the label, in words by its name.
    """

    public: LabelledSet
    validation: LabelledSet
    proxy: Tensor
    devices: tuple[Device, ...]
    test: LabelledSet
    classes: int
    records_per_device: int
    gap_classes: tuple[int, ...]
    divisor: float = 1.0
    inferred: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)

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
