"""The public constants of a data set: what everybody may know of it before a private record is touched.

They come from settings, from what is known of a public data set, or from its public records: never from the
private ones, of which one could then change what everybody sees. Only a simulation of a user's own file takes
what is not set from all of its records, and says so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from privkd.config import DataConfig
from privkd.config.labels import in_order, is_fraction, is_number, numbers_of, same_number
from privkd.data.dataset import Array, Indices, RawSet, Source
from privkd.data.encoding import columns_of
from privkd.data.preprocessing import BOUND, Column, Pixels, Table, raw_columns
from privkd.data.tokens import Tokens, tokens_of_ids, tokens_of_texts
from privkd.errors import ConfigError, DataError

PUBLIC_SOURCES = ("digits", "docstrings", "mnist", "cifar10")
"""Data sets that all the world has: a simulation plays a part of one as private."""

_BYTES, _WORDS = 255.0, 65535.0
_CLASSES = "NAME,NAME,..."
_FEW_CLASSES, _RECORDS_A_CLASS = 20, 10
_SIZES = ("records_per_device", "public_records", "validation_records", "proxy_records")
_PERSONS = ("persons_per_device", "records_per_person")
_PLACE = re.compile(r"(column|feature) [0-9]+")
"""What a feature is called that has no name of its own."""
_MOST_NAMED = 4
_BLOCK = 512
"""Records that are converted at once, so that memory holds little beside the inputs."""


@dataclass(frozen=True)
class Constants:
    """How raw features become inputs: the same for everybody.

    Attributes:
        divisor: what whole numbers are divided by; 1 where features stay as they came.
        largest: where features lie in ``0 .. largest``, and what lies beyond is taken for the nearer end, as
            1 of 0/1 flags; ``None``: they are not known to.
        channels: 1 or 3 of decoded images, ``None`` for anything else.
        said: how they were found, in words.
        columns: of a table, in the order of its features; none of anything else.
        bound: what a table's inputs are clipped to, in absolute value; ``None``: they are not.
        tokens: how texts or whole numbers become token ids; ``None``: inputs are no tokens.
    """

    divisor: float
    largest: float | None
    channels: int | None
    said: str
    columns: tuple[Column, ...] = ()
    bound: float | None = None
    tokens: Tokens | None = None

    @property
    def vocabulary(self) -> int | None:
        """Inputs are token ids below it; ``None``: they are numbers."""
        return None if self.tokens is None else self.tokens.vocabulary

    def module(self) -> nn.Module:
        """What makes inputs ``[record, *shape]`` of raw float32 features, each from its own record alone."""
        if self.columns:
            return Table(self.columns, self.bound)
        return Pixels(self.divisor, self.largest, self.channels)

    @torch.no_grad()
    def features(self, raw: Array) -> Tensor:
        """Inputs ``[record, *shape]`` from a ``RawSet``'s, by `module`: float32 or, of tokens, int64."""
        if self.tokens is not None:
            return self.tokens.ids(raw)
        module = self.module()

        def made(block: Array) -> Tensor:
            return module(torch.from_numpy(np.array(block, dtype=np.float32, order="C")))

        inputs = torch.empty((len(raw), *made(raw[:0]).shape[1:]))
        for first in range(0, len(raw), _BLOCK):
            inputs[first : first + _BLOCK] = made(raw[first : first + _BLOCK])
        return inputs

    def raw(self, inputs: Tensor) -> Tensor:
        """Raw features float32 of which `module` makes these ``inputs``, up to rounding.

        Whole numbers come back exactly, columns as far as they were not clipped; token ids are raw.
        """
        if self.tokens is not None:
            return inputs
        if self.columns:
            return raw_columns(inputs, self.columns)
        return inputs if self.divisor == 1 else (inputs * self.divisor).round()

    @property
    def words(self) -> str:
        """What they do to features, in words."""
        if self.tokens is not None:
            return f"none, takes token ids of {self.tokens.vocabulary}, int64"
        if self.columns:
            return _of_columns(self.columns, self.bound)
        return "none" if self.divisor == 1 else f"divided by {self.divisor:g}"


