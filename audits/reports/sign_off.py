"""What people say of a run and the program cannot know, and who signed for it: two files beside the report.

Both are people's: a report reads them each time it is written, and never writes over them.
"""

import hashlib
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tomli_w
from pydantic import Field, ValidationError

from audits.evidence import FileDigest, RunRecord, digest_in, write_whole
from privkd.config import Settings
from privkd.config.mistakes import in_words
from privkd.errors import RunError

ABOUT, SIGNATURE = "about.toml", "signature.toml"

Sector = Literal["", "Technology", "Healthcare", "Education", "Government", "Energy", "Finance"]
Named = Annotated[str, Field(min_length=1)]
File = TypeVar("File", bound=Settings)

_TEMPLATE = """\
# What the program cannot know of this run, for people to fill in. Reports read it, and none writes to it.
purpose = ""       # what the teacher is for
curators = []      # who publishes it
region = ""        # whom the data describe, or whose law applies
sector = ""        # Technology, Healthcare, Education, Government, Energy or Finance
published = ""     # YYYY-MM-DD
authors = []       # who wrote this
tuning = ""        # what was tried on private data before this run, and whether that was accounted for
justification = "" # why this epsilon, this delta and this unit
sources = ""       # links
"""


class About(Settings):
    """``about.toml``: what a run is for and who answers for it; empty is not stated.

    Attributes:
        purpose: what the teacher is for.
        curators: who publishes it.
        region: whom the data describe, or whose law applies.
        sector: of the deployments registry.
        published: when, ``YYYY-MM-DD``.
        authors: who wrote this.
        tuning: what was tried on private data before, and whether that was accounted for.
        justification: why this epsilon, delta and unit.
        sources: links.
    """

    purpose: str = ""
    curators: tuple[Named, ...] = ()
    region: str = ""
    sector: Sector = ""
    published: Annotated[str, Field(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?$")] = ""
    authors: tuple[Named, ...] = ()
    tuning: str = ""
    justification: str = ""
    sources: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """What an officer asks for first, and is not stated."""
        wanted = ("purpose", "curators", "region", "justification")
        return tuple(name for name in wanted if not getattr(self, name))


class Signature(Settings):
    """``signature.toml``: who signed, when, and the digest of what was signed."""

    name: Named
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def about(folder: Path) -> About:
    """What is stated in ``folder``; the first time, an empty form is left there to fill in.

    Raises:
        RunError: the file is not such a form.
    """
    path = folder / ABOUT
    if not path.exists():
        write_whole(path, _TEMPLATE.encode())
    return _read(About, path)


def signature(folder: Path) -> Signature | None:
    """Who signed the report in ``folder``, if anybody did.

    Raises:
        RunError: the file is no signature.
    """
    path = folder / SIGNATURE
    return _read(Signature, path) if path.exists() else None


def sign(folder: Path, name: str, digest: str) -> Signature:
    """Write down that ``name`` signs today for what has ``digest``.

    Raises:
        RunError: it cannot be written.
    """
    signed = Signature(name=name, date=date.today().isoformat(), digest=digest)
    write_whole(folder / SIGNATURE, tomli_w.dumps(signed.model_dump()).encode())
    return signed


def signed_files(facts: RunRecord, folder: Path) -> tuple[FileDigest, ...]:
    """What is signed: all that the report was read from, and what is stated, sorted by name."""
    return tuple(sorted((*facts.files, digest_in(folder, ABOUT)), key=lambda file: file.name))


def digest_of(files: Sequence[FileDigest]) -> str:
    """SHA-256 of what ``sha256sum`` prints of ``files``: the same wherever the folder lies."""
    lines = "".join(f"{file.digest}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _read(kind: type[File], path: Path) -> File:
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise RunError(f"{path}: {in_words(error, kind)}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not TOML ({error}): mend it, or remove it to begin anew") from None
