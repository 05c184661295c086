"""Values come out as they went in, in types that readers of the output accept."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.fragments import Fragment, read_fragment
from glmbatch.ledger.verification import verify
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.run.prompts import source_table
from glmbatch.settings.job import JobConfig
from glmbatch.store.values import prompt_values
from tests.support import CLASSIFY, Settings, Write, read_quarantine, run

pytestmark = pytest.mark.slow

FAR = [dt.datetime(9999, 12, 31, 23, 59, 59), dt.datetime(1, 1, 1), None, dt.datetime(2024, 1, 1)]


def output_of(out: Path) -> pa.Table:
    """The rows of the output's only file, after `verify` has found no fault."""
    (path,) = sorted(out.glob("a-*.parquet"))
    assert verify(out).findings == ()
    return pq.ParquetFile(path).read()


def test_another_tools_footer_does_not_hide_the_answers(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    table = pa.table({"text": ["fine"]})
    fields = [{"name": "text", "type": "string", "nullable": True, "metadata": {}}]
    key = "org.apache.spark.sql.parquet.row.metadata"
    metadata = {key: json.dumps({"type": "struct", "fields": fields}), "team": "x"}
    write_source("a.parquet", table.replace_schema_metadata(metadata))
    run(job_settings(steps=[CLASSIFY]))
    kept = output_of(out).schema.metadata
    assert b"team" in kept and key.encode() not in kept


@pytest.mark.parametrize("inside", ["column", "list", "struct"])
def test_int96_times_keep_their_value(
    write_source: Write, job_settings: Settings, out: Path, inside: str
) -> None:
    times = pa.array(FAR, pa.timestamp("us"))
    if inside == "list":
        times = pa.ListArray.from_arrays([0, 2, 3, 3, 4], times)
    elif inside == "struct":
        times = pa.StructArray.from_arrays([times], ["at"])
    columns = {"text": ["fine"] * 4, "until": times}
    write_source("a.parquet", columns, use_deprecated_int96_timestamps=True)
    run(job_settings(steps=[CLASSIFY]))
    written = output_of(out).column("until")
    assert written.type == times.type
    assert written.to_pylist() == times.to_pylist()


def test_int96_nanoseconds_are_not_truncated(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    times = pa.array([1, None, 2**62], pa.timestamp("ns"))
    columns = {"text": ["fine"] * 3, "at": times}
    write_source("a.parquet", columns, use_deprecated_int96_timestamps=True)
    run(job_settings(steps=[CLASSIFY]))
    assert output_of(out).column("at").combine_chunks().equals(times)
    columns["far"] = pa.array([FAR[0]] * 3, pa.timestamp("us"))
    write_source("a.parquet", columns, use_deprecated_int96_timestamps=True)
    write_source("b.parquet", {"text": ["fine"] * 20})
    summary = run(job_settings(steps=[CLASSIFY], max_error_rate=0.9))
    assert "no type holds both" in summary.unusable[0].reason


FINE = [1, 2**62]  # nanoseconds since 1970
PLAIN = [1_000, 2_000]
BEYOND = [2**55 * 1_000, 0]


@pytest.fixture
def write_times(write_source: Write) -> Callable[..., Path]:
    """Write two rows with INT96 times, given in nanoseconds, in a row group each."""

    def write(name: str, times: list[int]) -> Path:
        micros = any(time >= 2**63 for time in times)
        kind = pa.timestamp("us" if micros else "ns")
        at = pa.array([time // 1_000 if micros else time for time in times], kind)
        columns = {"text": ["fine", "good"], "at": at}
        options = {"use_deprecated_int96_timestamps": True, "row_group_size": 1}
        return write_source(name, columns, **options)

    return write


@pytest.mark.parametrize("unit", ["us", "ns"])
@pytest.mark.parametrize(
    ("first", "second"), [(PLAIN, FINE), (FINE, PLAIN), ([1_000, 1], PLAIN), (PLAIN, BEYOND)]
)
def test_all_int96_times_of_an_input_get_one_type(
    write_times: Callable[..., Path],
    job_settings: Settings,
    out: Path,
    first: list[int],
    second: list[int],
    unit: str,
) -> None:
    """The type is the same across files, fragments and nights, and no row is asked again."""
    settings = job_settings(steps=[CLASSIFY], data__rows_per_fragment=1)
    write_times("a.parquet", first)
    if unit == "us":  # "ns": both files in the same night
        run(settings)
    write_times("b.parquet", second)
    assert run(settings).computed == (0 if unit == "us" else 2)
    at = pq.read_table(out).column("at")
    scale = 1_000 if at.type == pa.timestamp("us") else 1
    assert [time * scale for time in at.cast(pa.int64()).to_pylist()] == first + second
    assert verify(out).findings == ()


def test_int96_times_that_fit_no_type_are_left_out(
    write_times: Callable[..., Path], job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    settings = job_settings(steps=[CLASSIFY], max_error_rate=0.9)
    write_times("a.parquet", FINE)
    write_times("b.parquet", BEYOND)
    assert [fault.source for fault in run(settings).unusable] == ["a.parquet"]
    # Without its source b cannot be rewritten, so its published type decides.
    (tmp_path / "in" / "b.parquet").unlink()
    write_times("c.parquet", PLAIN)
    summary = run(settings)
    assert "no type holds both" in summary.unusable[0].reason
    assert [fault.source for fault in summary.unusable] == ["a.parquet"]
    assert pq.read_table(out).num_rows == 4


def test_prompts_show_the_same_times_as_the_output(
    write_times: Callable[..., Path], job_settings: Settings, out: Path
) -> None:
    write_times("a.parquet", FINE)
    job = JobConfig.model_validate(
        job_settings(steps=[{**CLASSIFY, "prompt_template": "{at} {text}"}])
    )
    planned = plan_run(job)
    (question,) = assign(job, planned, prepare_models(job)).questions
    source = source_table(planned.plan.fragments[0], question)
    shown = prompt_values(source.column(question.inputs.columns["at"]))
    run(job)
    assert shown == prompt_values(output_of(out).column("at"))
    assert str(shown[0]).endswith("0.000000001")


def test_wrongly_published_values_are_rewritten(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    """A run repairs an output of the version that wrote such columns wrongly, without inference."""
    columns = {"text": ["fine"], "until": pa.array([FAR[0]], pa.timestamp("us"))}
    write_source("a.parquet", columns, use_deprecated_int96_timestamps=True)
    with pytest.MonkeyPatch.context() as before:
        before.setattr("glmbatch.ledger.input.opening.has_int96", lambda file: False)
        before.setattr("glmbatch.ledger.input.unchanged.LAYOUT", 0)
        before.setattr(Fragment, "unit", "ns")
        run(job_settings(steps=[CLASSIFY]))
    assert "column 'until' differs from row 0" in str(verify(out).findings[0])
    assert run(job_settings(steps=[CLASSIFY])).computed == 0
    assert output_of(out).column("until").to_pylist() == [FAR[0]]


def test_ids_may_have_any_type_readable_as_text(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "in").mkdir()
    values = "'{\"a\": 1}'::json as doc, ['0000000a-0000-0000-0000-00000000000b'::uuid] as more"
    query = f"select uuid() as id, 'fine' as text, {values} union all select uuid(), '', null, []"
    duckdb.sql(f"copy ({query}) to '{tmp_path}/in/a.parquet'")
    step = {**CLASSIFY, "prompt_template": "{id} {doc} {text}"}
    run(job_settings(steps=[step], data__id_column="id", max_error_rate=0.9))
    source = duckdb.sql(f"select id::text, doc::text, more::text from '{tmp_path}/in/a.parquet'")
    file = f"'{out}/a-0000000000.parquet'"
    assert duckdb.sql(f"select id, doc::text, more::text from {file}").fetchall() == (
        source.fetchall()
    )
    rows = output_of(out)
    assert rows.schema.field("id").type == pa.string()
    assert [line["id"] for line in read_quarantine(out)] == [rows.column("id")[1].as_py()]


@pytest.mark.parametrize(
    ("kind", "seen"), [(pa.list_(pa.int8()), "cannot name a row"), (pa.duration("s"), None)]
)
def test_an_unsuitable_id_column_is_refused(
    write_source: Write, job_settings: Settings, kind: pa.DataType, seen: str | None
) -> None:
    write_source("a.parquet", {"text": ["fine"], "id": pa.array([None], kind)})
    settings = job_settings(steps=[CLASSIFY], data__id_column="id")
    if seen is None:
        assert run(settings).rows == 1
        return
    with pytest.raises(InputError, match=f"{seen}. Set data.id_column"):
        run(settings)


NIGHTS: Mapping[str, list[dict[str, Any]]] = {
    "first": [{"n": [5], "s": [{"a": [1]}]}, {"n": [None], "s": [{"a": [None]}]}],
    "last": [{"n": [None], "s": [None]}, {"n": [5], "s": [{"a": [1]}]}],
    "none": [{"n": [None], "s": [{"a": [None]}]}] * 2,
}


@pytest.mark.parametrize("typed", NIGHTS)
def test_untyped_delta_columns_take_the_type_of_others(
    write_source: Write, job_settings: Settings, out: Path, typed: str
) -> None:
    one, other = NIGHTS[typed]
    settings = job_settings(steps=[CLASSIFY], data__format="delta")
    write_source("a.parquet", {"text": ["fine"], **one})
    write_source("b.parquet", {"text": ["good"], **other})
    run(settings)
    table = DeltaTable(out).to_pyarrow_table().select(["text", "n", "s"]).sort_by("text")
    values = [{"text": "fine"}, {"text": "good"}]
    for row, columns in zip(values, (one, other), strict=True):
        row |= {name: column[0] for name, column in columns.items()}
    assert table.to_pylist() == values
    text = typed == "none"
    assert table.schema.field("n").type == (pa.string() if text else pa.int64())
    assert verify(out).findings == ()
    # A later night appends a file without any value. The night after it rewrites the first two.
    write_source("c.parquet", {"text": ["late"], "n": [None], "s": [None]})
    assert run(settings).computed == 1
    write_source("a.parquet", {"text": ["fine"], "n": [6]})
    write_source("b.parquet", {"text": ["good"], "n": [None]})
    assert run(settings).computed == 0
    rows = DeltaTable(out).to_pyarrow_table().sort_by("text")
    assert rows.column("n").to_pylist() == [6, None, None]
    assert verify(out).findings == ()


def test_a_file_with_a_damaged_column_costs_no_inference(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    columns = {"text": ["fine"] * 9, "other": [f"value {row} of nobody" for row in range(9)]}
    source = write_source("a.parquet", columns, write_page_checksum=True, use_dictionary=False)
    write_source("b.parquet", {"text": ["good"]})
    with pq.ParquetFile(source) as file:
        column = file.metadata.row_group(0).column(1)
    content = bytearray(source.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    source.write_bytes(content)
    summary = run(job_settings(steps=[CLASSIFY], max_error_rate=0.95))
    assert {fault.source for fault in summary.unusable} == {"a.parquet"}
    assert summary.computed == 1


@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_an_avro_enum_stays_text(
    write_source: Write, job_settings: Settings, out: Path, form: str
) -> None:
    source = write_source("a.parquet", {"text": ["fine"], "kind": ["b"]}, store_schema=False)
    plain, enum = b"kind\x25\x00\x4c\x1c\x00\x00", b"kind\x25\x08\x4c\x4c\x00\x00"
    content = source.read_bytes()
    assert plain in content
    source.write_bytes(content.replace(plain, enum))
    with pq.ParquetFile(source) as file:
        assert file.schema_arrow.field("kind").type == pa.binary()
    run(job_settings(steps=[CLASSIFY], data__format=form))
    assert output_of(out).column("kind").to_pylist() == ["b"]
    assert run(job_settings(steps=[CLASSIFY], data__format=form)).computed == 0


def test_a_fragment_is_read_in_full_once_for_all_steps(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("a.parquet", {"text": ["fine", "good"]}, row_group_size=1)
    write_source("b.parquet", {"text": ["bad"]})
    steps = [CLASSIFY, {**CLASSIFY, "name": "tone"}]
    walks: list[str] = []

    def counted(fragment: Fragment, columns: list[str], *, whole: bool) -> Any:
        if whole:
            walks.append(fragment.name)
            if fragment.source == "b.parquet":
                raise UnusableFile("b.parquet: damaged where no prompt looks")
        return read_fragment(fragment, columns, whole=whole)

    monkeypatch.setattr("glmbatch.run.prompts.read_fragment", counted)
    settings = job_settings(steps=steps, data__rows_per_fragment=1, max_error_rate=0.9)
    assert [fault.source for fault in run(settings).unusable] == ["b.parquet"]
    assert sorted(walks) == ["a.parquet@0", "a.parquet@1", "b.parquet@0"]
    run(settings)  # only the fragment that failed is read in full again
    assert walks[3:] == ["b.parquet@0"]
