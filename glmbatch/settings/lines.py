"""How files of lines are read: CSV, TSV and JSON lines. Reads no files."""

from __future__ import annotations

import codecs

from pydantic import Field, field_validator, model_validator

from glmbatch.settings.kinds import Settings


class LinesConfig(Settings):
    """How CSV, TSV and JSON lines are read; Parquet files need none of this."""

    encoding: str | None = Field(
        None,
        min_length=1,
        description="Encoding of the characters, such as gb18030 or cp1252. Empty: UTF-8, or what "
        "a byte order mark says. A line with other bytes is a failed row.",
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between the fields of a CSV file. Empty: a comma, or a tab in a "
        "file that ends in .tsv.",
    )
    escape: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character that takes the meaning from the next one in a CSV file, such as a "
        "backslash. Empty: none; a quote within quotes is doubled.",
    )

    @field_validator("encoding")
    @classmethod
    def _is_of_text(cls, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            "\n".encode(codecs.lookup(name).name)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"{name[:40]!r} is no encoding of text that Python knows; write utf-8, gb18030, "
                "cp1252 or another"
            ) from error
        return name

    @model_validator(mode="after")
    def _marks_differ(self) -> LinesConfig:
        marks = [mark for mark in (self.delimiter, self.escape) if mark is not None]
        if len({*marks, '"', "\n", "\r"}) < len(marks) + 3:
            raise ValueError(
                "delimiter and escape must be two characters, and neither a quote nor a line end"
            )
        return self
