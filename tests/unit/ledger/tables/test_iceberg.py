"""An Iceberg table as output: each publication is one snapshot of the same files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.publication import plan_commit
from glmbatch.ledger.repair import repair
from glmbatch.ledger.tables.iceberg import RUN
from glmbatch.ledger.tables.table import commit_table, table_over
from glmbatch.ledger.tables.types import ICEBERG, table_schema
from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write

NAME = "lake/shop.reviews"
Job = Callable[..., JobConfig]


@pytest.fixture
def job(catalog: Catalog, job_settings: Settings) -> Job:
    """A job with one classify step whose output is an Iceberg table."""

    def job(**overrides: Any) -> JobConfig:
        table = {"data__format": "iceberg", "data__table": NAME}
        settings = job_settings(**{**table, **overrides})
        return JobConfig.model_validate({**settings, "steps": settings["steps"][:1]})

    return job


def texts(table: Table, **options: Any) -> list[str]:
    return sorted(table.scan(**options).to_arrow().column("text").to_pylist())


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("**/a*.parquet")}


def test_rows_answers_and_partitions_are_read(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("day=1/a b.parquet", {"text": rows[:12], "id": pa.array(range(12), pa.uint8())})
    write_source("day=2%2F3/a#c.parquet", {"text": rows[12:], "id": pa.array(range(11), pa.int8())})
    summary = run_job(job())
    table = catalog.load_table("shop.reviews")
    frame = table.scan().to_pandas().sort_values(["day", "id"])
    assert frame.text.tolist() == rows
    assert frame.day.tolist() == ["1"] * 12 + ["2/3"] * 11
    assert set(frame.mood) <= {"good", "bad", "so so"}
    assert table.scan("day = '1' and id >= 10").to_arrow().num_rows == 2
    # Statistics of the footers leave out files that cannot have such rows.
    assert len([*table.scan("id > 7 and day = '1'").plan_files()]) == 1
    assert table.current_snapshot().summary.additional_properties[RUN] == summary.run
    assert verify(out).findings == ()
    assert "load_catalog('lake').load_table('shop.reviews')" in describe(summary)


def test_each_run_is_one_snapshot_and_is_never_repeated(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:8]})
    write_source("ab.parquet", {"text": rows[8:16]})
    run_job(job())
    run_job(job())
    before = files_of(out)
    assert len(catalog.load_table("shop.reviews").snapshots()) == 1
    write_source("ab.parquet", {"text": rows[9:17]})
    assert run_job(job()).computed == 1, "the answers in the table are reused"
    table = catalog.load_table("shop.reviews")
    first, second = table.snapshots()
    assert [first.summary.operation.value, second.summary.operation.value] == [
        "append",
        "overwrite",
    ]
    assert texts(table) == sorted(rows[:8] + rows[9:17])
    assert texts(table, snapshot_id=first.snapshot_id) == sorted(rows[:16])
    assert before.items() <= files_of(out).items(), "no file is rewritten"
    assert second.summary.additional_properties["deleted-data-files"] == "1"
    (out.parent / "in" / "ab.parquet").unlink()
    run_job(job(data__missing_sources="drop"))
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[:8])
    assert verify(out).findings == ()


def test_a_file_without_rows_is_one_of_the_table(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:4], "stars": [1, 2, 3, 4]})
    write_source("b.parquet", {"text": rows[4:8], "stars": [5, 6, 7, 8]})
    few = {"data__where": "stars < 3"}
    for _ in range(2):
        run_job(job(**few))
        table = catalog.load_table("shop.reviews")
        assert len(table.snapshots()) == 1, "the second run changes nothing"
        assert texts(table) == sorted(rows[:2])
        assert verify(out).findings == ()
    run_job(job())
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[:8])
    assert verify(out).findings == ()


def test_the_next_run_completes_a_killed_publication(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:8]})
    run_job(job())
    write_source("a.parquet", {"text": rows[3:11]})

    def killed(*args: Any, **options: Any) -> None:
        commit_table(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.commit_table", killed)
        run_job(job())
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[3:11])
    only_in = [finding for finding in verify(out).findings if "is only in" in finding.what]
    assert len(only_in) == 2
    assert not run_job(job()).computed
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[3:11])
    assert verify(out).findings == ()


@pytest.mark.parametrize("last", range(12))
def test_a_kill_at_any_change_of_the_table_loses_nothing(
    last: int, write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    from pyiceberg.io.pyarrow import PyArrowFileIO

    write_source("a.parquet", {"text": rows[:3]})
    write_source("ab.parquet", {"text": rows[3:6]})
    run_job(job())
    write_source("a.parquet", {"text": rows[1:4], "stars": [1, 2, 3]})
    opened = 0
    new_output = PyArrowFileIO.new_output

    def killed(io: PyArrowFileIO, location: str) -> Any:
        nonlocal opened
        opened += 1
        if opened > last:
            raise KeyboardInterrupt
        return new_output(io, location)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PyArrowFileIO, "new_output", killed)
        try:
            run_job(job())
        except KeyboardInterrupt:
            assert texts(catalog.load_table("shop.reviews")) == sorted(rows[:6])
        else:
            assert opened <= last
    run_job(job())
    table = catalog.load_table("shop.reviews")
    assert texts(table) == sorted(rows[1:4] + rows[3:6])
    assert len(table.snapshots()) == 2
    assert verify(out).findings == ()


def test_columns_and_fields_are_added_and_types_stay(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3], "n": [1, 2, 3], "s": [{"a": 1}] * 3})
    run_job(job())
    first = catalog.load_table("shop.reviews").current_snapshot()
    write_source("b.parquet", {"text": rows[3:5], "stars": [4, 5], "s": [{"b": "x"}] * 2})
    labels = ["good", "bad", "fine"]
    steps = [{"kind": "classify", "name": "mood", "prompt_template": "{text}", "labels": labels}]
    again = JobConfig.model_validate({**job().model_dump(exclude_unset=True), "steps": steps})
    run_job(again)
    table = catalog.load_table("shop.reviews")
    read = table.scan().to_arrow().sort_by("text")
    stars = dict(zip(read["text"].to_pylist(), read["stars"].to_pylist(), strict=True))
    assert stars == {**dict.fromkeys(rows[:3]), rows[3]: 4, rows[4]: 5}
    assert {"a": 1, "b": None} in read["s"].to_pylist()
    scores = read["mood_scores"].to_pylist()
    assert all(score["so so"] is None and score["fine"] is not None for score in scores)
    assert texts(table, snapshot_id=first.snapshot_id) == sorted(rows[:3])
    assert verify(out).findings == ()
    write_source("a.parquet", {"text": rows[:3], "n": ["1", "2", "3"]})
    with pytest.raises(InputError, match=r"'n' has the type string, but int64.*Set data\.table"):
        run_job(again)


def test_advice_about_columns_works_when_followed(
    write_source: Write, catalog: Catalog, job: Job, tmp_path: Path, rows: list[str]
) -> None:
    folder = r"Set data.format to parquet and data.output to a new folder, without data.table\."
    other = r"Set data.table to a new name\."
    plain = {"data__output": str(tmp_path / "plain"), "data__format": "parquet"}
    plain["data__table"] = None
    write_source("a.parquet", {"text": rows[:3], "n": [1, 2, 3]})
    run_job(job())
    write_source("a.parquet", {"text": rows[:3], "n": ["1", "2", "3"]})
    with pytest.raises(InputError, match=f"'n' has the type string, but int64.*{other}"):
        run_job(job())
    renamed = {"data__table": "lake/shop.renamed"}
    run_job(job(**renamed))
    write_source("b.parquet", {"text": rows[3:5], "n": [4, 5]})
    with pytest.raises(InputError, match=f"int64, but string.*{other} If .*{folder}"):
        run_job(job(**renamed))
    with pytest.raises(InputError, match=f"(int64, but string|string, but int64).*{folder}"):
        run_job(job(data__table="lake/shop.again"))
    run_job(job(**plain))
    hours = pa.array([1, 2], pa.duration("s"))
    write_source("b.parquet", {"text": rows[3:5], "n": ["4", "5"], "took": hours})
    ways = f"{folder} Or leave the column out with data.columns"
    with pytest.raises(InputError, match=f"'took' has the type duration.*{ways}"):
        run_job(job(**renamed))
    write_source("b.parquet", {"text": rows[3:5], "n": ["4", "5"]})
    run_job(job(**renamed))
    write_source("b.parquet", {"text": rows[3:5], "n": ["4", "5"], "N": ["4", "5"]})
    with pytest.raises(
        InputError, match=f"ignore case. {folder} Or leave one out with data.columns"
    ):
        run_job(job(**renamed))
    (tmp_path / "in/b.parquet").unlink()
    write_source("day=1/a.parquet", {"text": rows[3:5], "n": ["4", "5"]})
    with pytest.raises(InputError, match=f"but an Iceberg table has one set. {folder}"):
        run_job(job(data__table="lake/shop.again"))
    (tmp_path / "in/a.parquet").unlink()
    gone = {"data__missing_sources": "drop"}
    with pytest.raises(InputError, match=f"its partition columns are .*{other}"):
        run_job(job(**renamed, **gone))
    run_job(job(data__table="lake/shop.days", **gone))


def test_tables_of_others_are_left_alone(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str], tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    mine = catalog.create_table("shop.mine", pa.schema([("text", pa.string())]))
    with pytest.raises(InputError, match="Iceberg table that glmbatch did not write"):
        run_job(job(data__table="lake/shop.mine"))
    run_job(job())
    with pytest.raises(InputError, match=r"is the table over .*/out, not over .*/other"):
        run_job(job(data__output=str(tmp_path / "other")))
    for form in ({"data__format": "parquet", "data__table": None}, {"data__format": "delta"}):
        with pytest.raises(InputError, match=r"is an Iceberg table. Set data.format to iceberg"):
            run_job(job(**{"data__table": None, **form}))
    table = catalog.load_table("shop.reviews")
    ours = table.current_snapshot().snapshot_id
    table.append(pa.table({"text": ["theirs"]}))
    with pytest.raises(InputError, match=rf"others wrote to the table.*snapshot {ours}, or set"):
        run_job(job())
    assert "theirs" in texts(catalog.load_table("shop.reviews"))
    # The advice to run again would lead to a refusal.
    found = [finding.what for finding in verify(out).findings]
    assert f"Roll it back to snapshot {ours}, or set data.table" in found[0]
    assert [what for what in found if "only in" in what] == ["is only in the table"]
    table.manage_snapshots().rollback_to_snapshot(ours).commit()
    run_job(job())
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[:3])
    assert mine.refresh().current_snapshot() is None


def test_a_commit_between_plan_and_commit_is_transient(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    run_job(job())
    table = table_over(out, "iceberg", NAME)
    manifest = Ledger(out).manifest()
    assert table is not None
    assert manifest is not None
    files = {file.output_name: out / file.output_name for file in manifest.files}
    plan = plan_commit(table, files, None)
    catalog.load_table("shop.reviews").append(pa.table({"text": ["theirs"]}))
    with pytest.raises(TransientError, match="another commit came between"):
        commit_table(table, dict.fromkeys([*files, "b.parquet"], 3), plan)


@pytest.mark.parametrize(
    ("name", "address", "kind", "message"),
    [
        ("other/shop.t", "", InputError, "no catalogue 'other' is described .there are: lake"),
        ("lake/none.t", "", InputError, "has no namespace 'none'. Create it"),
        ("lake/shop.t", "sqlite:////nowhere/c.db", InputError, "cannot be used: unable to open"),
        ("lake/shop.t", "postgresql+psycopg2://h:x", InputError, "cannot be used: invalid literal"),
        (
            "lake/shop.t",
            "postgresql+psycopg2://127.0.0.1:1/d",
            TransientError,
            "cannot be reached now",
        ),
        ("lake/shop.t", "http://127.0.0.1:1", TransientError, "cannot be reached now"),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_named(
    name: str,
    address: str,
    kind: type[Exception],
    message: str,
    write_source: Write,
    job: Job,
    out: Path,
    rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    if address:
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
    with pytest.raises(kind, match=f"^{name}: .*{message}") as raised:
        run_job(job(data__table=name))
    assert "\n" not in str(raised.value)
    assert not [*out.rglob("*.parquet")]


def test_an_output_becomes_a_table_and_is_repaired(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:9]})
    run_job(job(data__format="parquet", data__table=None))
    assert not run_job(job()).computed
    write_source("a.parquet", {"text": rows[1:9]})
    run_job(job())
    for name in ("_manifest.json", "_glmbatch/manifest.json"):
        (out / name).unlink()
    assert repair(out).rows == 8
    assert verify(out).findings == ()
    assert not run_job(job()).computed
    assert texts(catalog.load_table("shop.reviews")) == sorted(rows[1:9])


def test_the_newest_of_two_tables_over_an_output_is_its_table(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    for number in range(3):
        write_source("a.parquet", {"text": rows[number : number + 3]})
        run_job(job())
    run_job(job(data__table="lake/shop.second"))
    for name in ("_manifest.json", "_glmbatch/manifest.json"):
        (out / name).unlink()
    repair(out)
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.table == "lake/shop.second"


def test_a_table_whose_folder_was_deleted_is_named(
    write_source: Write, catalog: Catalog, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    run_job(job())
    shutil.rmtree(out)
    with pytest.raises(InputError, match=r"^lake/shop\.reviews: .* drop table shop\.reviews"):
        run_job(job())
    catalog.drop_table("shop.reviews")
    run_job(job())
    assert verify(out).findings == ()


def test_small_integers_are_widened() -> None:
    kinds = {pa.int8(): pa.int32(), pa.uint8(): pa.int32(), pa.uint32(): pa.int64()}
    for kind, wider in kinds.items():
        schema = table_schema(ICEBERG, "a", pa.schema([("x", pa.list_(kind))]))
        assert schema.field("x").type == pa.list_(wider)
    with pytest.raises(InputError, match="which Iceberg does not have"):
        table_schema(ICEBERG, "a", pa.schema([("x", pa.uint64())]))


@pytest.mark.parametrize(
    "overrides",
    [
        {"data__table": None},
        {"data__format": "delta"},
        {"data__table": "reviews"},
        {"data__table": "lake/reviews"},
        {"data__table": "lake/shop..reviews"},
    ],
)
def test_format_and_name_belong_together(overrides: dict[str, Any], job: Job) -> None:
    with pytest.raises(ValueError, match=r"belong together|must be CATALOG/namespace\.name"):
        job(**overrides)
