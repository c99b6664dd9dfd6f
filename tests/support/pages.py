"""What a page of the documentation shows: its commands, its files, its links."""

import re
import shlex
from pathlib import Path

import click
from typer.main import get_command

from cli import app

ROOT = Path(__file__).resolve().parents[2]


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
    """What the page links to within the project, pictures too."""
    return {link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("https://")}


def parsed(words: list[str]) -> None:
    """Let the command line parse ``words`` without running them; it raises on what it does not know."""
    command: click.Command = get_command(app)
    context = click.Context(command, info_name="privkd")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    command.make_context(command.name, list(words), parent=context)
