"""What every kind of step has: a name, a prompt, and the rows that it is asked of."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from glmbatch.settings.conditions import parse_condition
from glmbatch.settings.kinds import Address, Settings, Share, StepName
from glmbatch.settings.model import ModelSetting

TEXT = "text"  # the placeholder for data.text_column, whatever the column's name
ANSWER = "answer"  # the name of an example's answer, beside those of the placeholders
MOST_EXAMPLES = 64  # each takes room in every prompt


AbstainedRate = Annotated[
    Share | None,
    Field(
        description="Maximum share of the answered rows that get no answer because of "
        "abstain_below. Empty: no audit."
    ),
]


def object_text(value: object) -> object:
    """A mapping of fields as the JSON text that it stands for; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    try:
        return json.dumps(dict(value), ensure_ascii=False, default=_plain)
    except TypeError as error:
        raise ValueError(f"is no mapping of fields: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{value!r} is no value of a field")


Value = Annotated[str, BeforeValidator(object_text, json_schema_input_type=str | dict[str, Any])]


class Examples(Settings):
    """A few rows with their right answers, which the model reads before each row."""

    rows: list[dict[str, Value]] = Field(
        default_factory=list,
        max_length=MOST_EXAMPLES,
        description="The examples: a value for each placeholder of the prompt, and the `answer`, "
        "which for an extract step is a mapping of its fields. Empty: those of the file.",
    )
    file: Address | None = Field(
        None,
        description="Parquet file of the examples, with a column for each placeholder and one "
        "named `answer`. Empty: those of `rows`.",
    )

    @model_validator(mode="after")
    def _rows_or_file(self) -> Self:
        if bool(self.rows) == (self.file is not None):
            raise ValueError("examples need either rows or a file")
        return self


def _short_form(value: object) -> object:
    if isinstance(value, list):
        return {"rows": value}
    return {"file": value} if isinstance(value, str) else value


class Step(Settings):
    """The settings that all kinds of step share."""

    name: StepName = Field(
        description="Name of the step and its answer column; later prompts refer to it as {name}."
    )
    prompt_template: str = Field(
        "{text}",
        min_length=1,
        description="Prompt of a row: {column} inserts the row's value, {{ and }} are braces. "
        "Put first what all rows share: it is computed only once. If several classify or "
        "several generate steps ask about one text, begin each with that text instead: it is then "
        "read only once.",
    )
    when: str | None = Field(
        None,
        min_length=1,
        max_length=2000,
        description="Condition on a row's columns and earlier answers, such as "
        "`stars < 3 and language in ('de', 'en')`; the step is asked only of rows for which it "
        "holds. Empty: of all rows.",
    )
    system_prompt: str | None = Field(
        None, description="Instruction placed before the prompt. Empty: none."
    )
    examples: Annotated[Examples, BeforeValidator(_short_form)] | None = Field(
        None,
        description="A few rows with their right answers, as turns before each row: a list of "
        "them, or the path of a Parquet file. Empty: none.",
    )
    history_column: str | None = Field(
        None,
        min_length=1,
        description="Column with the earlier turns of each row's conversation: a list of "
        "[question, answer] pairs, or of structs with `role` and `content`. In the prompt, "
        "{column} of the same name is the last question of such a list. Empty: no earlier turns.",
    )
    chat: bool | None = Field(
        None,
        description="Whether to put the prompt in the chat format that the model was trained on. "
        "Without it, a generated text continues the prompt, blanks and line ends included. "
        "Empty: yes, except for a trained head and for CodeGeeX2.",
    )
    max_input_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum tokens in a prompt. Empty: as many as the model's positions allow.",
    )
    on_too_long: Literal["error", "truncate"] = Field(
        "error",
        description="What to do with a longer prompt. error: the row fails. truncate: the oldest "
        "turns of history_column are left out; if that is not enough, the end of the row's text is "
        "cut off, which is safer for labels than for replies.",
    )
    model: ModelSetting | None = Field(
        None, description="Checkpoint for this step only. Empty: the job's model."
    )

    @field_validator("prompt_template")
    @classmethod
    def _placeholders(cls, template: str) -> str:
        placeholders(template)
        return template

    @model_validator(mode="after")
    def _no_example_in_its_own_question(self) -> Self:
        if self.examples is not None and ANSWER in placeholders(self.prompt_template):
            raise ValueError(
                "prompt_template has {answer}, which is the answer of each example; give that "
                "column another name, or remove examples"
            )
        return self

    @model_validator(mode="after")
    def _turns_need_the_chat_form(self) -> Self:
        if self.history_column is not None and self.chat is False:
            raise ValueError(
                "history_column has turns of a chat, and chat: false has none; remove one of them"
            )
        return self

    @field_validator("when")
    @classmethod
    def _is_condition(cls, when: str | None) -> str | None:
        if when is not None:
            parse_condition(when)
        return when


def literal(text: str) -> str:
    """`text` as a template has it, so that its braces stay braces."""
    return text.replace("{", "{{").replace("}", "}}")


def renamed(template: str, names: Mapping[str, str]) -> str:
    """`template` with other names in its placeholders, where `names` has one for them."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(literal(text))
        if name is not None:
            parts.append(f"{{{names.get(name, name)}}}")
    return "".join(parts)


def differ_in_names(one: str, other: str) -> bool:
    """Whether two templates differ in nothing but the names of columns.

    A name that is in both must have the same places.
    """
    names, others = placeholders(one), placeholders(other)
    pairs = dict(zip(names, others, strict=False))
    moved = [name for name, new in pairs.items() if name != new and name in others]
    return len(names) == len(others) and not moved and renamed(one, pairs) == renamed(other, {})


def placeholders(template: str) -> list[str]:
    """Names of the columns that `template` uses, each once, in order of first use.

    ValueError if the template does not parse, or a placeholder is more than a plain column name,
    such as {a.b} or {a!r}.
    """
    names: list[str] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            "has a { or } without its other half; write {{ and }} for literal braces"
        ) from error
    for _, name, spec, conversion in pieces:
        if name is None:
            continue
        # {a.b} and {a[0]} would reach into a row's value; {0} and {} name no column.
        if spec or conversion or not name or name.isdigit() or any(mark in name for mark in ".[]"):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"placeholder {{{shown}}} must be a plain column name; write {{{{ and }}}} for "
                "literal braces"
            )
        if name not in names:
            names.append(name)
    return names
