"""A table in memory gets the answers of a file run, and is otherwise as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml

from glmbatch import annotate, annotate_table
from glmbatch.errors import AuditError, InputError
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.settings.job import ClassifyStep, JobConfig, answer_columns
from tests.support import CAUSAL, CLASSIFY, GENERATE, Settings, Write

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "model": str(CAUSAL),
    "steps": [CLASSIFY],
    "data": {"rows_per_fragment": 8},
    "runtime": {"device": "cpu"},
    "max_error_rate": 0.5,
}
ANSWERS = answer_columns(ClassifyStep.model_validate(CLASSIFY))


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
    pd.testing.assert_frame_equal(seen.reset_index(drop=True), published)
    assert list(frame.columns) == ["id", "text"], "the caller's own table is left alone"


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
            "the table: column 'text' has no one type: .*int.* Make it text.",
        ),
        (
            pd.DataFrame({"text": [["a"]]}),
            {},
            "the table: column 'text' holds list.*, not text. Set data.text_column.",
        ),
        (["a"], {}, "the table: is a list, not a pandas DataFrame or an Arrow table."),
        (
            pa.table({"text": ["x"]}),
            {"data": {"limit": 1}},
            "every row of a table is answered.* unset data.limit",
        ),
        (
            pa.table({"text": ["x"]}),
            {"step": []},
            r"the job: step: is no setting; did you mean steps\?",
        ),
        (
            pa.table({"text": ["x", None]}),
            {"on_error": "raise"},
            "row 1, step 'mood': text is null. Mend the row",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    table: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        annotate_table(table, {**JOB, **settings})
    assert "\n" not in str(caught.value)


def test_the_audits_of_the_job_hold(texts: list[str | None], tmp_path: Path) -> None:
    refused, job = pa.table({"text": texts}), {**JOB, "max_error_rate": 0.01}
    with pytest.raises(
        AuditError, match=r"2 of 25 rows failed \(8\.0%\), .*That folder is gone .* give a cache"
    ):
        annotate_table(refused, job)
    with pytest.raises(AuditError, match=r"2 of 25 rows failed.*\.html\.$") as caught:
        annotate_table(refused, job, cache=tmp_path / "cache")
    assert Path(str(caught.value).split("Read about the run: ")[1].removesuffix(".")).exists()


@pytest.fixture
def summaries(monkeypatch: pytest.MonkeyPatch) -> list[Summary]:
    """What the runs behind the calls said of themselves, in order."""
    summaries: list[Summary] = []

    def kept(job: JobConfig) -> Summary:
        summaries.append(run_job(job))
        return summaries[-1]

    monkeypatch.setattr("glmbatch.run.table.run_job", kept)
    return summaries


def test_with_a_cache_only_new_rows_are_asked_about(
    tmp_path: Path, summaries: list[Summary]
) -> None:
    def computed(texts: list[str], **settings: Any) -> int:
        annotate_table(pd.DataFrame({"text": texts}), {**JOB, **settings}, cache=tmp_path / "cache")
        return summaries[-1].computed

    texts = [f"text {number}" for number in range(12)]
    other = {**CLASSIFY, "labels": ["loud", "quiet"]}
    assert computed(texts) == 12
    assert computed(texts) == 0
    assert computed(texts, steps=[other]) == 12
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
