"""Plots as SVG within a page, drawn by pygal. Knows nothing of runs or scores.

pygal's scripts and styles are left out: the page's own style sheet colours every plot, in the dark
and in print too. Text stays text, and the same values always give the same plot.
"""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from itertools import chain
from typing import Any, NamedTuple

# Units of the drawing; the page scales it to the width of its column.
WIDTH = 440
HEIGHT = 240
BAR = 15  # thickness of a horizontal bar
TICKS = 6  # at most, on one axis
COLOURS = 7  # in the style sheet; more lines than this cannot be told apart
NAME_CHARS = 22  # a name beside a bar
# pygal explains a plot to scripts in these; a page has no scripts.
DROPPED = {"script", "style", "defs", "desc"}
TIPPED = {"dots", "bar", "histbar"}
TEXTS = re.compile("(text|tooltip)-overlay")
# More digits than anyone could see.
LONG = re.compile(r"\d+\.\d+")

# Names and points of the lines of a plot.
Point = tuple[float, float]
Line = tuple[str, Sequence[Point]]
Bars = tuple[str, Sequence[float]]


class Axis(NamedTuple):
    """The name of an axis, and how its numbers are written.

    `least` is the smallest step between two numbers: 1 for counts. `ends` are the least range that
    the axis covers. `names` are written at 1, 2, 3 and so on in place of numbers.
    """

    name: str
    percent: bool = False
    least: float = 0.0
    ends: tuple[float, ...] = ()
    names: Sequence[str] = ()

    def text(self, value: float) -> str:
        """`value` as it is written at the axis."""
        return f"{100 * value:,.4g} %" if self.percent else f"{value:,.6g}"


def lines(title: str, x: Axis, y: Axis, series: Sequence[Line]) -> str:
    """A line plot with shared axes; "" if there are no points."""
    series = [(name, points) for name, points in series[:COLOURS] if points]
    if not series:
        return ""
    pygal = _pygal()
    xs, ys = zip(*chain(*(points for _, points in series)), strict=True)
    chart = pygal.XY(**_settings(x, y, xs, ys), dots_size=2.5 if len(xs) < 120 else 1.2)
    for name, points in series:
        marks = []
        for at, value in points:
            place = x.names[round(at) - 1] if x.names else f"{x.name} {x.text(at)}"
            marks.append(
                {"value": (at, value), "tooltip": _plain(f"{name}, {place}: {y.text(value)}")}
            )
        chart.add(_plain(name), marks)
    return _figure(title, x, y, [name for name, _ in series], chart)


def histogram(title: str, x: Axis, y: Axis, width: float, counts: Sequence[int]) -> str:
    """Bars of equal `width` from 0 up; "" if all counts are 0."""
    if not any(counts):
        return ""
    pygal = _pygal()
    settings = _settings(x, y, [0.0, width * len(counts)], [0.0, max(counts)])
    chart = pygal.Histogram(**settings)
    marks = []
    for number, count in enumerate(counts):
        start, end = number * width, (number + 1) * width
        tip = f"{x.name} {x.text(start)} to {x.text(end)}: {y.text(count)} {y.name}"
        marks.append({"value": (count, start, end), "tooltip": _plain(tip)})
    chart.add(_plain(y.name), marks)
    return _figure(title, x, y, [y.name], chart)


def bars(title: str, x: Axis, names: Sequence[str], series: Sequence[Bars]) -> str:
    """Horizontal bars: for each of `names`, one of every series; "" if all are 0."""
    if not any(any(values) for _, values in series):
        return ""
    pygal = _pygal()
    high = max(max(values) for _, values in series)
    settings = _settings(Axis(""), x, [0.0], [0.0, high])
    settings["height"] = 50 + len(names) * (BAR * len(series) + 10)
    chart = pygal.HorizontalBar(**settings | {"x_labels": [_cut(name) for name in names[::-1]]})
    # pygal begins at the bottom.
    for series_name, values in series:
        marks = []
        for name, value in zip(names[::-1], values[::-1], strict=True):
            tip = _plain(f"{name}, {series_name}: {x.text(value)}")
            marks.append({"value": value, "tooltip": tip})
        chart.add(_plain(series_name), marks)
    return _figure(title, x, Axis(""), [name for name, _ in series], chart)


