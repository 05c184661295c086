"""A page for people: one HTML file that loads nothing from elsewhere, with its tables and plots inside.

Every text that is given here is escaped here. Knows nothing of runs, scores or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT, EDGE = 460, 280, 56
COLOURS = ("#06c", "#c40", "#888", "#383", "#939", "#a80")
NAMED_BARS = 12  # with more of them only the first and the last are named
# Were something of the data taken for markup after all, it could still load nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right;"
    "max-width:36em;overflow-wrap:break-word}td:first-child,th:first-child,.facts td{text-align:left}"
    "svg{background:#fafafa;margin:.3em;font-size:11px}.warn{color:#a40}"
)

# A name and the points of one line.
Line = tuple[str, Sequence[tuple[float, float]]]
# What an axis shows, and the texts at its ends.
Axis = tuple[str, str, str]


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file: `parts` below the title."""
    head = f'<meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return "\n".join(
        [f"<!doctype html><html lang=en>{head}", f"<h1>{escape(title)}</h1>", *parts, "</html>"]
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, warning: bool = False) -> str:
    return f"<p{' class=warn' if warning else ''}>{escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The rows below a line of names."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{cells}</tr>{_rows(rows)}</table>"


def facts(lines: Iterable[tuple[str, object]]) -> str:
    """Names with their values, a line for each."""
    return f"<table class=facts>{_rows(lines)}</table>"


def _rows(rows: Iterable[Sequence[object]]) -> str:
    return "".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )


def lines(title: str, x_name: str, y_name: str, each: Sequence[Line]) -> str:
    """Lines over common axes; nothing when there is no point."""
    points = [point for _, line in each for point in line]
    if not points:
        return ""
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))
    drawn = []
    for number, (_, line) in enumerate(each):
        colour = COLOURS[number % len(COLOURS)]
        places = [(_x((a - left) / (right - left)), _y((b - low) / (high - low))) for a, b in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    x_axis, y_axis = (x_name, f"{left:.4g}", f"{right:.4g}"), (y_name, f"{low:.3g}", f"{high:.3g}")
    return _svg(title, x_axis, y_axis, [*drawn, *_legend([name for name, _ in each])])


def bars(
    title: str,
    x_name: str,
    y_name: str,
    names: Sequence[str],
    each: Sequence[tuple[str, Sequence[float]]],
) -> str:
    """For each of `names` a bar of every series, from 0 up; nothing when all are 0."""
    high = max((value for _, values in each for value in values), default=0)
    if not high:
        return ""
    width = (WIDTH - 2 * EDGE) / len(names)
    drawn = []
    for number, (series, values) in enumerate(each):
        colour = COLOURS[number % len(COLOURS)]
        for at, (name, value) in enumerate(zip(names, values, strict=True)):
            x, y = EDGE + width * (at + 0.1 + 0.8 * number / len(each)), _y(value / high)
            drawn.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.8 * width / len(each):.1f}" height="{_y(0) - y:.1f}" '
                f'fill="{colour}"><title>{escape(f"{name}, {series}: {value:.4g}")}</title></rect>'
            )
    ends = (names[0], names[-1])
    if len(names) <= NAMED_BARS:
        ends = ("", "")
        fits = max(1, int(width / 6))
        drawn += [
            _text(EDGE + width * (at + 0.5), _y(0) + 14, name[:fits])
            for at, name in enumerate(names)
        ]
    return _svg(
        title,
        (x_name, *ends),
        (y_name, "0", f"{high:.3g}"),
        [*drawn, *_legend([name for name, _ in each])],
    )


def _svg(title: str, x_axis: Axis, y_axis: Axis, drawn: Sequence[str]) -> str:
    middle, bottom = HEIGHT / 2, HEIGHT - EDGE
    texts = [
        _text(WIDTH / 2, 20, title, 'font-size="14"'),
        _text(WIDTH / 2, HEIGHT - 10, x_axis[0]),
        _text(EDGE, bottom + 14, x_axis[1]),
        _text(WIDTH - EDGE, bottom + 14, x_axis[2]),
        _text(14, middle, y_axis[0], f'transform="rotate(-90 14 {middle:g})"'),
        _text(EDGE - 18, bottom, y_axis[1]),
        _text(EDGE - 18, EDGE + 4, y_axis[2]),
    ]
    told = escape(f"{title}: {y_axis[0]} ({y_axis[1]} to {y_axis[2]}) over {x_axis[0]}")
    axes = f'<path d="M{EDGE} {EDGE}V{bottom}H{WIDTH - EDGE}" fill="none" stroke="#444"/>'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{told}">'
        f"{axes}{''.join(drawn)}{''.join(texts)}</svg>"
    )


def _legend(names: Sequence[str]) -> list[str]:
    """The names of the series in their colours; none where one stands alone."""
    if len(names) < 2:
        return []
    apart = (WIDTH - 2 * EDGE) / len(names)
    return [
        _text(
            EDGE + apart * (at + 0.5),
            40,
            name[: int(apart / 6)],
            f'fill="{COLOURS[at % len(COLOURS)]}"',
        )
        for at, name in enumerate(names)
    ]


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {more}>{escape(text)}</text>'
        if text
        else ""
    )


def _x(share: float) -> float:
    return EDGE + (WIDTH - 2 * EDGE) * share


def _y(share: float) -> float:
    return HEIGHT - EDGE + (2 * EDGE - HEIGHT) * share


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
