"""`glmbatch compare`: what its arguments ask for, and a file of the answers that differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow as pa

from glmbatch.cli.parser import flag_values, set_values, truth_columns
from glmbatch.errors import InputError
from glmbatch.evaluation.compare import compare
from glmbatch.evaluation.results import Comparison, DifferingAnswer
from glmbatch.settings.jobfile import load_job
from glmbatch.store.files import check_file, committed
from glmbatch.store.parquet import write_table

TEXT = pa.string()
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("part", TEXT),
        ("text", TEXT),
        ("a", TEXT),
        ("b", TEXT),
        ("truth", TEXT),
        ("right_a", pa.bool_()),
        ("right_b", pa.bool_()),
    ]
)


def compare_parsed(parsed: argparse.Namespace) -> Comparison:
    """The comparison; the answers that differ are written to the file that the user named."""
    changes = set_values(parsed.set)
    if parsed.other is None and not changes:
        raise InputError(
            f"{parsed.job}: there is nothing to compare it with. Name a second job, or change a "
            "setting with --set."
        )
    if parsed.differences is not None:
        check_file("--differences", parsed.differences)
    given = flag_values(parsed)
    found = compare(
        load_job(parsed.job, given),
        load_job(parsed.other or parsed.job, given | changes),
        parsed.rows,
        truth=truth_columns(parsed.truth),
        keep=parsed.keep,
    )
    if parsed.differences is not None:
        write_differences(Path(parsed.differences), found.differences)
    return found


def write_differences(path: Path, differences: tuple[DifferingAnswer, ...]) -> None:
    """Write the answers that differ to a Parquet file: texts as they are, other values as JSON."""
    columns = []
    for field in SCHEMA:
        values = [getattr(row, field.name) for row in differences]
        if field.type == TEXT:
            values = [None if value is None else _as_text(value) for value in values]
        columns.append(pa.array(values, field.type))
    table = pa.table(columns, SCHEMA)
    with committed(path, "--differences") as partial:
        write_table(partial, SCHEMA, iter(table.to_batches()), {})


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
