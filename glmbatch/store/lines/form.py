"""Which files hold lines, and in which form: by the endings of their names and the settings."""

from __future__ import annotations

from itertools import product
from typing import Literal

from pydantic import BaseModel

from glmbatch.settings.lines import LinesConfig

# Raise it when the same bytes would be read as other rows.
READING = 1
PACKED = {".gz": "gzip", ".zst": "zstd"}
KINDS: dict[str, Literal["csv", "json"]] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
}
# What a file of lines ends in, in any case.
ENDINGS = tuple(kind + packed for kind, packed in product(KINDS, ("", *PACKED)))

# Why a line cannot be read; null if it can. It is a column of every file of lines.
LINE_ERROR = "_line_error"


class Form(BaseModel, frozen=True, extra="forbid"):
    """What decides, besides the bytes of a file of lines, which rows it has.

    `columns` are those of a file of which no line can be read, so that its rows have their places.
    """

    kind: Literal["csv", "json"]
    packed: Literal["", "gzip", "zstd"] = ""
    encoding: str | None = None
    delimiter: str = ","
    escape: str | None = None
    columns: tuple[str, ...] = ()
    version: int = READING

    def as_text(self) -> str:
        """The form as JSON, the same for the same form."""
        return self.model_dump_json()


def is_lines(name: str, kind: Literal["csv", "json"] | None = None) -> bool:
    """Whether the file `name` holds lines, by its ending; with a `kind`, only lines of that."""
    endings = [ending for ending in ENDINGS if kind in (None, KINDS["." + ending.split(".")[1]])]
    return name.casefold().endswith((*endings,))


def form_of(name: str, settings: LinesConfig) -> Form | None:
    """The form of the lines in the file `name`; None if it is a Parquet file."""
    folded = name.casefold()
    packed = next((ending for ending in PACKED if folded.endswith(ending)), "")
    ending = next((ending for ending in KINDS if folded.endswith(ending + packed)), None)
    if ending is None:
        return None
    how = PACKED.get(packed, "")
    if KINDS[ending] == "json":
        return Form(kind="json", packed=how, encoding=settings.encoding)
    return Form(
        kind="csv",
        packed=how,
        encoding=settings.encoding,
        delimiter=settings.delimiter or ("\t" if ending == ".tsv" else ","),
        escape=settings.escape,
    )
