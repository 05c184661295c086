"""The prompt that the viewer shows is the one that the model read, or none is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.ledger.rowkeys import row_key
from glmbatch.view.prompts import find_text_column, shown_prompt
from glmbatch.view.published import Published, read_published
from tests.support import run
from tests.unit.view.conftest import TEXTS, job


@pytest.fixture
def published(folder: Path) -> Published:
    return read_published(str(folder / "out"))


def prompts_of(published: Published, file: int, row: int) -> list[str | None]:
    table = published.row(file, row)
    shown = [shown_prompt(published, step, file, table, "body") for step in published.steps]
    return [prompt.text for prompt in shown]


def test_prompts_of_every_kind_are_shown(published: Published) -> None:
    assert [step.kind for step in published.steps] == ["label", "labels", "fields", "text"]
    mood, topics, facts, reply = prompts_of(published, 1, 2)
    assert mood is not None and TEXTS[10] in mood and mood.startswith("[Round 1]\n\n问：")
    assert topics is not None and TEXTS[10] in topics
    assert facts is not None and "tone" in facts
    answer = published.row(1, 2).column("mood")[0].as_py()
    assert reply is not None and f"{answer} 10: {TEXTS[10]}" in reply
    key = published.row(1, 2).column("reply_key")[0].as_py()
    assert row_key(published.files[1].step_keys["reply"], reply) == key


def test_a_cut_prompt_is_shown_as_it_was_cut(published: Published) -> None:
    shown = shown_prompt(published, published.step("reply"), 2, published.row(2, 6), "body")
    assert shown.is_cut
    assert shown.text is not None and 5 < shown.text.count("long") < 60


def test_cut_turns_are_shown_as_they_were_cut(tmp_path: Path) -> None:
    turns = [
        [[f"question {turn}", f"answer {turn}"] for turn in range(count)] for count in (0, 2, 9)
    ]
    (tmp_path / "in").mkdir()
    rows = pa.table({"body": ["Is it good?"] * 3, "turns": turns})
    pq.write_table(rows, tmp_path / "in" / "a.parquet")
    settings = job(tmp_path)
    settings["steps"] = [
        {
            "kind": "classify",
            "name": "mood",
            "labels": ["good", "bad"],
            "prompt_template": "{text}",
            "history_column": "turns",
            "max_input_tokens": 160,
            "on_too_long": "truncate",
        }
    ]
    run(settings)
    published = read_published(str(tmp_path / "out"))
    assert find_text_column(published) == "body"
    shown = []
    for row in range(3):
        shown.append(shown_prompt(published, published.steps[0], 0, published.row(0, row), "body"))
    texts = [prompt.text or "" for prompt in shown]
    assert [prompt.is_cut for prompt in shown] == [False, False, True]
    assert [text.count("question") for text in texts[:2]] == [0, 2]
    assert 0 < texts[2].count("question") < 9 and "question 8" in texts[2]


def test_a_row_without_a_prompt_says_so(published: Published) -> None:
    shown = shown_prompt(published, published.steps[0], 2, published.row(2, 5), "body")
    assert shown.text is None and shown.lack == "This row had no prompt."


def test_a_prompt_that_was_never_asked_is_not_shown(published: Published) -> None:
    row = published.row(0, 0)
    changed = row.set_column(row.column_names.index("body"), "body", pa.array(["another text"]))
    shown = shown_prompt(published, published.steps[0], 0, changed, "body")
    assert shown.text is None and "cannot be rendered again" in shown.lack


def test_settings_that_are_not_known_are_no_crash(published: Published) -> None:
    unknown = replace(published.steps[0], settings=None)
    shown = shown_prompt(published, unknown, 0, published.row(0, 0), "body")
    assert shown.text is None and "settings" in shown.lack


def test_the_text_column_is_proved_by_a_key(published: Published) -> None:
    # `note` comes first and is text too.
    assert find_text_column(published) == "body"


def test_prompts_with_fields_of_an_earlier_step_are_shown(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"body": TEXTS[:4]}), tmp_path / "in" / "a.parquet")
    settings = job(tmp_path)
    fields = {
        "ok": {"type": "boolean"},
        "day": {"type": "date"},
        "tags": {"type": "list", "items": {"type": "integer", "minimum": 0, "maximum": 3}},
    }
    facts = {"kind": "extract", "name": "facts", "fields": fields, "max_tokens": 60}
    prompt = "{facts_ok} {facts_day} {facts_tags} {facts}: {body}"
    reply = {"kind": "generate", "name": "reply", "prompt_template": prompt, "max_tokens": 2}
    settings["steps"] = [facts, reply]
    run(settings)
    published = read_published(str(tmp_path / "out"))
    answered = [published.row(0, row) for row in range(4)]
    asked = [row for row in answered if row.column("reply_key")[0].is_valid]
    assert asked
    for row in asked:
        assert shown_prompt(published, published.step("reply"), 0, row, "body").text
