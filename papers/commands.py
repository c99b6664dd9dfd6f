"""What ``privkd papers`` does, between the command line's parsing and the studies."""

import sys
from dataclasses import dataclass
from pathlib import Path

from papers.catalogue import STUDIES, study_named
from papers.study import scale_named
from privkd.errors import ConfigError
from privkd.stdout import print_json

_MOST_SEEDS = 1000
_QUICK = "quick"


@dataclass(frozen=True)
class PaperRequest:
    """``privkd papers run`` as it was typed; ``None`` is as the study has it."""

    name: str
    scale: str | None
    quick: bool
    seeds: int | None
    data_dir: Path | None
    out: Path
    json: bool


def list_command(*, as_json: bool) -> None:
    """Print the studies."""
    if as_json:
        rows = [{"name": s.name, "title": s.title, "scales": [x.name for x in s.scales]} for s in STUDIES]
        print_json({"papers": rows})
        return
    from papers.console import print_studies

    print_studies(STUDIES)


def show_command(name: str) -> None:
    """Print a study's page.

    Raises:
        ConfigError: there is none of that name.
    """
    sys.stdout.write(study_named(name).page)


def run_command(request: PaperRequest) -> None:
    """Run a study, or what is left of it, and print.

    Raises:
        PrivkdError: see its tree; the message is for people.
    """
    study = study_named(request.name)
    if request.seeds is not None and not 1 <= request.seeds <= _MOST_SEEDS:
        raise ConfigError(f"seeds={request.seeds}: expected 1 to {_MOST_SEEDS}")
    if request.quick and request.scale not in (None, _QUICK):
        raise ConfigError(f"--quick and --scale {request.scale}: give one of the two")
    scale = scale_named(study, _QUICK if request.quick else request.scale)
    from papers.console import print_reproduction
    from papers.player import Player
    from papers.reproduce import reproduce, reproduction_tree
    from privkd.console import progress_on_stderr

    with progress_on_stderr() as progress:
        player = Player(request.out, request.data_dir, progress)
        found = reproduce(study, scale, request.seeds or scale.seeds, player)
    if request.json:
        print_json(reproduction_tree(found))
    else:
        print_reproduction(found)
