"""A column that a job misspells is named in one line, for each kind of input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from pyiceberg.catalog import Catalog

from glmbatch.errors import InputError
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, Settings

ROWS = pa.table({"id": [1, 2], "text": ["one", "two"], "length": [3, 3], "day": ["a", "b"]})
STEPS = [{**CLASSIFY, "prompt_template": "{text}{titel}"}]
# By setting: what the job says, and the column that no input has.
MISSPELT: dict[str, tuple[dict[str, Any], str]] = {
    "data.where": ({"data__where": "day = 'a' and lenght > 3"}, "lenght"),
    "data.columns": ({"data__columns": ["id", "lenght"]}, "lenght"),
    "data.text_column": ({"data__text_column": "txet"}, "txet"),
    "data.id_column": ({"data__id_column": "key"}, "key"),
    "steps[0].prompt_template": ({"steps": STEPS}, "titel"),
    "steps[0].when": ({"steps": [{**CLASSIFY, "when": "lenght > 3"}]}, "lenght"),
}


@pytest.fixture
def written(tmp_path: Path, catalog: Catalog) -> Callable[[str], tuple[str, str]]:
    """Write ROWS as some kind of input; returns its address, and what a message calls it."""
    folder = tmp_path / "in"

    def write(kind: str) -> tuple[str, str]:
        if kind == "iceberg":
            table = catalog.create_table("shop.landing", ROWS.schema)
            with table.update_spec() as spec:
                spec.add_identity("day")
            table.append(ROWS)
            return "iceberg:lake/shop.landing", "iceberg:lake/shop.landing: snapshot "
        folder.mkdir()
        called = f"{folder}: none of "
        if kind == "delta":
            write_deltalake(folder, ROWS, partition_by=["day"])
            called = f"{folder}: version 0 of the Delta table: "
        elif kind == "csv":
            for name in ("a.csv", "b.csv"):
                pc.write_csv(ROWS, folder / name)
        else:
            pq.write_to_dataset(ROWS, folder, partition_cols=["day"])
        return str(folder), called

    return write


@pytest.mark.parametrize("setting", MISSPELT)
@pytest.mark.parametrize("kind", ["folder", "csv", "delta", "iceberg"])
def test_names_the_column_the_input_and_its_columns(
    written: Callable[[str], tuple[str, str]],
    job_settings: Settings,
    tmp_path: Path,
    kind: str,
    setting: str,
) -> None:
    said, column = MISSPELT[setting]
    address, called = written(kind)
    if kind in ("delta", "iceberg"):  # what a table says is enough
        for path in tmp_path.rglob("*.parquet"):
            path.unlink()
    job = JobConfig.model_validate(job_settings(data__input=address, **said))
    with pytest.raises(InputError) as raised:
        plan_run(job)
    message = str(raised.value)
    assert message.startswith(called)
    assert f"no column {column!r}; it has ['id', 'text', 'length', 'day']" in message
    assert f". Set {setting}" in message
    assert message.count(column) == 1


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_a_type_that_cannot_be_compared_is_named_too(
    written: Callable[[str], tuple[str, str]], job_settings: Settings, kind: str
) -> None:
    address, called = written(kind)
    job = job_settings(data__input=address, data__where="length = 'x'")
    with pytest.raises(InputError, match="'length' holds int64, which cannot be") as raised:
        plan_run(JobConfig.model_validate(job))
    assert str(raised.value).startswith(called)
