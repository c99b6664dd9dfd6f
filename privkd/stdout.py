"""What a command says to another program: one JSON value, one line, alone on stdout."""

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """Write ``value`` as one line of strict JSON.

    Raises:
        ValueError: a number is infinite or not one; commands spell those as text or ``null`` beforehand.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
