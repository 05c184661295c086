"""HTML elements for reports: one self-contained file that loads nothing.

Every function escapes the texts that it is given. Knows nothing of runs, scores or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from glmbatch.report.page.style import STYLE

# Even if some text acted as markup, it could load nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# A longer cell keeps some width on a narrow screen.
TEXT_CHARS = 40
# A cell with nothing but a number is aligned to the right.
NUMBER = re.compile(r"[\d.,%+-]+")


def page(title: str, parts: Iterable[str]) -> str:
    """A complete HTML file: the title, then `parts`, which the functions below return."""
    head = (
        f'<meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    begin = [f"<!doctype html><html lang=en>{head}", f"<h1>{escape(title)}</h1>"]
    return "\n".join([*begin, *parts, "</html>"])


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, warning: bool = False, soft: bool = False) -> str:
    """A paragraph; a warning and a soft one have other colours."""
    kind = " class=warn" if warning else " class=soft" if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def verdict(lines: Iterable[str], kind: str = "") -> str:
    """The few lines that matter most; `kind` is "watch", "bad" or "" for good news."""
    texts = "".join(paragraph(line) for line in lines)
    return f'<div class="{" ".join(["verdict", kind]).strip()}">{texts}</div>'


def plots(figures: Iterable[str]) -> str:
    """Plots beside each other where the page is wide enough; "" without any."""
    drawn = "".join(figures)
    return f"<div class=plots>{drawn}</div>" if drawn else ""


def folded(title: str, parts: Iterable[str]) -> str:
    """Parts that are shown once a reader opens them."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def preformatted(text: str) -> str:
    """Text that keeps its line breaks and spaces, such as JSON."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with `head` as its column names; it scrolls by itself on a narrow screen."""
    lines = [tuple(map(str, row)) for row in rows]
    names = []
    columns = list(zip(*lines, strict=True)) or [()] * len(head)
    for name, column in zip(head, columns, strict=True):
        are_numbers = bool(column) and all(map(NUMBER.fullmatch, column))
        names.append(f"<th{' class=number' if are_numbers else ''}>{escape(name)}</th>")
    return f"<div class=wide><table><tr>{''.join(names)}</tr>{_rows(lines)}</table></div>"


def heat(head: Sequence[str], names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A table of counts whose cells are the darker, the larger their share of the row."""
    lines = []
    for name, row in zip(names, counts, strict=True):
        whole = max(1, sum(row))
        cells = [
            f'<td class="number heat" style="--share:{count / whole:.3f}">{count:,}</td>'
            for count in row
        ]
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div class=wide><table><tr>{titles}</tr>{''.join(lines)}</table></div>"


def facts(lines: Iterable[tuple[str, object]]) -> str:
    """A table of names and values, without column names."""
    return f"<div class=wide><table class=facts>{_rows(lines)}</table></div>"


def _rows(rows: Iterable[Sequence[object]]) -> str:
    lines = []
    for row in rows:
        cells = "".join(_cell(str(value)) for value in row)
        lines.append(f"<tr>{cells}</tr>")
    return "".join(lines)


def _cell(text: str) -> str:
    is_number = NUMBER.fullmatch(text)
    kind = " class=number" if is_number else " class=text" if len(text) > TEXT_CHARS else ""
    return f"<td{kind}>{escape(text)}</td>"
