"""A job over labelled rows: the numbers of its answers, which are asked only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.evaluation.compare import compare
from glmbatch.evaluation.evaluate import evaluate
from glmbatch.evaluation.render import describe
from glmbatch.evaluation.results import Evaluation, StepResult
from glmbatch.evaluation.steps import Answered, score_step
from glmbatch.evaluation.truth import Truth
from glmbatch.report.summary import step_summary
from glmbatch.settings.job import ClassifyStep
from tests.support import CLASSIFY, Settings, Write, rows_of, run

pytestmark = pytest.mark.slow

STEPS = [
    {**CLASSIFY, "when": "stars > 0", "audits": {"max_label_drift": 0.001}},
    {
        "kind": "classify",
        "name": "topics",
        "labels": ["price", "delivery", "quality"],
        "multiple": True,
        "threshold": 0.4,
    },
    {"kind": "generate", "name": "reply", "prompt_template": "{mood}: {text}", "max_tokens": 4},
    {
        "kind": "extract",
        "name": "facts",
        "fields": {
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
            "tone": {"choices": ["warm", "cold"]},
            "note": {"type": "text", "max_length": 8},
            "tags": {"type": "list", "items": {"type": "integer", "minimum": 0, "maximum": 3}},
        },
        "max_tokens": 40,
    },
]


@pytest.fixture
def settings(job_settings: Settings) -> dict[str, Any]:
    return job_settings(steps=STEPS, max_error_rate=0.5, data__id_column="id")


@pytest.fixture
def table(rows: list[str | None]) -> pa.Table:
    texts = [*rows[:12], None, rows[0]]
    return pa.table({"id": range(14), "text": texts, "stars": [0, *range(1, 14)]})


def labelled(table: pa.Table, output: Path, path: Path) -> list[dict[str, Any]]:
    """Write rows whose truth is every answer but the third ones; return the answers."""
    answers = rows_of(output)
    truths: dict[str, list[Any]] = {}
    others = {"mood": "so so", "topics": ["price"], "reply": "other", "facts_tags": [9]}
    others |= {"facts_stars": 9, "facts_tone": "odd", "facts_note": "other"}
    for name, other in others.items():
        truths[name] = [row[name] if place % 3 else other for place, row in enumerate(answers)]
    truths["reply"][5] = None
    for name, values in truths.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    return answers


def test_numbers_are_those_of_a_run(
    settings: dict[str, Any], table: pa.Table, write_source: Write, tmp_path: Path, out: Path
) -> None:
    write_source("a.parquet", table)
    run(settings)
    file = tmp_path / "labelled.parquet"
    answers = labelled(table, out, file)
    published = sorted(out.rglob("*"))
    found = evaluate(settings, str(file), keep=tmp_path / "kept")
    assert sorted(out.rglob("*")) == published
    mood, topics, reply, facts = found.steps
    # Row 0 is not asked for its mood, and so not for a reply; row 12 has no text.
    assert (mood.counts.scored, mood.counts.not_asked, mood.counts.failed) == (
        (12, 1, {"null_value": 1})
    )
    assert (reply.counts.scored, reply.counts.without_truth) == (11, 1)
    truth = pq.read_table(file).to_pylist()
    scored = [row for row in range(1, 14) if row != 12]
    expected = [truth[row]["mood"] for row in scored]
    given = [answers[row]["mood"] for row in scored]
    assert mood.results["mood"].accuracy == accuracy_score(expected, given)
    assert mood.results["mood"].macro_f1 == f1_score(expected, given, average="macro")
    right = [truth[row]["topics"] == answers[row]["topics"] for row in (0, *scored)]
    assert topics.results["topics"].exact_match == np.mean(right)
    right = [truth[row]["reply"] == answers[row]["reply"] for row in scored if row != 5]
    assert reply.results["reply"].exact_match == np.mean(right)
    assert {name: part.kind for name, part in facts.results.items()} == {
        "stars": "value",
        "tone": "labels",
        "note": "text",
        "tags": "list",
    }
    assert facts.exact_match == pytest.approx(1 - 4 / 13)
    assert facts.results["tone"].unknown_truths == {"odd": 4}


def test_evaluating_again_asks_nothing(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path
) -> None:
    table = table.append_column("mood", pa.array(["good"] * 14))
    table = table.append_column("reply", pa.array(["good"] * 14))
    file = tmp_path / "labelled.parquet"
    pq.write_table(table, file)

    def tokens(found: Evaluation) -> list[tuple[int, int]]:
        return [(step.computed, step.prompt_tokens) for step in found.steps]

    first = evaluate(settings, str(file), keep=tmp_path / "kept")
    assert all(computed and prompts for computed, prompts in tokens(first))
    again = evaluate(settings, str(file), keep=tmp_path / "kept")
    assert tokens(again) == [(0, 0)] * 2
    assert again.steps[0].results == first.steps[0].results
    # One more row costs one more answer, also if its truth changes.
    more = pa.concat_tables([table, table.slice(1, 1)])
    more = more.set_column(1, "text", pa.array([*table.column("text").to_pylist(), "new"]))
    pq.write_table(more, file)
    third = evaluate(settings, str(file), keep=tmp_path / "kept")
    assert [computed for computed, _ in tokens(third)] == [1, 1]


def test_only_what_a_truth_needs_is_asked(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path
) -> None:
    truths = ["x", None] * 7
    labelled = table.append_column("reply", pa.array(truths))
    labelled = labelled.append_column("topics", pa.nulls(14, pa.string()))
    file = tmp_path / "labelled.parquet"
    pq.write_table(labelled, file)
    found = evaluate(settings, str(file), keep=tmp_path / "kept")
    mood, reply = found.steps
    assert found.left_out == ("topics", "facts")
    assert mood.note == "no column has its truth"
    # Of seven rows with a truth, one is not to be asked for its mood, and one has no text.
    assert (mood.computed, reply.computed) == (5, 5)
    assert reply.counts.model_dump() == {
        "rows": 14,
        "scored": 5,
        "without_truth": 7,
        "not_asked": 1,
        "abstained": 0,
        "failed": {"earlier_step_failed": 1},
    }
    assert "no row has their truth: topics, facts\n" in describe(found)
    # The same rows alone have the same numbers.
    pq.write_table(labelled.take(list(range(0, 14, 2))), file)
    alone = evaluate(settings, str(file), keep=tmp_path / "kept").steps[1]
    assert alone.results == reply.results and alone.computed == 0
    pq.write_table(table.append_column("reply", pa.nulls(14, pa.string())), file)
    with pytest.raises(InputError, match=r"no row has a truth: column \['reply'\] is null"):
        evaluate(settings, str(file), keep=tmp_path / "kept")


def test_a_field_without_a_truth_is_left_out_of_its_numbers(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path
) -> None:
    answers = evaluate_fields(settings, table, tmp_path, [{"tone": "warm", "stars": 5}] * 14)
    assert answers.without_truth == {}
    half = [{"tone": "warm", "stars": None if row % 2 else 5} for row in range(14)]
    found = evaluate_fields(settings, table, tmp_path, half)
    # Row 12 has no text.
    assert found.counts.scored == 13
    assert found.without_truth == {"stars": 7}
    assert (found.results["stars"].rows, found.results["tone"].rows) == (6, 13)
    whole = [{"tone": None, "stars": 5} if row in (1, 3) else None for row in range(14)]
    found = evaluate_fields(settings, table, tmp_path, whole)
    assert found.counts.scored == 2 and found.exact_match is None
    assert found.without_truth == {"tone": 2} and "tone" not in found.results
    assert "  tone (rows left out: 2 without truth)\n" in describe(
        Evaluation(rows=14, steps=(found,), kept="kept", seconds=1)
    )


def evaluate_fields(
    settings: dict[str, Any], table: pa.Table, folder: Path, truth: list[Any]
) -> StepResult:
    file = folder / "labelled.parquet"
    pq.write_table(table.append_column("facts", pa.array(truth)), file)
    fields: Any = STEPS[3]["fields"]
    step = {**STEPS[3], "fields": {name: fields[name] for name in ("stars", "tone")}}
    only = {**settings, "steps": [step]}
    return evaluate(only, str(file), keep=folder / "kept").steps[0]


def test_a_field_that_the_model_abstains_from_is_left_out(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path
) -> None:
    facts = {**STEPS[3], "layout": "struct", "confidence": True}
    truth = [{"tone": "warm", "stars": 5}] * 14
    file = tmp_path / "labelled.parquet"
    pq.write_table(table.append_column("facts", pa.array(truth)), file)
    sure = evaluate({**settings, "steps": [facts]}, str(file), keep=tmp_path / "kept").steps[0]
    assert sure.counts.scored == 13 and not sure.abstained
    # The tiny model gives two choices about the same probability, and digits far lower ones.
    facts["abstain_below"] = 0.4
    found = evaluate({**settings, "steps": [facts]}, str(file), keep=tmp_path / "kept").steps[0]
    assert found.abstained["stars"] + getattr(found.results.get("stars"), "rows", 0) == 13
    assert found.abstained["stars"] > 0 and found.results["tone"].rows == 13


def test_the_command_prints_aligned_lines_or_json(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows" / "gold=good"
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "a.parquet")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**settings, "steps": STEPS[:2]}))
    command = ["evaluate", str(job), str(tmp_path / "rows"), "--keep", str(tmp_path / "kept")]
    command += ["--truth", "mood=gold", "--set", f"runtime.cache={tmp_path}"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mood, compared with column gold"
    assert "12 of 14 scored; left out: 1 not asked, 1 failed (null_value 1)" in lines[1]
    assert lines[2].index("0.") == lines[3].index("0.") == lines[1].index("12 of")
    assert main([*command, "--precision", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["results"]["mood"]["coverage"][0]["precision"] == 0.5
    assert found["steps"][0]["computed"] == 0


def test_answers_decide_how_a_truth_is_compared() -> None:
    step = ClassifyStep.model_validate(CLASSIFY)
    # Those of a head that estimates a number.
    kinds = pa.array([None, None], pa.string())
    keys = [b"1", b"2"]
    answers = pa.table({"mood": [1.0, 2.5], "mood_error_type": kinds, "mood_key": keys})
    answered = Answered(answers, np.arange(2), {"mood": step_summary("mood", "run", [])})
    found = score_step(
        step, Truth({"mood": "x"}, {"mood": ["1", "2"]}, {"mood": [True] * 2}), answered, ()
    )
    assert found.results["mood"].mean_absolute_error == 0.25
    lists = Truth({"mood": "x"}, {"mood": [["good"], ["bad"]]}, {"mood": [True] * 2})
    with pytest.raises(InputError, match="answers with numbers, and the column does not"):
        score_step(step, lists, answered, ())


def test_a_heads_labels_are_compared_with_the_truth() -> None:
    step = ClassifyStep(name="mood")
    scores = pa.array([{"good": 0.75, "bad": 0.25}] * 2)
    kinds = pa.array([None, None], pa.string())
    answers = pa.table({"mood": ["good"] * 2, "mood_scores": scores, "mood_error_type": kinds})
    answers = answers.append_column("mood_key", pa.array([b"1", b"2"]))
    answered = Answered(answers, np.arange(2), {"mood": step_summary("mood", "run", [])})
    truth = Truth({"mood": "stars"}, {"mood": ["5", "3"]}, {"mood": [True] * 2})
    with pytest.raises(InputError, match=r"mood=stars: the column has \['5', '3'\]"):
        score_step(step, truth, answered, ())
    mixed = Truth({"mood": "stars"}, {"mood": ["good", "3"]}, {"mood": [True] * 2})
    found = Evaluation(
        rows=2, steps=(score_step(step, mixed, answered, ()),), left_out=(), kept="", seconds=0.0
    )
    assert "'3': 1 row" in describe(found)


def test_rows_that_contradict_each_other_are_named(
    settings: dict[str, Any],
    table: pa.Table,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    constant = {**CLASSIFY, "name": "tone", "prompt_template": "Is it good?"}
    settings = {**settings, "steps": [CLASSIFY, constant]}
    moods = ["good"] * 13 + ["bad"]  # the last text is the first one again
    labelled = table.append_column("mood", pa.array(moods))
    pq.write_table(labelled.append_column("tone", pa.array(["good"] * 14)), tmp_path / "a.parquet")
    evaluate(settings, str(tmp_path / "a.parquet"), keep=tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "contradict" in line] == [
        "mood: 2 rows of column 'mood' contradict another row with the same prompt, so some "
        "answers count as wrong whatever they are"
    ]
    assert any(
        "'tone' asks all rows the same: its prompt_template has no" in line for line in lines
    )


def test_rows_without_any_truth_are_refused(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path
) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(table, file)
    with pytest.raises(InputError, match="no column has the truth of a step; it has"):
        evaluate(settings, str(file), keep=tmp_path)
    with pytest.raises(InputError, match=r"nowhere.*ROWS"):
        evaluate(settings, str(tmp_path / "nowhere"), keep=tmp_path)
    pq.write_table(pa.table({"body": ["a"]}), file)
    with pytest.raises(InputError, match=r"has none of the columns .*; it has \['body'\]"):
        evaluate(settings, str(file), keep=tmp_path)
    pq.write_table(table.append_column("mood", table.column("id")), file)
    with pytest.raises(InputError, match=r"--truth mood=mood: .* none of them is a label of the"):
        evaluate(settings, str(file), keep=tmp_path)
    truths = pa.array([*table.column("text").to_pylist()[:-1], "good"])
    misspelt = {**settings, "data": {**settings["data"], "text_column": "txet"}}
    pq.write_table(table.append_column("mood", truths), file)
    every = r"no column 'txet'; it has \['id', 'text', 'stars', 'mood'\]\. Set data\.text_column"
    with pytest.raises(InputError, match=every):
        evaluate(misspelt, str(file), keep=tmp_path)
    with pytest.raises(InputError, match=every):
        compare(misspelt, misspelt, str(file), keep=tmp_path)
    lacking = table.drop_columns(["stars"]).append_column("mood", truths)
    pq.write_table(lacking, file)
    with pytest.raises(InputError, match=r"rows\.parquet: no column 'stars'"):
        evaluate(settings, str(file), keep=tmp_path)
