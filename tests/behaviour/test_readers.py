"""Every program that the documentation names reads the published rows correctly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.readers import READERS, rows_by
from tests.support import CAUSAL, CLASSIFY, GENERATE, ROOT, run

pytestmark = pytest.mark.slow

GLOB = "out/**/*-??????????.parquet"
COLUMNS = ("id", "text", "mood", "mood_score", "mood_error", "reply", "reply_prompt_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `out` has two days and three fragments, one of them with a failed row."""
    folder = tmp_path_factory.mktemp("readers")
    texts: list[list[str | None]] = [["很好", None, "fine"], ["so so"]]
    for day, column in enumerate(texts, 1):
        path = folder / f"in/day={day}/a.parquet"
        path.parent.mkdir(parents=True)
        table = pa.table({"id": range(10 * day, 10 * day + len(column)), "text": column})
        fields = [{"name": name, "type": "string"} for name in table.schema.names]
        key = "org.apache.spark.sql.parquet.row.metadata"
        schema = json.dumps({"type": "struct", "fields": fields})
        pq.write_table(table.replace_schema_metadata({key: schema}), path)
    settings: dict[str, Any] = {
        "data": {"input": str(folder / "in"), "output": str(folder / "out")},
        "model": {"path": str(CAUSAL)},
        "steps": [CLASSIFY, GENERATE],
        "runtime": {"device": "cpu"},
        "max_error_rate": 0.9,
    }
    settings["data"]["rows_per_fragment"] = 2
    run(settings)
    return folder


def rows(found: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """The rows in order of id. Numbers become int, because readers represent null differently."""
    for row in sorted(found, key=lambda row: int(row["id"])):
        values = [row[name] for name in COLUMNS]
        values[-1] = None if values[-1] is None else int(values[-1])
        yield tuple(values)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_all_rows_and_answers(folder: Path, reader: str) -> None:
    expected = ds.dataset(folder / "out", partitioning=None).to_table().to_pylist()
    assert len(expected) == 4
    # Spark and pandas skip names that begin with an underscore.
    place = str(folder / ("out" if reader in ("pandas", "spark") else GLOB))
    found = rows_by(reader, place, COLUMNS)
    assert list(rows(found)) == list(rows(expected))


def test_the_documents_say_how_each_reader_reads() -> None:
    page = (ROOT / "docs/answers.md").read_text()
    for call in (
        "pandas.read_parquet('out')",
        "spark.read.parquet('out')",
        f"duckdb.sql(\"from read_parquet('{GLOB}', union_by_name=true)\")",
        f"polars.read_parquet('{GLOB}')",
        f"dask.dataframe.read_parquet('{GLOB}')",
        f"daft.read_parquet('{GLOB}')",
        f"datasets.load_dataset('parquet', data_files='{GLOB}')",
    ):
        assert call in page
