"""Files beside runs, written whole or not at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from privkd.errors import RunError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and its folder where that is missing.

    Raises:
        RunError: it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        # A temporary file is its owner's alone; this one is as readable as any.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise RunError(f"{path}: {error.strerror or error}; name another folder with --out") from None
