"""README and docs: each command they show is one, each file they name exists, each link leads somewhere."""

import ast
import inspect
import pkgutil
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from pages import ROOT, commands_of, files_named, links_of, nav_pages, parsed, symbols_missed

import attacks
import audits
import privkd
from privkd.config import load_config

PROJECT = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES = [ROOT / "README.md", *PROJECT, *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted((ROOT / "papers/pages").glob("*.md"))
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_readme_begins_with_the_two_commands() -> None:
    assert commands_of(PAGES[0].read_text())[:2] == [["make"], ["make", "test"]]


def test_the_readme_shows_a_front_door_that_is_there() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    fronts = {"attacks": attacks, "audits": audits, "privkd": privkd}
    calls = [node for node in ast.walk(ast.parse(shown)) if isinstance(node, ast.Call)]
    found = {ast.unparse(call.func): call for call in calls}
    assert {"privkd.Config", "privkd.train", "audits.membership", "attacks.register"} <= set(found)
    for name, call in found.items():
        front, _, function = name.partition(".")
        if front in fronts and function != "Config":
            given = {keyword.arg: None for keyword in call.keywords}
            signature = inspect.signature(getattr(fronts[front], function))
            signature.bind(*call.args, **given)
    assert eval(ast.unparse(found["privkd.Config"]), fronts).data.devices == 20


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: page.name)
def test_every_row_of_a_table_has_all_its_cells(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize(
    "mistaken", ["trian", "train --epsilom 3", "audit memberships", "keys --output x", "compare a"]
)
def test_a_command_that_is_none_would_be_found(mistaken: str) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        parsed(mistaken.split())


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
                case ["pre-commit", *rest]:
                    assert rest == ["install"]
                case [".venv/bin/python", script, *_]:
                    assert (ROOT / script).is_file(), words
                case _:
                    pytest.fail(f"{page.name} shows an unknown command: {words}")

    def test_every_file_it_names_exists(self, page: Path) -> None:
        assert [name for name in files_named(page.read_text()) if not (ROOT / name).exists()] == []

    def test_every_dotted_name_is_one_of_ours(self, page: Path) -> None:
        for name in re.findall(r"`((?:privkd|audits|attacks|papers)(?:\.\w+)+)", page.read_text()):
            assert name.endswith(".py") or pkgutil.resolve_name(name)

    def test_every_link_leads_somewhere(self, page: Path) -> None:
        # The front page leads to pages of the site that are made when it is built.
        made = set(nav_pages()) if page.parent == ROOT / "docs" else set()
        links = links_of(page.read_text()) - made
        assert [link for link in links if not (page.parent / link).is_file()] == []

    def test_every_page_is_reached_from_the_readme(self, page: Path) -> None:
        reached = {ROOT / link for link in links_of(PAGES[0].read_text())}
        assert page in {PAGES[0], *reached}


class TestArchitecture:
    PAGE = (ROOT / "docs" / "architecture.md").read_text()

    def test_every_symbol_is_in_a_file_that_is_named_beside_it(self) -> None:
        text = re.sub(r"```.*?```", "", self.PAGE, flags=re.DOTALL)
        # A paragraph, a point of a list and a row of a table are a thought each.
        thoughts = re.split(r"\n\n|\n(?=- |\d+\. |\|)", text)
        assert {thought[:40]: missed for thought in thoughts if (missed := symbols_missed(thought))} == {}
        assert symbols_missed("`Cloud.publishes` (`privkd/cloud.py`)") == ["publishes"], "the twin"

    def test_the_layers_are_those_that_the_linter_holds(self) -> None:
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        (held,) = [each["layers"] for each in contracts if each.get("containers") == ["privkd"]]
        table = self.PAGE.partition("| layer |")[2].partition("\n\n")[0]
        rows = [line.split("|")[1] for line in table.splitlines()[2:]]
        assert [re.findall(r"`(\w+)`", row) for row in rows] == [re.findall(r"\w+", layer) for layer in held]
