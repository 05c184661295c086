"""Rows in, files out, through the real engine on a small checkpoint: what a reader of the output sees."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import AuditError, BadRow, InputError, UnusableFile
from glmbatch.ledger.ledger import MANIFEST, QUARANTINE, REFUSED, Ledger
from glmbatch.report.summary import Summary, describe
from glmbatch.run.pipeline import answer, run_job
from glmbatch.run.planning import assign, locate_model, passes, plan_run, prepare_model
from glmbatch.run.publish import publish
from glmbatch.settings.job import JobConfig, ModelConfig, answer_columns
from glmbatch.store.files import digest_file
from tests.conftest import CAUSAL, CLASSIFIER, CLASSIFY, GENERATE, ROOT
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import read_json

pytestmark = pytest.mark.slow
Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


def run(settings: dict[str, Any]) -> Summary:
    return run_job(JobConfig.model_validate(settings))


def output(tmp_path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        ds.dataset(tmp_path / "out", partitioning=None).to_table().to_pylist()
    )
    return rows


def test_each_row_comes_out_in_place_with_its_answers(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("day=1/a.parquet", {"id": range(23), "text": rows})
    summary = run(job_settings())
    seen = output(tmp_path)
    assert [row["text"] for row in seen] == rows
    assert {row["mood"] for row in seen} <= {"good", "bad", "so so"}
    for row in seen:
        assert math.isclose(sum(row["mood_scores"].values()), 1, abs_tol=1e-9)
        assert (
            row["mood_score"] == max(row["mood_scores"].values()) == row["mood_scores"][row["mood"]]
        )
        assert row["reply_finish_reason"] in {"stop", "length"}
        assert 0 <= row["reply_completion_tokens"] <= 6
        assert row["mood_error"] is row["reply_error_type"] is None
        assert len(row["reply_key"]) == 16
    assert (summary.rows, summary.faulty_rows, summary.fragments) == (23, 0, 3)
    assert sorted(path.name for path in (tmp_path / "out" / "day=1").iterdir()) == [
        "a-0000000000.parquet",
        "a-0000000008.parquet",
        "a-0000000016.parquet",
    ]


def test_columns_types_nesting_and_file_metadata_come_out_as_they_went_in(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "text": pa.array(["一", "two", "三"], pa.large_string()),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "when": pa.array([0, 1, None], pa.timestamp("ms", "Asia/Shanghai")),
            "price": pa.array(["1.50", None, "2.25"]).cast(pa.decimal128(9, 2)),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "nested": pa.array([{"a": [{"b": 1}]}, None, {"a": []}]),
            "pairs": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int8())),
            "blank": pa.nulls(3),
        }
    )
    fields = [
        field.with_metadata({b"note": b"kept"}) if field.name == "text" else field
        for field in table.schema
    ]
    table = table.cast(pa.schema(fields, {b"team": "数据".encode()}))
    write_source("a.parquet", table)
    run(job_settings())
    written = pq.read_table(tmp_path / "out" / "a-0000000000.parquet", partitioning=None)
    assert written.select(table.schema.names).equals(table)
    assert written.schema.metadata[b"team"] == "数据".encode()
    assert written.schema.field("text").metadata[b"note"] == b"kept"
    steps = JobConfig.model_validate(job_settings()).steps
    assert written.schema.names == [
        *table.schema.names,
        *answer_columns(steps[0]),
        *answer_columns(steps[1]),
    ]


def test_a_bad_row_keeps_its_place_and_says_why(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    texts = ["fine", None, "", " \n", b"\xff\xfe".decode("latin-1"), "long " * 3000, "also fine"]
    write_source("a.parquet", {"id": [f"row-{n}" for n in range(7)], "text": texts})
    summary = run(job_settings(max_error_rate=0.9, data__id_column="id"))
    seen = output(tmp_path)
    assert [row["text"] for row in seen] == texts
    kinds = [None, "null_value", "empty_text", "empty_text", None, "too_long", None]
    assert [row["mood_error_type"] for row in seen] == kinds
    assert [row["reply_error_type"] for row in seen] == [
        kind and "earlier_step_failed" for kind in kinds
    ]
    assert all((row["mood"] is None) == (row["mood_error"] is not None) for row in seen)
    listed = pq.read_table(tmp_path / "out" / QUARANTINE).to_pylist()
    assert [
        (line["source"], line["row"], line["id"]) for line in listed if line["step"] == "mood"
    ] == [("a.parquet", number, f"row-{number}") for number in (1, 2, 3, 5)]
    assert (summary.faulty_rows, summary.quarantined) == (4, True)
    assert "4 rows failed" in describe(summary)


def test_bytes_that_are_no_text_cost_their_row_alone(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": pa.array([b"fine", b"\xff", "好".encode()])})
    run(job_settings(max_error_rate=0.5))
    assert [row["mood_error_type"] for row in output(tmp_path)] == [None, "not_utf8", None]


def test_under_raise_a_bad_row_stops_the_run_and_nothing_is_published(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["fine"] * 9 + [None]})
    with pytest.raises(BadRow, match=r"a\.parquet: row 9, step 'mood': text is null\..*on_error"):
        run(job_settings(on_error="raise"))
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_under_null_a_bad_row_keeps_its_reason_and_the_run_is_done(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["fine", "fine too", None]})
    summary = run(job_settings(on_error=None, max_error_rate=0.5))
    assert (summary.faulty_rows, summary.quarantined) == (1, False)
    assert output(tmp_path)[2]["mood_error"] == "text is null"


@pytest.mark.parametrize(
    ("bad", "rate", "message"), [(3, 0.2, r"3 of 10 rows failed \(30\.0%\)"), (10, 1.0, "all 10")]
)
def test_too_many_failed_rows_publish_nothing_and_leave_what_was_there(
    write_source: Write, job_settings: Settings, tmp_path: Path, bad: int, rate: float, message: str
) -> None:
    write_source("a.parquet", {"text": ["yesterday"] * 10})
    run(job_settings())
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*") if path.is_file()}
    write_source("a.parquet", {"text": ["today"] * (10 - bad) + [None] * bad})
    with pytest.raises(AuditError, match=f"nothing published: {message}") as refused:
        run(job_settings(max_error_rate=rate))
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "out").glob("*") if path.is_file()
    }
    listed = tmp_path / "out" / REFUSED
    assert str(listed) in str(refused.value)
    lines = [
        (line["row"], line["step"], line["error"]) for line in pq.read_table(listed).to_pylist()
    ]
    assert sorted(line for line in lines if line[1] == "mood") == [
        (row, "mood", "text is null") for row in range(10 - bad, 10)
    ]
    write_source("a.parquet", {"text": ["today"] * 10})
    run(job_settings())
    assert not listed.exists()


def test_a_damaged_page_costs_its_fragment_alone(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    source = write_source(
        "a.parquet",
        {"text": [f"row {n}" for n in range(24)]},
        row_group_size=8,
        write_page_checksum=True,
    )
    with pq.ParquetFile(source) as file:
        page = file.metadata.row_group(1).column(0).data_page_offset
    whole = source.read_bytes()
    source.write_bytes(whole[: page + 40] + bytes([whole[page + 40] ^ 1]) + whole[page + 41 :])
    with pytest.raises(UnusableFile, match=r"a\.parquet"):
        run(job_settings(on_error="raise"))
    summary = run(job_settings(max_error_rate=0.5))
    assert [fault.source for fault in summary.unusable] == ["a.parquet"]
    assert [row["text"] for row in output(tmp_path)] == [
        f"row {n}" for n in [*range(8), *range(16, 24)]
    ]
    assert (
        pq.read_table(tmp_path / "out" / QUARANTINE).to_pylist()[0]["error_type"] == "unusable_file"
    )


def test_a_second_run_computes_nothing_and_says_so(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y", None]})
    first = run(job_settings(max_error_rate=0.5))
    second = run(job_settings(max_error_rate=0.5, runtime__max_slots=1))
    assert (first.computed, second.computed) == (4, 0)
    assert "no inference was executed and no model was loaded" in describe(second)
    assert second.samples == first.samples
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "in" / "renamed.parquet")
    assert run(job_settings(max_error_rate=0.5)).computed == 0


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_answers_that_are_not_whole_are_computed_again(
    write_source: Write, job_settings: Settings, tmp_path: Path, damage: str
) -> None:
    write_source("a.parquet", {"text": ["x", "y", "z"]})
    run(job_settings())
    before = output(tmp_path)
    for path in [
        *(tmp_path / "out" / "_glmbatch" / "answers").iterdir(),
        *(tmp_path / "out").glob("*.parquet"),
    ]:
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1] + b"X")
    assert run(job_settings()).computed == 6
    assert output(tmp_path) == before


def test_repeated_texts_are_asked_once(write_source: Write, job_settings: Settings) -> None:
    write_source("a.parquet", {"text": ["same", "other", "same", "same"]})
    settings = job_settings()
    settings["steps"] = [CLASSIFY]
    assert [step.computed for step in run(settings).steps] == [2]


def test_a_new_day_joins_the_days_before_it(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("day=1/a.parquet", {"text": ["one"]})
    run(job_settings())
    write_source("day=2/a.parquet", {"text": ["two"]})
    second = run(job_settings(data__input=str(tmp_path / "in" / "*" / "*.parquet")))
    assert second.computed == 2
    assert [row["text"] for row in output(tmp_path)] == ["one", "two"]
    only = job_settings(data__input=str(tmp_path / "in" / "day=2*" / "*.parquet"))
    assert run(only).computed == 0
    assert [row["text"] for row in output(tmp_path)] == ["one", "two"]


def test_an_output_never_mixes_two_settings(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("day=1/a.parquet", {"text": ["one"]})
    write_source("day=2/a.parquet", {"text": ["two"]})
    run(job_settings())
    settings = job_settings(data__input=str(tmp_path / "in" / "day=2*" / "*.parquet"))
    settings["steps"][1]["max_tokens"] = 3
    with pytest.raises(
        InputError, match=r"day=1/a-0000000000\.parquet was answered with other settings"
    ):
        run(settings)
    settings["data"]["input"] = str(tmp_path / "in")
    assert run(settings).computed == 2
    assert {row["text"] for row in output(tmp_path)} == {"one", "two"}


def test_fewer_fragments_replace_more_of_the_same_file(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [f"row {n}" for n in range(20)]})
    run(job_settings())
    run(job_settings(data__rows_per_fragment=100))
    assert [row["text"] for row in output(tmp_path)] == [f"row {n}" for n in range(20)]


def test_a_limited_run_does_not_replace_all_rows(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [f"row {n}" for n in range(20)]})
    run(job_settings(data__limit=3))
    assert len(output(tmp_path)) == 3
    run(job_settings())
    with pytest.raises(InputError, match=r"a run with data\.limit would replace them"):
        run(job_settings(data__limit=3))
    assert len(output(tmp_path)) == 20


def test_a_trained_head_answers_with_its_own_labels_beside_the_base(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][0] = {"kind": "classify", "name": "mood", "model": {"path": str(CLASSIFIER)}}
    run(settings)
    together = output(tmp_path)
    assert {row["mood"] for row in together} <= {"负面", "中性", "正面"}
    assert list(together[0]["mood_scores"]) == ["负面", "中性", "正面"]
    settings["data"]["output"] = str(tmp_path / "out2")
    settings["runtime"]["max_loaded_models"] = 1
    run(settings)
    apart = ds.dataset(tmp_path / "out2", partitioning=None).to_table().to_pylist()
    assert apart == together


def write_adapter(tmp_path: Path, name: str, seed: int = 0) -> ModelConfig:
    make_original_adapter(tmp_path / name, read_json(CAUSAL / "config.json"), seed=seed)
    return ModelConfig(path=str(CAUSAL), adapter=str(tmp_path / name))


def test_steps_with_different_adapters_over_one_base_each_get_their_own(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    models = [
        ModelConfig(path=str(CAUSAL)),
        *(write_adapter(tmp_path, name, ord(name)) for name in "ab"),
    ]
    steps = [
        {**CLASSIFY, "name": f"mood_{number}", "model": model.model_dump()}
        for number, model in enumerate(models)
    ]
    run(job_settings(steps=steps))
    together = output(tmp_path)
    for row in together:
        assert len({str(row[f"mood_{number}_scores"]) for number in range(3)}) == 3
    for number, step in enumerate(steps):
        run(job_settings(steps=[step], data__output=str(tmp_path / f"out-{number}")))
        alone = ds.dataset(tmp_path / f"out-{number}", partitioning=None).to_table().to_pylist()
        name = f"mood_{number}"
        assert [(row[f"{name}_key"], row[f"{name}_scores"]) for row in alone] == [
            (row[f"{name}_key"], row[f"{name}_scores"]) for row in together
        ]


def test_an_adapter_and_one_changed_byte_of_it_and_8_bits_are_other_models(
    job_settings: Settings, tmp_path: Path
) -> None:
    job = JobConfig.model_validate(job_settings())
    model = write_adapter(tmp_path, "adapter")
    bare, first = (prepare_model(locate_model(each, job.runtime)) for each in (job.model, model))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = prepare_model(locate_model(model, job.runtime))
    assert len({bare.identity, first.identity, second.identity}) == 3
    assert prepare_model(locate_model(job.model, job.runtime)) == bare
    int8 = job.model.model_copy(update={"quantization": "int8"})
    assert prepare_model(locate_model(int8, job.runtime)).identity != bare.identity


def test_models_that_do_not_fit_together_take_turns_over_all_fragments(
    job_settings: Settings,
) -> None:
    other = {"path": str(CLASSIFIER)}
    settings = job_settings()
    settings["steps"] = [
        {**CLASSIFY, "name": "a"},
        {"kind": "classify", "name": "b", "model": other},
        {**GENERATE, "name": "c", "prompt_template": "{a} {text}"},
        {**GENERATE, "name": "d", "prompt_template": "{b} {text}"},
    ]
    job = JobConfig.model_validate(settings)
    assert passes(job, 2) == ((0, 1, 2, 3),)
    assert passes(job, 1) == ((0, 2), (1,), (3,))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"kind": "classify", "name": "a", "labels": None},
            r"has no trained head\. Set the step's labels\.",
        ),
        (
            {"kind": "classify", "name": "a", "model": str(CLASSIFIER), "labels": ["x", "y"]},
            "was trained for",
        ),
        ({"kind": "generate", "name": "a", "model": str(CLASSIFIER)}, "cannot generate"),
        (
            {"kind": "generate", "name": "a", "max_tokens": 5000},
            r"has 2048 positions.*Set max_tokens\.",
        ),
        ({"kind": "generate", "name": "a", "model": "no/such/place"}, "no/such/place"),
    ],
)
def test_a_model_that_cannot_answer_its_step_is_told_before_any_row(
    write_source: Write, job_settings: Settings, step: dict[str, Any], message: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    settings = job_settings()
    settings["steps"] = [step]
    with pytest.raises(InputError, match=message):
        run(settings)


def test_sampled_answers_do_not_depend_on_fragments_slots_or_neighbours(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    answers = []
    for number, (size, slots) in enumerate([(100, 1), (100, 16), (7, 3)]):
        settings = job_settings(
            data__output=str(tmp_path / f"out{number}"),
            data__rows_per_fragment=size,
            runtime__max_slots=slots,
        )
        settings["steps"] = [
            {
                "kind": "generate",
                "name": "reply",
                "max_tokens": 12,
                "temperature": 1.0,
                "top_p": 1.0,
            }
        ]
        run(settings)
        table = ds.dataset(tmp_path / f"out{number}", partitioning=None).to_table()
        answers.append(table.column("reply").to_pylist())
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 15


def test_a_table_without_rows_gives_a_table_without_rows(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": pa.array([], pa.string())})
    summary = run(job_settings())
    written = pq.read_table(tmp_path / "out" / "a-0000000000.parquet")
    assert (summary.rows, written.num_rows) == (0, 0)
    assert "mood_scores" in written.schema.names


def test_the_manifest_lists_what_is_published_with_its_digests(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 20})
    run(job_settings())
    manifest = Ledger(tmp_path / "out").manifest()
    assert manifest is not None
    assert {file.output_name: file.digest for file in manifest.files} == {
        path.name: digest_file(path) for path in (tmp_path / "out").glob("a-*.parquet")
    }
    assert not (tmp_path / "out" / "_glmbatch" / "staged").exists()


def test_answers_that_failed_their_audit_are_never_published_later(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 9 + [None]})
    fine = job_settings(max_error_rate=0.2)
    run(fine)
    before = output(tmp_path)
    other = job_settings(max_error_rate=0.0)
    other["steps"][1]["max_tokens"] = 2
    with pytest.raises(AuditError):
        run(other)
    run(fine)
    assert output(tmp_path) == before
    assert_manifest_is_true(tmp_path)


def assert_manifest_is_true(tmp_path: Path) -> None:
    manifest = Ledger(tmp_path / "out").manifest()
    assert manifest is not None
    public = {
        path.relative_to(tmp_path / "out").as_posix(): path
        for path in (tmp_path / "out").rglob("*.parquet")
    }
    visible = {name: path for name, path in public.items() if not name.startswith("_")}
    assert {file.output_name: file.digest for file in manifest.files} == {
        name: digest_file(path) for name, path in visible.items()
    }


def test_a_renamed_step_writes_columns_of_its_new_name(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    settings = job_settings()
    settings["steps"] = [{**GENERATE, "prompt_template": "{text}"}]
    run(settings)
    settings["steps"][0]["name"] = "answer"
    run(settings)
    assert all(row["answer"] is not None and "reply" not in row for row in output(tmp_path))


def test_a_run_over_one_day_leaves_the_days_before_it(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    for day in (1, 2):
        write_source(f"day={day}/a.parquet", {"text": [f"of day {day}", None]})
        run(job_settings(data__input=str(tmp_path / "in" / f"day={day}"), max_error_rate=0.5))
    assert [row["text"] for row in output(tmp_path)] == ["of day 1", None, "of day 2", None]
    listed = pq.read_table(tmp_path / "out" / QUARANTINE).to_pylist()
    assert {line["source"] for line in listed} == {"day=1/a.parquet", "day=2/a.parquet"}


def test_an_output_is_of_one_input(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("one/a.parquet", {"text": ["x"]})
    write_source("two/a.parquet", {"text": ["y"]})
    run(job_settings(data__input=str(tmp_path / "in" / "one")))
    with pytest.raises(
        InputError, match=r"holds the answers over .*in/one.*Set data\.output to another folder"
    ):
        run(job_settings(data__input=str(tmp_path / "in" / "two")))


def test_a_renamed_file_is_published_once(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    source = write_source("a.parquet", {"text": ["x", "y"]})
    run(job_settings())
    source.rename(source.with_name("b.parquet"))
    assert run(job_settings()).computed == 0
    assert [row["text"] for row in output(tmp_path)] == ["x", "y"]
    assert_manifest_is_true(tmp_path)


def test_a_damaged_published_file_is_written_again(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    run(job_settings())
    published = tmp_path / "out" / "a-0000000000.parquet"
    whole = published.read_bytes()
    published.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    assert run(job_settings()).computed == 0
    assert pq.read_table(published).equals(pq.read_table(pa.BufferReader(whole)))
    assert_manifest_is_true(tmp_path)


def test_under_raise_answers_of_an_earlier_run_are_refused_too(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["x", None]})
    run(job_settings(max_error_rate=0.5))
    with pytest.raises(BadRow, match=r"a\.parquet: row 1, step 'mood': text is null"):
        run(job_settings(on_error="raise", max_error_rate=0.5))


def test_weights_changed_between_plan_and_load_are_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(CAUSAL, model)
    write_source("a.parquet", {"text": ["x"]})
    job = JobConfig.model_validate(job_settings(model={"path": str(model), "dtype": "bfloat16"}))
    plan = plan_run(job)
    work = assign(job, plan, [prepare_model(locate_model(job.model, job.runtime))])
    os.utime(model / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(InputError, match="was changed since this run took its digests"):
        answer(job, work.fragments[0].assignments[0])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "config.json"]
)
def test_an_adapter_changed_between_plan_and_load_is_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path, name: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    job = JobConfig.model_validate(
        job_settings(model=write_adapter(tmp_path, "adapter").model_dump())
    )
    work = assign(job, plan_run(job), [prepare_model(locate_model(job.model, job.runtime))])
    (tmp_path / "adapter" / "README.md").touch()
    (tmp_path / "adapter" / name).touch()
    with pytest.raises(
        InputError, match=r"with the adapter .* was changed since this run took its digests"
    ):
        answer(job, work.fragments[0].assignments[0])


def test_text_that_is_no_utf_8_never_stops_the_run(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    broken = pa.array([b"fine", b"\xff", b"also fine"]).view(pa.string())
    write_source("a.parquet", {"text": broken, "id": broken})
    run(job_settings(max_error_rate=0.5, data__id_column="id"))
    listed = pq.read_table(tmp_path / "out" / QUARANTINE).to_pylist()
    assert [(line["row"], line["error_type"]) for line in listed if line["step"] == "mood"] == [
        (1, "not_utf8")
    ]


def test_files_that_cannot_be_read_count_towards_the_error_rate(
    write_source: Write, job_settings: Settings
) -> None:
    for number in range(4):
        source = write_source(f"{number}.parquet", {"text": [f"text {number}"] * 5})
        if number:
            source.write_bytes(source.read_bytes()[:-5])
    with pytest.raises(AuditError, match=r"15 of 20 rows failed.* in unreadable files"):
        run(job_settings(max_error_rate=0.5))
    assert run(job_settings(max_error_rate=0.8)).rows == 5


def test_trying_prompts_on_a_few_rows_is_never_in_its_own_way(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 3})
    write_source("b.parquet", {"text": ["y"] * 3})
    run(job_settings(data__limit=5))
    settings = job_settings(data__limit=2)
    settings["steps"][0]["prompt_template"] = "Is it good? {text}"
    run(settings)
    assert len(output(tmp_path)) == 2


def test_a_prompt_may_call_the_text_by_its_columns_name(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"body": ["fine", " ", "long " * 3000]})
    settings = job_settings(data__text_column="body", max_error_rate=0.9)
    settings["steps"] = [{**GENERATE, "prompt_template": "{body}", "on_too_long": "truncate"}]
    run(settings)
    assert [row["reply_error_type"] for row in output(tmp_path)] == [None, "empty_text", None]


def test_readers_of_the_folder_find_every_file_whole_while_nights_are_published(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    settings = job_settings(steps=[CLASSIFY])
    files = [tmp_path / "out" / f"{file}-0000000000.parquet" for file in range(6)]
    nights = [
        [f"file {file} night {night} row {row}" for row in range(4)]
        for night in range(3)
        for file in range(6)
    ]
    seen: list[list[str]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.extend(pq.read_table(path).column("text").to_pylist() for path in files)

    reader = threading.Thread(target=read)
    for night in range(3):
        for file in range(6):
            write_source(f"{file}.parquet", {"text": nights[6 * night + file]})
        run(settings)
        if not night:
            reader.start()
    stop.set()
    reader.join()
    assert all(each in nights for each in seen)
    assert len(seen) > 6


def test_a_landing_folder_may_be_emptied_once_its_rows_are_written(
    write_source: Write, job_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source("a.parquet", {"text": ["one", None], "id": ["x", "y"]})

    def emptied(*arguments: Any) -> Summary:
        source.unlink()
        return publish(*arguments)

    monkeypatch.setattr("glmbatch.run.pipeline.publish", emptied)
    summary = run(job_settings(steps=[CLASSIFY], data__id_column="id", max_error_rate=0.5))
    assert summary.samples[0]["text"] == "one"
    assert pq.read_table(tmp_path / "out" / QUARANTINE).column("id").to_pylist() == ["y"]


def test_no_row_and_broken_files_are_no_success(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("empty.parquet", {"text": pa.array([], pa.string())})
    (tmp_path / "in" / "broken.parquet").write_bytes(b"broken")
    with pytest.raises(AuditError, match="no row, and 1 unreadable files"):
        run(job_settings(on_error="null", max_error_rate=1.0))


def test_two_runs_of_one_process_do_not_write_to_one_output(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    job = JobConfig.model_validate(job_settings(steps=[CLASSIFY]))
    Ledger(job.data.output).open("another")
    with pytest.raises(InputError, match="another run of this process"):
        run_job(job)
    Ledger(job.data.output).close("another")
    assert run_job(job).rows == 1


def test_duckdb_finds_every_row_once_by_the_glob_of_the_readme(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("day=1/a.parquet", {"text": [f"row {row}" for row in range(10)] + [None]})
    write_source("b.parquet", {"text": ["flat"]})
    run(job_settings(steps=[CLASSIFY], max_error_rate=0.5))
    glob = "out/**/*-??????????.parquet"
    assert glob in (ROOT / "README.md").read_text()
    found = duckdb.sql(
        f"select count(*) from read_parquet('{tmp_path}/{glob}', union_by_name=true)"
    ).fetchall()
    assert found == [(12,)]


def test_a_canary_that_is_not_there_is_told_before_any_work(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    with pytest.raises(InputError, match="Set canary"):
        run(job_settings(canary=str(tmp_path / "none.parquet")))
    assert not list((tmp_path / "out").rglob("*.parquet"))
