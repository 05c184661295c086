"""An Iceberg table as input whose folders have names that are no columns of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import deltalake
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from pyiceberg.transforms import TruncateTransform
from pyiceberg.typedef import Record

from glmbatch.errors import InputError
from glmbatch.ledger.verification import verify
from tests.behaviour.test_iceberg_columns import INPUT, Job, columns_of
from tests.behaviour.test_iceberg_input import add_file
from tests.behaviour.test_readers import read_as_told
from tests.support import CLASSIFY, Settings, run

REGIONS = ["us east", None, "eu"]


@pytest.fixture
def job(job_settings: Settings) -> Job:
    """Settings of a job with one step over the table."""
    return lambda **changes: job_settings(
        **{"data__input": INPUT, "steps": [dict(CLASSIFY)], **changes}
    )


@pytest.fixture
def table(catalog: Catalog, rows: list[str]) -> Table:
    """A table by region and by the beginning of each text, whose region is now called area."""
    columns = pa.table({"text": rows[:3], "region": REGIONS})
    table = catalog.create_table("shop.reviews", columns.schema)
    with table.update_spec() as spec:
        spec.add_identity("region")
    table.append(columns[:2])
    with table.update_spec() as spec:
        spec.add_field("text", TruncateTransform(1), "begin")
    # pyiceberg itself writes no such partition without one more package.
    path = Path(table.location()) / f"data/region=eu/begin={rows[2][0]}/a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(columns[2:].cast(table.schema().as_arrow()), path)
    add_file(table, path, partition=Record("eu", rows[2][0]), spec_id=table.spec().spec_id)
    with table.update_schema() as schema:
        schema.rename_column("region", "area")
    return table


def test_a_renamed_partition_is_a_column_by_its_new_name(
    table: Table, job: Job, out: Path, rows: list[str], tmp_path: Path
) -> None:
    assert all("/region=" in task.file.file_path for task in table.scan().plan_files())
    template = {**CLASSIFY, "prompt_template": "{area}: {text}"}
    summary = run(job(steps=[template], max_error_rate=1))
    expected = dict(zip(rows, REGIONS, strict=False))
    assert {text: area for text, area in columns_of(out, "text", "area")} == expected
    assert verify(out).findings == ()
    frame = read_as_told(summary, tmp_path)
    assert not {"region", "begin"} & {*frame.columns}
    areas = [None if pandas.isna(area) else area for area in frame.area]
    assert dict(zip(frame.text, areas, strict=True)) == expected
    one = run(job(data__where="area = 'us east'", data__output=str(tmp_path / "one")))
    assert one.filtered is not None
    # The null partition has no bounds, so its file is opened.
    assert (one.rows, one.filtered.sources, one.filtered.rows) == (1, 1, 1)
    assert verify(tmp_path / "one").findings == ()


@pytest.mark.parametrize("name", ["region", "begin"])
@pytest.mark.parametrize(
    "settings",
    [
        lambda name: {"data__where": f"{name} = 'us+east'"},
        lambda name: {"data__columns": ["text", name]},
        lambda name: {"data__id_column": name},
        lambda name: {"steps": [{**CLASSIFY, "prompt_template": f"{{{name}}}: {{text}}"}]},
        lambda name: {"steps": [{**CLASSIFY, "when": f"{name} = 'eu'"}]},
    ],
)
def test_names_of_folders_that_are_no_columns_are_refused(
    table: Table, job: Job, settings: Any, name: str
) -> None:
    with pytest.raises(
        InputError, match=rf"no column '{name}'; it has \['text', 'area'\]"
    ) as refused:
        run(job(**settings(name)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("format", ["delta", "iceberg"])
def test_a_table_of_answers_has_the_tables_columns(
    table: Table, catalog: Catalog, job: Job, out: Path, rows: list[str], format: str
) -> None:
    name = "lake/shop.answers" if format == "iceberg" else None
    run(job(data__format=format, data__table=name))
    if format == "delta":
        answers = deltalake.DeltaTable(out).to_pyarrow_table()
    else:
        answers = catalog.load_table("shop.answers").scan().to_arrow()
    assert not {"region", "begin"} & {*answers.column_names}
    found = dict(zip(*(answers[name].to_pylist() for name in ("text", "area")), strict=True))
    assert found == dict(zip(rows, REGIONS, strict=False))
    assert verify(out).findings == ()


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_a_partition_by_times_is_compared_as_times(
    catalog: Catalog, job: Job, out: Path, rows: list[str], zone: str | None
) -> None:
    times = pa.array([datetime(2026, 11, 27), datetime(2026, 11, 27, 1, 2, 3, 4), None])
    columns = pa.table({"text": rows[:3], "seen": times.cast(pa.timestamp("us", zone))})
    table = catalog.create_table("shop.reviews", columns.schema)
    with table.update_spec() as spec:
        spec.add_identity("seen")
    table.append(columns)
    midnight = "2026-11-27T00:00:00Z" if zone else "2026-11-27"
    summary = run(job(data__where=f"seen <= '{midnight}'"))
    assert [text for (text,) in columns_of(out, "text")] == rows[:1]
    assert summary.filtered is not None and summary.filtered.sources == 1
    assert verify(out).findings == ()
