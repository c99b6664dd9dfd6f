"""Files of keys: secrets that their owner alone may read, and public files that are replaced whole."""

import os
import stat
import tempfile
from pathlib import Path

from privkd.errors import ConfigError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MOST = 1 << 20


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read.

    Raises:
        ConfigError: it exists already, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} exists already: a key is never overwritten; name another folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def read_secret(path: Path) -> bytes:
    """What a secret file holds.

    Raises:
        ConfigError: it cannot be read, or others than its owner may read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MOST)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; `privkd keys` makes one") from None
    if mode & _OTHERS:
        raise ConfigError(
            f"{path}: others than its owner may use it (mode {mode:03o}): run `chmod 600 {path}`, and if "
            "somebody else could reach it, make a new key"
        )
    return data


def read_public(path: Path) -> bytes:
    """What a small public file holds.

    Raises:
        ConfigError: it cannot be read, or is larger than any key or certificate.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    if len(data) > _MOST:
        raise ConfigError(f"{path}: more than {_MOST} bytes, so no key and no certificate")
    return data


def replace_public(path: Path, data: bytes) -> None:
    """Write a public file whole, over an older one if there is one; it is on the disk when this returns.

    Raises:
        ConfigError: it cannot be written; the older one is as it was.
    """
    try:
        descriptor, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def make_folder(folder: Path) -> None:
    """Have a folder, which others may not look into where it is new.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}") from None
