"""What a page of the documentation shows: its commands, its files, its links."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from cli import app

ROOT = Path(__file__).resolve().parents[2]


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are mkdocs' own."""


_Loader.add_constructor("!ENV", lambda loader, node: None)
SITE: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def nav_pages(nav: list[dict[str, Any]] = SITE["nav"]) -> list[str]:
    """The site's pages in the order of its navigation, as paths below ``docs``."""
    below = (place for entry in nav for place in entry.values())
    return [page for place in below for page in ([place] if isinstance(place, str) else nav_pages(place))]


def commands_of(page: str) -> list[list[str]]:
    """The words of each command in the page's shell blocks, comments off and continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def files_named(page: str) -> set[str]:
    """The project's files that stand in the page's code spans."""
    folders = "privkd|papers|audits|attacks|tests|benchmarks|docs|examples"
    return set(re.findall(rf"`((?:{folders})/[\w./-]+)`", page))


def symbols_missed(text: str) -> list[str]:
    """The names in code spans of ``text`` that no file defines that it names too; none if it names none."""
    spans = re.findall(r"`([^`]+)`", text)
    # A bare word names no file of ours, whatever a run has left in the folder.
    named = [ROOT / span for span in spans if re.search(r"[/.]", span) and (ROOT / span).exists()]
    files = [file for path in named for file in ([path] if path.is_file() else path.rglob("*.py"))]
    code = "\n".join(file.read_text() for file in files)
    names = [span.rpartition(".")[2] for span in spans if re.fullmatch(r"[A-Za-z_][\w.]*", span)]
    return [
        name
        for name in names
        if named
        and name not in ("py", "toml", "json", "jsonl")
        and not re.search(rf"^ *(?:def|class) {name}\b|^ *{name}\b *[:=]", code, re.MULTILINE)
    ]


def links_of(page: str) -> set[str]:
    """What the page links to within the project, pictures too, without the place in it."""
    links = re.findall(r"\]\(([^)]+)\)", page)
    return {link.partition("#")[0] for link in links if not link.startswith(("https://", "#"))}


def parsed(words: list[str]) -> None:
    """Let the command line parse ``words`` without running them; it raises on what it does not know."""
    command = get_command(app)
    context = typer.Context(command, info_name="privkd")
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        _, found, words = command.resolve_command(context, list(words))
        assert found is not None
        command = found
    command.make_context(command.name, list(words), parent=context)
