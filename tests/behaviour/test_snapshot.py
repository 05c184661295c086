"""A database's table as a snapshot, and a job over it, against a real PostgreSQL server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import BAD_INPUT, DONE, FAILED, main
from glmbatch.store.inputs.database import table_query
from tests.postgresql import postgresql_server
from tests.support import CLASSIFY, Settings, rows_of, run

pytestmark = pytest.mark.slow

ALL_TYPES = """
create table types (
    id int primary key, exact numeric(30, 10), any_digits numeric, at timestamptz, local timestamp,
    doc json, docb jsonb, names text[], matrix int[][], key uuid, bytes bytea, day date,
    hour time, span interval, host inet, nothing text, yes boolean, small real, "Odd ""name" text
);
insert into types values (
    1, 123456789012345678.1234567890, 1.50, '2026-11-26 12:00+01', '2026-11-26 12:00',
    '{"a":1}', '{"a":1}', '{x,NULL}', '{{1,2},{3,4}}', '0188d2a5-2f5c-7a6e-8000-000000000001',
    '\\x00ff', '2026-11-26', '12:00', '1 day', '1.2.3.4', null, true, 1.5, 'q'
);
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a database that is empty at first."""
    with postgresql_server() as setting:
        host = setting.partition("?host=")[2]
        yield f"postgresql:///postgres?host={host}&user=prefect"


def execute(database: str, *statements: str) -> None:
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(database) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        connection.commit()


def test_a_changed_row_costs_one_answer(
    database: str, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    execute(
        database,
        "create table reviews (id int primary key, text text)",
        "insert into reviews select n, 'review ' || n from generate_series(1, 20) as n",
    )
    file = tmp_path / "in" / "reviews.parquet"
    file.parent.mkdir()
    command = ["snapshot", database, str(file), "--table", "public.reviews", "--key", "id"]
    job = job_settings(steps=[dict(CLASSIFY)])
    assert main(command) == DONE
    assert run(job).steps[0].computed == 20
    before = file.stat()
    assert main(command) == DONE
    assert file.stat() == before
    assert run(job).unchanged_sources == 1
    # PostgreSQL moves a changed row to the end of its table.
    execute(database, "update reviews set text = 'other' where id = 7")
    assert main(command) == DONE
    summary = run(job)
    assert (summary.rows, summary.steps[0].computed) == (20, 1)
    assert [row["id"] for row in rows_of(out)] == list(range(1, 21))


def test_values_of_each_type_are_kept(database: str, tmp_path: Path) -> None:
    execute(database, *filter(str.strip, ALL_TYPES.split(";")))
    file = tmp_path / "types.parquet"
    assert main(["snapshot", database, str(file), "--table", "types", "--key", "id"]) == DONE
    table = pq.read_table(file)
    types = {field.name: str(field.type) for field in table.schema}
    row: dict[str, Any] = table.to_pylist()[0]
    assert types["exact"] == "decimal128(30, 10)"
    assert str(row["exact"]) == "123456789012345678.1234567890"
    assert types["at"] == "timestamp[us, tz=UTC]"
    assert row["at"].hour == 11
    assert types["local"] == "timestamp[us]"
    assert types["day"] == "date32[day]"
    assert types["bytes"] == "binary"
    assert types["nothing"] == "string"
    texts = {
        "any_digits": "1.50",
        "doc": '{"a":1}',
        "docb": '{"a": 1}',
        "names": '["x",null]',
        "matrix": "[[1,2],[3,4]]",
        "key": "0188d2a5-2f5c-7a6e-8000-000000000001",
        "span": "1 day",
        "host": "1.2.3.4/32",
        'Odd "name': "q",
    }
    assert {name: row[name] for name in texts} == texts


REFUSED = {
    "select nonsense": (BAD_INPUT, 'column "nonsense" does not exist'),
    "select 1 as x": (BAD_INPUT, "has no column 'id'; it has ['x']"),
    "select 1 as id union all select 1": (BAD_INPUT, "'id' is 1 in two rows"),
    "select null::int as id": (BAD_INPUT, "'id' is null"),
    "select 1 as id, 'infinity'::date as d": (BAD_INPUT, "column 'd' has the value infinity"),
    "select 1 as id, '-infinity'::timestamptz as d": (BAD_INPUT, "has the value infinity"),
    "select 1 as id, 'NaN'::numeric(5, 2) as d": (BAD_INPUT, "a value cannot be written"),
    "select id, 1 / (id - 5) as x from generate_series(1, 9) as id": (FAILED, "division by zero"),
    "select setval('numbers', 9) as id": (BAD_INPUT, "in a read-only transaction"),
}


@pytest.mark.parametrize("query", REFUSED)
def test_a_refused_query_leaves_the_file_as_it_was(
    database: str, tmp_path: Path, query: str, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(database, "create sequence if not exists numbers")
    file = tmp_path / "a.parquet"
    file.write_bytes(b"before")
    code, reason = REFUSED[query]
    assert main(["snapshot", database, str(file), "--query", query, "--key", "id"]) == code
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_no_message_shows_a_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = [str(tmp_path / "a.parquet"), "--table", "t", "--key", "id"]
    for address in (
        "postgresql://me:geheim@localhost/db",
        "postgresql://localhost/db?password=geheim",
        "host=localhost password=geheim",
    ):
        assert main(["snapshot", address, *rest]) == BAD_INPUT
    monkeypatch.setenv("PGPASSWORD", "geheim")
    assert main(["snapshot", f"postgresql:///db?host={tmp_path}", *rest]) == FAILED
    shown = capsys.readouterr()
    assert "cannot be read now" in shown.err
    assert "geheim" not in shown.out + shown.err
    assert os.listdir(tmp_path) == []


def test_a_name_is_quoted_part_by_part() -> None:
    assert table_query('public.a"b; drop') == 'SELECT * FROM "public"."a""b; drop"'
