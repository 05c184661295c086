"""Where a JSON value that was cut off can be closed. Bytes in, positions out."""

from __future__ import annotations

import re

# A whole character of a JSON text: an escape, or a UTF-8 sequence.
_CHARACTER = re.compile(
    rb"""\\u[0-9a-fA-F]{4} | \\[^u]
    | [\x00-!\x23-\x5b\x5d-\x7f]
    | [\xc2-\xdf][\x80-\xbf] | [\xe0-\xef][\x80-\xbf]{2} | [\xf0-\xf4][\x80-\xbf]{3}""",
    re.VERBOSE,
)
_CHARACTERS = re.compile(rb"(?:%s)*+" % _CHARACTER.pattern, re.VERBOSE)
_TEXT = re.compile(rb'"(?:%s)*+"' % _CHARACTER.pattern, re.VERBOSE)


def end_of_text(value: bytes | bytearray) -> int:
    """The end of the last whole character in `value`, a JSON text without its closing quote."""
    match = _CHARACTERS.match(value, 1)
    assert match is not None
    return match.end()


def end_of_items(value: bytes | bytearray) -> int:
    """The end of the last whole item in `value`, a JSON list of plain values without its bracket.

    A number or a word is whole once a comma follows it.
    """
    at = whole = 1
    while at < len(value):
        if value[at : at + 1] == b'"':
            match = _TEXT.match(value, at)
            if match is None:
                break
            at = whole = match.end()
        else:
            if value[at : at + 1] == b",":
                whole = at
            at += 1
    return whole
