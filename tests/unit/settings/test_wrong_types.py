"""A wrong type in any setting is answered with one clear line, in our words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from glmbatch.errors import InputError
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import parse_settings
from glmbatch.settings.tuning import TuneConfig

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 7, 1.5, math.nan, math.inf, 10**30, "", " ", "ja", "1", "a" * 300),
    *([], ["a"], [1], [None], [["a"]], [{}], {}, {"a": 1}, {1: 2}, {"a": None}, {"a": {}}),
    date(2024, 1, 1),
)
# What pydantic and Python call things.
FOREIGN = (
    "should be",
    "valid ",
    "Value error",
    "parsing",
    "instance",
    "None",
    "dict[",
    "dictionary",
    "[key]",
    "encountered",
    "must match",
)

BOOLEANS = (
    "follow_links",
    "engine_process",
    "chat",
    "multiple",
    "log_probs",
    "confidence",
    "nullable",
    "gradient_checkpointing",
)

STEPS: list[dict[str, Any]] = [
    {"kind": "classify", "name": "mood", "labels": ["a", "b"]},
    {"kind": "generate", "name": "reply", "temperature": 1.0},
    {
        "kind": "extract",
        "name": "facts",
        "fields": {"note": {"type": "text"}, "tags": {"type": "list", "items": {"type": "text"}}},
    },
]
JOB: dict[str, Any] = {"data": {"input": "in", "output": "out"}, "model": "m", "steps": STEPS}
TRAINING: dict[str, Any] = {"data": {"input": "in"}, "output": "out", "model": "m"}


def settings_of(kind: type[BaseModel], where: str) -> Iterator[str]:
    """The dotted names of all settings below `where`."""
    for name, field in kind.model_fields.items():
        own = f"{where}.{field.alias or name}".removeprefix(".")
        yield own
        for part in members(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel) and name != "steps":
                yield from settings_of(part, own)


def members(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from members(part)


def places() -> Iterator[tuple[type[BaseModel], dict[str, Any], str]]:
    for name in settings_of(JobConfig, ""):
        yield JobConfig, JOB, name
    for place, step in enumerate(STEPS):
        steps = {kind.model_fields["kind"].default: kind for kind in step_kinds()}
        for name in settings_of(steps[step["kind"]], ""):
            # A list of fields, of which one is changed.
            if not name.startswith("fields."):
                yield JobConfig, JOB, f"steps.{place}.{name}"
    yield JobConfig, JOB, "steps.2.fields.note"
    yield JobConfig, JOB, "steps.2.fields.tags.items"
    for setting in ("type", "choices", "minimum", "pattern", "max_length", "nullable", "items"):
        yield JobConfig, JOB, f"steps.2.fields.note.{setting}"
    yield JobConfig, JOB, "steps.2.fields.tags.max_items"
    yield JobConfig, JOB, "steps.2.fields.tags.description"
    for name in settings_of(TuneConfig, ""):
        yield TuneConfig, TRAINING, name


def step_kinds() -> Iterator[type[BaseModel]]:
    for part in members(JobConfig.model_fields["steps"].annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


PLACES = list(places())


def test_all_settings_are_tried() -> None:
    assert len(PLACES) > 150
    for kind, settings, _ in PLACES:
        parse_settings("job.yaml", settings, kind)


@pytest.mark.parametrize(("kind", "settings", "name"), PLACES, ids=lambda x: str(x)[:60])
def test_a_wrong_value_is_named_in_our_words(
    kind: type[BaseModel], settings: dict[str, Any], name: str
) -> None:
    for value in VALUES:
        try:
            parse_settings("job.yaml", settings, kind, {name: value})
        except InputError as error:
            for line in str(error).splitlines():
                assert line.startswith("job.yaml: "), (value, line)
                shown = line.replace(repr(value), "")
                assert not any(word in shown for word in FOREIGN), (value, line)
                assert len(line) < 400, (value, line)


def is_accepted(kind: type[BaseModel], settings: dict[str, Any], name: str, value: object) -> bool:
    try:
        parse_settings("job.yaml", settings, kind, {name: value})
    except InputError:
        return False
    return True


@pytest.mark.parametrize(("kind", "settings", "name"), PLACES, ids=lambda x: str(x)[:60])
def test_only_a_boolean_setting_takes_booleans(
    kind: type[BaseModel], settings: dict[str, Any], name: str
) -> None:
    last = name.rpartition(".")[2]
    assert is_accepted(kind, settings, name, True) == (last in BOOLEANS)
    assert is_accepted(kind, settings, name, False) == (last in (*BOOLEANS, "number"))
    if last in BOOLEANS:
        assert not any(is_accepted(kind, settings, name, number) for number in (0, 1, 1.0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.version", True, "data.version: must be a whole number; it is True"),
        ("data.version", 1.5, "data.version: must be a whole number; it is 1.5"),
        ("data.limit", "true", "data.limit: must be a whole number; it is 'true'"),
        ("data.today", 0, "data.today: must be a date, such as 2026-11-25; it is 0"),
        ("data.follow_links", 1, "data.follow_links: must be true or false; it is 1"),
        ("max_error_rate", False, "max_error_rate: must be a number; it is False"),
        (
            "report.price_per_hour",
            math.inf,
            "report.price_per_hour: must be a finite number; it is inf",
        ),
        (
            "steps.0.abstain_below",
            {"a": True},
            "steps[0].abstain_below.a: must be a number; it is True",
        ),
        (
            "canary",
            {"file": "f", "max_change": True},
            "canary.max_change: must be a number; it is True",
        ),
        (
            "evaluate",
            {"rows": "f", "least_score": {"mood": True}},
            "evaluate.least_score.mood: must be a number; it is True",
        ),
        (
            "evaluate",
            {"rows": "f", "least_gain": False},
            "evaluate.least_gain: must be a number; it is False",
        ),
    ],
)
def test_a_value_is_never_read_as_one_of_another_type(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as error:
        parse_settings("job.yaml", JOB, JobConfig, {name: value})
    assert str(error.value) == f"job.yaml: {message}"


def test_whole_numbers_may_be_text_or_have_a_point() -> None:
    for value in ("7", 7.0):
        job = parse_settings("job.yaml", JOB, JobConfig, {"data.limit": value})
        assert job.data.limit == 7
