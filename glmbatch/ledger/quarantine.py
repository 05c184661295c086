"""The list of failed rows and left-out files, for people to read. Knows no models.

    OUTPUT/_quarantine.parquet         of what is published
    OUTPUT/_glmbatch/refused.parquet   of a run that published nothing

Published files also record why each row failed, so the first list can be rebuilt from them.
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
from glmbatch.ledger.receipts import OutputReceipt, read_receipt
from glmbatch.settings.columns import Columns
from glmbatch.store.files import committed
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import open_parquet, read_columns, write_table
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

OWN = "_glmbatch"  # everything in the output that is not for readers
QUARANTINE = "_quarantine.parquet"
REFUSED = "_glmbatch/refused.parquet"
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),  # row number in the source, from 0; null for a whole file
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
    """The listed failures in these published `files`; none if the list cannot be read.

    Includes entries for whole files and fragments, except for sources in `told`, whose faults the
    caller knows already.
    """
    ranges: dict[str, list[range]] = {}
    for file in sorted(files, key=lambda file: file.first_row):
        rows = range(file.first_row, file.first_row + file.covered)
        ranges.setdefault(file.source, []).append(rows)

    def is_of_files(line: Line) -> bool:
        source = line["source"]
        if not line["step"]:  # an entry for a whole file or fragment
            return source in ranges and source not in told
        of_source = ranges.get(source, [])
        # Ranges do not overlap, so only the last one that begins at or before the row can have it.
        place = bisect_right(of_source, line["row"], key=lambda rows: rows.start)
        return place > 0 and line["row"] in of_source[place - 1]

    return [line for line in read_lines(output / QUARANTINE) or [] if is_of_files(line)]


def mended_quarantine(
    output: AnyPath, files: Sequence[PublishedFile], told: Collection[str] = ()
) -> list[Line]:
    """As `read_quarantine`, completed from the published files with entries that the list lacks.

    Entries from a file have no id. Logs a warning for a file that cannot be read.
    """
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
        if not file.faulty_rows and file.source not in listed:
            continue
        of_source = listed[file.source]
        begin = bisect_left(of_source, file.first_row, key=_row)
        lines = of_source[begin : bisect_left(of_source, file.first_row + file.covered, key=_row)]
        if len({line["row"] for line in lines}) != file.faulty_rows:
            try:
                lines = list(_failed_rows(output, file))
            except UnusableFile as error:  # keep the entries that the list has
                logger.warning("%s: its failed rows cannot be listed", error)
        of_files += lines
    return of_files


def _row(line: Line) -> int:
    return int(line["row"])


def read_lines(path: AnyPath) -> list[Line] | None:
    """The entries of the list at `path`; [] if there is no list, None if it is damaged."""
    try:
        if not path.exists():
            return []
        with open_parquet(path) as file:
            if not file.schema_arrow.equals(QUARANTINE_SCHEMA):
                raise UnusableFile(f"{path}: does not have the columns of a list of failed rows")
            lines: list[Line] = file.read().to_pylist()
            return lines
    except (UnusableFile, OSError) as error:
        logger.warning("%s: the next run rebuilds it from the published rows", error)
        return None


def _failed_rows(output: AnyPath, file: PublishedFile) -> Iterator[Line]:
    """An entry for each failure of a step on a row of a published file; without row ids."""
    path = output / file.output_name
    rows: Sequence[int] = range(file.first_row, file.first_row + file.rows)
    if file.span:
        receipt = read_receipt(path, OutputReceipt)
        if receipt is None:
            raise UnusableFile(f"{path}: has no receipt in its footer")
        rows = receipt.fragment.numbers.tolist()
    for step in file.step_keys:
        columns = Columns(step)
        table = read_columns(path, [columns.error_type, columns.error])
        kinds, reasons = (column.to_pylist() for column in table.columns)
        for at, (kind, reason) in enumerate(zip(kinds, reasons, strict=True)):
            if reason is not None:
                yield {
                    "source": file.source,
                    "row": rows[at],
                    "step": step,
                    "error_type": kind,
                    "error": reason,
                }


def line_of_file(fault: FileFault) -> Line:
    """The entry of a file or fragment that is left out."""
    return {
        "source": fault.source,
        "row": fault.first_row,
        "error_type": "unusable_file",
        "error": fault.reason,
    }


def write_quarantine(output: AnyPath, lines: Sequence[Line]) -> None:
    """Make `lines` the list of failed rows of the published files."""
    path = output / QUARANTINE
    # A night without change has the same list. Writing it would import pandas: see _write.
    if path.exists() and read_lines(path) == [_complete(line) for line in lines]:
        narrow(path, [path.parent / OWN])
    else:
        _write(path, lines)


def _complete(line: Line) -> Line:
    return {name: line.get(name) for name in QUARANTINE_SCHEMA.names}


def write_refused(output: AnyPath, lines: Sequence[Line]) -> AnyPath:
    """Write the list of a run that publishes nothing, and return its path.

    Replaces the list of an earlier run. The next publication deletes it.
    """
    _write(output / REFUSED, lines)
    return output / REFUSED


def _write(path: AnyPath, lines: Sequence[Line]) -> None:
    # pyarrow imports pandas, to recognize its columns, when it is first given Python values.
    rows = pa.Table.from_pylist(list(lines), QUARANTINE_SCHEMA)
    with committed(path) as partial:
        write_table(partial, rows.schema, iter(rows.to_batches()), {})
        # As private as the folder `_glmbatch`, which is as private as the sources.
        narrow(partial, [path.parent / OWN])
