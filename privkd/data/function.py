"""The user's own data set: ``package.module:function``, called without arguments."""

import re
from typing import Any

import numpy as np
from torch import Tensor

from privkd.config import DataConfig
from privkd.data.source import Array, RawSet, Source, make_source
from privkd.errors import DataError, one_line
from privkd.userscode import users_callable

_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function_name(source: str) -> bool:
    """Whether ``source`` is spelt ``package.module:function``."""
    return _DOTTED.fullmatch(source) is not None


def load_function(source: str, config: DataConfig) -> Source:
    """Call the function, which returns ``(inputs, labels)`` as arrays, tensors or lists.

    The working directory is importable. The function must return the same records each time, or a run cannot
    be repeated.

    Raises:
        DataError: it cannot be imported, fails, or returns something else.
    """
    function = users_callable(source, "source", DataError)
    try:
        returned = function()
    except (Exception, SystemExit) as error:
        raise DataError(
            f"source {source!r}: failed when called without arguments ({one_line(error)})"
        ) from error
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise DataError(f"source {source!r}: returned {type(returned).__name__}; return (inputs, labels)")
    inputs, labels = (_array(value, source) for value in returned)
    taken = {"label": "the second that the function returned"}
    return make_source(source, RawSet(inputs, labels), classes=config.classes, taken=taken)


def _array(value: Any, source: str) -> Array:
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return (value.float() if value.is_floating_point() else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"source {source!r}: {one_line(error)}; return plain arrays or tensors") from error
