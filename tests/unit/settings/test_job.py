"""Settings from files and flags refuse mistakes and say what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from glmbatch.errors import InputError
from glmbatch.settings.job import (
    CanaryConfig,
    ClassifyStep,
    EvaluateConfig,
    GenerateStep,
    JobConfig,
    placeholders,
)
from glmbatch.settings.jobfile import load_job
from glmbatch.settings.kinds import MOVED
from tests.support import Settings


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings) -> Callable[..., str]:
    def write(**overrides: Any) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job_settings(**overrides), allow_unicode=True))
        return str(path)

    return write


def test_yaml_json_flags_and_python_give_the_same_job(
    job_file: Any, job_settings: Settings, tmp_path: Path
) -> None:
    expected = JobConfig.model_validate(job_settings(data__limit=5))
    as_json = tmp_path / "job.json"
    as_json.write_text(json.dumps(job_settings(data__limit=5)))
    assert load_job(job_file(data__limit=5)) == load_job(str(as_json)) == expected
    assert load_job(job_file(), {"data.limit": "5"}) == expected
    assert JobConfig.model_validate_json(expected.model_dump_json()) == expected


def test_a_path_alone_is_a_model(job_settings: Settings) -> None:
    assert JobConfig.model_validate(job_settings(model="some/model")).model.path == "some/model"


def test_a_file_alone_is_a_canary(job_file: Any, job_settings: Settings) -> None:
    job = JobConfig.model_validate(job_settings(canary="c.parquet"))
    assert job.canary == CanaryConfig(file="c.parquet", max_change=0)
    changed = load_job(job_file(canary="c.parquet"), {"canary.max_change": 0.5})
    assert changed.canary == CanaryConfig(file="c.parquet", max_change=0.5)


def test_a_file_alone_is_rows_to_measure_on(job_file: Any) -> None:
    accepted = {"evaluate.least_gain": -1, "evaluate.least_score": 0}
    measured = load_job(job_file(evaluate="rows.parquet"), accepted).evaluate
    assert measured == EvaluateConfig(rows="rows.parquet", least_gain=-1, least_score=0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"data__inputs": "x"}, "data.inputs: is not a setting; did you mean input?"),
        ({"limit": 9}, "limit: is not a setting here; set data.limit"),
        ({"data__on_error": "null"}, "data.on_error: is not a setting here; write it at the top"),
        (
            {"steps": [{"kind": "classify", "name": "a", "fields": {"b": "text"}}]},
            "steps[0].fields: is not a setting of kind classify; steps of kind extract have it",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "max_tokens": 9}]},
            "is not a setting of kind classify; steps of kind generate or extract have it",
        ),
        ({"data__limit": 0}, "data.limit: must be at least 1; it is 0"),
        ({"model": {}}, "model.path: is required but not set"),
        (
            {"on_error": "ignore"},
            "on_error: must be 'raise', 'quarantine' or 'null'; it is 'ignore'",
        ),
        ({"steps": []}, "steps: must not be empty"),
        (
            {"steps": [{"kind": "clasify", "name": "x"}]},
            "steps[0].kind: must be one of classify, generate, extract; it is 'clasify'; did you "
            "mean classify?",
        ),
        (
            {"steps": [{"name": "x"}]},
            "steps[0].kind: is required but not set; it is one of classify, generate, extract",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a b", "labels": ["x", "y"]}]},
            "steps[0].name: must be letters from a to z, digits and underscores",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": ["x", "y", "x"]}]},
            "labels repeat: ['x']",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": ["Good", "bad", "good"]}]},
            "steps[0].labels: labels differ only in case: ['Good', 'good']; keep one of them",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": ["Good ", "bad"]}]},
            "steps[0].labels: labels begin or end with a space: ['Good ']; leave it out",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": ["x"]}]},
            "a step needs at least two labels",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": {"x": 1, "y": ""}}]},
            "the description of label 'x' is no text; put it in quotes",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": [{"name": "x", "of": ""}]}]},
            "a label has a name and a description, and no ['of']",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": [{"name": ["x", "y"]}, "z"]}]},
            "the name of a label is a text, not ['x', 'y']",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": {"x": "one", "X": "two"}}]},
            "steps[0].labels: labels differ only in case: ['X', 'x']; keep one of them",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "labels": {"x": ""}, "compare": "prior"}]},
            "a step needs at least two labels",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "compare": "prior"}]},
            "compare: prior is for a choice among labels; remove it",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "number": True, "abstain_below": 0.5}]},
            "number: true goes without abstain_below; remove one of them",
        ),
        (
            {
                "steps": [
                    {
                        "kind": "classify",
                        "name": "a",
                        "labels": ["x", "y"],
                        "multiple": True,
                        "verdicts": ["yes", "yes, but"],
                    }
                ]
            },
            "steps[0].verdicts: one verdict begins the other: ['yes', 'yes, but']; reword one",
        ),
        ({"steps": [{"kind": "generate", "name": "a", "max_length": 9}]}, "set max_tokens"),
        (
            {"steps": [{"kind": "generate", "name": "a", "prompt_template": "{text"}]},
            "without its other half",
        ),
        ({"steps": [{"kind": "generate", "name": "text"}]}, "a step cannot be named 'text'"),
        ({"steps": [{"kind": "generate", "name": "a"}] * 2}, "both write a column 'a'"),
        (
            {"steps": [{"kind": "generate", "name": name} for name in "aA"]},
            "both write a column 'A'",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "when": "stars <"}]},
            "steps[0].when: stars < is no condition: compare with = or <",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "when": "a_error is null"}]},
            "steps[0].when uses 'a_error', which step 'a' does not answer before",
        ),
        (
            {"steps": [{"kind": "generate", "name": n, "when": "b == 'x'"} for n in "ab"]},
            "steps[1].when uses 'b', which step 'b' does not answer before",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "prompt_template": "{a}: {text}"}]},
            "steps[0].prompt_template uses 'a', which step 'a' does not answer before",
        ),
        (
            {"steps": [{"kind": "generate", "name": n, "prompt_template": "{b}"} for n in "ab"]},
            "steps[1].prompt_template uses 'b', which step 'b' does not answer before",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "examples": [{"text": 5}]}]},
            "steps[0].examples.rows[0].text: must be text, but YAML reads it as 5",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "abstain_below": 1.5}]},
            "steps[0].abstain_below: must be at most 1; it is 1.5",
        ),
        (
            {
                "steps": [
                    {
                        "kind": "classify",
                        "name": "a",
                        "labels": ["x", "y"],
                        "abstain_below": {"x": 0.5, "z": 0.5},
                    }
                ]
            },
            "steps[0]: abstain_below names ['z'], which is no label",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "abstain_below": {"x": 1.5}}]},
            "steps[0].abstain_below: a least probability is above 0 and at most 1; it is 1.5",
        ),
        ({"runtime__device": "tpu"}, "runtime.device: must be auto, cpu, cuda or one"),
        ({"data__lines": {"delimiter": ";;"}}, "delimiter: must have at most 1 character; it is"),
        (
            {"evaluate": {"rows": "a.parquet", "least_score": 95}},
            "least_score: must be at most 1, or a mapping, such as {name: value}; it is 95",
        ),
        (
            {"evaluate": {"rows": "a.parquet", "least_score": {"mood": 95}}},
            "evaluate.least_score.mood: must be at most 1; it is 95",
        ),
        (
            {"evaluate": {"rows": "a.parquet", "least_score": {"a b": 0.5}}},
            "evaluate.least_score.a b: must be letters from a to z, digits",
        ),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(
    job_file: Any, overrides: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_job(job_file(**overrides))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(job_file(**overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"max_canary_change": 0.1}, "job: max_canary_change moved to canary.max_change"),
        (
            {"runtime__price_per_hour": 2},
            "runtime: price_per_hour moved to report.price_per_hour",
        ),
        (
            {"steps": [{"kind": "classify", "name": "a", "max_label_drift": 0.2}]},
            "steps[0]: max_label_drift moved to audits.max_label_drift",
        ),
        (
            {"steps": [{"kind": "generate", "name": "a", "max_empty_rate": 0.2}]},
            "steps[0]: max_empty_rate moved to audits.max_empty_rate",
        ),
        ({"runtime__max_loaded_models": 1}, "runtime: max_loaded_models was removed: the run"),
    ],
)
def test_a_moved_setting_is_named_by_its_new_place(
    job_file: Any, overrides: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_job(job_file(**overrides))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_new_place_of_a_moved_setting_exists() -> None:
    places = {place.split()[-1] for place in MOVED.values() if place.startswith("moved to ")}
    fields = set()
    for kind in (JobConfig, ClassifyStep, GenerateStep):
        for group, field in kind.model_fields.items():
            for part in (field.annotation, *get_args(field.annotation)):
                fields |= {f"{group}.{name}" for name in getattr(part, "model_fields", {})}
    assert places <= fields


def test_all_wrong_settings_are_reported_together(job_file: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_job(job_file(data__limit=0, max_error_rate=2))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("- a", "expected settings, but the file contains a list"),
        ("a: [", "neither YAML nor JSON"),
        ("", "expected settings, but the file contains nothing"),
    ],
)
def test_an_invalid_job_file_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_job(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["steps.9.max_tokens", "steps.first.max_tokens", "model.path.x"])
def test_a_flag_for_a_missing_place_is_refused(job_file: Any, name: str) -> None:
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_job(job_file(), {name: "1"})


def test_a_flag_can_set_a_setting_of_a_step(job_file: Any) -> None:
    job = load_job(job_file(), {"steps.1.max_tokens": 3})
    assert job.steps[1].model_dump()["max_tokens"] == 3


def test_settings_cannot_be_changed(job_settings: Settings) -> None:
    job = JobConfig.model_validate(job_settings())
    with pytest.raises(ValidationError, match="frozen"):
        job.data.limit = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "{a", "a}"]
)
def test_a_template_uses_only_plain_column_names(template: str) -> None:
    with pytest.raises(ValueError, match=r"placeholder|without its other half"):
        placeholders(template)


def test_placeholders_are_listed_once_in_order() -> None:
    assert placeholders("{b} {a} {{x}} {b} {列}") == ["b", "a", "列"]


def test_the_form_keeps_the_order_of_declaration() -> None:
    schema = JobConfig.model_json_schema()
    data = schema["$defs"]["DataConfig"]["properties"]
    assert [field["position"] for field in data.values()] == list(range(len(data)))
    assert next(iter(data)) == "input"
