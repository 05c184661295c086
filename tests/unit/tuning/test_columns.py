"""Trainings whose prompts have several columns of the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.settings.steps.step import differ_in_names
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.examples import Example, read_examples
from glmbatch.tuning.finetune import begin, check, finetune
from glmbatch.tuning.render import describe
from tests.support import Tune, Write
from tests.unit.tuning.rows import FILLERS, WORDS

TITLED = "{title} ({stars}): {text}"


def titled(rows: int) -> dict[str, list[Any]]:
    """Rows whose title decides the label; their texts and stars say nothing."""
    dice = random.Random(3)
    labels = [dice.choice(list(WORDS)) for _ in range(rows)]
    return {
        "title": [dice.choice(WORDS[label]) for label in labels],
        "stars": [dice.randrange(5) for _ in labels],
        "text": [f"{' '.join(dice.sample(FILLERS, 3))} {dice.randrange(99)}" for _ in labels],
        "label": labels,
    }


@pytest.fixture
def source(tmp_path: Path, write_source: Write) -> dict[str, list[Any]]:
    """240 rows of `titled` in place of those of `tune`, two of which lack a title."""
    rows = titled(240)
    rows["title"][3] = rows["title"][7] = None
    write_source("day=0/a.parquet", {name: values[:120] for name, values in rows.items()})
    write_source("day=1/a.parquet", {name: values[120:] for name, values in rows.items()})
    return rows


@pytest.mark.slow
def test_a_classifier_learns_from_several_columns(
    tune: Tune, source: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(tune(prompt_template=TITLED, training__epochs=4))
    assert report.scores.accuracy > 0.8 and report.promoted
    assert report.baseline_name.endswith("(on title and stars and text, joined)")
    assert report.baseline.accuracy > 0.8
    assert report.audit.without_value == 2
    assert "without value 2" in describe(report)
    assert "2 of 240 rows were left out: a column of the prompt is null" in describe(report)
    # A job takes the prompt of the training, and fails the rows that it left out.
    job = {
        "data": {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")},
        "model": report.checkpoint,
        "steps": [{"kind": "classify", "name": "mood"}],
        "runtime": {"device": "cpu"},
    }
    (step,) = run_job(JobConfig.model_validate(job)).steps
    assert (step.computed + step.repeated, step.failed) == (238, 2)
    answers = [pq.read_table(file) for file in sorted((tmp_path / "out").glob("day=*/*.parquet"))]
    given = [answer for table in answers for answer in table.column("mood").to_pylist()]
    right = [a == label for a, label in zip(given, source["label"], strict=True)]
    assert sum(right) / 240 > 0.8
    # The command asks the same.
    assert main(["evaluate", report.checkpoint, str(tmp_path / "in"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"] == sum(right) / 238
    assert scores["learned"] == report.audit.parts["train"] + report.audit.parts["valid"]
    job["steps"][0]["prompt_template"] = "{text} ({stars}): {title}"
    with pytest.raises(InputError, match="was trained with the prompt_template"):
        run_job(JobConfig.model_validate(job))


@pytest.mark.slow
def test_a_writer_learns_from_several_columns(
    tune: Tune, source: dict[str, list[Any]], tmp_path: Path
) -> None:
    writes = {"data__response_column": "label", "training__max_answer_tokens": 8}
    report = finetune(tune(**writes, prompt_template=TITLED, training__epochs=1, must_beat=[]))
    assert report.scores.rows + sum(report.audit.parts[p] for p in ("train", "valid")) == 238
    assert report.untrained is not None


@pytest.mark.slow
def test_a_prompt_with_another_column_is_compared(
    tune: Tune, source: dict[str, list[Any]], write_source: Write
) -> None:
    first = finetune(tune(training__epochs=1, must_beat=[], prompt_template="{title} {text}"))
    second = finetune(tune(training__epochs=1, must_beat=[], data__seed=1))
    assert first.promoted and second.compared_with == first.run
    assert second.current is not None and second.current.rows == second.scores.rows
    assert any("the current checkpoint was trained on" in each for each in second.audit.warnings)
    write_source("day=0/a.parquet", {"text": ["a"], "label": ["good"]})
    match = r"no column 'title'; .* Set another output, because the prompt of the current"
    with pytest.raises(InputError, match=match):
        check(tune())


def test_rows_are_the_same_if_their_prompts_are(tmp_path: Path, write_source: Write) -> None:
    rows = {"title": ["ab", "a", "AB", "b"], "text": ["c", "bc", "C", "c"], "label": ["x"] * 4}
    write_source("a.parquet", rows)
    data = LabelledData(input=str(tmp_path / "in"))
    examples = read_examples(data, "{title}{text}").examples
    assert [example.same for example in examples] == ["abc", "abc", "abc", "bc"]
    assert [example.text for example in examples] == ["ab\nc", "a\nbc", "AB\nC", "b\nc"]
    # One column alone counts as before, whatever is around it.
    assert read_examples(data, "{title}!").examples[0].same == "ab"
    assert Example("", "Good  day", "").with_template("{text}").same == "good day"


@pytest.mark.parametrize("column", ["titel", "label"])
def test_a_column_that_is_missing_is_named(tune: Tune, column: str) -> None:
    match = r"no column 'titel'; it has \['text', 'label'.*\]\. Set prompt_template"
    if column == "label":
        match = r"prompt_template has {label}, the column that the model learns"
    with pytest.raises((InputError, ValidationError), match=match):
        begin(tune(prompt_template=f"{{{column}}} {{text}}"))


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("Is it good?", "prompt_template has no column, such as {text}"),
        ("{text} {predicted}", "names that begin with 'predicted' are of the answers"),
        ("{text!r}", "must be a plain column name"),
    ],
)
def test_a_template_of_no_use_is_refused(tune: Tune, template: str, match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        tune(prompt_template=template)


def test_the_text_column_may_be_named(tmp_path: Path, tune: Tune, write_source: Write) -> None:
    rows = titled(240)
    write_source("day=0/a.parquet", {"body": rows["text"], **rows})
    write_source("day=1/a.parquet", {"body": ["x"], "text": [None], "label": ["good"]})
    named = tune(data__text_column="body", prompt_template="{body}")
    run = begin(named)
    assert Path(run).is_dir()
    assert begin(named.model_copy(update={"prompt_template": "{text}"})) == run


@pytest.mark.parametrize(
    ("template", "trained", "alike"),
    [
        ("{body}", "{text}", True),
        ("{name}: {body}", "{title}: {text}", True),
        ("{title}: {text}", "{title}: {text}", True),
        ("{text}: {title}", "{title}: {text}", False),
        ("{text}: {body}", "{title}: {text}", False),
        ("{a}: {a}", "{title}: {text}", False),
        ("{a} {b} {a}", "{c} {d} {c}", True),
        ("{a} {b} {b}", "{c} {d} {c}", False),
        ("{{x}} {a}", "{{y}} {b}", False),
        ("{{x}} {a}", "{{x}} {b}", True),
        ("{a}, {b}", "{c}", False),
    ],
)
def test_only_names_of_columns_may_differ(template: str, trained: str, alike: bool) -> None:
    assert differ_in_names(template, trained) == alike
