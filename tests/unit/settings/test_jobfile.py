"""Values of `--set`: text settings take a text as it is typed, others take YAML."""

from __future__ import annotations

from datetime import date

import pytest

from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import read_value
from glmbatch.settings.tuning import TuneConfig

TEMPLATE = "steps.1.prompt_template"


TYPED = """{facts}: {text}|{text}|yes|012|[a]|{a}|a: {text}|2024-01-01|#1: {a}|in/a #1.parquet
"{a}" or {b}|@a|{|it's|%a|- a|null and void"""


@pytest.mark.parametrize("text", TYPED.replace("\n", "|").split("|"))
def test_a_text_setting_takes_what_is_typed(text: str) -> None:
    for name in (TEMPLATE, "data.input", "data.text_column", "model.path", "steps.0.labels.1"):
        assert read_value(JobConfig, name, text) == text
    assert read_value(TuneConfig, "data.label_column", text) == text
    assert read_value(JobConfig, "steps.0.fields.stars.description", text) == text


def test_a_quoted_text_is_what_the_quotes_hold() -> None:
    assert read_value(JobConfig, TEMPLATE, '"a\\n{text}"') == "a\n{text}"
    assert read_value(JobConfig, TEMPLATE, "'yes'") == "yes"
    assert read_value(JobConfig, "data.output", " out ") == "out"


def test_null_empties_a_text_that_may_be_empty() -> None:
    for text in ("null", "", "~"):
        assert read_value(JobConfig, "steps.0.when", text) is None
        assert read_value(JobConfig, "data.text_column", text) == text


def test_other_settings_are_yaml() -> None:
    assert read_value(JobConfig, "steps.0.labels", "[good, bad]") == ["good", "bad"]
    assert read_value(JobConfig, "steps.0.max_tokens", "012") == 10
    assert read_value(JobConfig, "steps.0.multiple", "yes") is True
    assert read_value(JobConfig, "model", "{path: a}") == {"path": "a"}
    assert read_value(JobConfig, "no.such", "2024-01-01") == date(2024, 1, 1)
    with pytest.raises(ValueError, match="month must be in"):
        read_value(JobConfig, "steps.0.max_tokens", "2024-13-01")
