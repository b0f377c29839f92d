"""report.html: one page that shows what is in a report.json. Needs the extra `plots`."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from woodfisher.errors import WoodfisherError, extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jinja2 import Template

    from woodfisher.results.page.record import AnyReport

REPORT, PAGE = "report.json", "report.html"


def require_page() -> None:
    """Raise, before any work, where Jinja or pydantic is missing."""
    with extra("plots", "report.html needs Jinja and pydantic"):
        import jinja2  # noqa: F401
        import pydantic  # noqa: F401


def render(report: AnyReport) -> str:
    """The page of a report as HTML: no script, nothing from elsewhere, and every text of the report escaped."""
    from woodfisher.results.page.pages import page_of

    try:
        page = page_of(report)
    except (ArithmeticError, ValueError) as error:
        raise WoodfisherError(f"the report holds numbers that can't be drawn ({error}).") from error
    return _template().render(page=page)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("woodfisher.results.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def save_page(content: Mapping[str, Any], path: Path) -> None:
    """Write the page of what is about to be report.json."""
    from woodfisher.results.page.record import parse

    write_page(parse(json.dumps(content), REPORT), path)


def write_page(report: AnyReport, path: Path) -> None:
    """Write the page of a report."""
    path.write_text(render(report), encoding="utf-8")