AS_THEY_CAME = Constants(1.0, None, None, "as they are")
"""Of features that are inputs already."""


def find_constants(source: Source, public: Indices, config: DataConfig) -> Constants:
    """The constants of ``source``, from settings and from its ``public`` records and test split.

    Raises:
        DataError: as `columns_of`.
        ConfigError: ``data.scale`` is set for features that are no whole numbers, or must be set for images
            in whole numbers that are neither flags nor of 8 or 16 bits; or ``data.standardise`` asks it of
            what is no table of numbers; or a tokenizer cannot be read.
    """
    if config.scale is not None and not source.whole:
        raise ConfigError(
            f"data.scale={config.scale:g}: the features of source {config.source!r} are no whole numbers by "
            "type, and are taken as they are; scale them in the data"
        )
    if source.tokens:
        return _of_tokens(source, public, config)
    _check_no_tokens(config)
    table = _is_table(source, config)
    channels = _channels(source, public)
    divisor = source.divisor if config.scale is None else config.scale
    if divisor is not None:
        return Constants(divisor, None, channels, f"divided by {divisor:g}")
    if table or (source.records.words is not None and source.records.inputs.dtype == np.float32):
        return _of_table(source, public, config, standardise=table)
    low, high = _range(source, public)
    bytes_ = source.records.inputs.dtype == np.uint8
    images = source.whole and source.records.inputs.ndim > 2
    if (bytes_ or images) and low >= 0 and high <= 1:
        return Constants(1.0, 1.0, channels, "as they are, 0/1 flags")
    if bytes_:
        return Constants(_BYTES, None, channels, f"bytes, divided by {_BYTES:g}")
    if images:
        return _of_whole_images(source, low, high, channels)
    return Constants(1.0, None, channels, f"as they are, {low:.4g} to {high:.4g} in the public records")


def _of_tokens(source: Source, public: Indices, config: DataConfig) -> Constants:
    """Of texts, or of whole numbers that are token ids."""
    parts = [part.inputs for part in _parts(source, public)]
    if source.records.inputs.dtype.kind == "O":
        tokens, said = tokens_of_texts([text for part in parts for text in part.tolist()], config)
    else:
        tokens, said = tokens_of_ids(parts, config)
    return Constants(1.0, None, None, said, tokens=tokens)


def _check_no_tokens(config: DataConfig) -> None:
    for name in ("tokenizer", "vocabulary", "length"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"data.{name}: source {config.source!r} holds neither text nor, by data.tokens, token ids; "
                "leave it out, or say which column is the text with --text NAME"
            )


def _is_table(source: Source, config: DataConfig) -> bool:
    """Whether the features are standardised: as set, else those of a table, and fractions in an array."""
    inputs = source.records.inputs
    able = inputs.ndim == 2 and inputs.dtype == np.float32 and source.divisor is None
    if config.standardise == "yes" and (not able or config.scale is not None):
        why = "data.scale divides them already" if able else "they are no table of numbers"
        raise ConfigError(
            f"data.standardise='yes': the features of source {config.source!r} are not standardised, as {why}"
        )
    if config.standardise == "auto":
        return able and config.scale is None and (bool(source.columns) or not source.whole)
    return config.standardise == "yes"


def _of_table(source: Source, public: Indices, config: DataConfig, *, standardise: bool) -> Constants:
    """Of columns by their public values; where nothing is to be done to any, they are none."""
    width = source.records.inputs.shape[1]
    names = source.columns or tuple(f"feature {number}" for number in range(1, width + 1))
    try:
        columns = columns_of(names, list(_parts(source, public)), config, standardise=standardise)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None
    if all(column.as_it_came for column in columns):
        low, high = _range(source, public)
        return Constants(1.0, None, None, f"as they are, {low:.4g} to {high:.4g} in the public records")
    bound = BOUND if standardise else None
    return Constants(1.0, None, None, f"{_of_columns(columns, bound)}, by the public records", columns, bound)


