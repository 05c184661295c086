"""Jobs over conversations: a column of earlier turns is read, checked, planned, kept and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from glmbatch.errors import AuditError, InputError
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.run.table import annotate_table
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFIER, CLASSIFY, Settings, Write, column_of, rows_of, run

PAIRS = [[], None, [["hi", "hello"]], [["hi", "hello"], ["well?", "yes"]], [["hi", None]]]
TEXTS = ["so", "so", "so", "so", "so"]
ASK = {"kind": "generate", "name": "reply", "prompt_template": "{text}", "max_tokens": 3}
HISTORY = {"history_column": "talk"}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_run_reads_earlier_turns(
    write_source: Write, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": TEXTS, "talk": PAIRS})
    settings = job_settings(steps=[{**CLASSIFY, **HISTORY}, {**ASK, **HISTORY}], max_error_rate=0.5)
    planned = preview(JobConfig.model_validate(settings))
    run(settings)
    rows = rows_of(out)
    assert [row["reply_error_type"] for row in rows] == [None] * 4 + ["bad_history"]
    assert rows[4]["reply_error"] == "talk: round 1 has no answer"
    lengths = [row["reply_prompt_tokens"] for row in rows[:4]]
    assert lengths[0] == lengths[1] < lengths[2] < lengths[3]
    assert rows[0]["mood_key"] == rows[1]["mood_key"] != rows[2]["mood_key"]
    # The prompt of the second row is that of the first, and the last has none.
    assert [(step.to_run, step.repeated, step.skipped) for step in planned.steps] == [(3, 1, 1)] * 2
    assert planned.steps[1].prompt_tokens == sum(lengths[1:])
    freeze(out, tmp_path / "canary.parquet", 9)
    settings["canary"] = str(tmp_path / "canary.parquet")
    settings["data"]["output"] = str(tmp_path / "again")
    assert [audit.measured for audit in run(settings).audits] == [0, 0]
    # Without turns a row's prompt is the same, but it is the answer to another question.
    settings["steps"] = [ASK]
    del settings["canary"]
    settings["data"]["output"] = str(tmp_path / "bare")
    run(settings)
    assert column_of(tmp_path / "bare", "reply_prompt_tokens")[0] == lengths[0]
    assert column_of(tmp_path / "bare", "reply")[0] == rows[0]["reply"]


def test_a_plan_says_if_too_many_rows_have_no_prompt(
    write_source: Write, job_settings: Settings
) -> None:
    empty = [[["hi", None]]] * 3
    write_source("a.parquet", {"text": ["a", "b", None, "d"], "talk": [*empty, []]})
    settings = job_settings(steps=[{**ASK, **HISTORY}, {**CLASSIFY, "prompt_template": "{reply}"}])
    planned = preview(JobConfig.model_validate(settings))
    assert [(step.to_run, step.skipped) for step in planned.steps] == [(1, 3)] * 2
    assert planned.refused is not None
    assert planned.refused.startswith("3 of 4 rows failed (75.0%), max_error_rate allows 10.0%: ")
    with pytest.raises(AuditError) as found:
        run(settings)
    assert planned.refused in str(found.value)
    settings["max_error_rate"] = 0.75
    assert preview(JobConfig.model_validate(settings)).refused is None


def test_messages_end_with_the_question(job_settings: Settings) -> None:
    talks = [
        [message("user", "hi"), message("assistant", "hello"), message("user", "well?")],
        [message("system", "Be brief."), message("user", "hi")],
        [message("user", "hi"), message("assistant", "hello")],
        None,
    ]
    step = {**ASK, **HISTORY, "prompt_template": "{talk}"}
    settings = job_settings(steps=[step])
    answers = annotate_table(pa.table({"talk": talks}), settings).to_pylist()
    assert [row["reply_error_type"] for row in answers] == [None] * 2 + [
        "bad_history",
        "null_value",
    ]
    assert [row["talk"] for row in answers] == talks
    # The text column may be the conversation itself.
    settings["data"]["text_column"] = "talk"
    settings["steps"] = [{**step, "prompt_template": "{text}"}]
    same = annotate_table(pa.table({"talk": talks}), settings).to_pylist()
    assert [row["reply"] for row in same] == [row["reply"] for row in answers]
    # The same conversation with the question in a column of its own.
    settings["data"]["text_column"] = "last"
    apart = pa.table({"talk": [talks[0][:2]], "last": ["well?"]})
    (row,) = annotate_table(apart, settings).to_pylist()
    assert row["reply_prompt_tokens"] == answers[0]["reply_prompt_tokens"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"talk": ["hi"]}, "column 'talk' holds string, not a list of turns"),
        ({"talk": [["hi"]]}, "not a list of turns: pairs of question and answer, or structs of"),
        ({"told": ["hi"]}, "no column 'talk'"),
    ],
)
def test_a_column_of_no_turns_is_refused(
    columns: dict[str, Any], reason: str, write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["so"], **columns})
    with pytest.raises(InputError) as caught:
        run(job_settings(steps=[{**ASK, **HISTORY}]))
    assert reason in str(caught.value)
    assert "Set steps[0].history_column." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_gives_no_turns(write_source: Write, job_settings: Settings) -> None:
    write_source("talk=hi/a.parquet", {"text": ["so"]})
    with pytest.raises(InputError, match="column 'talk' holds string, not a list of turns"):
        run(job_settings(steps=[{**ASK, **HISTORY}]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chat": False}, "history_column has turns of a chat, and chat: false has none"),
        ({"history_column": "mood"}, "which step 'mood' answers; use a column of the input"),
        ({"history_column": ""}, "at least 1 character"),
    ],
)
def test_settings_without_a_sense_are_refused(
    changes: dict[str, Any], reason: str, job_settings: Settings
) -> None:
    with pytest.raises(ValidationError, match=reason):
        JobConfig.model_validate(job_settings(steps=[CLASSIFY, {**ASK, **HISTORY, **changes}]))


def test_a_head_without_the_chat_form_has_no_turns(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["so"], "talk": [[]]})
    step = {"kind": "classify", "name": "mood", **HISTORY}
    with pytest.raises(InputError, match="is asked without the chat form"):
        run(job_settings(steps=[step], model={"path": str(CLASSIFIER)}))
