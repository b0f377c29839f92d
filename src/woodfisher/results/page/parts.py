"""What a page is made of: cards, sections, figures and tables, before they are HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

    from woodfisher.results.page.record import Origin


@dataclass(frozen=True)
class Card:
    """A result at the top: what it is of, the figure, and what to compare it with."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, what its axes measure, and samples of its series with their names."""

    svg: Markup
    caption: str = ""
    y: str = ""
    x: str = ""
    legend: Sequence[tuple[Markup, str]] = ()


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; folded away under `summary` where there is one.

    Attributes
    ----------
    best:
        `(row, column)` of cells to stress.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then a list, figures and tables."""

    key: str
    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """Everything that a page says."""

    command: str
    title: str
    verdict: str
    cards: Sequence[Card]
    warnings: int
    sections: Sequence[Section]
    seed: int
    origin: Origin | None
