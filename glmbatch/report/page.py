"""HTML and SVG elements for reports: one self-contained file that loads nothing.

Every function escapes the texts that it is given. Knows nothing of runs, scores or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# Size of a plot in pixels, and the margin around its axes.
WIDTH = 460
HEIGHT = 280
EDGE = 56
# One for each series. They also differ in brightness, for colour-blind readers.
COLOURS = ("#06c", "#c40", "#888", "#383", "#939", "#a80")
# With more bars than this, names would overlap, so only the first and the last are shown.
NAMED_BARS = 12
# A character of the 11-pixel font is about 6 pixels wide.
CHARACTER = 6
# Even if some text acted as markup, it could load nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:66em;margin:2em auto;padding:0 1em;"
    "color:#222}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;max-width:36em;"
    "overflow-wrap:break-word}"
    "td.number{text-align:right}.facts td{text-align:left}"
    "svg{background:#fafafa;margin:.3em;font-size:11px}"
    ".warn{color:#a40}"
)

# Name and points of one line.
Line = tuple[str, Sequence[tuple[float, float]]]
# Name and heights of one series of bars.
Bars = tuple[str, Sequence[float]]
# A cell with nothing but a number is aligned to the right.
NUMBER = re.compile(r"[\d.,%+-]+")
# Name of an axis, and the texts at its ends.
Axis = tuple[str, str, str]


def page(title: str, parts: Iterable[str]) -> str:
    """A complete HTML file: the title, then `parts`, which the functions below return."""
    head = (
        f'<meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    begin = [f"<!doctype html><html lang=en>{head}", f"<h1>{escape(title)}</h1>"]
    return "\n".join([*begin, *parts, "</html>"])


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, warning: bool = False) -> str:
    """A paragraph; a warning has another colour."""
    return f"<p{' class=warn' if warning else ''}>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text that keeps its line breaks and spaces, such as JSON."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with `head` as its column names."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{names}</tr>{_rows(rows)}</table>"


def facts(lines: Iterable[tuple[str, object]]) -> str:
    """A table of names and values, without column names."""
    return f"<table class=facts>{_rows(lines)}</table>"


def _rows(rows: Iterable[Sequence[object]]) -> str:
    lines = []
    for row in rows:
        cells = "".join(_cell(str(value)) for value in row)
        lines.append(f"<tr>{cells}</tr>")
    return "".join(lines)


def _cell(text: str) -> str:
    kind = " class=number" if NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def lines(title: str, x_name: str, y_name: str, series: Sequence[Line]) -> str:
    """A line plot with shared axes; "" if there are no points."""
    points: list[tuple[float, float]] = []
    for _, line in series:
        points += line
    if not points:
        return ""
    # All series share the axes, so the ranges cover all points.
    left, right = _range([x for x, _ in points])
    low, high = _range([y for _, y in points])
    drawn = []
    for number, (_, line) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        places = []
        for x, y in line:
            places.append((_x((x - left) / (right - left)), _y((y - low) / (high - low))))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        # Dots, because a line of one point would be invisible.
        for x, y in places:
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
    drawn += _legend([name for name, _ in series])
    x_axis = (x_name, _number(left), _number(right))
    y_axis = (y_name, _number(low), _number(high))
    return _svg(title, x_axis, y_axis, drawn)


def bars(title: str, x_name: str, y_name: str, names: Sequence[str], series: Sequence[Bars]) -> str:
    """A bar chart: for each of `names`, a bar of every series from 0 up; "" if all are 0."""
    high = max((max(values, default=0) for _, values in series), default=0)
    if not high:
        return ""
    slot = (WIDTH - 2 * EDGE) / len(names)
    drawn = []
    for number, (series_name, values) in enumerate(series):
        for at, (name, value) in enumerate(zip(names, values, strict=True)):
            # The bars of one name share 80 percent of its slot.
            x = EDGE + slot * (at + 0.1 + 0.8 * number / len(series))
            tip = f"{name}, {series_name}: {value:.4g}"
            drawn.append(_bar(x, 0.8 * slot / len(series), value / high, number, tip))
    ends = (names[0], names[-1])
    if len(names) <= NAMED_BARS:
        ends = ("", "")
        fits = max(1, int(slot / CHARACTER))
        for at, name in enumerate(names):
            drawn.append(_text(EDGE + slot * (at + 0.5), _y(0) + 14, name[:fits]))
    drawn += _legend([name for name, _ in series])
    return _svg(title, (x_name, *ends), (y_name, "0", _number(high)), drawn)


def _bar(x: float, width: float, share: float, number: int, tip: str) -> str:
    """A bar that covers `share` of the height, in the colour of series `number`."""
    top = _y(share)
    place = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_y(0) - top:.1f}"'
    colour = COLOURS[number % len(COLOURS)]
    return f'<rect {place} fill="{colour}"><title>{escape(tip)}</title></rect>'


def _svg(title: str, x_axis: Axis, y_axis: Axis, drawn: Sequence[str]) -> str:
    """A plot with its title and axes around the elements `drawn`."""
    middle = HEIGHT / 2
    bottom = HEIGHT - EDGE
    texts = [
        _text(WIDTH / 2, 20, title, 'font-size="14"'),
        _text(WIDTH / 2, HEIGHT - 10, x_axis[0]),
        _text(EDGE, bottom + 14, x_axis[1]),
        _text(WIDTH - EDGE, bottom + 14, x_axis[2]),
        _text(14, middle, y_axis[0], f'transform="rotate(-90 14 {middle:g})"'),
        _text(EDGE - 18, bottom, y_axis[1]),
        _text(EDGE - 18, EDGE + 4, y_axis[2]),
    ]
    # Screen readers read this instead of the picture.
    label = escape(f"{title}: {y_axis[0]} ({y_axis[1]} to {y_axis[2]}) over {x_axis[0]}")
    axes = f'<path d="M{EDGE} {EDGE}V{bottom}H{WIDTH - EDGE}" fill="none" stroke="#444"/>'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">'
        f"{axes}{''.join(drawn)}{''.join(texts)}</svg>"
    )


def _legend(names: Sequence[str]) -> list[str]:
    """The names of the series in their colours; none for a single series."""
    if len(names) < 2:
        return []
    slot = (WIDTH - 2 * EDGE) / len(names)
    fits = int(slot / CHARACTER)
    texts = []
    for at, name in enumerate(names):
        colour = COLOURS[at % len(COLOURS)]
        texts.append(_text(EDGE + slot * (at + 0.5), 40, name[:fits], f'fill="{colour}"'))
    return texts


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    """`text` centred at `x`; "" if the text is empty."""
    if not text:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {attributes}>{escape(text)}</text>'


def _x(share: float) -> float:
    """The horizontal pixel at `share` of the x axis."""
    return EDGE + (WIDTH - 2 * EDGE) * share


def _y(share: float) -> float:
    """The vertical pixel at `share` of the y axis; pixels count from the top."""
    return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * share


def _number(value: float) -> str:
    """Three digits of `value`, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, moved apart if they are equal."""
    low = min(values)
    high = max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
