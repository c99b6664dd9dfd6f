"""Which column of a table is the label, and which are features. Columns are known by their names alone.

A choice that more than one column could claim, or that no name speaks for, is asked back, never guessed.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from privkd.config import DataConfig
from privkd.errors import ConfigError, DataError

LABEL_NAMES = ("label", "labels", "y", "class", "target", "targets")
"""Column or array names that mark the labels, in any case."""

UNLABELLED = "none, they are not needed"
_MOST_NAMED = 8
# What pandas calls an index that had no name when it wrote a table, or when it read one.
_UNNAMED = re.compile(r"|unnamed: [0-9]+", re.IGNORECASE)


class Beside(DataConfig):
    """The settings by which a file beside the data is read: it has their columns, in whatever order.

    What ``drop`` and ``group`` name need not be there, and is no feature.

    Attributes:
        features: those of the data by name, in their order; none where they are no table.
        labelled: whether it must have labels; else those that it has are passed over.
    """

    features: tuple[str, ...] = ()
    labelled: bool = True


def labelled(config: DataConfig) -> bool:
    """Whether what is read by ``config`` must have labels."""
    return not isinstance(config, Beside) or config.labelled


@dataclass(frozen=True)
class Columns:
    """Indices of a table's columns.

    Attributes:
        label: that of the label; ``None`` where none is needed.
        features: those of all others, but for what was left out.
        feature_names: their names.
        group: that which says whose record each is, if one does.
        label_name: that of the label.
        by_place: no name spoke for the label: it is the last column of a table without a header.
        said: how they were chosen, in words.
    """

    label: int | None
    features: tuple[int, ...]
    feature_names: tuple[str, ...]
    group: int | None
    label_name: str | None
    by_place: bool
    said: dict[str, str]


def choose_columns(
    names: Sequence[str],
    config: DataConfig,
    origin: str,
    *,
    named: bool = True,
    index: Collection[str] = (),
) -> Columns:
    """The label's column and the features' ones.

    Args:
        names: of all columns; ``column 1``, ``column 2``, ... where the table names none.
        config: ``label``, ``group``, ``text`` and ``drop``.
        origin: what messages call the table.
        named: whether the names are the table's own.
        index: names of columns that number the rows, and are no features.

    Raises:
        ConfigError: ``data.label``, ``data.group``, ``data.text`` or ``data.drop`` names no column, or two
            the same.
        DataError: nothing tells which column is the label, two could be, one has no name, or there are no
            features; or a file beside the data has other columns than these.
    """
    if isinstance(config, Beside):
        return _columns_beside(names, config, origin, index)
    dropped = {_named(names, name, "drop", origin) for name in config.drop}
    group = None if config.group is None else _named(names, config.group, "group", origin)
    if group in dropped:
        raise ConfigError(f"data.group={config.group!r}: data.drop leaves it out; take it from one of them")
    dropped |= set() if group is None else {group}
    kept = [number for number in range(len(names)) if number not in dropped]
    _check_named([names[number] for number in kept], kept, origin)
    label, why = _label(names, kept, config, origin, named=named)
    text = None if config.text is None else _named(names, config.text, "text", origin)
    if text is not None and text in (label, *dropped):
        raise ConfigError(f"data.text={config.text!r}: it is left out, or it is the label or the group too")
    numbering = [number for number in kept if names[number] in index and number != label]
    features = tuple(number for number in kept if number != label and number not in numbering)
    if text is not None:
        dropped |= set(features) - {text}
        features = (text,)
    if not features:
        raise DataError(f"{origin}: one column only beside what is left out; give features and a label")
    used = (
        ("features", _counted(len(features), "column")) if text is None else ("text", _quoted(names, [text]))
    )
    said = {"label": f"{_quoted(names, [label])}, {why}", used[0]: used[1]}
    if group is not None:
        said["group"] = f"{_quoted(names, [group])}, as set"
    left_out = [number for number in [*sorted(dropped), *numbering] if number != group]
    if left_out:
        said["left out"] = _quoted(names, left_out)
    by_place = label == kept[-1] and not named and config.label is None
    own = tuple(names[number] for number in features)
    return Columns(label, features, own, group, names[label], by_place, said)


def _columns_beside(names: Sequence[str], config: Beside, origin: str, index: Collection[str]) -> Columns:
    """The columns that the data have, in the order of the data."""
    passed_over = {*config.drop, *index, *(() if config.group is None else (config.group,))}
    passed_over |= {f"column {name}" for name in passed_over if name.isdecimal()}
    places = [f"column {number + 1}" for number in range(len(names))]
    kept = [number for number, name in enumerate(names) if not passed_over & {name, places[number]}]
    label = _label_beside(names, kept, config, origin)
    features = [number for number in kept if number != label]
    if config.text is not None:
        features = [_named(names, config.text, "text", origin)]
    elif config.features:
        features = _in_order([names[number] for number in features], features, config.features, origin)
    label = label if config.labelled else None
    said = {"label": UNLABELLED if label is None else _quoted(names, [label])}
    own = tuple(names[number] for number in features)
    return Columns(label, tuple(features), own, None, None if label is None else names[label], False, said)


def _label_beside(names: Sequence[str], kept: Sequence[int], config: Beside, origin: str) -> int | None:
    """The label's column, which of unlabelled inputs is there or not."""
    if config.label is None:
        place = label_among([names[number] for number in kept], origin)
        found = [] if place is None else [kept[place]]
    else:
        found = [number for number in kept if names[number] == config.label]
    if config.labelled and len(found) != 1:
        called = "called like a label" if config.label is None else f"called {config.label!r}"
        raise DataError(
            f"{origin}: {len(found) or 'no'} columns are {called}, as the data's label is, of "
            f"{_quoted(names, kept)}; call the label as in the data"
        )
    return found[0] if found else None


