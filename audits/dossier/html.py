"""A page as one HTML file that needs nothing else. The only importer of jinja2."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from audits.dossier.page import Figure, Page

_MIME = {"svg": "image/svg+xml", "png": "image/png"}


def as_html(page: Page) -> str:
    """The page; whatever a run's files say is text in it, never markup."""
    environment = Environment(
        loader=PackageLoader("audits.dossier"),
        autoescape=select_autoescape(enabled_extensions=("html", "svg"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = _embedded
    return environment.get_template("report.html").render(page=page)


def _embedded(figure: Figure) -> str:
    return f"data:{_MIME[figure.kind]};base64,{base64.b64encode(figure.data).decode()}"
