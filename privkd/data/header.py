"""Whether the first line of a CSV file names the columns or is a record: that line alone is looked at."""

from collections.abc import Sequence

from privkd.config import DataConfig
from privkd.data.columns import LABEL_NAMES
from privkd.errors import DataError
from privkd.labels import is_missing, is_number

_SHOWN = 40


def has_header(cells: Sequence[str], config: DataConfig, origin: str) -> bool:
    """Whether ``cells``, of the first line, are names: as set, else as they tell.

    A feature is a number, so a line with text where features stand holds names, unless there are numbers
    beside it and none of it is the label's name. A line of numbers is a record, with or without text at its
    end.

    Raises:
        DataError: the line could be either: numbers that count the columns; text beside numbers; a label's
            name that may be a class.
    """
    if config.header != "auto":
        return config.header == "yes"
    numbers = [cell for cell in cells if is_number(cell)]
    words = [cell for cell in cells if cell not in numbers and not is_missing(cell)]
    in_features = [cell for cell in cells[:-1] if cell in words]
    counting = _counts(cells) or (_counts(cells[:-1]) and len(cells) > 2 and cells[-1] in words)
    names_label = any(word.lower() in LABEL_NAMES for word in words) or config.label in words
    if words and (not numbers or (names_label and (in_features or counting))):
        return True
    if in_features or counting or names_label:
        line = ",".join(cells)
        shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
        raise DataError(
            f"{origin}: the first line, {shown!r}, could be a header or a record; say which with "
            "--set data.header=yes or --set data.header=no"
        )
    return False


def _counts(cells: Sequence[str]) -> bool:
    """Whether ``cells`` count from 0 or from 1, as columns without names are called."""
    return list(cells) in ([str(number + first) for number in range(len(cells))] for first in (0, 1))
