"""The bytes of a file as numbered lines of text, in which bytes of no character are marked."""

from __future__ import annotations

import codecs
import io
import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.store.lines.form import Form

# The longest line and CSV record. More is a file without line ends, or a quote that nobody closed.
MOST_CHARS = 32 << 20
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark begins it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARKED = re.compile("[\ud800-\udfff]")
_MARKING = "glmbatch_mark"


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Stand for each byte that is no character by half of a surrogate pair, which no text has."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in wrong), error.end


codecs.register_error(_MARKING, _mark)


def is_marked(text: str) -> bool:
    """Whether `text` has bytes that are no characters."""
    return not text.isascii() and MARKED.search(text) is not None


def unmarked(text: str) -> str:
    """`text` with a byte that is no character written as \\xff."""
    return MARKED.sub(lambda match: f"\\x{ord(match.group()) & 0xFF:02x}", text)


def open_text(file: BinaryIO, form: Form) -> io.TextIOWrapper:
    """The characters of the opened file, with its line ends: LF, CR or both."""
    if form.packed:
        file = cast(BinaryIO, pa.CompressedInputStream(file, form.packed))
    buffered = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
    encoding = form.encoding
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        begin = buffered.peek(4)[:4]
        marks = (name for mark, name in BYTE_ORDER_MARKS.items() if begin.startswith(mark))
        encoding = next(marks, "utf-8")
    return io.TextIOWrapper(buffered, encoding, _MARKING, newline="")


class Lines(Iterator[str]):
    """The lines of a text in order, with their line ends.

    `taken` are those since `begin` was called, of which the first has the `number`, from 1.
    `put_back` returns all but the first of them.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.number = 1
        self.taken: list[str] = []
        self._chars = 0
        self._text = text
        self._waiting: deque[str] = deque()

    def begin(self) -> None:
        """Begin a record: forget the lines taken."""
        self.number += len(self.taken)
        self.taken = []
        self._chars = 0

    def put_back(self) -> None:
        """Begin with the second of the lines taken."""
        self._waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        self.begin()

    def __next__(self) -> str:
        if self._chars > MOST_CHARS:
            raise TooLong
        line = self._waiting.popleft() if self._waiting else self._text.readline(MOST_CHARS + 1)
        if not line:
            raise StopIteration
        if len(line) > MOST_CHARS:
            number = self.number + len(self.taken)
            raise UnusableFile(f"line {number} is longer than {MOST_CHARS:,} characters")
        self.taken.append(line)
        self._chars += len(line)
        return line


class TooLong(Exception):
    """A record goes on for more than MOST_CHARS characters."""