def round_numbers(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers at equal distances that cover `low` to `high`: steps of 1, 2 or 5 tens."""
    # Values that differ only by rounding, as means of a constant do, are as one value.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        high = low + max(abs(low) * 0.1, least, 1e-6)
    order = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    # The limit is a hair more, because 0.6 / 0.1 is not quite 6.
    step = next(
        order * size for size in (1, 2, 5, 10) if (high - low) / (order * size) <= TICKS + 1e-9
    )
    step = max(step, least)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _pygal() -> Any:
    """The package; importing it takes 0.1 s, which a process without a page does not spend."""
    import pygal

    # It asks to be asked about every later import, in a way that Python 3.11 warns of.
    ours = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]
    sys.meta_path[:] = ours
    return pygal


def _settings(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    """pygal's settings for a plot whose axes cover these values."""
    y_marks = round_numbers(min([*ys, *y.ends]), max([*ys, *y.ends]), y.least)
    if x.names:
        # Only so many that their names do not overlap, always with the last.
        every = max(1, math.ceil(len(x.names) / TICKS))
        x_marks = []
        for at in range(len(x.names), 0, -every):
            x_marks.append({"value": at, "label": _plain(x.names[at - 1])})
        x_range = (0.7, len(x.names) + 0.3)
    else:
        numbers = round_numbers(min([*xs, *x.ends]), max([*xs, *x.ends]), x.least)
        x_marks = [{"value": at, "label": x.text(at)} for at in numbers]
        x_range = (numbers[0], numbers[-1])
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "js": (),
        "css": (),
        "no_prefix": True,
        "show_legend": False,
        "margin": 6,
        "margin_right": 16,
        "truncate_label": -1,
        "y_labels": y_marks,
        "y_labels_major": y_marks,  # all alike; pygal cannot choose among two that are nearly equal
        "range": (y_marks[0], y_marks[-1]),
        "value_formatter": y.text,
        "x_labels": x_marks,
        "xrange": x_range,
        "print_values": False,
    }


def _figure(title: str, x: Axis, y: Axis, names: Sequence[str], chart: Any) -> str:
    """The drawn chart under its title and the names of its colours."""
    drawn = _cleaned(chart.render_tree())
    # Screen readers read this instead of the picture.
    drawn.attrib = {
        "viewBox": drawn.attrib["viewBox"],
        "role": "img",
        "aria-label": _plain(", ".join(filter(None, [title, y.name, x.name]))),
    }
    keys = []
    for number, name in enumerate(names if len(names) > 1 else ()):
        keys.append(f"<li class=c{number}><span>{escape(_plain(name))}</span></li>")
    parts = [f"<figcaption>{escape(title)}</figcaption>"]
    if keys:
        parts.append(f"<ul class=key>{''.join(keys)}</ul>")
    if y.name:
        parts.append(f"<div class=axis>{escape(y.name)}</div>")
    parts.append(ET.tostring(drawn, encoding="unicode"))
    if x.name:
        parts.append(f'<div class="axis below">{escape(x.name)}</div>')
    return f"<figure>{''.join(parts)}</figure>"


def _cleaned(node: Any) -> ET.Element:
    """A copy of pygal's tree without scripts, styles, comments, ids and what serves only them."""
    # The tree is lxml's if that is installed; both have the same names for what is used here.
    kept = {}
    for name, value in node.attrib.items():
        if name not in {"id", "style"} and "{" not in name:
            kept[name] = value if name == "class" else LONG.sub(_short, value)
    copy = ET.Element(node.tag.rpartition("}")[2], kept)
    copy.text = node.text
    for child in node:
        if not isinstance(child.tag, str) or child.tag in DROPPED:
            continue
        # Titles are the tips of dots and bars. Others repeat what is written at the axes.
        if child.tag == "title" and kept.get("class") not in TIPPED:
            continue
        if not TEXTS.search(child.attrib.get("class", "")):
            copy.append(_cleaned(child))
    return copy


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.4g}"


def _plain(text: str) -> str:
    """`text` on one line, without characters that XML does not allow."""
    return "".join(
        letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split())
    )


def _cut(name: str) -> str:
    name = _plain(name)
    return name if len(name) <= NAME_CHARS else name[: NAME_CHARS - 1] + "…"
