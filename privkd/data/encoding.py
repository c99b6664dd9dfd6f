"""What the columns of a table mean, told by public records alone, and text as numbers by that."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from privkd.config import DataConfig
from privkd.config.labels import in_order
from privkd.data.dataset import Array, RawSet, Source, Words
from privkd.data.preprocessing import TRUTHS, Column, standards
from privkd.errors import DataError

MOST_CATEGORIES = 64
"""Different values of a column of text that are taken for categories without being asked."""

_FEW = 10
_SHOWN = 30
_DATE = re.compile(
    r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}([T ].*)?|[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4}( .*)?"
)
_WITH_COMMAS = re.compile(r"[-+]?[0-9][0-9.]*,[0-9]+")
_WHOSE = "user|patient|customer|client|person|subject|member|student|employee|device|account|record|row|case"
_NUMBERING = re.compile(
    rf"(.*[ _.-])?(id|ids|uuid|guid)|.*[a-z]I[dD]|({_WHOSE})[ _.-]?(id|no|nr|number)|index|idx|row"
)


def columns_of(
    names: Sequence[str], parts: Sequence[RawSet], config: DataConfig, *, standardise: bool
) -> tuple[Column, ...]:
    """How each column of a table becomes inputs.

    Args:
        names: of the columns.
        parts: the public records.
        config: ``missing`` and ``categorical``.
        standardise: whether numbers are brought to mean 0 and deviation 1.

    Raises:
        DataError: a column holds dates, free text, what only numbers the records, or nothing.
    """
    inputs = [part.inputs for part in parts]
    found = list(standards(names, inputs))
    for place, column in enumerate(found):
        words = _counted(column.name, place, parts)
        if words is not None:
            found[place] = _of_words(column.name, words, config)
            continue
        values = np.concatenate([part[:, place] for part in inputs])
        values = values[~np.isnan(values)]
        if not values.size:
            raise DataError(f"column {column.name!r} has no value in the public records; {_DROP}")
        if (values == np.floor(values)).all():
            _check_no_numbering(column.name, len(np.unique(values)), len(values))
        own = column if standardise else Column(name=column.name)
        found[place] = own.model_copy(update={"fill": _fill(values, config)})
    return tuple(found)


_DROP = "leave it out with --drop"


def _fill(values: Array, config: DataConfig) -> float | None:
    """What stands for a number that is missing."""
    if config.missing == "mean":
        return float(np.float32(values.mean(dtype=np.float64)))
    if config.missing == "most-frequent":
        different, counts = np.unique(values, return_counts=True)
        return float(different[np.argmax(counts)])
    return None


def _counted(name: str, place: int, parts: Sequence[RawSet]) -> Counter[str] | None:
    """How often each text occurs in a column; ``None`` where it holds numbers."""
    found: Counter[str] = Counter()
    told = [(part.words or {}).get(place) for part in parts]
    numbers = any(
        words is None and not np.isnan(part.inputs[:, place]).all()
        for words, part in zip(told, parts, strict=True)
    )
    for words in filter(None, told):
        counts = np.bincount(words.codes[words.codes >= 0], minlength=len(words.values))
        found.update({value: int(count) for value, count in zip(words.values, counts, strict=True) if count})
    if found and numbers:
        raise DataError(
            f"column {name!r} holds text, {_shown(found)}, in one file and numbers in another; mend it, or "
            f"say that its values are names with --set data.categorical={name}"
        )
    return None if numbers or not any(told) else found


def _of_words(name: str, words: Mapping[str, int], config: DataConfig) -> Column:
    if not words:
        raise DataError(f"column {name!r} has no value in the public records; {_DROP}")
    vocabulary = in_order(words)
    if name not in config.categorical:
        _check_told(name, words)
        lower = {value.lower() for value in words}
        vocabulary = next((pair for pair in TRUTHS if lower <= {*pair}), vocabulary)
    fill = None
    if config.missing in ("mean", "most-frequent"):
        codes = codes_of(Words(tuple(words), np.arange(len(words), dtype=np.int32)), vocabulary)
        counts = np.bincount(codes.astype(np.int64), weights=[*words.values()], minlength=len(vocabulary))
        fill = float(np.argmax(counts))
    return Column(name=name, vocabulary=vocabulary, fill=fill)


def _check_told(name: str, words: Mapping[str, int]) -> None:
    """Refuse text that is no category."""
    if all(map(_DATE.fullmatch, words)):
        raise DataError(dates(name, min(words)))
    if any(map(_WITH_COMMAS.fullmatch, words)):
        shown = next(value for value in words if _WITH_COMMAS.fullmatch(value))
        raise DataError(
            f"column {name!r} holds {shown!r}, which may be a number with a comma before its fraction; say "
            f"so with --set data.decimal=comma, or that it is a name with --set data.categorical={name}"
        )
    total = sum(words.values())
    _check_no_numbering(name, len(words), total)
    if len(words) > MOST_CATEGORIES or (len(words) > _FEW and 2 * len(words) > total):
        raise DataError(
            f"column {name!r} holds text, {_shown(words)}, of {len(words)} different values in {total} "
            f"public records, as free text or names do; {_DROP}, say that it is whose each record is with "
            f"--group, that it is the records' text with --text {name!r}, or that its values are categories "
            f"with --set data.categorical={name}"
        )


def dates(name: str, shown: str) -> str:
    """The refusal of a column of dates."""
    return (
        f"column {name!r} holds dates, {shown[:_SHOWN]}; give a number, such as days since a day that all "
        "agree on, or leave it out with --drop"
    )


def _check_no_numbering(name: str, different: int, records: int) -> None:
    """Refuse what is called, and looks, like the number of a record or the name of whom it is from."""
    if not (_NUMBERING.fullmatch(name) or _NUMBERING.fullmatch(name.lower())):
        return
    if different > 2 * _FEW or 2 * different > records:
        raise DataError(
            f"column {name!r} holds {different} different values in {records} public records, and is called "
            f"like what numbers them or says whose they are; {_DROP}, say with --group that it is whose they "
            f"are, or that its values are categories with --set data.categorical={name}"
        )


def _shown(words: Mapping[str, int]) -> str:
    value = min(words)
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")


def codes_of(words: Words, vocabulary: Sequence[str]) -> NDArray[np.float32]:
    """Places in the ``vocabulary`` float32 ``[record]``: -1 of other text, NaN where there is none."""
    known = {value: float(place) for place, value in enumerate(vocabulary)}
    flag = tuple(vocabulary) in TRUTHS
    places = [known.get(value.lower() if flag else value, -1.0) for value in words.values]
    return np.array([*places, np.nan], dtype=np.float32)[words.codes]


def encoded(records: RawSet, columns: Sequence[Column], origin: str) -> RawSet:
    """The records of a table as numbers, text by the vocabularies of ``columns``.

    Raises:
        DataError: a column holds text where numbers are known, or the other way round; or a value is missing
            where nothing stands for it.
    """
    if records.words is None:
        return records
    inputs = records.inputs.copy()
    as_they_came = [Column(name=f"column {number + 1}") for number in range(inputs.shape[1])]
    for place, column in enumerate(columns or as_they_came):
        words, own = records.words.get(place), inputs[:, place]
        if words is not None and not column.vocabulary and (words.codes >= 0).any():
            text = words.values[words.codes[words.codes >= 0][0]]
            raise DataError(
                f"{origin}: {column.name!r} holds text, {text!r}, where numbers are known; mend it"
            )
        if words is None and column.vocabulary and not np.isnan(own).all():
            raise DataError(
                f"{origin}: {column.name!r} holds numbers where text is known; say that its values are names "
                f"with --set data.categorical={column.name}"
            )
        if words is not None and column.vocabulary:
            own[:] = codes_of(words, column.vocabulary)
        if column.fill is None and np.isnan(own).any():
            raise DataError(
                f"{origin}: {column.name!r} is missing in {int(np.isnan(own).sum())} records, first in "
                f"record {int(np.argmax(np.isnan(own)))}; give it, or leave these records out"
            )
    return replace(records, inputs=inputs, words={})


def encoded_source(source: Source, columns: Sequence[Column]) -> Source:
    """All records of ``source``, as `encoded` makes them."""

    def made(records: RawSet, what: str) -> RawSet:
        return encoded(records, columns, f"{source.name}{what}")

    return replace(
        source,
        records=made(source.records, ""),
        test=source.test and made(source.test, " (test split)"),
        proxy=source.proxy and made(source.proxy, " (proxy)"),
        public=source.public and encoded_source(source.public, columns),
    )
