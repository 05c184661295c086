"""A Delta table over an output in an object store: whole publications, also after kills."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from glmbatch.errors import GlmbatchError, TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.repair import repair
from glmbatch.ledger.tables.table import commit_table, plan_commit, table_over
from glmbatch.ledger.verification import verify
from glmbatch.store.objects.access import storage_options
from glmbatch.view.published import read_published
from glmbatch.view.rows import Rows
from tests.behaviour.test_stores import free, refusing_after, stopped_holder
from tests.stores import Request, Store
from tests.support import CLASSIFY, Settings, run, some

pytestmark = pytest.mark.slow
DAYS: dict[int, list[Any]] = {1: [f"row {n}" for n in range(12)], 2: ["one", None, "three"]}


def table(store: Store, output: str = "out") -> DeltaTable:
    options = storage_options(store.path(output))
    return DeltaTable(store.url(output), storage_options=options)


def rows(store: Store, output: str = "out") -> list[dict[str, Any]]:
    """What a reader of the table sees, in order."""
    read: list[dict[str, Any]] = table(store, output).to_pyarrow_table().to_pylist()
    return sorted(read, key=lambda row: (row["day"], row["text"] or ""))


def without_rank(store: Store, output: str) -> list[dict[str, Any]]:
    """As `rows`, without the column that is added in a commit of its own."""
    return [
        {name: value for name, value in row.items() if name != "rank"}
        for row in rows(store, output)
    ]


def texts(store: Store, output: str = "out") -> list[str | None]:
    return [row["text"] for row in rows(store, output)]


def sound(store: Store, output: str = "out") -> None:
    assert not verify(store.url(output)).findings, verify(store.url(output))


@pytest.fixture
def settings(store: Store, job_settings: Settings) -> Settings:
    """Make settings of a job with two days of input, and a Delta table as output."""
    for day, values in DAYS.items():
        store.put(f"in/day={day}/a.parquet", pa.table({"text": values}))

    def there(**overrides: Any) -> dict[str, Any]:
        places = {"data__input": store.url("in"), "data__output": store.url("out")}
        job = {"data__format": "delta", "max_error_rate": 0.5, "steps": [dict(CLASSIFY)]}
        return job_settings(**{**job, **places, **overrides})

    return there


def test_a_run_is_one_commit_that_readers_see(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    assert run(settings()).computed == 14
    assert (table(store).version(), len(rows(store))) == (0, 15)
    assert run(settings()).computed == 0
    assert table(store).version() == 0
    store.put("in/day=2/a.parquet", pa.table({"text": ["one", "two"], "rank": [1, 2]}))
    assert run(settings()).computed == 1
    assert texts(store) == [*sorted(DAYS[1]), "one", "two"]
    assert {row["rank"] for row in rows(store)} == {None, 1, 2}  # a column more, in its own commit
    assert table(store).version() == 2
    sound(store)
    viewed = read_published(store.url("out"), str(tmp_path / "cache"))
    with closing(Rows(viewed, "text")) as shown:
        assert {"rank", "mood"} <= set(shown.columns)
    assert viewed.row(0, 0).column("text").to_pylist() == DAYS[1][:1]


def test_columns_of_nulls_get_the_types_of_the_table(store: Store, settings: Settings) -> None:
    typed = pa.table({"text": ["one"], "note": ["x"], "rank": pa.array([3], pa.uint8())})
    store.put("in/day=1/a.parquet", typed)
    for name in ("in/day=2/a.parquet", "in/day=3/a.parquet"):
        store.put(name, pa.table({"text": ["two"], "note": pa.nulls(1), "rank": pa.nulls(1)}))
        run(settings())
    kinds = pa.schema(table(store).schema().to_arrow())
    assert kinds.field("rank").type == pa.int16()
    assert [row["rank"] for row in rows(store)] == [3, None, None]
    sound(store)


def test_repair_finds_the_table(store: Store, settings: Settings) -> None:
    run(settings())
    before = Ledger(store.url("out")).manifest()
    store.path(f"out/{MANIFEST}").unlink()
    repair(store.url("out"))
    after = Ledger(store.url("out")).manifest()
    assert before is not None
    assert after is not None
    assert after.format == "delta"
    assert {file.output_name for file in after.files} == {file.output_name for file in before.files}
    assert run(settings()).computed == 0
    sound(store)


@pytest.fixture
def changed(store: Store, settings: Settings) -> Callable[[str], dict[str, Any]]:
    """Make a job over changed rows, one missing source and a new column, over an older output."""
    store.put("in/day=3/b.parquet", pa.table({"text": ["of an earlier day"]}))
    run(settings(data__output=store.url("before")))
    newer = pa.table({"text": [f"changed {n}" for n in range(12)], "rank": list(range(12))})
    store.put("in/day=1/a.parquet", newer)
    store.path("in/day=3/b.parquet").unlink()

    def job(output: str) -> dict[str, Any]:
        store.copy("before", output)
        return settings(data__output=store.url(output), data__missing_sources="drop")

    return job


def test_readers_see_whole_versions_after_any_refused_change(
    store: Store, changed: Callable[[str], dict[str, Any]]
) -> None:
    run(changed("undisturbed"))
    new = rows(store, "undisturbed")
    whole = [without_rank(store, "before"), without_rank(store, "undisturbed")]
    assert len(whole[0]) == 16
    assert [row["text"] for row in new if row["day"] == "1"] == sorted(
        f"changed {n}" for n in range(12)
    )
    changes = [request.key for request in store.requests if request.changes]
    intent = changes.index("undisturbed/_glmbatch/publishing.json")
    for last in some(range(intent, len(changes))):
        output = f"cut-{last}"
        job = changed(output)
        store.harm = refusing_after(store, last)
        try:
            run(job)
        except GlmbatchError:
            pass
        else:  # the last requests write the index and the report, so they may fail silently
            assert last >= len(changes) - 5
        free(store, output)
        assert without_rank(store, output) in whole
        run(job)
        assert rows(store, output) == new
        sound(store, output)


def test_a_stopped_holder_commits_nothing_once_another_ran(
    store: Store, changed: Callable[[str], dict[str, Any]]
) -> None:
    """Its commit stands still too; the other run has the same rows, so it would commit none."""
    job = changed("stopped")

    def at(request: Request) -> bool:
        is_commit = "_delta_log/" in request.key and request.method == "PUT"
        return is_commit and request.key.endswith("2.json")  # after that of the new column

    with stopped_holder(store, job, at, error="another commit came between"):
        # What was published before, so that no file of the table changes.
        store.put("in/day=1/a.parquet", pa.table({"text": DAYS[1]}))
        store.put("in/day=3/b.parquet", pa.table({"text": ["of an earlier day"]}))
        run(job)
        version = table(store, "stopped").version()
    assert table(store, "stopped").version() == version
    assert without_rank(store, "stopped") == without_rank(store, "before")
    sound(store, "stopped")


def test_six_writers_at_once_lose_no_commit(store: Store) -> None:
    """Each adds a file to the newest version or creates the table, again if another was faster."""
    over = table_over(store.url("out"), "delta")
    assert over is not None
    for number in range(1, 7):
        store.put(f"out/{number}.parquet", pa.table({"n": [number]}))
    start = threading.Barrier(6)

    def add(number: int) -> int:
        start.wait()
        for tries in range(1, 50):
            live = over.list_files()
            places = {name: store.path(f"out/{name}") for name in (*live, f"{number}.parquet")}
            plan = plan_commit(over, places, None)
            if plan.known != live:  # another was faster between both looks at the table
                continue
            try:
                commit_table(over, dict.fromkeys(places, 1), plan)
            except TransientError:
                continue
            return tries
        raise AssertionError("never committed")

    with ThreadPoolExecutor(6) as pool:
        tries = list(pool.map(add, range(1, 7)))
    assert sum(tries) > 6, "they met"
    read = table(store).to_pyarrow_table().column("n").to_pylist()
    assert sorted(read) == list(range(1, 7))
    assert table(store).version() == 5
