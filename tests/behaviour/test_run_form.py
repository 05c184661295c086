"""Prefect's run form mirrors our settings classes: their order, descriptions and bounds."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import ValidationError, validate

from flows.annotate import annotate
from flows.finetune import finetune
from flows.upkeep import resume
from glmbatch.settings.job import (
    CanaryConfig,
    ClassifyStep,
    DataConfig,
    EvaluateConfig,
    GenerateStep,
    JobConfig,
    LineageConfig,
    ModelConfig,
    ReportConfig,
    RuntimeConfig,
)
from glmbatch.settings.lines import LinesConfig
from glmbatch.settings.steps.classify import ClassifyAudits
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.fields import ExtractField, FieldValue
from glmbatch.settings.steps.generate import GenerateAudits
from glmbatch.settings.steps.step import Examples
from glmbatch.settings.tuning import LabelledData, TrainingConfig, TuneConfig

FLOWS: dict[str, Flow[..., Any]] = {flow.name: flow for flow in (annotate, finetune, resume)}
OF_JOBS = {
    CanaryConfig,
    ClassifyAudits,
    ClassifyStep,
    DataConfig,
    EvaluateConfig,
    Examples,
    ExtractField,
    ExtractStep,
    FieldValue,
    GenerateAudits,
    GenerateStep,
    JobConfig,
    LineageConfig,
    LinesConfig,
    ModelConfig,
    ReportConfig,
    RuntimeConfig,
}
OF_TRAINING = {LabelledData, TrainingConfig, TuneConfig}
# Bounds that a job gives to values of any sign.
BOUNDS = {"minimum", "maximum"}
LOWER, UPPER = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}


def groups(name: str) -> dict[str, dict[str, Any]]:
    """The fields in each box of the form."""
    schema = parameter_schema(FLOWS[name]).model_dump()
    boxes = {box: definition["properties"] for box, definition in schema["definitions"].items()}
    return {**boxes, "parameters": schema["properties"]}


def kinds(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of a field's values, leaving out the null of an optional field."""
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]


def test_every_box_shows_fields_in_declaration_order() -> None:
    shown = groups("annotate") | groups("finetune")
    classes = OF_JOBS | OF_TRAINING
    assert {settings.__name__ for settings in classes} | {"parameters"} == shown.keys()
    for settings in classes:
        fields = shown[settings.__name__]
        in_the_form = sorted(fields, key=lambda field: fields[field]["position"])
        assert in_the_form == [field.alias or name for name, field in settings.model_fields.items()]


def test_the_number_of_a_snapshot_may_be_text() -> None:
    version = "5402315784313543297"  # 5402315784313543000 in a browser
    job = {
        "data": {"input": "iceberg:lake/shop.reviews", "output": "out", "version": version},
        "model": {"path": "model"},
        "steps": [{"kind": "generate", "name": "reply"}],
    }
    schema = parameter_schema(annotate).model_dump()
    validate({"job": job}, schema, raise_on_error=True)
    assert annotate.validate_parameters({"job": job})["job"].data.version == int(version)


@pytest.mark.parametrize("name", FLOWS)
def test_every_field_has_a_description(name: str) -> None:
    definitions = parameter_schema(FLOWS[name]).model_dump()["definitions"]
    for box, fields in groups(name).items():
        for field, shown in fields.items():
            group = definitions.get(shown.get("$ref", "").rpartition("/")[2], {})
            assert shown.get("description") or group.get("description") or "const" in shown, (
                f"{box}.{field}"
            )


@pytest.mark.parametrize("name", FLOWS)
def test_numbers_have_minimums_and_shares_have_maximums(name: str) -> None:
    for box, fields in groups(name).items():
        for field in fields.keys() - BOUNDS:
            for kind in kinds(fields[field]):
                if kind.get("type") in ("integer", "number"):
                    assert LOWER & kind.keys(), f"{box}.{field}"
                    if field.endswith(("_share", "_rate", "_gain", "_dropout", "_change")):
                        assert UPPER & kind.keys(), f"{box}.{field}"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("data", "rows_per_fragment"), 0, "0 is less than the minimum of 1"),
        (("max_error_rate",), 2, "2 is greater than the maximum of 1"),
        (
            ("data", "inputs"),
            "in",
            "Additional properties are not allowed ('inputs' was unexpected)",
        ),
        (("on_error",), "ignore", "'ignore' is not one of ['raise', 'quarantine', 'null']"),
    ],
)
def test_the_server_refuses_what_the_settings_refuse(
    place: tuple[str, ...], value: object, message: str
) -> None:
    job: dict[str, Any] = {
        "data": {"input": "in", "output": "out"},
        "model": {"path": "model"},
        "steps": [{"kind": "generate", "name": "reply"}],
    }
    schema = parameter_schema(annotate).model_dump()
    validate({"job": job}, schema, raise_on_error=True)
    box = job if len(place) == 1 else job[place[0]]
    box[place[-1]] = value
    with pytest.raises(ValidationError) as refused:
        validate({"job": job}, schema, raise_on_error=True)
    assert message in str(refused.value)


@pytest.mark.parametrize("attempts", [True, 0, 21, 10**30, 2.5, "many"])
def test_a_number_of_starts_that_is_none_is_refused(attempts: object) -> None:
    with pytest.raises(ParameterTypeError, match="most_attempts: Input should be"):
        resume.validate_parameters({"run": uuid4(), "most_attempts": attempts})
