"""Iceberg tables in an S3 store and in a catalogue of PostgreSQL, against real servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog

from glmbatch.errors import TransientError, UnusableFile
from glmbatch.ledger.verification import verify
from tests.behaviour.test_stores import stopped_holder, versions
from tests.postgresql import postgresql_server
from tests.stores import Request, Store
from tests.support import CLASSIFY, Settings, Write, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a PostgreSQL catalogue that is empty at first."""
    with postgresql_server() as setting:
        host = setting.partition("?host=")[2]
        yield f"postgresql+psycopg2://prefect@/postgres?host={host}"


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> Catalog:
    """A catalogue of each kind with an empty namespace, over an empty store."""
    address = f"sqlite:///{tmp_path}/catalog.db"
    if request.param == "postgresql":
        address = request.getfixturevalue("database")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
    s3 = {
        "s3.endpoint": store.address,
        "s3.access-key-id": os.environ["AWS_ACCESS_KEY_ID"],
        "s3.secret-access-key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "s3.region": "us-east-1",
    }
    opened = load_catalog("lake", uri=address, **s3)
    opened.create_namespace_if_not_exists("shop")
    for name in opened.list_tables("shop"):
        opened.drop_table(name)
    return opened


def texts(catalog: Catalog, name: str = "shop.reviews") -> list[str]:
    return sorted(catalog.load_table(name).scan().to_arrow().column("text").to_pylist())


def test_a_table_in_a_store_is_written_and_read(
    catalog: Catalog,
    store: Store,
    write_source: Write,
    job_settings: Settings,
    rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = {"data__format": "iceberg", "data__table": "lake/shop.reviews"}
    job = job_settings(steps=[dict(CLASSIFY)], data__output=store.url("out"), **form)
    write_source("day=1/a.parquet", {"text": rows[:3]})
    write_source("day=2/b.parquet", {"text": rows[3:6]})
    run(job)
    run(job)
    write_source("day=2/b.parquet", {"text": rows[4:7], "stars": [1, 2, 3]})
    assert run(job).computed == 1
    table = catalog.load_table("shop.reviews")
    assert len(table.snapshots()) == 2
    assert texts(catalog) == sorted(rows[:3] + rows[4:7])
    assert table.scan("day = '2'").to_arrow().num_rows == 3
    assert verify(store.url("out")).findings == ()
    write_source("day=3/c#d.parquet", {"text": rows[7:8]})
    with pytest.raises(UnusableFile, match=r"c#d\.parquet: readers .* for the end of a name"):
        run({**job, "on_error": "raise"})
    # As the input of another job, without a setting for S3 but a warehouse.
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", store.url("warehouse"))
    steps = [{**CLASSIFY, "name": "again"}]
    read = {"data__input": "iceberg:lake/shop.reviews", "data__output": store.url("next")}
    assert run(job_settings(steps=steps, **read)).rows == 6
    assert verify(store.url("next")).findings == ()


def test_a_killed_commit_in_a_store_is_made_once(
    catalog: Catalog,
    store: Store,
    write_source: Write,
    job_settings: Settings,
    rows: list[str],
) -> None:
    form = {"data__format": "iceberg", "data__table": "lake/shop.reviews"}
    job = job_settings(steps=[dict(CLASSIFY)], data__output=store.url("out"), **form)
    write_source("a.parquet", {"text": rows[:3]})
    write_source("b.parquet", {"text": rows[3:6]})
    run(job)
    write_source("b.parquet", {"text": rows[4:7]})
    store.harm = lambda request: (
        503 if request.changes and "metadata/snap-" in request.key else None
    )
    with pytest.raises(TransientError, match=r"^lake/shop\.reviews: cannot be reached now"):
        run(job)
    store.calm()
    assert texts(catalog) == sorted(rows[:6])
    run(job)
    assert texts(catalog) == sorted(rows[:3] + rows[4:7])
    assert verify(store.url("out")).findings == ()


@pytest.mark.parametrize("catalog", ["sqlite"], indirect=True)
def test_a_stopped_holder_commits_nothing_once_another_ran(
    catalog: Catalog, store: Store, job_settings: Settings
) -> None:
    """Its metadata stand still too; the other has the published rows, so it would commit none."""
    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    form = {"data__format": "iceberg", "data__table": "lake/shop.reviews"}
    job = job_settings(steps=[dict(CLASSIFY)], **places, **form)
    older = pa.table({"text": ["older", "rows"]})
    store.put("in/a.parquet", older)
    run(job)
    store.put("in/a.parquet", pa.table({"text": ["of", "the holder"]}))

    def at(request: Request) -> bool:
        return request.method == "PUT" and request.key.endswith(".metadata.json")

    with stopped_holder(store, job, at, error="another commit came between"):
        store.put("in/a.parquet", older)
        run(job)
        snapshots = catalog.load_table("shop.reviews").snapshots()
        after = versions(store, "out")
    table = catalog.load_table("shop.reviews")
    assert table.snapshots() == snapshots
    for snapshot in snapshots:  # all that they need is still there
        read = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()
        assert read.column("text").to_pylist() == ["older", "rows"]
    # The holder deletes the metadata of its own commit.
    now = versions(store, "out")
    assert {name for name in now.items() ^ after.items() if "/metadata/" not in name[0]} == set()
    assert verify(store.url("out")).findings == ()
