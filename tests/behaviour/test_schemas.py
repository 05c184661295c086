"""A whole job over random tables: each reader reads the same values before and after."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.ledger.verification import verify
from glmbatch.store.types import written_type
from tests.readers import spark_differences
from tests.schemas import random_table
from tests.support import CLASSIFIER, run

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SCHEMAS_SEED", "13"))
TABLES = int(os.environ.get("SCHEMAS", "100"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Source and output files of one job over random tables."""
    folder = tmp_path_factory.mktemp("schemas")
    (folder / "in").mkdir()
    rng = random.Random(SEED)
    while len(list((folder / "in").iterdir())) < TABLES:
        path = folder / "in" / f"{len(list((folder / 'in').iterdir())):05}.parquet"
        try:
            table = random_table(rng)
            # Finer times become nanoseconds in the output, which Spark cannot read.
            old = rng.random() < 0.3 and "timestamp[ns" not in str(table.schema)
            pq.write_table(table, path, use_deprecated_int96_timestamps=old)
        except (pa.ArrowException, OSError):  # Parquet cannot store this table
            path.unlink(missing_ok=True)
    settings: dict[str, Any] = {
        "data": {"input": str(folder / "in"), "output": str(folder / "out")},
        "model": {"path": str(CLASSIFIER)},
        "steps": [{"kind": "classify", "name": "mood"}],
        "runtime": {"device": "cpu"},
        "max_error_rate": 1,
    }
    summary = run(settings)
    for fault in summary.unusable:  # the only reason allowed: times that fit no single type
        assert "no type holds both" in fault.reason, fault.reason
    left_out = {fault.source for fault in summary.unusable}
    found = []
    for source in sorted((folder / "in").iterdir()):
        if source.name not in left_out:
            found.append((source, folder / "out" / f"{source.stem}-0000000000.parquet"))
    assert len(found) > 0.8 * TABLES
    assert verify(folder / "out").findings == ()
    return found


def as_text(value: Any) -> str:
    """`value` as text, with UUIDs as strings, because the output has them as strings."""
    return re.sub(r"UUID\(('[^']*')\)", r"\1", repr(value))


def values_of(column: pa.ChunkedArray) -> str:
    try:
        return as_text(column.to_pylist())
    except (OverflowError, ValueError):  # out of the range of Python's dates and durations
        lines = column.combine_chunks().to_string(window=100).splitlines()
        # Here a UUID is printed as hexadecimal digits.
        text = "\n".join(line for line in lines if " type: " not in line)
        return re.sub(r'[-"]', "", text).lower()


def test_arrow_reads_the_same_values_and_types(pairs: list[tuple[Path, Path]]) -> None:
    for source, output in pairs:
        with pq.ParquetFile(source, coerce_int96_timestamp_unit="us") as file:
            before = file.read()
        after = pq.ParquetFile(output).read()
        assert "mood" in after.schema.names
        for name in before.schema.names:
            one, other = before.column(name), after.column(name)
            assert other.type == written_type(one.type), (source, name)
            if one.equals(other):
                continue
            assert values_of(one) == values_of(other), (source, name)


def test_duckdb_reads_the_same_values(pairs: list[tuple[Path, Path]]) -> None:
    for source, output in pairs:
        try:
            expected = duckdb.sql(f"from read_parquet('{source}')").fetchall()
        except (duckdb.Error, ValueError, OverflowError):  # DuckDB cannot read the source either
            continue
        rows = duckdb.sql(f"from read_parquet('{output}')").fetchall()
        width = len(expected[0])
        assert as_text([row[:width] for row in rows]) == as_text(expected), source


def test_spark_reads_the_same_values(pairs: list[tuple[Path, Path]]) -> None:
    assert spark_differences([(str(source), str(output)) for source, output in pairs]) == {}