def _of_columns(columns: Sequence[Column], bound: float | None) -> str:
    """What they do to features, in words."""
    text = [column for column in columns if column.vocabulary]
    numbers = [column for column in columns if not column.vocabulary]
    moved = sum((column.mean, column.scale) != (0, 1) for column in numbers)
    within = "" if bound is None else f", clipped at {bound:g} deviations"
    said = [f"{_columns(moved)} standardised to mean 0 and deviation 1{within}"] if moved else []
    if moved < len(numbers):
        kept = len(numbers) - moved
        said.append(f"{kept} as they are" if bound is None else f"{kept} as they are, 0/1 flags")
    if text:
        named = ", ".join(repr(column.name) for column in text[:_MOST_NAMED])
        more = f" and {len(text) - _MOST_NAMED} more" if len(text) > _MOST_NAMED else ""
        said.append(f"{named}{more} as categories, of {sum(len(c.vocabulary) for c in text)} known values")
    if any(column.fill is not None for column in columns):
        said.append("missing values filled")
    return "; ".join(said)


def _columns(number: int) -> str:
    return f"{number} column{'' if number == 1 else 's'}"


def check_columns(source: Source, columns: Sequence[Column]) -> None:
    """Do nothing where ``source`` has the features that published ``columns`` are about, in their order.

    Raises:
        DataError: it has others; those without names are told by their number alone.
    """
    if not columns:
        return
    shape = source.records.inputs.shape[1:]
    if shape != (len(columns),):
        raise DataError(
            f"{source.name}: records of shape {list(shape)}, but the plan is about {len(columns)} columns"
        )
    for own, wanted in zip(source.columns, (column.name for column in columns), strict=False):
        if own != wanted and not (_PLACE.fullmatch(own) or _PLACE.fullmatch(wanted)):
            raise DataError(
                f"{source.name}: {own!r} stands where the plan has {wanted!r}; give its columns, in its order"
            )


def _of_whole_images(source: Source, low: float, high: float, channels: int | None) -> Constants:
    """Of images in whole numbers that are no bytes by type: by the range of the public ones."""
    largest = next((most for most in (_BYTES, _WORDS) if low >= 0 and high <= most), None)
    if largest is None:
        raise ConfigError(
            f"{source.name}: images in whole numbers from {low:g} to {high:g} are neither of 8 nor of 16 "
            "bits; say what to divide them by, with --set data.scale=N"
        )
    said = f"whole numbers up to {largest:g} by those of the public records, divided by it"
    return Constants(largest, largest, channels, said)


def _range(source: Source, public: Indices) -> tuple[float, float]:
    """The least and the largest value of the public records."""
    parts = [part.inputs for part in _parts(source, public) if part.inputs.size]
    if not parts:
        return 0.0, 0.0
    return float(min(part.min() for part in parts)), float(max(part.max() for part in parts))


def _parts(source: Source, public: Indices) -> Iterator[RawSet]:
    yield source.records.at(public)
    if source.test is not None:
        yield source.test


def _channels(source: Source, public: Indices) -> int | None:
    if source.records.colour is None:
        return None
    test = source.test.colour if source.test is not None else None
    coloured = source.records.colour[public].any() or (test is not None and test.any())
    return 3 if coloured else 1


def unset(config: DataConfig, *, given_test: bool) -> tuple[str, ...]:
    """The settings of ``config.data`` that are read from all records of a user's own file, by name.

    Args:
        config: none where its source is one of `PUBLIC_SOURCES`.
        given_test: the data bring a test split of their own.
    """
    if config.source in PUBLIC_SOURCES:
        return ()
    names = {"classes": None, **dict.fromkeys(_SIZES), "test_records": None}
    if given_test:
        del names["test_records"]
    if config.proxy is not None:
        del names["proxy_records"]
    if config.public is not None:
        names = {"records_per_device": None}
    if config.group is not None:
        names |= dict.fromkeys(_PERSONS)
    return tuple(name for name in names if getattr(config, name) is None)


