"""A Delta table as input: one version, its new files alone, and what it removes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from glmbatch.cli.plan import describe_plan
from glmbatch.errors import InputError
from glmbatch.ledger.input import cutting
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, Settings, column_of, rows_of, run

Night = Callable[..., Summary]


def rows(*numbers: int, **others: Any) -> pa.Table:
    columns = {"id": list(numbers), "text": [f"row {number}" for number in numbers]}
    return pa.table({**columns, **{name: [value] * len(numbers) for name, value in others.items()}})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of two files, each from a commit of its own."""
    folder = tmp_path / "in"
    write_deltalake(folder, rows(1, 2, 3))
    write_deltalake(folder, rows(4, 5), mode="append")
    return folder


@pytest.fixture
def night(job_settings: Settings) -> Night:
    def one(**overrides: Any) -> Summary:
        return run(job_settings(steps=[dict(CLASSIFY)], data__id_column="id", **overrides))

    return one


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the input's files that are looked at."""
    names: list[str] = []
    look = cutting._Looker._at

    def recording(self: Any, name: str, given: Any) -> Any:
        names.append(name)
        return look(self, name, given)

    monkeypatch.setattr(cutting._Looker, "_at", recording)
    return names


def ids(output: Path) -> list[int]:
    return sorted(column_of(output, "id"))


def sound(output: Path) -> None:
    assert not verify(output).findings, verify(output)


def commit(folder: Path, *actions: dict[str, Any]) -> None:
    """Write a commit by hand, for what deltalake does not write."""
    number = len(list((folder / "_delta_log").glob("0*.json")))
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (folder / "_delta_log" / f"{number:020}.json").write_text(text)


def test_reads_the_live_files_of_one_version(table: Path, night: Night, out: Path) -> None:
    DeltaTable(table).delete("id = 2")
    summary = night()
    assert ids(out) == [1, 3, 4, 5]
    assert str(summary.version) == "version 2 of the Delta table"
    assert "reads version 2 of the Delta table" in describe(summary)
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.version == summary.version
    sound(out)


def test_plan_names_the_version(table: Path, job_settings: Settings) -> None:
    plan = preview(JobConfig.model_validate(job_settings(data__version=0)))
    assert "reads version 0 of the Delta table" in describe_plan(plan)
    assert plan.rows == 3


def test_only_new_files_are_looked_at(
    table: Path, night: Night, out: Path, opened: list[str]
) -> None:
    night()
    opened.clear()
    write_deltalake(table, rows(6), mode="append")
    summary = night()
    assert len(opened) == 1
    assert (summary.unchanged_sources, summary.steps[0].computed) == (2, 1)
    assert ids(out) == [1, 2, 3, 4, 5, 6]
    sound(out)


def test_rows_move_and_go_with_their_files(table: Path, night: Night, out: Path) -> None:
    night()
    DeltaTable(table).delete("id = 1")
    assert night().steps[0].computed == 0
    assert ids(out) == [2, 3, 4, 5]
    DeltaTable(table).optimize.compact()
    assert night().steps[0].computed == 0
    assert len(rows_of(out)) == 4
    DeltaTable(table).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert night().steps[0].computed == 0
    sound(out)
    write_deltalake(table, rows(9), mode="overwrite")
    night()
    assert ids(out) == [9]
    sound(out)


def test_a_pinned_version_stays(table: Path, night: Night, out: Path) -> None:
    night(data__version=0)
    assert ids(out) == [1, 2, 3]
    night()
    assert ids(out) == [1, 2, 3, 4, 5]
    night(data__version=0)
    assert ids(out) == [1, 2, 3]
    with pytest.raises(InputError, match=r"has no version 7; the newest is 1"):
        night(data__version=7)
