"""An Iceberg table as input: the files of one snapshot, and what is refused by name."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table import Table
from pyiceberg.transforms import BucketTransform
from pyiceberg.typedef import Record

from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, Settings, rows_of, run

INPUT = "iceberg:lake/shop.reviews"


def reviews(texts: list[Any], day: int = 1, **columns: Any) -> pa.Table:
    days = [datetime.date(2026, 11, day)] * len(texts)
    return pa.table({"text": texts, "day": days, **columns})


@pytest.fixture
def table(catalog: Catalog, rows: list[str | None]) -> Table:
    """A table with a partition for each day, in two snapshots."""
    table = catalog.create_table("shop.reviews", reviews(["a"]).schema)
    with table.update_spec() as spec:
        spec.add_identity("day")
    table.append(reviews(rows[:3], 1))
    table.append(reviews(rows[3:6], 2))
    return table


@pytest.fixture
def job(table: Table, job_settings: Settings) -> Callable[..., dict[str, Any]]:
    """Settings of a job with one step over the table."""

    def settings(**overrides: Any) -> dict[str, Any]:
        return job_settings(**{"data__input": INPUT, "steps": [dict(CLASSIFY)], **overrides})

    return settings


def add_file(table: Table, path: Path, **facts: Any) -> None:
    """Add a file that is there to the table, in a snapshot of its own."""
    kind = {"content": DataFileContent.DATA, "file_format": FileFormat.PARQUET}
    size = {"record_count": 1, "file_size_in_bytes": path.stat().st_size}
    transaction = table.transaction()
    with transaction.update_snapshot().fast_append() as snapshot:
        snapshot.append_data_file(
            DataFile.from_args(**{"file_path": str(path), **kind, **size, **facts})
        )
    transaction.commit_transaction()


def texts_of(out: Path) -> list[str]:
    return sorted(row["text"] for row in rows_of(out))


def test_only_new_files_are_opened_and_gone_rows_go(
    table: Table, job: Settings, out: Path, rows: list[str]
) -> None:
    first, second = (snapshot.snapshot_id for snapshot in table.snapshots())
    assert str(run(job(data__version=first)).version) == f"snapshot {first} of the Iceberg table"
    assert texts_of(out) == sorted(rows[:3])
    summary = run(job())
    assert (summary.computed, summary.unchanged_sources) == (3, 1)
    assert texts_of(out) == sorted(rows[:6])
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.version is not None
    assert manifest.version.number == second
    assert verify(out).findings == ()
    table.overwrite(reviews(rows[2:4], 1), overwrite_filter="day = '2026-11-01'")
    assert run(job()).computed == 0, "its texts are known"
    assert texts_of(out) == sorted([*rows[2:4], *rows[3:6]])
    # The table says which files it has, also if a landing folder would keep them.
    assert run(job(data__where="day = '2026-11-02'")).rows == 3
    with pytest.raises(InputError, match=r"has no snapshot 7; .* newest are \[.*data\.version"):
        run(job(data__version=7))


def test_added_columns_and_other_transforms_are_read(
    catalog: Catalog, table: Table, job: Settings, out: Path, rows: list[str]
) -> None:
    with table.update_schema() as update:
        update.union_by_name(pa.schema([("stars", pa.int64())]))
    table.append(reviews(rows[6:7], 3, stars=[1]))
    with table.update_spec() as spec:
        spec.add_field("text", BucketTransform(2), "part")
    # pyiceberg itself writes no such partition without one more package.
    path = Path(table.location()) / "data/day=2026-11-03/part=1/a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(reviews(rows[7:8], 3, stars=[2]).cast(table.schema().as_arrow()), path)
    add_file(table, path, partition=Record(20_760, 1), spec_id=table.spec().spec_id)
    run(job())
    stars = {row["text"]: row["stars"] for row in rows_of(out)}
    assert stars == {**dict.fromkeys(rows[:6]), rows[6]: 1, rows[7]: 2}
    assert verify(out).findings == ()


def test_an_iceberg_output_is_the_input_of_another_job(
    catalog: Catalog, job: Settings, out: Path, tmp_path: Path, rows: list[str]
) -> None:
    run(job(data__format="iceberg", data__table="lake/shop.answers"))
    again = job(data__input="iceberg:lake/shop.answers", data__output=str(tmp_path / "next"))
    again["steps"][0] = {**again["steps"][0], "name": "again"}
    run(again)
    found = rows_of(tmp_path / "next")
    assert sorted(row["text"] for row in found) == sorted(rows[:6])
    assert all(row["mood"] and row["again"] for row in found)
    with pytest.raises(InputError, match=r"is an Iceberg table .*iceberg:CATALOG/namespace.name"):
        run({**again, "data": {**again["data"], "input": str(out)}})


def test_tables_without_rows_are_refused(catalog: Catalog, job: Settings, out: Path) -> None:
    with pytest.raises(
        InputError, match=r"has no such table; shop has \['reviews'\]\. Set data\.in"
    ):
        run(job(data__input="iceberg:lake/shop.none"))
    with pytest.raises(InputError, match=r"has no namespace 'shp'\. Set data\.input"):
        run(job(data__input="iceberg:lake/shp.reviews"))
    catalog.create_table("shop.empty", reviews(["a"]).schema)
    with pytest.raises(InputError, match="the table has no snapshot"):
        run(job(data__input="iceberg:lake/shop.empty"))
    assert not out.exists() or not [*out.rglob("*.parquet")]


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        (DataFileContent.POSITION_DELETES, FileFormat.PARQUET, "delete files .*rewrite_data_files"),
        (DataFileContent.DATA, FileFormat.ORC, "files of ORC, and only Parquet is read. Set write"),
    ],
)
def test_files_with_other_rows_or_of_other_kinds_are_refused(
    content: DataFileContent, form: FileFormat, message: str, table: Table, job: Settings
) -> None:
    first = next(iter(table.scan().plan_files())).file
    path = Path(first.file_path)
    kind = {"content": content, "file_format": form}
    add_file(table, path, partition=first.partition, spec_id=first.spec_id, **kind)
    with pytest.raises(InputError, match=f"^lake/shop.reviews: has {message}"):
        run(job())


@pytest.mark.parametrize("inside", [False, True])
def test_defaults_of_earlier_rows_are_refused_by_the_plan(
    inside: bool, catalog: Catalog, job: Settings, rows: list[str]
) -> None:
    columns = pa.table({"text": rows[:1], "part": [{"a": 1}]})
    table = catalog.create_table("shop.parts", columns.schema)
    table.append(columns)
    place = Path(catalog.load_table("shop.parts").metadata_location)
    metadata = json.loads(place.read_text())
    for schema in metadata["schemas"]:
        field = schema["fields"][1]["type"]["fields"][0] if inside else schema["fields"][0]
        field["initial-default"] = 7 if inside else "none"
    place.write_text(json.dumps(metadata))
    column = "part.a" if inside else "text"
    with pytest.raises(InputError, match=f"the column '{column}' has a default .*new table"):
        preview(JobConfig.model_validate(job(data__input="iceberg:lake/shop.parts")))
