"""README and docs: each command they show is one, each file they name exists, each link leads somewhere."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from pages import ROOT, commands_of, files_named, links_of, parsed

from privkd.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted((ROOT / "papers/pages").glob("*.md"))
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_readme_begins_with_the_two_commands() -> None:
    assert commands_of(PAGES[0].read_text())[:2] == [["make"], ["make", "test"]]


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: page.name)
def test_every_row_of_a_table_has_all_its_cells(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
class TestPages:
    def test_every_command_parses(self, page: Path) -> None:
        for words in commands_of(page.read_text()):
            match words:
                case ["privkd", *rest]:
                    parsed([word for word in rest if not word.startswith("[")])
                    for setting in (value for flag, value in pairwise(rest) if flag == "--set"):
                        load_config(None, ["data.devices=1000", setting])
                case ["make", *targets]:
                    assert set(targets) <= set(TARGETS)
                case [".venv/bin/python", script, *_]:
                    assert (ROOT / script).is_file(), words
                case _:
                    pytest.fail(f"{page.name} shows an unknown command: {words}")

    def test_every_file_it_names_exists(self, page: Path) -> None:
        assert [name for name in files_named(page.read_text()) if not (ROOT / name).exists()] == []

    def test_every_link_leads_somewhere(self, page: Path) -> None:
        links = links_of(page.read_text())
        assert [link for link in links if not (page.parent / link).is_file()] == []

    def test_every_page_is_reached_from_the_readme(self, page: Path) -> None:
        assert page == PAGES[0] or f"docs/{page.name}" in links_of(PAGES[0].read_text())
