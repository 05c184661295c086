"""An Iceberg table as input whose columns changed: a file's columns are found by their ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from pyiceberg.table.update import RemoveSchemasUpdate
from pyiceberg.typedef import Record
from pyiceberg.types import LongType, StringType

from glmbatch.errors import InputError
from glmbatch.ledger.verification import verify
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.settings.job import JobConfig
from tests.behaviour.test_iceberg_input import add_file
from tests.support import CLASSIFY, Settings, rows_of, run

INPUT = "iceberg:lake/shop.reviews"
Job = Callable[..., dict[str, Any]]


def reviews(texts: list[Any], **columns: Any) -> pa.Table:
    size = len(texts)
    stars = pa.array(range(size), pa.int32())
    return pa.table({"text": texts, "stars": stars, "note": ["n"] * size, **columns})


@pytest.fixture
def table(catalog: Catalog, rows: list[str]) -> Table:
    table = catalog.create_table("shop.reviews", reviews(["a"]).schema)
    table.append(reviews(rows[:3]))
    return table


@pytest.fixture
def job(job_settings: Settings) -> Job:
    """Settings of a job with one step over the table."""

    def settings(**overrides: Any) -> dict[str, Any]:
        return job_settings(**{"data__input": INPUT, "steps": [dict(CLASSIFY)], **overrides})

    return settings


def columns_of(out: Path, *names: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[name] for name in names) for row in rows_of(out))


def set_mapping(table: Table, mapping: str) -> None:
    with table.transaction() as transaction:
        transaction.set_properties({"schema.name-mapping.default": mapping})


def test_renamed_dropped_and_replaced_columns_are_served(
    table: Table, job: Job, out: Path, rows: list[str], tmp_path: Path
) -> None:
    assert run(job()).computed == 3
    with table.update_schema() as update:
        update.rename_column("text", "body")
        update.delete_column("note")
    with table.update_schema() as update:
        update.rename_column("stars", "note")
        update.update_column("stars", LongType())
    with table.update_schema() as update:
        update.add_column("stars", LongType())
    table.append(pa.table({"body": rows[3:5], "note": [7, 8], "stars": [1, 2]}))
    # Maintenance removes schemas that no snapshot has; files keep the names that they had then.
    with table.transaction() as transaction:
        transaction._apply((RemoveSchemasUpdate(schema_ids=[0, 1, 2]),))
    summary = run(job(data__text_column="body"))
    assert summary.computed == 2, "the texts of the first file are known under another name"
    old = [(text, number, None) for number, text in enumerate(rows[:3])]
    every = [*old, (rows[3], 7, 1), (rows[4], 8, 2)]
    assert columns_of(out, "body", "note", "stars") == sorted(every)
    assert all("text" not in row for row in rows_of(out))
    assert verify(out).findings == ()
    for where, kept in {
        "stars is null and note >= 1": rows[1:3],
        "stars = 1": rows[3:4],  # in the footer of the first file, another column has this name
        "note < 1 or stars >= 2": [rows[0], rows[4]],
    }.items():
        some = tmp_path / where
        chosen = {"data__output": str(some), "data__columns": ["body"]}
        run(job(data__text_column="body", data__where=where, **chosen))
        assert columns_of(some, "body") == sorted((text,) for text in kept)
        assert all("note" not in row for row in rows_of(some))
        assert verify(some).findings == ()


def test_a_renamed_column_is_one_column_of_another_table(
    catalog: Catalog, table: Table, job: Job, out: Path, rows: list[str]
) -> None:
    with table.update_schema() as update:
        update.rename_column("text", "message")
        update.update_column("stars", LongType())
    with table.update_schema() as update:
        update.rename_column("note", "text")
    table.append(pa.table({"message": [rows[3]], "stars": [7], "text": ["m"]}))
    run(job(data__format="iceberg", data__table="lake/shop.answers", data__text_column="message"))
    answers = catalog.load_table("shop.answers").scan().to_arrow().to_pylist()
    found = sorted((row["message"], row["text"], row["stars"]) for row in answers)
    old = [(text, "n", number) for number, text in enumerate(rows[:3])]
    assert found == sorted([*old, (rows[3], "m", 7)])
    assert verify(out).findings == ()


def test_a_file_without_ids_goes_by_the_tables_mapping(
    table: Table, job: Job, out: Path, rows: list[str]
) -> None:
    assert run(job()).computed == 3
    path = Path(table.location()) / "data/b.parquet"
    pq.write_table(reviews(rows[3:5]), path)
    add_file(table, path, record_count=2, partition=Record())
    with table.update_schema() as update:
        update.rename_column("text", "body")
    with table.update_schema() as update:
        update.add_column("text", StringType())
    renamed = job(data__text_column="body", on_error="raise")
    with pytest.raises(InputError, match=r"b\.parquet: column 'text' has no field id, and"):
        run(renamed)
    mapping = [{"names": ["text", "body"], "field-id": 1}, {"names": ["stars"], "field-id": 2}]
    set_mapping(table, json.dumps([*mapping, {"names": ["note"]}]))
    assert run(renamed).computed == 2
    old = [(text, number, "n", None) for number, text in enumerate(rows[:3])]
    new: list[tuple[Any, ...]] = [(text, at, None, None) for at, text in enumerate(rows[3:5])]
    assert columns_of(out, "body", "stars", "note", "text") == sorted([*old, *new])
    assert verify(out).findings == ()
    set_mapping(table, json.dumps([*mapping, {"names": ["note"], "field-id": 3}]))
    assert run(renamed).computed == 0
    new = [(text, at, "n", None) for at, text in enumerate(rows[3:5])]
    assert columns_of(out, "body", "stars", "note", "text") == sorted([*old, *new])
    assert verify(out).findings == ()


@pytest.mark.parametrize(
    "mapping",
    ["{not json", '[{"field-id": 1}]', '[{"names": "text", "field-id": 1}]', '[{"names": [7]}]'],
)
def test_a_mapping_that_cannot_be_read_is_named(table: Table, job: Job, mapping: str) -> None:
    set_mapping(table, mapping)
    with pytest.raises(
        InputError, match=r"^lake/shop.reviews: its schema\.name-mapping\.default .* Correct it\.$"
    ):
        run(job())


@pytest.mark.parametrize("is_given", [False, True])
def test_a_commit_between_two_plannings_changes_nothing(
    table: Table, job: Job, out: Path, rows: list[str], is_given: bool
) -> None:
    run(job())
    with table.update_schema() as update:
        update.rename_column("text", "body")
    snapshot = table.snapshots()[0].snapshot_id
    settings = job(data__text_column="body", data__version=snapshot if is_given else None)
    config = JobConfig.model_validate(settings)
    planned = plan_run(config)
    table.append(reviews(rows[3:4]).rename_columns(["body", "stars", "note"]))
    plan = assign(config, planned, prepare_models(config)).run.plan
    assert (plan.version, plan.columns) == (planned.plan.version, planned.plan.columns)
    assert sum(fragment.rows for fragment in plan.fragments) == 3


def test_parts_of_a_column_that_changed_are_refused_by_name(
    catalog: Catalog, job: Job, rows: list[str]
) -> None:
    columns = pa.table({"text": rows[:1], "part": [{"a": 1, "b": 2}]})
    table = catalog.create_table("shop.reviews", columns.schema)
    table.append(columns)
    with table.update_schema() as update:
        update.delete_column(("part", "a"))
    with table.update_schema() as update:
        update.rename_column(("part", "b"), "a")
    with pytest.raises(InputError, match="column 'part' has a field 'a' that is not the one"):
        run(job())
    with table.update_schema() as update:
        update.rename_column(("part", "a"), "c")
    with pytest.raises(
        InputError, match=r"column 'part' is struct<a: .* Rewrite the table's files"
    ):
        run(job())


def test_parts_that_a_mapping_lacks_are_refused_by_name(
    catalog: Catalog, job: Job, rows: list[str]
) -> None:
    columns = pa.table({"text": rows[:1], "part": [{"a": 1, "b": 2}]})
    table = catalog.create_table("shop.reviews", columns.schema)
    path = Path(table.location()) / "data/a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(columns, path)
    add_file(table, path, partition=Record())
    entries = json.loads(table.schema().name_mapping.model_dump_json())
    set_mapping(table, json.dumps(entries))
    assert run(job(on_error="raise")).rows == 1
    del entries[1]["fields"][0]
    set_mapping(table, json.dumps(entries))
    with pytest.raises(InputError, match="column 'part' has a field 'a' that has no field id"):
        run(job(on_error="raise"))


def test_a_change_of_words_alone_opens_no_file(table: Table, job: Job, out: Path) -> None:
    run(job())
    with table.update_schema() as update:
        update.update_column("text", doc="what the customer wrote")
    assert run(job()).unchanged_sources == 1


def test_a_column_is_known_before_the_next_snapshot(
    table: Table, job: Job, out: Path, rows: list[str]
) -> None:
    first = table.snapshots()[0].snapshot_id
    with table.update_schema() as update:
        update.add_column("stars_again", LongType())
    assert run(job(data__where="stars_again is null", data__version=first)).rows == 3
    with table.update_spec() as spec:
        spec.add_identity("stars_again")
    new = reviews(rows[3:5], stars_again=[1, 2])
    table.append(new)
    run(job())
    expected = [*((text, None) for text in rows[:3]), (rows[3], 1), (rows[4], 2)]
    assert columns_of(out, "text", "stars_again") == sorted(expected)
    assert verify(out).findings == ()
    assert run(job(data__where="stars_again = 2")).rows == 1
    # An older snapshot has the columns that it had.
    with pytest.raises(InputError, match="no column 'stars_again'"):
        run(job(data__where="stars_again is null", data__version=first))


def test_null_blank_and_spaced_partitions_are_served(
    catalog: Catalog, job: Job, out: Path, rows: list[str], tmp_path: Path
) -> None:
    regions = ["two words", None, "", "null", "a=b/c%"]
    columns = pa.table({"text": rows[:5], "region": regions})
    table = catalog.create_table("shop.reviews", columns.schema)
    with table.update_spec() as spec:
        spec.add_identity("region")
    table.append(columns)
    template = {**CLASSIFY, "prompt_template": "{region}: {text}"}
    asked = {"steps": [template], "max_error_rate": 1}
    run(job(**asked))
    assert {row["text"]: row["region"] for row in rows_of(out)} == dict(
        zip(rows, regions, strict=False)
    )
    assert verify(out).findings == ()
    for where, kept in {
        "region = 'two words'": rows[:1],
        "region is null": rows[1:2],
        "region = ''": rows[2:3],
        "region = 'null'": rows[3:4],
        "not region = 'two words'": rows[2:5],
        "region = 'two+words'": [],
    }.items():
        some = tmp_path / where
        run(job(**asked, data__where=where, data__output=str(some)))
        assert columns_of(some, "text") == sorted((text,) for text in kept), where
        assert verify(some).findings == ()


def test_values_that_only_metadata_have_are_refused(
    catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    table = catalog.create_table("shop.reviews", pa.table({"text": ["a"], "region": ["x"]}).schema)
    with table.update_spec() as spec:
        spec.add_identity("region")
    set_mapping(table, table.schema().name_mapping.model_dump_json())
    for number, folder in enumerate(("region=x", "plain")):
        path = Path(table.location()) / "data" / folder / "a.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": [rows[number]]}), path)
        add_file(table, path, partition=Record("x"), spec_id=table.spec().spec_id)
    with pytest.raises(InputError, match="has no column 'region', which is 'x' in the table"):
        run(job(on_error="raise"))
    run(job(steps=[{**CLASSIFY, "prompt_template": "{region}: {text}"}], max_error_rate=0.5))
    assert columns_of(out, "text") == [(rows[0],)]
    assert verify(out).findings == ()
