"""The site, as `make docs` builds it, without running the tutorials."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import ROOT, nav_pages
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import attacks
import audits
import privkd
from cli import app
from privkd.config.reference import settings_reference

FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Page(HTMLParser):
    """What a page fetches, and what in it can be pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        if address := given.get(FETCHED.get(tag, "")):
            self.fetched.append(address)


def elsewhere(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(?i)(?:[a-z]+:)?//", address)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths, "RUN_TUTORIALS": "false"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def anchors(site: Path, page: str) -> set[str]:
    return Page((site / page).read_text()).anchors


def commands(command: TyperCommand | TyperGroup, name: str) -> Iterator[str]:
    yield name
    if isinstance(command, TyperGroup):
        for word, below in command.commands.items():
            yield from commands(below, f"{name}-{word}")


def test_every_page_is_in_the_navigation_once() -> None:
    pages = Counter(nav_pages())
    assert {page for page, times in pages.items() if times > 1} == set()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    assert {f"papers/{path.name}" for path in (ROOT / "papers/pages").glob("*.md")} <= set(pages)
    assert {f"tutorials/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")} <= set(pages)


def test_every_page_is_built(site: Path) -> None:
    assert [page for page in nav_pages() if not (site / page).with_suffix(".html").is_file()] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert elsewhere(Page(path.read_text()).fetched) == [], path.name
    for path in site.rglob("*.css"):
        asked = re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", path.read_text())
        assert elsewhere(asked) == [], path.name
    twin = (
        '<link rel="stylesheet" href="https://fonts.example/css"><script src="//cdn.example/x.js"></script>'
    )
    assert len(elsewhere(Page(twin).fetched)) == 2


def test_every_command_has_its_help(site: Path) -> None:
    shown = anchors(site, "reference/command-line.html")
    assert {"privkd-train", "privkd-audit-membership", "privkd-keys-add-device"} <= shown
    assert set(commands(get_command(app), "privkd")) <= shown


def test_every_setting_is_told(site: Path) -> None:
    told = anchors(site, "reference/settings.html")
    assert {setting.name for setting in settings_reference().settings} <= told


@pytest.mark.parametrize("front", [privkd, audits, attacks], ids=lambda front: front.__name__)
def test_every_public_name_has_its_docstring(front: object, site: Path) -> None:
    name = front.__name__
    told = anchors(site, f"reference/{name}.html")
    public = {f"{name}.{each}" for each in front.__all__ if not each.startswith("_")}
    assert public - told == set()
