"""What all settings classes share: strictness, common types, and advice for keys that moved.

Reads no files and no environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from glmbatch.errors import some_of
from glmbatch.settings.addresses import checked, on_this_machine

# Step names become column names, which every Parquet reader must accept.
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
Share = Annotated[float, Field(ge=0, le=1)]
StepName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]

# Keys of earlier versions or other tools, and what to use instead. A settings class without a field
# of that name refuses the key with this text.
MOVED = {
    "max_label_drift": "moved to audits.max_label_drift",
    "max_truncated_rate": "moved to audits.max_truncated_rate",
    "max_empty_rate": "moved to audits.max_empty_rate",
    "max_length_drift": "moved to audits.max_length_drift",
    "max_canary_change": "moved to canary.max_change",
    "price_per_hour": "moved to report.price_per_hour",
    "max_loaded_models": "was removed: the run measures how many models fit in memory",
    "retry_failed": "was removed: rows on which the model failed are always retried",
    "rope_scaling": "was removed: rope_ratio always means what it means in ChatGLM2",
    "max_length": "would include the prompt; set max_tokens (and max_input_tokens) instead",
}


Address = Annotated[str, Field(min_length=1), AfterValidator(checked)]
LocalAddress = Annotated[str, Field(min_length=1), AfterValidator(on_this_machine)]


def _number_fields(schema: dict[str, Any]) -> None:
    # The Prefect form sorts the fields of a nested class by name unless each has a position.
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Settings(BaseModel):
    """Base class of all settings: frozen, and strict about unknown keys.

    Forms show the fields in the order of declaration. Validation errors do not quote the refused
    value, because it may contain a secret.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra=_number_fields, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _say_where_it_moved(cls, values: object) -> object:
        if isinstance(values, dict):
            for key, place in MOVED.items():
                if key in values and key not in cls.model_fields:
                    raise ValueError(f"{key} {place}")
        return values


def _distinct(labels: list[str]) -> list[str]:
    if len(labels) < 2:
        raise ValueError(f"a step needs at least two labels; it has {some_of(labels)}")
    if not all(label.strip() for label in labels):
        raise ValueError(f"a label is empty: {some_of(labels)}")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"labels repeat: {some_of(repeated)}")
    folded = [label.casefold() for label in labels]
    alike = [label for label in labels if folded.count(label.casefold()) > 1]
    if alike:
        # Each label is a field of the scores, and Spark and DuckDB ignore the case of fields.
        raise ValueError(f"labels differ only in case: {some_of(alike)}; keep one of them")
    return labels


def _within_bounds(threshold: float | dict[str, float] | None) -> float | dict[str, float] | None:
    given = threshold.values() if isinstance(threshold, dict) else [threshold]
    for probability in given:
        if probability is not None and not 0 < probability < 1:
            raise ValueError(f"a threshold is between 0 and 1; it is {probability}")
    return threshold


def _two_words(verdicts: list[str] | None) -> list[str] | None:
    if verdicts is not None:
        distinct = {verdict.strip() for verdict in verdicts} - {""}
        if len(distinct) != len(verdicts) or len(verdicts) != 2:
            raise ValueError(f"two different words are needed, not {some_of(verdicts)}")
        first, second = verdicts
        if first.startswith(second) or second.startswith(first):
            # The shorter one would always be as likely as the longer one, or likelier.
            raise ValueError(f"one verdict begins the other: {some_of(verdicts)}; reword one")
    return verdicts


Labels = Annotated[list[str], AfterValidator(_distinct)]
# For a form; `_within_bounds` says what is wrong in one line.
Probability = Annotated[
    float, Field(json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})
]
Threshold = Annotated[
    Probability | dict[str, Probability] | None,
    AfterValidator(_within_bounds),
    Field(
        description="With multiple: the probability from which on a label is in the answer, for "
        "all labels or as label: probability. Empty, and for labels left out: 0.5."
    ),
]
Verdicts = Annotated[
    list[str] | None,
    AfterValidator(_two_words),
    Field(
        description="With multiple: what the model says of a label that applies, and of one that "
        "does not, in the language of the prompt. Empty: yes and no, so that the likelihoods of "
        "`label: yes` and `label: no` are compared."
    ),
]


def check_multiple(
    multiple: bool,
    labels: Sequence[str] | None,
    threshold: float | dict[str, float] | None,
    verdicts: Sequence[str] | None,
) -> None:
    """ValueError if these settings of a step do not go together."""
    if not multiple:
        for setting, value in (("threshold", threshold), ("verdicts", verdicts)):
            if value is not None:
                raise ValueError(f"{setting} is for steps with multiple: true; remove it")
        return
    if labels is None:
        raise ValueError("a step with multiple: true needs labels; set them")
    unknown = sorted(threshold.keys() - set(labels)) if isinstance(threshold, dict) else []
    if unknown:
        raise ValueError(f"threshold names {some_of(unknown)}, which is no label")
