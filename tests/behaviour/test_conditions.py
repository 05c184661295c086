"""A step with a condition is asked only of the rows for which it holds; the others cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmbatch.cli.plan import describe_plan
from glmbatch.errors import BadRow, InputError
from glmbatch.glm.engine.protocol import ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.run.table import annotate_table
from glmbatch.settings.job import JobConfig
from tests.support import (
    CLASSIFY,
    GENERATE,
    Settings,
    Write,
    column_of,
    read_quarantine,
    rows_of,
    run,
    touch_published,
)

ROWS = 24
STARS = [None if row % 6 == 5 else row % 6 for row in range(ROWS)]  # 0, 1, 2, 3, 4, none
FEW = "stars < 2 and language in ('de', 'en')"


@pytest.fixture
def source(write_source: Write) -> Path:
    columns = {
        "text": [f"text number {row}" for row in range(ROWS)],
        "stars": STARS,
        "language": ["de"] * 20 + ["fr"] * 4,
    }
    return write_source("day=1/a.parquet", columns)


def conditioned(settings: dict[str, Any], *conditions: str | None) -> dict[str, Any]:
    # Copies, because other tests use the same steps.
    steps = settings["steps"]
    for place, condition in enumerate(conditions):
        steps[place] = {**steps[place], "when": condition}
    return settings


def counts(settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [(step.computed, step.reused, step.not_asked) for step in run(settings).steps]


def test_only_rows_that_meet_the_condition_are_asked(
    source: Path, job_settings: Settings, out: Path
) -> None:
    plain = job_settings(data__output=str(out.parent / "plain"))
    run(plain)
    summary = run(conditioned(job_settings(max_error_rate=0.0), FEW, "mood is not null"))
    asked = [row for row, stars in enumerate(STARS) if stars is not None and stars < 2 and row < 20]
    for step in summary.steps:
        assert (step.computed, step.not_asked, step.failed) == (len(asked), ROWS - len(asked), 0)
    assert summary.faulty_rows == 0
    assert "8 computed, 0 reused, 16 not asked" in describe(summary)
    # A condition changes no answer and no key of a row that is asked.
    both = zip(rows_of(out), rows_of(out.parent / "plain"), strict=True)
    for row, (one, other) in enumerate(both):
        if row in asked:
            assert one == other
        else:
            assert one["text"] == other["text"]
            assert one["mood_error_type"] == one["reply_error_type"] == "not_asked"
            rest = {name for name, value in one.items() if value is not None}
            assert rest <= {"text", "stars", "language", "mood_error_type", "reply_error_type"}
    assert read_quarantine(out) == []
    assert verify(str(out)).findings == ()


def test_a_changed_condition_asks_only_the_new_rows(
    source: Path, job_settings: Settings, out: Path
) -> None:
    settings = conditioned(job_settings(), "stars == 0")
    assert counts(settings) == [(4, 0, 20), (4, 0, 20)]
    assert run(settings).unchanged_sources == 1
    conditioned(settings, "stars <= 1")
    planned = preview(JobConfig.model_validate(settings))
    assert [(step.to_run, step.reused, step.not_asked) for step in planned.steps] == [
        (4, 4, 16),
        (4, 4, 16),
    ]
    assert "not asked" in describe_plan(planned)
    assert counts(settings) == [(4, 4, 16), (4, 4, 16)]
    conditioned(settings, "stars == 1")
    assert counts(settings) == [(0, 4, 20), (0, 4, 20)]
    # The answers that left the output are not known any more.
    conditioned(settings, None)
    assert counts(settings) == [(20, 4, 0)] * 2
    assert None not in column_of(out, "mood")


def test_a_condition_may_use_folders_and_earlier_scores(
    source: Path, job_settings: Settings, out: Path
) -> None:
    settings = job_settings()
    run(settings)
    middle = sorted(column_of(out, "mood_score"))[ROWS // 2]
    conditioned(settings, "day == '1'", f"mood_score < {middle} or day != '1'")
    assert counts(settings) == [(0, ROWS, 0), (0, ROWS // 2, ROWS // 2)]
    for row in rows_of(out):
        assert (row["reply"] is not None) == (row["mood_score"] < middle)
    # Compared with a number, it is read as one, as in data.where.
    conditioned(settings, "day < 2", f"mood_score < {middle} or day in (2, 3)")
    assert counts(settings) == [(0, ROWS, 0), (0, ROWS // 2, ROWS // 2)]
    # The folder's value decides, although the file has the same bytes.
    source.parent.rename(source.parent.with_name("day=2"))
    assert counts(settings) == [(0, 0, ROWS), (0, 0, ROWS)]
    source.parent.with_name("day=2").rename(source.parent.with_name("day=True"))
    conditioned(settings, "day = true", "day = false")
    assert counts(settings) == [(0, ROWS, 0), (0, 0, ROWS)]
    source.parent.with_name("day=True").rename(source.parent.with_name("day=x"))
    with pytest.raises(
        InputError, match=r"column 'day' is 'x' here, which is compared with true or"
    ):
        run(settings)


def test_a_plan_counts_rows_that_wait_for_an_earlier_answer(
    source: Path, job_settings: Settings
) -> None:
    settings = conditioned(job_settings(), None, "stars == 3 and mood == 'good'")
    reply = preview(JobConfig.model_validate(settings)).steps[1]
    # The other rows are not asked, whatever their mood will be.
    assert (reply.to_run, reply.waiting, reply.not_asked) == (4, 4, 20)
    run(settings)
    planned = preview(JobConfig.model_validate(settings)).steps[1]
    assert (planned.to_run, planned.waiting) == (0, 0)
    assert planned.reused + planned.not_asked == ROWS


def test_a_condition_on_a_failed_answer_fails_too(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", None, "three"], "stars": [1, 1, 1]})
    second = {**GENERATE, "prompt_template": "{stars}", "when": "mood in ('good', 'bad')"}
    third = {**second, "name": "note", "when": "stars > 1 and mood == 'good'"}
    settings = job_settings(max_error_rate=1.0, steps=[CLASSIFY, second, third])
    run(settings)
    assert column_of(out, "mood_error_type") == [None, "null_value", None]
    assert column_of(out, "reply_error_type")[1] == "earlier_step_failed"
    # The stars decide alone that this row is not asked.
    assert column_of(out, "note_error_type") == ["not_asked"] * 3
    settings["on_error"] = "raise"
    with pytest.raises(BadRow, match="row 1, step 'mood'"):
        run(settings)
    conditioned(settings, "text is not null", "stars == 1", "stars == 1")
    assert [step.failed for step in run(settings).steps] == [0, 0, 0]


def test_a_condition_may_test_why_an_answer_is_missing(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", None, "three"], "stars": [1, 1, 2]})
    conditions = {
        "failed": "mood_error_type == 'null_value'",
        "left": "mood_error_type == 'not_asked'",
        "told": "mood_error is null and mood_error_type is not null",
        "other": "mood_error_type != 'null_value' or mood_score > 1",
    }
    steps = []
    for name, when in conditions.items():
        prompt = f"{name} {{stars}}"
        steps.append({**GENERATE, "name": name, "prompt_template": prompt, "when": when})
    first = {**CLASSIFY, "when": "stars == 1"}
    steps.append({**GENERATE, "name": "next", "prompt_template": "{mood}"})
    quoted = "next_error == 'mood failed: text is null'"
    steps.append({**GENERATE, "name": "quoted", "prompt_template": "{stars}", "when": quoted})
    settings = job_settings(max_error_rate=1.0, steps=[first, *steps])
    planned = preview(JobConfig.model_validate(settings)).steps
    assert [(step.to_run, step.waiting, step.not_asked) for step in planned[1:]] == [
        (2, 1, 1),
        (2, 1, 1),
        (2, 1, 1),
        (2, 1, 0),
        (1, 1, 1),
        (2, 1, 1),
    ]
    summary = run(settings)
    rows = {name: column_of(out, f"{name}_error_type") for name in conditions}
    assert rows["failed"] == ["not_asked", None, "not_asked"]
    assert rows["left"] == rows["told"] == ["not_asked", "not_asked", None]
    # Only the answer itself is not known of a row that failed.
    assert rows["other"] == ["not_asked", "earlier_step_failed", None]
    assert column_of(out, "quoted_error_type") == ["not_asked", None, "not_asked"]
    touch_published(out)
    again = preview(JobConfig.model_validate(settings)).steps
    for step, planned_step in zip(summary.steps, again, strict=True):
        assert planned_step.not_asked == step.not_asked
        assert (planned_step.to_run, planned_step.skipped) == (0, step.failed)


def test_a_row_that_now_succeeds_leaves_a_second_step(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    second = {**GENERATE, "prompt_template": "{text}", "when": "mood_error_type == 'model_failed'"}
    third = {**GENERATE, "name": "note", "prompt_template": "{reply}"}
    settings = job_settings(max_error_rate=1.0, steps=[CLASSIFY, second, third])
    real = TorchEngine.classify

    def failing(engine: TorchEngine, requests: Any) -> Any:
        for result in real(engine, requests):
            yield ClassifyResult(result.index, (), "not finite") if result.index == 0 else result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TorchEngine, "classify", failing)
        run(settings)
    for name in ("reply", "note"):
        assert sorted(column_of(out, f"{name}_error_type"), key=str) == [None, "not_asked"]
    run(settings)
    assert column_of(out, "mood_error_type") == [None, None]
    for name in ("reply", "note"):
        assert column_of(out, f"{name}_error_type") == ["not_asked", "not_asked"]


def test_a_canary_checks_the_rows_that_were_asked(
    source: Path, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    settings = conditioned(job_settings(), None, "stars == 0")
    run(settings)
    file = tmp_path / "canary.parquet"
    assert freeze(out, file, ROWS) == ROWS
    settings = job_settings(canary=str(file), data__output=str(tmp_path / "again"))
    audits = run(conditioned(settings, None, "stars == 0")).audits
    assert [audit.what.split()[2] for audit in audits] == ["24", "4"]
    assert [audit.measured for audit in audits] == [0, 0]


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        (("star < 3",), r"no column 'star'; it has .*'stars'.* Set steps\[0\].when"),
        (("stars < 'x'",), r"column 'stars' holds int64, .* Set steps\[0\].when"),
        ((None, "mood_scores == 'good'"), r"step 'reply': column 'mood_scores' holds struct"),
        ((None, "mood in ('good', 'godo')"), r"step 'mood' never answers 'godo'; its labels are"),
        (
            (None, "mood_error_type == 'to_long'"),
            r"step 'mood' never answers 'to_long' in mood_error_type; its error types are .*",
        ),
        ((None, "mood_scor > 0.9"), r"no column 'mood_scor'; .*did you mean mood_score\?"),
        ((None, "mood_probability > 0.9"), r"step 'mood' answers \['mood', 'mood_score', "),
    ],
)
def test_a_condition_that_can_never_hold_is_refused(
    source: Path, job_settings: Settings, conditions: tuple[str | None, ...], reason: str
) -> None:
    settings = conditioned(job_settings(), *conditions)
    for call in (run, lambda settings: preview(JobConfig.model_validate(settings))):
        with pytest.raises(InputError, match=reason) as caught:
            call(settings)
        assert "\n" not in str(caught.value)


def test_a_table_in_memory_has_conditions_too(job_settings: Settings) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a text", "another"], "stars": [1.0, None]})
    settings = conditioned(job_settings(), "stars == 1")
    del settings["data"]
    answered = annotate_table(frame, settings)
    assert list(answered["mood"].isna()) == [False, True]
    assert list(answered["mood_error_type"].fillna("")) == ["", "not_asked"]