def _in_order(names: Sequence[str], places: Sequence[int], wanted: Sequence[str], origin: str) -> list[int]:
    """The ``places`` of the columns called ``names``, in the order of ``wanted``."""
    lacking = [name for name in wanted if name not in names]
    if lacking:
        shown = _quoted(lacking, range(len(lacking)))
        raise DataError(
            f"{origin}: lacks {shown} of the data's columns; it has {_quoted(names, range(len(names)))}; "
            "give it those of the data, in any order"
        )
    extra = [number for number, name in enumerate(names) if name not in wanted]
    extra += [number for number, name in enumerate(names) if name in names[:number]]
    if extra:
        raise DataError(
            f"{origin}: {_quoted(names, extra)} is in it beside the data's columns, or twice; leave it out "
            "of the file, or give it to the data"
        )
    return [places[names.index(name)] for name in wanted]


def _label(
    names: Sequence[str], kept: Sequence[int], config: DataConfig, origin: str, *, named: bool
) -> tuple[int, str]:
    """The label's column, and why it is."""
    if config.label is not None:
        label = _named(names, config.label, "label", origin)
        if label not in kept:
            raise ConfigError(
                f"data.label={config.label!r}: data.drop leaves it out, or it is data.group; take it from one"
            )
        return label, "as set"
    if not named:
        return kept[-1], "the last, as there is no header"
    found = label_among([names[number] for number in kept], origin)
    if found is None:
        raise DataError(
            f"{origin}: no label column: none of {_quoted(names, kept)} is called like one "
            f"({', '.join(LABEL_NAMES)}); say which it is with --label NAME"
        )
    return kept[found], "by its name"


def label_among(names: Sequence[str], origin: str, what: str = "columns") -> int | None:
    """Index of the one of ``names`` that is called like a label, if there is one.

    Raises:
        DataError: several are.
    """
    found = [number for number, name in enumerate(names) if name.lower() in LABEL_NAMES]
    if len(found) > 1:
        called = {names[number].lower() for number in found}
        if len(called) == 1:
            raise DataError(f"{origin}: {len(found)} {what} are called {called.pop()!r}; keep one")
        raise DataError(
            f"{origin}: {len(found)} {what} are called like a label, {_quoted(names, found)}; say which is "
            "with --label NAME"
        )
    return found[0] if found else None


def _named(names: Sequence[str], wanted: str, setting: str, origin: str) -> int:
    """Index of the column called ``wanted``, by its name or as ``column N`` or ``N``."""
    found = [number for number, name in enumerate(names) if name == wanted]
    if not found:
        place = re.fullmatch(r"(?:column )?([1-9][0-9]{0,8})", wanted)
        by_place = place is not None and int(place[1]) <= len(names)
        # A number is a place where columns have no names of their own; in words it always is.
        if (
            place is not None
            and by_place
            and (wanted != place[1] or names[int(place[1]) - 1] == f"column {wanted}")
        ):
            return int(place[1]) - 1
        raise ConfigError(
            f"data.{setting}={wanted!r}: {origin} has no such column; it has "
            f"{_quoted(names, range(len(names)))}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"data.{setting}={wanted!r}: {origin} has {len(found)} columns of that name; give 'column N'"
        )
    return found[0]


def _check_named(names: Sequence[str], places: Sequence[int], origin: str) -> None:
    for name, place in zip(names, places, strict=True):
        if _UNNAMED.fullmatch(name):
            called = f" but {name!r}" if name else ""
            raise DataError(
                f"{origin}: column {place + 1} of the header has no name{called}, so it may number the rows; "
                f"name it, or leave it out with --drop 'column {place + 1}'"
            )


def _quoted(names: Sequence[str], numbers: Sequence[int]) -> str:
    shown = ", ".join(repr(names[number]) for number in numbers[:_MOST_NAMED])
    return shown if len(numbers) <= _MOST_NAMED else f"{shown} and {len(numbers) - _MOST_NAMED} more"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def refuse_columns(
    config: DataConfig,
    *,
    label: bool = False,
    lines: bool = False,
    group: bool = False,
    table: bool = False,
    text: bool = False,
    tokens: bool = False,
) -> None:
    """Refuse settings on columns for a source that has none.

    Args:
        config: the settings.
        label: whether the source knows ``data.label`` all the same, and with it ``data.group``.
        lines: whether it is text in lines: it knows ``data.header``, ``data.delimiter``, ``data.decimal``.
        group: whether it knows ``data.group``, and nothing else.
        table: whether it has columns of text or with missing values.
        text: whether it knows ``data.text``.
        tokens: whether it knows ``data.tokens``.

    Raises:
        ConfigError: one is set.
    """
    if isinstance(config, Beside):  # They are about the data.
        return
    wrong = {
        "label": config.label is not None and not label,
        "drop": bool(config.drop) and not label,
        "group": config.group is not None and not (label or group),
        "header": config.header != "auto" and not lines,
        "delimiter": config.delimiter != "auto" and not lines,
        "decimal": config.decimal != "point" and not lines,
        "missing": config.missing != "refuse" and not table,
        "categorical": bool(config.categorical) and not table,
        "text": config.text is not None and not text,
        "tokens": config.tokens and not tokens,
    }
    for name, given in wrong.items():
        if given:
            raise ConfigError(
                f"data.{name}: source {config.source!r} has no columns it could be about; leave it out"
            )
