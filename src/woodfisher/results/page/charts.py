"""Charts as inline SVG that is as wide as the page lets it be, while its text keeps its size.

Positions across are in per cent, down in pixels; what is drawn in one stroke stands in an inner picture that is
stretched. Colours are classes of the page's style sheet, so that one picture serves dark, light and print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

from markupsafe import Markup

from woodfisher.results.numbers import power_of_ten, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

COLOURS = 8
"""Of series, s0 to s7 in the style sheet."""

_TICK_ROOM, _TOP, _BOTTOM = 8, 10, 26
_NAME, _BAR, _THIN, _GAP = 19, 10, 7, 4
_SHAPES = (
    "M-3.6,0a3.6,3.6 0 1,0 7.2,0a3.6,3.6 0 1,0 -7.2,0",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.4L4.2,3.2H-4.2z",
    "M0,-4.6L4.6,0L0,4.6L-4.6,0z",
)
_SMALLEST = 1e-300
"""Value below which a scale takes all for zero."""

_DECADES = 3
"""Of a scale on either side of zero, before it is linear."""

_MARKED = 40
"""Points of a line up to which each has a marker."""

_CROSS = "M-4,-4L4,4M-4,4L4,-4"


@dataclass(frozen=True)
class Scale:
    """A range of values as [0, 1], and the values that are marked on it."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


def linear(values: Iterable[float], *, zero: bool = False, tight: bool = False, unit: str = "") -> Scale:
    """A scale around values, with 0 on it if asked for, and round ends unless `tight`."""
    values = [*values, *([0.0] if zero else [])] or [0.0]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    step = _round_step((high - low) / (6 if tight else 4))
    inward = math.ceil, math.floor
    outward = math.floor, math.ceil
    down, up = inward if tight else outward
    marks = range(down(low / step), up(high / step) + 1)
    start, stop = (low, high) if tight else (marks[0] * step, marks[-1] * step)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(i * step, f"{i * step:.{decimals}f}".replace("-", "−") + unit) for i in marks]
    return Scale(lambda v: (v - start) / (stop - start), ticks)


def counting(last: float, *, first: float = 0) -> Scale:
    """A scale from one whole number to another, marked at round ones between."""
    last = max(last, first + 1)
    step = max(round(_round_step((last - first) / 6)), 1)
    marks = range(math.ceil(first / step) * step, int(last) + 1, step)
    return Scale(lambda v: (v - first) / (last - first), [(float(at), f"{at:,}") for at in marks])


def logarithmic(values: Iterable[float]) -> Scale:
    """A scale of powers of ten around positive values."""
    logs = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(logs) + 1e-9), math.ceil(max(logs) - 1e-9)
    high = max(high, low + 1)
    every = -(-(high - low) // 6)
    return Scale(
        lambda v: (math.log10(v) - low) / (high - low) if v > 0 else 0.0,
        [(10.0**p, power_of_ten(p)) for p in range(low, high + 1, every)],
    )


def signed_logarithmic(values: Iterable[float]) -> Scale:
    """A scale that is logarithmic over the three largest decades on either side of zero, and linear between."""
    values = list(values)
    largest = max(map(abs, values), default=0.0)
    largest = largest if largest > _SMALLEST else 1.0
    top = math.ceil(math.log10(largest) - 1e-9)
    threshold = 10.0 ** (top - _DECADES)

    def bent(v: float) -> float:
        return math.copysign(math.log10(1 + abs(v) / threshold), v)

    powers = [10.0**p for p in range(top - _DECADES + 1, top + 1)]
    low = min(0.0, *(bent(v) for v in values), 0.0)
    high = max(0.0, *(bent(v) for v in values), 0.0)
    marked = [
        (sign * p, ("−" if sign < 0 else "") + power_of_ten(round(math.log10(p))))
        for sign in (-1, 1)
        for p in powers
    ]
    room = (high - low or 1.0) / 25
    low, high = low - room * (low < 0), high + room * (high > 0)
    span = high - low or 1.0
    kept = [(v, label) for v, label in marked if low - 1e-9 <= bent(v) <= high + 1e-9]
    return Scale(lambda v: (bent(v) - low) / span, sorted([*kept, (0.0, "0")]))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * (1 + 1e-9))


