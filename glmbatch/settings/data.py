"""Which rows and columns are read, and where answers go; the dates in these settings.

Reads no files and no environment.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta, tzinfo
from string import Formatter
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from glmbatch.settings.addresses import TABLE, TABLE_SCHEME, names_a_table
from glmbatch.settings.conditions import parse_condition
from glmbatch.settings.kinds import Address, OutputFormat, Settings
from glmbatch.settings.lines import LinesConfig

# The settings in which dates may stand.
DATED = ("input", "output", "where")
DAY = re.compile(r"(today|yesterday)|today([+-][0-9]{1,4})")
# Codes of a date, without those of a time of day.
FORM = re.compile(r"([^%{}]|%[-]?[aAbBdejmuUVwWyYgG])+")
# A browser rounds whole numbers of more than 15 digits, as snapshots have. So a form takes text.
TableVersion = Annotated[
    int | None,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+$"},
                {"type": "integer", "minimum": 0},
                {"type": "null"},
            ]
        }
    ),
]
ADVICE = "write {today}, {yesterday}, {today-7} or {today:%Y%m%d}, and {{ and }} for plain braces"


class DataConfig(Settings):
    """Where rows are read from and where answers are written."""

    input: Address = Field(
        description="File, folder of files, or glob such as `in/day=*/*.parquet`: Parquet, CSV or "
        "JSON lines; or a table: the folder of a Delta table, or iceberg:CATALOG/namespace.name. "
        "A local path or an address such as s3://bucket/name. {today} is a date: see data.today.",
    )
    output: Address = Field(
        description="Folder for the answers, created if absent; it mirrors the input's folders. "
        "A local path or an address such as s3://bucket/name.",
    )
    format: OutputFormat = Field(
        "parquet",
        description="parquet: a folder of Parquet files. delta, iceberg: also a Delta Lake or an "
        "Iceberg table over them; choose one if readers must never see two publications mixed "
        "(needs glmbatch[delta] or glmbatch[iceberg]).",
    )
    table: str | None = Field(
        None,
        description="Name of the Iceberg table, as CATALOG/namespace.name. pyiceberg's own "
        "settings say where the catalogue is. Empty: no Iceberg table is written.",
    )
    version: TableVersion = Field(
        None,
        ge=0,
        description="Of an input that is a table: the version of a Delta table to read, or the "
        "snapshot of an Iceberg table; in a form, enter it as text. Empty: the newest when the run "
        "is planned.",
    )
    text_column: str = Field(
        "text", min_length=1, description="Column with the text; prompts refer to it as {text}."
    )
    id_column: str | None = Field(
        None,
        description="Column that identifies rows in error lists. Empty: the row number in the "
        "file identifies them.",
    )
    where: str | None = Field(
        None,
        description="Condition on rows, as after SQL's `where`: `day = '2026-11-25' and lang in "
        "('de', 'fr') and length > 10`. It tests columns, and the values in the names of folders. "
        "Empty: all rows.",
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="Columns of the input that go out; id_column and those of folder names always "
        "do. Prompts, conditions and data.where may use others. Empty: all columns.",
    )
    today: date | None = Field(
        None,
        ge=date(1900, 1, 1),
        le=date(9000, 1, 1),
        description="The date that {today} is in data.input, data.output and data.where; "
        "{yesterday}, {today-7} and {today:%Y%m%d} follow from it. Empty: the date on which the "
        "run was scheduled to start.",
    )
    time_zone: str = Field(
        "UTC",
        description="Time zone of that date, such as Europe/Berlin.",
    )
    rows_per_fragment: int = Field(
        10_000,  # minutes of work on a GPU, and some MB of answers
        ge=1,
        le=10_000_000,
        description="The most rows of a file, and of a task, its retry and its commit. Fewer rows "
        "lose less work in a crash; more make fewer, larger files.",
    )
    missing_sources: Literal["keep", "drop"] = Field(
        "keep",
        description="What happens to published rows whose source file is gone. keep: for a landing "
        "folder that is emptied after each run. drop: for full snapshots, whose files may be split "
        "or renamed. Rows of files of which data.where leaves out all rows are treated so too. "
        "Rows of files that a table no longer has are removed in any case.",
    )
    follow_links: bool = Field(
        False,
        description="Follow symbolic links that lead out of the input, as in a Hugging Face cache. "
        "Anyone who can write to the input can then make the job read any file on this machine.",
    )
    recheck_share: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="Share of the unchanged files to digest again in each run, chosen at random. "
        "It detects bytes that changed under the same size and times, as on a failing disk. 1 "
        "reads every file every night; 0 trusts sizes and times. Files of a table are never "
        "digested again.",
    )
    lines: LinesConfig = Field(LinesConfig(), description="How CSV and JSON lines are read.")
    limit: int | None = Field(
        None, ge=1, description="Process only the first N rows, for a trial. Empty: all rows."
    )

    # Before the checks of all addresses, which know no tables.
    @field_validator("input", mode="before")
    @classmethod
    def _names_a_table_in_full(cls, address: object) -> object:
        if isinstance(address, str) and names_a_table(address):
            scheme, name = address[: len(TABLE_SCHEME)], address[len(TABLE_SCHEME) :]
            if scheme != TABLE_SCHEME or not TABLE.fullmatch(name):
                raise ValueError(
                    f"must be {TABLE_SCHEME}CATALOG/namespace.name for an Iceberg table"
                )
        return address

    @field_validator("output", mode="before")
    @classmethod
    def _is_a_folder(cls, address: object) -> object:
        if isinstance(address, str) and names_a_table(address):
            raise ValueError(
                "is a folder or an address; for an Iceberg table set data.format to iceberg and "
                "data.table to CATALOG/namespace.name"
            )
        return address

    @field_validator("table")
    @classmethod
    def _names_a_table(cls, name: str | None) -> str | None:
        if name is not None and not TABLE.fullmatch(name):
            raise ValueError("must be CATALOG/namespace.name")
        return name

    @field_validator("time_zone")
    @classmethod
    def _is_a_zone(cls, name: str) -> str:
        try:
            _zone(name)
        except (ValueError, OSError, ZoneInfoNotFoundError) as error:
            raise ValueError(f"{name} is no time zone; write one such as Europe/Berlin") from error
        return name

    @field_validator(*DATED)
    @classmethod
    def _has_only_dates(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            plain = with_dates(text, date(2000, 12, 31))
            if info.field_name == "where":
                parse_condition(plain)
        return text

    @model_validator(mode="after")
    def _has_a_name_for_its_table(self) -> Self:
        if (self.format == "iceberg") != (self.table is not None):
            raise ValueError(
                "format: iceberg and table: CATALOG/namespace.name belong together; set both, or "
                "neither"
            )
        return self

    @property
    def columns_out(self) -> tuple[str, ...]:
        """The columns of the input that go out, sorted; empty if all do."""
        if self.columns is None:
            return ()
        named = [] if self.id_column is None else [self.id_column]
        return tuple(sorted({*self.columns, *named}))

    def has_out(self, column: str) -> bool:
        """Whether a column of the input goes out."""
        return self.columns is None or column in self.columns_out

    def dated(self, moment: datetime | None) -> DataConfig:
        """These settings for a run that was to start at `moment`, or starts now.

        To be called once: braces that stand for themselves are single afterwards.
        """
        today = self.today or (moment or datetime.now(UTC)).astimezone(_zone(self.time_zone)).date()
        values = {name: getattr(self, name) for name in DATED}
        dates = {name: with_dates(text, today) for name, text in values.items() if text is not None}
        changed = dates != {name: text for name, text in values.items() if text is not None}
        return self.model_copy(update={**dates, "today": today if changed else self.today})


def _zone(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)


def with_dates(text: str, today: date) -> str:
    """`text` with dates in place of {today}, {yesterday}, {today-7}, {today:%Y%m%d}.

    {{ and }} are single braces. ValueError for anything else in braces.
    """
    parts = []
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text}: {error}; {ADVICE}") from error
    for literal, name, form, conversion in pieces:
        parts.append(literal)
        if name is None:
            continue
        day = DAY.fullmatch(name)
        if day is None or conversion or (form and not FORM.fullmatch(form)):
            raise ValueError(f"{text}: {{{name}{':' if form else ''}{form}}} is no date; {ADVICE}")
        days = -1 if day[1] == "yesterday" else int(day[2] or 0)
        parts.append(format(today + timedelta(days=days), form or "%Y-%m-%d"))
    return "".join(parts)


def plain(path: str) -> str:
    """`path` as a setting in which its braces are no dates."""
    return path.replace("{", "{{").replace("}", "}}")
