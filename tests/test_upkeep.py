"""What those who carry on are given: hooks, forms, the citation."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def recipe(target: str) -> list[str]:
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in lines.splitlines()]


def test_hooks_call_what_lint_and_types_call() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == [*recipe("lint"), *recipe("types")]
    assert {hook["pass_filenames"] for hook in repository["hooks"]} == {False}


def test_the_citation_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = read(ROOT / "CITATION.cff")
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert {"message", "title", "authors"} <= set(cited), "what the format demands"
    assert (cited["title"], cited["version"], cited["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip
    assert cited["authors"] == project["authors"]
    assert (cited["abstract"].rstrip("."), cited["keywords"]) == (project["description"], project["keywords"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_what_is_needed(form: Path) -> None:
    asked = read(form)
    assert {"name", "description", "body"} <= set(asked)
    fields = [field for field in asked["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    for field in fields:
        assert field["attributes"]["label"]
        assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"}


def test_there_is_a_form_for_false_claims_and_it_leads_to_the_private_way() -> None:
    assert {form.stem for form in FORMS} == {"bug", "false-claim", "feature"}
    assert "SECURITY.md" in read(ROOT / ".github/ISSUE_TEMPLATE/false-claim.yml")["description"]
    assert "private security advisory" in (ROOT / "SECURITY.md").read_text()