def in_words(names: tuple[str, ...]) -> tuple[str, ...]:
    """Settings of `unset` as a person calls them."""
    return tuple(name.replace("_", " ") for name in names)


def check_set(config: DataConfig, *, given_test: bool) -> None:
    """Refuse a deployment whose public constants would be read from private records.

    Raises:
        ConfigError: it names the settings to give.
    """
    lacking = unset(config, given_test=given_test)
    if lacking:
        flags = " ".join(
            f"--classes {_CLASSES}" if name == "classes" else f"--set data.{name}=N" for name in lacking
        )
        raise ConfigError(
            f"source {config.source!r}: a deployment (privacy.noise='system') reads no public constant from "
            f"private records; give {flags}"
        )


def label_space(source: Source, config: DataConfig) -> tuple[str, ...]:
    """The classes by name, in the order of their numbers: as set, else the source's, else those that occur.

    Raises:
        DataError: where they are read from the records: fewer than two, or numbers that are no whole ones.
    """
    classes = config.classes or source.classes
    if classes is not None:
        return classes
    labels = source.records.labels
    found = np.unique(labels).tolist()
    if all(map(is_number, found)):
        for label in filter(is_fraction, found):
            row = int(np.argmax(labels == label))
            raise DataError(
                f"{source.name}: label {label} of record {row} is not an integer class; use 0, 1, 2, ..."
            )
    if len(found) < 2:
        raise DataError(f"{source.name}: all labels are {found[0]!r}; a data set needs at least two classes")
    _check_spellings(found, source.name)
    if source.label_by_place and len(found) > max(_FEW_CLASSES, len(labels) // _RECORDS_A_CLASS):
        raise DataError(
            f"{source.name}: its last column, taken for the label as there is no header, would make "
            f"{len(found)} classes of {len(labels)} records; say which is the label with --label N"
        )
    return in_order(found)


def _check_spellings(labels: list[str], name: str) -> None:
    """Refuse classes read from records of which two are one whole number, with and without a point."""
    spelt: dict[int, str] = {}
    for label in labels:
        value = same_number(label)
        if value is not None and spelt.setdefault(value, label) != label:
            raise DataError(
                f"{name}: labels {spelt[value]!r} and {label!r} spell one number in two ways; spell them "
                "alike, or name that class and all others once with --classes"
            )


def numbered(labels: Array, classes: tuple[str, ...]) -> Indices:
    """Class numbers int64 ``[record]`` of ``labels``; ``len(classes)`` for a label that is none.

    A label that is no class as it is written is the one that spells the same whole number, if one does.
    """
    number = numbers_of(classes)
    values, positions = np.unique(labels, return_inverse=True)
    found = [_number_of(str(value), number, len(classes)) for value in values]
    return np.array(found, dtype=np.int64)[positions]


def _number_of(label: str, number: Mapping[str | int, int], other: int) -> int:
    value = same_number(label)
    return number.get(label, other if value is None else number.get(value, other))


def numbered_test(source: Source, test: RawSet, classes: tuple[str, ...], config: DataConfig) -> Indices:
    """Class numbers of the test split that came with the data, int64 ``[record]``.

    Raises:
        DataError: a label is none of ``classes``.
    """
    numbers = numbered(test.labels, classes)
    strange = test.labels[numbers == len(classes)]
    if strange.size:
        known = config.classes or source.classes
        place = "among the training labels" if known is None else f"among the {len(classes)} classes"
        cure = "remove it" if known is None else "remove it, or name all classes with --classes"
        name = config.test or f"{source.name} (test split)"
        raise DataError(f"{name}: label {str(strange[0])!r} does not occur {place}; {cure}")
    return numbers
