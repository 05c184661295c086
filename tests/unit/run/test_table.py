"""A table in memory gets the answers of a file run and is otherwise unchanged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import yaml

from glmbatch import annotate, annotate_table
from glmbatch.errors import AuditError, InputError
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.settings.job import ClassifyStep, JobConfig
from tests.support import CAUSAL, CLASSIFY, GENERATE, Settings, Write

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "model": str(CAUSAL),
    "steps": [CLASSIFY],
    "data": {"rows_per_fragment": 8},
    "runtime": {"device": "cpu"},
    "max_error_rate": 0.5,
}
ANSWERS = ClassifyStep.model_validate(CLASSIFY).answer_columns


@pytest.fixture
def texts(rows: list[str | None]) -> list[str | None]:
    return [*rows[:10], None, " ", *rows[10:]]


def test_a_table_and_a_dataframe_get_the_answers_of_a_file_run(
    texts: list[str | None], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    table = pa.table({"id": range(len(texts)), "text": texts}, metadata={"team": "a"})
    write_source("a.parquet", table)
    settings = job_settings(max_error_rate=0.5)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert annotate(file).rows == len(texts)
    published = pd.read_parquet(tmp_path / "out")
    assert published["mood_error_type"].dropna().tolist() == ["null_value", "empty_text"]

    answered = annotate_table(table, JobConfig.model_validate(settings))
    assert answered.select(table.schema.names).equals(table)
    assert answered.schema.metadata == table.schema.metadata
    pd.testing.assert_frame_equal(answered.to_pandas(), published)

    index = pd.Index([7] * len(texts), name="shelf")
    frame = table.to_pandas().set_index(index)
    seen = annotate_table(frame, file)
    assert seen.index.equals(index)
    # pandas reads a file's integers as floats if there is a null among them.
    counts = dict.fromkeys(["reply_prompt_tokens", "reply_completion_tokens"], "Int32")
    pd.testing.assert_frame_equal(seen.reset_index(drop=True), published.astype(counts))
    assert list(frame.columns) == ["id", "text"], "the caller's own table is unchanged"


def test_columns_that_no_prompt_names_need_no_arrow_type(
    texts: list[str | None],
) -> None:
    text = pd.Series(texts)
    plain = annotate_table(pd.DataFrame({"text": text}), JOB)
    for kind in ("string", "category", object):
        frame = pd.DataFrame({"text": text.astype(kind), "odd": [print, {1}, 3] * 8 + [None], 5: 1})
        frame["count"] = pd.array([None, *range(len(texts) - 1)], dtype="Int64")
        seen = annotate_table(frame, JOB)
        pd.testing.assert_frame_equal(seen[frame.columns], frame)
        pd.testing.assert_frame_equal(seen[ANSWERS], plain[ANSWERS], check_column_type=False)
    for arrow in (pa.string_view(), pa.large_string(), pa.binary()):
        chunks = pa.chunked_array([pa.array(texts[:9]), pa.array(texts[9:])]).cast(arrow)
        assert annotate_table(pa.table({"text": chunks}), JOB).column("mood").to_pylist() == [
            None if pd.isna(label) else label for label in plain["mood"]
        ]


@pytest.mark.parametrize(
    "empty", [pa.table({"text": pa.array([], pa.string())}), pd.DataFrame({"text": []})]
)
def test_a_table_without_rows_gets_the_columns(empty: Any) -> None:
    answered = annotate_table(empty, {**JOB, "steps": [CLASSIFY, GENERATE]})
    assert len(answered) == 0
    names = answered.schema.names if isinstance(answered, pa.Table) else list(answered.columns)
    assert names[:9] == ["text", *ANSWERS, "reply"]


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (
            pa.table({"body": ["x"]}),
            {},
            r"the table: no column 'text'; it has \['body'\]. Set data.text_column.",
        ),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), {}, "the table: two columns 'text'"),
        (
            pd.DataFrame({"text": ["a"], "Mood_Score": [lambda: 0]}),
            {},
            "already has a column 'Mood_Score', which step",
        ),
        (
            pd.DataFrame({"text": ["a", 1]}),
            {},
            "the table: column 'text' has no single type: .*int.* Convert it to text.",
        ),
        (
            pd.DataFrame({"text": [["a"]]}),
            {},
            "the table: column 'text' holds list.*, not text. Set data.text_column.",
        ),
        (["a"], {}, "the table: is a list, not a pandas DataFrame or an Arrow table, and has no"),
        (pl.LazyFrame({"text": ["a"]}), {}, r"polars.LazyFrame.* Convert it with collect\(\)."),
        (pd.Series(["a"]), {}, "stream of this pandas.Series cannot be read as a table: "),
        (pa.array(["a"]), {}, "this pyarrow.StringArray cannot be read"),
        (None, {}, "the table: is a NoneType, not"),
        (
            pa.table({"text": ["x"]}),
            {"data": {"limit": 1}},
            "every row of a table is answered.* unset data.limit",
        ),
        (
            pa.table({"text": ["x"]}),
            {"step": []},
            r"the job: step: is not a setting; did you mean steps\?",
        ),
        (
            pa.table({"text": ["x", None]}),
            {"on_error": "raise"},
            "^the table: row 1, step 'mood': text is null. Fix the row",
        ),
    ],
)
def test_a_bad_table_gives_an_error_of_one_line(
    table: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        annotate_table(table, {**JOB, **settings})
    assert "\n" not in str(caught.value)
    assert "/" not in str(caught.value), "names no file of ours"


def from_duckdb(table: pa.Table) -> Any:
    import duckdb

    return duckdb.from_arrow(table)


def from_hub(table: pa.Table) -> Any:
    import datasets  # takes some seconds

    return datasets.Dataset(table)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda table: table.to_batches()[0], pa.Table),
        (lambda table: table.to_reader(), pa.Table),
        (ds.dataset, pa.Table),
        (lambda table: ds.dataset(table).scanner(), pa.Table),
        (from_duckdb, pa.Table),
        (from_hub, pa.Table),
        (pl.from_arrow, pl.DataFrame),
    ],
    ids=["batch", "reader", "dataset", "scanner", "duckdb", "hub", "polars"],
)
def test_other_tables_are_accepted_and_polars_comes_back(make: Any, kind: type) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ["good", None, "so so"]})
    expected = annotate_table(table, JOB)
    answered = annotate_table(make(table), JOB)
    assert isinstance(answered, kind)
    if kind is pl.DataFrame:
        assert answered["mood_key"].dtype == pl.Binary
        answered = answered.to_arrow()
    assert answered.schema.names == expected.schema.names
    assert answered.to_pylist() == expected.to_pylist()


@pytest.mark.parametrize(
    ("columns", "setting"),
    [
        ([0, 1], "0"),
        ([("a", "b"), None], "('a', 'b')"),
        ([1.5, 2], "1.5"),
        (["a.b", "b"], "a.b"),
        (pd.Index(["\ud800", "b"], dtype=object), "\\ud800"),
        (pd.CategoricalIndex(["text", "b"]), "text"),
        (pd.to_datetime(["2024-01-01", "2024-01-02"]), "2024-01-01 00:00:00"),
        (["text", "twice", "twice"], "text"),
        (pd.MultiIndex.from_tuples([("a", "text"), ("mood", "x")], names=["p", "q"]), None),
        (pd.MultiIndex.from_tuples([("text", ""), ("mood", "x")]), "text"),
    ],
    ids=repr,
)
def test_any_column_name_is_accepted(columns: Any, setting: str | None) -> None:
    frame = pd.DataFrame([["good"] * len(columns), [""] * len(columns)])
    frame.columns = columns
    setting = setting or "('a', 'text')"
    answered = annotate_table(frame, {**JOB, "data": {"text_column": setting}})
    assert list(answered.columns[: len(columns)]) == list(frame.columns)
    assert answered.columns.nlevels == frame.columns.nlevels
    assert answered.columns.names == frame.columns.names
    assert answered.iloc[:, len(columns) + ANSWERS.index("mood_error")].tolist()[1] is not None
    assert answered.iloc[:, : len(columns)].to_numpy().tolist() == frame.to_numpy().tolist()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([0, "0"], "two columns '0'"),
        (["0", "MOOD_error"], "already has a column 'MOOD_error'"),
        (pd.MultiIndex.from_tuples([("0", ""), ("mood", "")]), "already has a column 'mood'"),
        ([7, 8], "no column '0'; it has \\['7', '8'\\]"),
    ],
    ids=repr,
)
def test_names_that_do_not_match_the_job_are_errors(columns: Any, message: str) -> None:
    frame = pd.DataFrame([["good", "bad"]])
    frame.columns = columns
    with pytest.raises(InputError, match=f"^the table: {message}"):
        annotate_table(frame, {**JOB, "data": {"text_column": "0"}})


@pytest.mark.parametrize(
    "index",
    [
        pd.MultiIndex.from_tuples([(1, "x"), (1, "x")], names=["text", "mood"]),
        pd.Index([None, None], name="mood_error"),
        pd.date_range("2024", periods=2, tz="Asia/Shanghai"),
        pd.CategoricalIndex(["a", "a"]),
        pd.interval_range(0, 2),
    ],
    ids=lambda index: type(index).__name__,
)
def test_any_index_is_kept(index: pd.Index) -> None:
    frame = pd.DataFrame({"text": ["good", "bad"]}, index=index)
    frame.attrs = {"team": "a"}
    answered = annotate_table(frame, JOB)
    assert answered.index.identical(index) and answered.attrs == frame.attrs


KINDS: list[Any] = [
    pd.array(["a", None], dtype="string[python]"),
    pd.array(["a", None], dtype="string[pyarrow]"),
    pd.array([1, None], dtype="Int64"),
    pd.array([True, None], dtype="boolean"),
    pd.array([1, None], dtype=pd.ArrowDtype(pa.decimal128(5, 2))),
    pd.Categorical(["a", None]),
    pd.Categorical([1, None]),
    pd.cut([1, 9], 2),
    pd.period_range("2024-01", periods=2, freq="M"),
    pd.interval_range(0, 2),
    pd.arrays.SparseArray([0, 1]),
    pd.date_range("2024", periods=2, tz="Asia/Shanghai"),
    [Decimal("1.50"), None],
    [date(2024, 1, 1), None],
    [b"a", b"\xff"],
    [2**64 - 1, 0],
    [UUID(int=1), UUID(int=2)],
]
ASKED = {"steps": [{**CLASSIFY, "prompt_template": "{kind}: {text}"}]}


@pytest.mark.parametrize(
    "values", KINDS, ids=lambda values: str(getattr(values, "dtype", "object"))
)
def test_values_of_any_type_can_be_used_in_prompts(values: Any) -> None:
    frame = pd.DataFrame({"text": ["good", "bad"], "kind": values})
    answered = annotate_table(frame, {**JOB, **ASKED})
    assert pd.isna(answered["mood_error"][0])
    pd.testing.assert_frame_equal(answered[["text", "kind"]], frame)


@pytest.mark.parametrize(
    "values",
    [[1, "a"], [1 + 2j] * 2, [print] * 2, [2**70, 1], [{"a": 1}] * 2, [[1]] * 2, ["\ud800", "a"]],
    ids=repr,
)
def test_values_that_cannot_be_asked_name_their_column(values: list[Any]) -> None:
    frame = pd.DataFrame({"text": ["good", "bad"], "kind": pd.Series(values, dtype=object)})
    with pytest.raises(InputError, match=r"^the table: column 'kind' (has|holds)") as caught:
        annotate_table(frame, {**JOB, **ASKED})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


UNLIMITED = {key: value for key, value in JOB.items() if key != "max_error_rate"}


@pytest.mark.parametrize("texts", [[], [""], [None, None], ["good"], ["good", " "]], ids=repr)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("job_class", [dict, JobConfig.model_validate])
def test_failed_rows_end_no_call_and_change_no_type(
    texts: list[str | None], cached: bool, job_class: Any, tmp_path: Path
) -> None:
    settings = {**UNLIMITED, "steps": [CLASSIFY, GENERATE]}
    if job_class is not dict:  # which names no places to leave out
        settings["data"] = {"input": "a", "output": "b"}
    job = job_class(settings)
    frame = pd.DataFrame({"text": pd.Series(texts, dtype="str")})
    cache = tmp_path / "cache" if cached else None
    answered = annotate_table(frame, job, cache=cache)
    failed = [text is None or not text.strip() for text in texts]
    assert answered["mood_error"].notna().tolist() == failed
    kinds = {name: str(kind) for name, kind in answered.dtypes.items()}
    expected = {"mood": "str", "mood_score": "float64", "reply_prompt_tokens": "Int32"}
    expected |= {"mood_key": "object", "reply_error": "str", "reply_completion_tokens": "Int32"}
    assert kinds | expected == kinds
    arrow = annotate_table(pa.table({"text": pa.array(texts, pa.string())}), job, cache=cache)
    assert arrow.schema.field("reply_prompt_tokens").type == pa.int32()
    assert arrow.schema.field("mood_error").type == pa.string()


@pytest.mark.parametrize(
    ("texts", "rate", "ends"),
    [([""], 1, False), ([""], 0.99, True), (["", "good"], 0.5, False), (["", "good"], 0.4, True)],
)
def test_the_jobs_own_error_rate_applies(texts: list[str], rate: float, ends: bool) -> None:
    table, job = pa.table({"text": texts}), {**JOB, "max_error_rate": rate}
    with pytest.raises(AuditError, match=r"^the table: ") if ends else nullcontext():
        assert annotate_table(table, job).num_rows == len(texts)


def test_the_audits_of_the_job_apply(texts: list[str | None], tmp_path: Path) -> None:
    refused, job = pa.table({"text": texts}), {**JOB, "max_error_rate": 0.01}
    with pytest.raises(
        AuditError, match=r"^the table: 2 of 25 rows failed \(8\.0%\), .*Without a cache"
    ):
        annotate_table(refused, job)
    with pytest.raises(AuditError, match=r"2 of 25 rows failed.*\.html\.$") as caught:
        annotate_table(refused, job, cache=tmp_path / "cache")
    assert Path(str(caught.value).split("Read about the run: ")[1].removesuffix(".")).exists()


@pytest.fixture
def summaries(monkeypatch: pytest.MonkeyPatch) -> list[Summary]:
    """The summaries of the runs behind the calls, in order."""
    summaries: list[Summary] = []

    def kept(job: JobConfig, others: Sequence[str] = ()) -> Summary:
        summaries.append(run_job(job, others))
        return summaries[-1]

    monkeypatch.setattr("glmbatch.run.table.run_job", kept)
    return summaries


def test_with_a_cache_only_new_rows_are_asked(tmp_path: Path, summaries: list[Summary]) -> None:
    def computed(texts: list[str], **settings: Any) -> int:
        annotate_table(pd.DataFrame({"text": texts}), {**JOB, **settings}, cache=tmp_path / "cache")
        return summaries[-1].computed

    texts = [f"text {number}" for number in range(12)]
    other = {**CLASSIFY, "labels": ["loud", "quiet"]}
    assert computed(texts) == 12
    assert computed(texts) == 0
    assert computed(texts, steps=[other]) == 12
    # Steps are known one by one, in whatever sets, under whatever names.
    assert computed(texts, steps=[CLASSIFY, {**other, "name": "sound"}]) == 0
    third = {**other, "name": "third", "labels": ["here", "there"]}
    assert computed(texts, steps=[other, CLASSIFY | {"name": "x"}, third]) == 12
    assert computed(["new", *reversed(texts)]) == 1
    assert computed(texts[:1]) == 0
    assert computed(texts, steps=[other]) == 0


def test_the_model_stays_loaded_between_calls(
    caplog: pytest.LogCaptureFixture, summaries: list[Summary]
) -> None:
    annotate_table(pa.table({"text": ["first"]}), JOB)
    with caplog.at_level(logging.INFO, "glmbatch"):
        annotate_table(pa.table({"text": ["second"]}), JOB)
        assert summaries[-1].computed == 1
        assert not [record for record in caplog.records if "loading" in record.message]
        annotate_table(
            pa.table({"text": ["third"]}),
            {**JOB, "model": {"path": str(CAUSAL), "dtype": "bfloat16"}},
        )
        assert [record for record in caplog.records if "loading" in record.message]
