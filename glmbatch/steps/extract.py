"""An extract step: typed fields as columns. Scores and token ids in, columns out; no tensors.

Fields that are a choice are asked first, each by the likelihoods of its choices behind the prompt.
The other values are then written behind them, in one answer whose form is forced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import date
from typing import Any

import pyarrow as pa

from glmbatch.glm.engine.protocol import Engine, GenerateResult
from glmbatch.glm.form import Form, FormField, RowForm, before
from glmbatch.glm.form_tokens import form_tokens
from glmbatch.glm.tokenizer import Tokenizer
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ExtractStep
from glmbatch.settings.steps.fields import ExtractField, FieldValue
from glmbatch.steps.classify import Choice, LabelSet, ask_choices
from glmbatch.steps.generate import Confidence, ask_by_number, request_of
from glmbatch.steps.prompt import Prompt, RowFault, RowPrompts

_ARROW = {
    "text": pa.string(),
    "choice": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
}


@dataclass(frozen=True, slots=True)
class Extraction:
    """The values of one row by field, and the probability of each that was chosen.

    `finish_reason` is "length" if a text or a list was cut. `completion_tokens` counts the tokens
    that the model chose. `sure` has the confidence in each field that was written, if the step asks
    for it. The values of `abstained` fields are None, because the model is not sure of them.
    """

    values: Mapping[str, Any]
    scores: Mapping[str, float]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    sure: Mapping[str, Confidence]
    abstained: Sequence[str] = ()

    @property
    def text(self) -> str | None:
        """The values as JSON; None if the model abstains from all of them."""
        return None if len(self.abstained) == len(self.values) else as_json(self.values)


def extraction_fields(step: ExtractStep) -> list[pa.Field]:
    """The columns of an extraction: the answer, why it ended, values, scores, tokens and so on."""
    columns = Columns(step.name)
    values = [pa.field(field.name, _arrow_type(field)) for field in step.fields]
    answer = pa.string() if step.layout == "columns" else pa.struct(values)
    fields = [pa.field(columns.answer, answer), pa.field(columns.finish_reason, pa.string())]
    if step.layout == "columns":
        fields += [value.with_name(columns.field(value.name).answer) for value in values]
    fields += [pa.field(columns.field(name).score, pa.float64()) for name in step.chosen]
    fields.append(pa.field(columns.prompt_tokens, pa.int32()))
    fields.append(pa.field(columns.completion_tokens, pa.int32()))
    for name in step.written if step.tells_confidence else ():
        fields += [pa.field(number, pa.float64()) for number in columns.field(name).of_confidence]
    if step.abstain_below is not None:
        fields.append(pa.field(columns.abstained, pa.list_(pa.string())))
    return fields


def extraction_columns(
    step: ExtractStep, extractions: Sequence[Extraction | None]
) -> list[list[object]]:
    """The values of each of `extraction_fields`, row by row; None where nothing was extracted."""
    columns: list[list[object]] = [[] for _ in extraction_fields(step)]
    for extraction in extractions:
        values = [None] * len(columns) if extraction is None else _row(step, extraction)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


def _row(step: ExtractStep, extraction: Extraction) -> list[Any]:
    answer: object = extraction.text
    values: list[Any] = [extraction.values[field.name] for field in step.fields]
    if step.layout == "struct":
        answer = None if answer is None else dict(extraction.values)
        values = []
    numbers: list[Any] = [extraction.scores[name] for name in step.chosen]
    numbers += [extraction.prompt_tokens, extraction.completion_tokens]
    for name in step.written if step.tells_confidence else ():
        numbers += astuple(extraction.sure[name])
    abstained = [] if step.abstain_below is None else [extraction.abstained]
    return [answer, extraction.finish_reason, *values, *numbers, *abstained]


def as_json(values: Mapping[str, Any]) -> str:
    """The values of fields as JSON text."""
    return json.dumps(values, ensure_ascii=False, default=date.isoformat)


def is_blank(answer: object) -> bool:
    """Whether an answer, as its column has it, has no value but nulls and empty ones."""
    values = json.loads(answer) if isinstance(answer, str) else answer
    assert isinstance(values, dict)
    return all(value in (None, "", []) for value in values.values())


def ask_extractions(
    step: ExtractStep, prompts: Mapping[bytes, Prompt], engine: Engine, tokenizer: Tokenizer
) -> Iterator[tuple[bytes, Extraction | RowFault]]:
    """Ask the engine about each prompt; yield pairs of row key and answer, in any order.

    A prompt on which the model failed has a RowFault.
    """
    chosen: dict[bytes, dict[str, tuple[str, float]]] = {key: {} for key in prompts}
    for name, key, choice in _ask_choices(step, prompts, engine, tokenizer):
        if not isinstance(choice, RowFault):
            # A key is missing if the row failed already.
            chosen.get(key, {})[name] = choice
        elif chosen.pop(key, None) is not None:
            yield key, choice
    form = form_of(step, tokenizer)
    if not step.written:
        for key, known in chosen.items():
            nothing = GenerateResult(0, (), "stop")
            yield key, _extraction(step, form, known, len(prompts[key].ids), nothing)
        return
    keys = list(chosen)  # the engine numbers its requests
    requests = (
        replace(
            request_of(step, index, key, prompts[key], form.longest),
            form=RowForm(form, _texts(chosen[key])),
            log_probs=step.tells_confidence,
        )
        for index, key in enumerate(keys)
    )
    for number, result in ask_by_number(engine, requests):
        key = keys[number]
        if isinstance(result, RowFault):
            yield key, result
        else:
            yield key, _extraction(step, form, chosen[key], len(prompts[key].ids), result)


def _texts(chosen: Mapping[str, tuple[str, float]]) -> dict[str, str]:
    """The chosen values of one row, as JSON texts."""
    return {name: text for name, (text, _) in chosen.items()}


def _ask_choices(
    step: ExtractStep, prompts: Mapping[bytes, Prompt], engine: Engine, tokenizer: Tokenizer
) -> Iterator[tuple[str, bytes, tuple[str, float] | RowFault]]:
    """The likeliest choice of each field, as JSON text, and its probability; in any order.

    Each comes with its field and row key. All fields of a row are asked behind one read of it.
    """
    tokens = form_tokens(tokenizer)
    label_sets = []
    begins = []
    fields = [field for field in step.fields if field.type == "choice"]
    for field in fields:
        texts = _choice_texts(field)
        label_sets.append(LabelSet(texts, tuple(tokens.encode(x.encode()) for x in texts)))
        # As the first field of a document, so that the probabilities do not depend on the others.
        begins.append(tokens.encode(before([FormField(field.name, None)], 0)))

    def rows() -> Iterator[RowPrompts]:
        for key, prompt in prompts.items():
            ids = [[*prompt.ids, *begin] for begin in begins]
            yield [(at, key, replace(prompt, ids=of_field)) for at, of_field in enumerate(ids)]

    if not fields:
        return
    for at, key, choice in ask_choices(label_sets, rows(), engine):
        if isinstance(choice, Choice):
            assert choice.label is not None  # only a classify step abstains
            yield fields[at].name, key, (choice.label, choice.score)
        else:
            assert isinstance(choice, RowFault)
            yield fields[at].name, key, choice


def form_of(step: ExtractStep, tokenizer: Tokenizer) -> Form:
    """The form of the answers of `step`."""
    fields = []
    for field in step.fields:
        if field.type == "choice":
            fields.append(FormField(field.name, None, field.most_tokens or 0))
        else:
            schema = json.dumps(field.json_schema())
            fields.append(
                FormField(field.name, schema, field.most_tokens or 0, field.type == "list")
            )
    return Form(tuple(fields), step.max_tokens, tokenizer)


def _extraction(
    step: ExtractStep,
    form: Form,
    chosen: Mapping[str, tuple[str, float]],
    prompt_tokens: int,
    result: GenerateResult,
) -> Extraction:
    """The values that were `chosen`, and those of `result`, which has no ids if all were."""
    written = form.read(result.ids) if result.ids else {}
    values: dict[str, Any] = {}
    for field in step.fields:
        known = chosen.get(field.name)
        value = written[field.name] if known is None else json.loads(known[0])
        values[field.name] = _read(field if field.items is None else field.items, value)
    sure: dict[str, Confidence] = {}
    if step.tells_confidence and result.ids:
        log_probs = form.numbers_by_field(result.ids, result.log_probs)
        sure = {name: Confidence.of(log_probs[name]) for name in step.written}
    scores = {name: score for name, (_, score) in chosen.items()}
    tokens = len(result.ids) - result.forced
    extraction = Extraction(values, scores, result.finish_reason, prompt_tokens, tokens, sure)
    return extraction if step.abstain_below is None else _abstain(extraction, step.abstain_below)


def _abstain(extraction: Extraction, least: float) -> Extraction:
    """`extraction` without the values in which the confidence is below `least`."""
    unsure = {name for name, score in extraction.scores.items() if score < least}
    unsure |= {name for name, sure in extraction.sure.items() if sure.is_below(least)}
    values = dict(extraction.values)
    values.update(dict.fromkeys(unsure))
    return replace(extraction, values=values, abstained=[x for x in values if x in unsure])


def _read(kind: FieldValue, value: Any) -> Any:
    """A JSON value as its column holds it."""
    if isinstance(value, list):
        return [_read(kind, item) for item in value]
    if value is None:
        return None
    if kind.type == "text" and kind.pattern is None:
        # The tokenizer puts a blank in front of a word, also of the first one. A text without the
        # blanks at its ends is still within its bounds; behind a pattern it might not match.
        return value.strip()
    if kind.type == "number":
        return float(value)
    return date.fromisoformat(value) if kind.type == "date" else value


def _arrow_type(field: ExtractField) -> pa.DataType:
    if field.items is not None:
        return pa.list_(_ARROW[field.items.type])
    return _ARROW[field.type]


def _choice_texts(field: ExtractField) -> list[str]:
    texts = [json.dumps(choice, ensure_ascii=False) for choice in field.choices or ()]
    return [*texts, "null"] if field.nullable else texts
