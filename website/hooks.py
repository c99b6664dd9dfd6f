"""What the site has beside the pages of docs/: reference, tutorials, papers' pages, the project's own.

mkdocs calls `on_files` before it reads any page.
"""

from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from reference import FRONTS, command_line_page, front_page, settings_page
from tutorials import Tutorial, read

ROOT = Path(__file__).resolve().parents[1]


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, before plugins look for pages."""
    for uri, text in (*_reference(), *_papers(), *_project()):
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        _add_tutorial(files, config, read(path, run=config.extra["run_tutorials"]))
    for path in sorted((ROOT / "website" / "assets").iterdir()):
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def _add_tutorial(files: Files, config: MkDocsConfig, tutorial: Tutorial) -> None:
    files.append(File.generated(config, f"tutorials/{tutorial.name}.md", content=tutorial.page))
    for name, picture in tutorial.pictures.items():
        files.append(File.generated(config, f"tutorials/{name}", content=picture))


def _reference() -> Iterator[tuple[str, str]]:
    yield "reference/command-line.md", command_line_page()
    yield "reference/settings.md", settings_page()
    for front in FRONTS:
        yield f"reference/{front}.md", front_page(front)


def _papers() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "papers" / "pages").glob("*.md"):
        yield f"papers/{path.name}", path.read_text()


def _project() -> Iterator[tuple[str, str]]:
    for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text()
        for page in ("CONTRIBUTING", "SECURITY", "CHANGELOG"):
            text = text.replace(f"]({page}.md)", f"]({page.lower()}.md)")
        yield f"project/{name.lower()}.md", text.replace("](docs/", "](../")