@dataclass(frozen=True)
class Series:
    """A line of `(x, y)` with its name.

    Attributes
    ----------
    colour:
        Its number; they come again after the eighth.
    how:
        `line`, `step` (each value holds until the next), `dots` or `crosses`; markers stand on lines of few points.
    spread:
        Half the height of an error bar at each point, or None.
    notes:
        What a point says when it is pointed at; nothing where there are none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    how: Literal["line", "step", "dots", "crosses"] = "line"
    spread: Sequence[float | None] = ()
    dashed: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One row of a chart of layers.

    Attributes
    ----------
    name, value:
        Written above its bars, left and right.
    lanes:
        Bars below one another, each of parts `(from, to, class)` in [0, 1].
    marks:
        `(where, class)` of thin lines across all lanes.
    """

    name: str
    value: str
    lanes: Sequence[Sequence[tuple[float, float, str]]]
    marks: Sequence[tuple[float, str]] = ()


def chart(
    label: str,
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    height: int = 240,
    rules: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over two scales; `rules` are `(y, class)` of lines across."""
    bottom = height - _BOTTOM
    svg = _svg(label, height, "chart")

    def down(value: float) -> float:
        return bottom - _clip(y.place(value)) * (bottom - _TOP)

    def across(value: float) -> float:
        return 100 * _clip(x.place(value))

    for value, text in y.ticks:
        _line(svg, 0, down(value), 100, down(value), "zero" if value == 0 and y.ticks[0][0] < 0 else "grid")
        _text(svg, text, 0, down(value) + 4, "tick end", dx=-_TICK_ROOM)
    for value, text in x.ticks:
        _line(svg, across(value), bottom, across(value), bottom + 4, "axis")
        _text(svg, text, across(value), height - 8, "tick middle")
    _line(svg, 0, bottom, 100, bottom, "axis")
    for value, kind in rules:
        _line(svg, 0, down(value), 100, down(value), kind)
    for one in series:
        colour = series_class(one.colour)
        places = [(across(a), down(b)) for a, b in one.points]
        if one.how in ("line", "step") and len(places) > 1:
            style = f"stroke {colour}" + (" dashed" if one.dashed else "")
            _path(svg, _stepped(places) if one.how == "step" else places, height, style)
        for (a, b), half in zip(one.points, one.spread or [None] * len(one.points), strict=True):
            if half:
                _line(svg, across(a), down(b - half), across(a), down(b + half), f"stroke {colour} thin")
        if one.how == "step" or (one.how == "line" and len(one.points) > _MARKED):
            continue
        shape = _CROSS if one.how == "crosses" else _SHAPES[one.colour % len(_SHAPES)]
        kind = "cross" if one.how == "crosses" else "marker"
        for index, (a, b) in enumerate(places):
            mark = _marker(svg, a, b, shape, f"{kind} {colour}")
            if one.notes:
                ET.SubElement(mark, "title").text = one.notes[index]
    return _markup(svg)


def bars(label: str, rows: Sequence[Row], scale: Scale) -> Markup:
    """A row for each layer, its name above its bars, over a scale."""
    most = max(len(row.lanes) for row in rows)
    thick = _BAR if most == 1 else _THIN
    row_height = _NAME + most * (thick + 2) + _GAP
    bottom = row_height * len(rows)
    svg = _svg(label, bottom + _BOTTOM, "bars")
    for value, text in scale.ticks:
        at = 100 * _clip(scale.place(value))
        _line(svg, at, 0, at, bottom, "grid")
        side = "middle" if 3 < at < 97 else "start" if at <= 3 else "end"
        _text(svg, text, at, bottom + _BOTTOM - 8, f"tick {side}")
    for index, row in enumerate(rows):
        top = index * row_height
        _text(svg, shortened(row.name, most=34), 0, top + 14, "name", title=row.name)
        _text(svg, row.value, 100, top + 14, "value end")
        y = top + _NAME
        for lane in row.lanes:
            for start, stop, kind in lane:
                left, right = 100 * _clip(start), 100 * _clip(stop)
                _rect(svg, left, y, max(right - left, 0.0), thick, kind)
            y += thick + 2
        for at, kind in row.marks:
            reach = 0 if kind == "eigen" else 2
            _line(svg, 100 * _clip(at), top + _NAME - reach, 100 * _clip(at), y - 2 + reach, kind)
    return _markup(svg)


def swatch(colour: int, how: str = "line", *, dashed: bool = False) -> Markup:
    """A sample of a series for the legend."""
    name = series_class(colour)
    svg = ET.Element("svg", {"class": "swatch", "width": "26", "height": "12", "aria-hidden": "true"})
    if how in ("line", "step"):
        _line(svg, 0, 6, 100, 6, f"stroke {name}" + (" dashed" if dashed else ""))
    if how in ("line", "dots", "crosses") and not dashed:
        shape = _CROSS if how == "crosses" else _SHAPES[colour % len(_SHAPES)]
        _marker(svg, 50, 6, shape, f"{'cross' if how == 'crosses' else 'marker'} {name}")
    return _markup(svg)


def key(kind: str, how: Literal["bar", "mark", "level", "eigen"]) -> Markup:
    """A sample of what `bars` draws for the legend."""
    svg = ET.Element("svg", {"class": "swatch", "width": "26", "height": "14", "aria-hidden": "true"})
    if how == "bar":
        _rect(svg, 0, 2, 100, _BAR, kind)
    elif how == "eigen":
        for at in (12, 30, 44, 70, 92):
            _line(svg, at, 2, at, 12, kind)
    elif how == "level":
        _line(svg, 0, 7, 100, 7, kind)
    else:
        _line(svg, 50, 0, 50, 14, kind)
    return _markup(svg)


def series_class(colour: int) -> str:
    """The class that a series' colour has in the style sheet."""
    return f"s{colour % COLOURS}"


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _stepped(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    corners = [places[0]]
    for (_, before), (x, y) in pairwise(places):
        corners += [(x, before), (x, y)]
    return corners


def _svg(label: str, height: int, kind: str) -> ET.Element:
    return ET.Element(
        "svg", {"class": kind, "width": "100%", "height": f"{height:g}", "role": "img", "aria-label": label}
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _line(parent: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ET.SubElement(
        parent,
        "line",
        {
            "x1": f"{_number(x1)}%",
            "y1": _number(y1),
            "x2": f"{_number(x2)}%",
            "y2": _number(y2),
            "class": kind,
        },
    )


def _rect(parent: ET.Element, x: float, y: float, width: float, height: float, kind: str) -> None:
    ET.SubElement(
        parent,
        "rect",
        {
            "x": f"{_number(x)}%",
            "y": _number(y),
            "width": f"{_number(width)}%",
            "height": _number(height),
            "class": kind,
        },
    )


def _text(
    parent: ET.Element, text: str, x: float, y: float, kind: str, *, dx: float = 0, title: str = ""
) -> None:
    element = ET.SubElement(parent, "text", {"x": f"{_number(x)}%", "y": _number(y), "class": kind})
    if dx:
        element.set("dx", _number(dx))
    element.text = text
    if title and title != text:
        ET.SubElement(element, "title").text = title


def _path(parent: ET.Element, places: Sequence[tuple[float, float]], height: float, kind: str) -> None:
    inner = ET.SubElement(
        parent,
        "svg",
        {
            "width": "100%",
            "height": f"{height:g}",
            "viewBox": f"0 0 100 {height:g}",
            "preserveAspectRatio": "none",
            "overflow": "visible",
        },
    )
    route = "M" + "L".join(f"{_number(x)},{_number(y)}" for x, y in places)
    ET.SubElement(inner, "path", {"d": route, "class": kind})


def _marker(parent: ET.Element, x: float, y: float, shape: str, kind: str) -> ET.Element:
    inner = ET.SubElement(parent, "svg", {"x": f"{_number(x)}%", "y": _number(y), "overflow": "visible"})
    return ET.SubElement(inner, "path", {"d": shape, "class": kind})


def _markup(svg: ET.Element) -> Markup:
    return Markup(ET.tostring(svg, encoding="unicode"))  # noqa: S704  ElementTree has escaped every text
