"""Every program that the documentation names reads the published rows correctly."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog

from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from tests.readers import READERS, rows_by
from tests.stores import Store
from tests.support import CAUSAL, CLASSIFY, GENERATE, ROOT, Settings, Write, run

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


NULL = "__HIVE_DEFAULT_PARTITION__"
DAY = datetime.date(2026, 11, 1)
# By kind: the files of an input, and the days that a reader of the output finds.
FOLDERS: dict[str, tuple[dict[str, dict[str, Any]], list[Any]]] = {
    "none": ({"a.parquet": {"text": ["one"]}}, [None]),
    "named": (
        {"day=A/a.parquet": {"text": ["one"]}, "day=B/b.parquet": {"text": ["two"]}},
        ["A", "B"],
    ),
    "null": (
        {"day=A/a.parquet": {"text": ["one"]}, f"day={NULL}/b.parquet": {"text": ["two"]}},
        ["A", None],
    ),
    "only null": ({f"day={NULL}/b.parquet": {"text": ["one"]}}, [None]),
    "in files": ({f"day={DAY}/a.parquet": {"text": ["one"], "day": [DAY]}}, [DAY]),
    "null in files": (
        {
            "day=A/a.parquet": {"text": ["one"], "day": ["A"]},
            "day=null/b.parquet": {"text": ["two"], "day": pa.nulls(1, pa.string())},
        },
        ["A", None],
    ),
    "one of two in files": (
        {
            "day=A/part=1/a.parquet": {"text": ["one"], "part": [1]},
            "day=B/part=2/b.parquet": {"text": ["two"], "part": [2]},
        },
        ["A", "B"],
    ),
}


def read_as_told(summary: Summary, folder: Path) -> pandas.DataFrame:
    """The rows as the summary's line reads them in a fresh process, which imports nothing else."""
    (line,) = [line for line in describe(summary).splitlines() if line.startswith("Read the a")]
    imports, call = line.removeprefix("Read the answers: ").split("; ")
    code = f"{imports}\n({call}).to_pickle({str(folder / 'rows')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return pandas.read_pickle(folder / "rows")


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_summary_ends_with_a_call_that_reads_the_rows(
    write_source: Write, job_settings: Settings, tmp_path: Path, kind: str
) -> None:
    files, days = FOLDERS[kind]
    for name, columns in files.items():
        write_source(name, columns)
    frame = read_as_told(run(job_settings()), tmp_path)
    frame = frame.sort_values("text").astype({"day": object} if "day" in frame else {})
    assert frame.text.tolist() == ["one", "two"][: len(days)]
    assert frame.mood.notna().all()
    read = frame.day.tolist() if "day" in frame else [None]
    assert [None if pandas.isna(day) else day for day in read] == days


@pytest.mark.parametrize("format", ["delta", "iceberg"])
def test_the_summary_ends_with_a_call_that_reads_a_table(
    catalog: Catalog, write_source: Write, job_settings: Settings, tmp_path: Path, format: str
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    table = "lake/shop.answers" if format == "iceberg" else None
    summary = run(job_settings(data__format=format, data__table=table))
    assert sorted(read_as_told(summary, tmp_path).text) == ["one", "two"]


@pytest.mark.parametrize("format", ["parquet", "delta"])
def test_a_store_that_fails_after_publication_fails_no_summary(
    store: Store, write_source: Write, job_settings: Settings, format: str
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    summary = run(job_settings(data__output=store.url("out"), data__format=format))
    store.harm = lambda request: 503
    text = describe(summary)
    assert f"-> {store.url('out')}" in text
    assert "Read the answers: " not in text
    assert f"Read about the run: {store.url('out')}" in text


def test_the_documents_say_how_each_reader_reads() -> None:
    page = (ROOT / "docs/answers.md").read_text()
    for call in (
        "pandas.read_parquet('out')",
        "pandas.read_parquet('out', partitioning=None)",
        "import pandas, pyarrow.dataset; pandas.read_parquet('out', ",
        "partitioning=pyarrow.dataset.partitioning(pyarrow.schema([('day', 'string')]), fl",
        "spark.read.parquet('out')",
        f"duckdb.sql(\"from read_parquet('{GLOB}', union_by_name=true)\")",
        f"polars.read_parquet('{GLOB}')",
        f"dask.dataframe.read_parquet('{GLOB}')",
        f"daft.read_parquet('{GLOB}')",
        f"datasets.load_dataset('parquet', data_files='{GLOB}')",
    ):
        assert call in page
