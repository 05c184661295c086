"""The list of rows that failed and of files that were left out. For people; knows no models.

    OUTPUT/_quarantine.parquet         of what is published
    OUTPUT/_glmbatch/refused.parquet   of a run that published nothing

The rows themselves carry their reasons in the published files, so the first list can be made again.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.manifest import PublishedFile
from glmbatch.settings.columns import Columns
from glmbatch.store.files import committed
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import open_parquet, read_columns, write_table
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

OWN = "_glmbatch"  # all that is not for readers
QUARANTINE = "_quarantine.parquet"
REFUSED = "_glmbatch/refused.parquet"
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),  # number in the file, from 0; null for a whole file
        pa.field("id", pa.string()),
        pa.field("step", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
    ]
)
Line = dict[str, Any]


def read_quarantine(
    output: AnyPath, files: Sequence[PublishedFile], told: Collection[str] = ()
) -> list[Line]:
    """The lines of rows that failed in these published files, as far as the list can be read.

    And those of whole files, but for the sources that this run has `told` of itself.
    """
    ranges: dict[str, list[range]] = {}
    for file in sorted(files, key=lambda file: file.first_row):
        rows = range(file.first_row, file.first_row + file.rows)
        ranges.setdefault(file.source, []).append(rows)

    def is_of_files(line: Line) -> bool:
        source = line["source"]
        if not line["step"]:  # why a file, or the rest of one, could not be read
            return source in ranges and source not in told
        of_source = ranges.get(source, [])
        # The last that begins at or before the row: no two hold the same.
        place = bisect_right(of_source, line["row"], key=lambda rows: rows.start)
        return place > 0 and line["row"] in of_source[place - 1]

    return [line for line in read_lines(output / QUARANTINE) or [] if is_of_files(line)]


def mended_quarantine(
    output: AnyPath, files: Sequence[PublishedFile], told: Collection[str] = ()
) -> list[Line]:
    """As `read_quarantine`, with the lines that the list lacks, from the files themselves."""
    of_files: list[Line] = []
    listed: dict[str, list[Line]] = defaultdict(list)
    for line in read_quarantine(output, files, told):
        if line["step"]:
            listed[line["source"]].append(line)
        else:
            of_files.append(line)
    for lines in listed.values():
        lines.sort(key=_row)
    for file in files:
        of_source = listed[file.source]
        begin = bisect_left(of_source, file.first_row, key=_row)
        lines = of_source[begin : bisect_left(of_source, file.first_row + file.rows, key=_row)]
        if len({line["row"] for line in lines}) != file.faulty_rows:
            try:
                lines = list(_failed_rows(output, file))
            except UnusableFile as error:  # what is listed is the best there is
                logger.warning("%s: its failed rows cannot be listed", error)
        of_files += lines
    return of_files


def _row(line: Line) -> int:
    return int(line["row"])


def read_lines(path: AnyPath) -> list[Line] | None:
    """The lines of a list; none where there is no list, None where it is damaged."""
    try:
        if not path.exists():
            return []
        with open_parquet(path) as file:
            if not file.schema_arrow.equals(QUARANTINE_SCHEMA):
                raise UnusableFile(f"{path}: has other columns than a list of failed rows")
            lines: list[Line] = file.read().to_pylist()
            return lines
    except (UnusableFile, OSError) as error:
        logger.warning("%s: the next run makes it again from the published rows", error)
        return None


def _failed_rows(output: AnyPath, file: PublishedFile) -> Iterator[Line]:
    """A line for each step of each row of a published file that failed; without their ids."""
    for step in file.step_keys:
        columns = Columns(step)
        table = read_columns(output / file.output_name, [columns.error_type, columns.error])
        kinds, reasons = (column.to_pylist() for column in table.columns)
        for number, (kind, reason) in enumerate(zip(kinds, reasons, strict=True), file.first_row):
            if reason is not None:
                yield {
                    "source": file.source,
                    "row": number,
                    "step": step,
                    "error_type": kind,
                    "error": reason,
                }


def line_of_file(fault: FileFault) -> Line:
    """The line of a file, or of the rest of one, that is left out."""
    return {
        "source": fault.source,
        "row": fault.first_row,
        "error_type": "unusable_file",
        "error": fault.reason,
    }


def write_quarantine(output: AnyPath, lines: Sequence[Line]) -> None:
    """Write the list of what is published."""
    _write(output / QUARANTINE, lines)


def write_refused(output: AnyPath, lines: Sequence[Line]) -> AnyPath:
    """Write the list of a run that publishes nothing; returns its path.

    The next publication deletes it.
    """
    _write(output / REFUSED, lines)
    return output / REFUSED


def _write(path: AnyPath, lines: Sequence[Line]) -> None:
    rows = pa.Table.from_pylist(list(lines), QUARANTINE_SCHEMA)
    with committed(path) as partial:
        write_table(partial, rows.schema, iter(rows.to_batches()), {})
        # Beside the answers, which the folder of the runs is kept as private as.
        narrow(partial, [path.parent / OWN])
