"""The prompt of a published row, rendered again as the job did and proved by its row key.

Needs neither the job nor its checkpoint: the manifest has the settings of each step, and the key of
a row is a digest of its prompt. A prompt that does not have this key is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from glmbatch.ledger.rowkeys import row_key
from glmbatch.run.prompts import column_texts, earlier_values, source_values
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import TEXT, placeholders
from glmbatch.settings.steps.any_step import AnyStep
from glmbatch.steps.inputs import PromptInputs
from glmbatch.steps.prompt import HISTORY, History, NoPrompt, PromptValue, render_prompt
from glmbatch.store.values import is_text
from glmbatch.view.published import Published, ViewedStep

# Ends of a text that are tried if the prompt was cut. One takes some 20 microseconds.
MOST_CUTS = 20_000


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """The prompt that the model read, or in `lack` why it cannot be shown."""

    text: str | None
    is_cut: bool = False
    lack: str = ""


def shown_prompt(
    published: Published, step: ViewedStep, file: int, row: pa.Table, text_column: str | None
) -> ShownPrompt:
    """The prompt of `step` for one `row` of the file at place `file`, as `Published.row` has it."""
    key = row.column(Columns(step.name).key)[0].as_py()
    if key is None:
        return ShownPrompt(None, lack="This row had no prompt.")
    if step.settings is None:
        return ShownPrompt(None, lack="The manifest does not have the settings of this step.")
    values = _values(published, step.settings, row, text_column)
    if values is None:
        return ShownPrompt(None, lack="The columns of the prompt are not in the published files.")
    texts = _texts(step.settings, text_column)
    step_key = published.files[file].step_keys[step.name]
    chats = [True, False] if step.settings.chat is None else [step.settings.chat]
    for chat in chats:
        for place, tried in enumerate(_shorter(values, texts)):
            prompt = render_prompt(step.settings, tried, chat=chat, texts=texts)
            if isinstance(prompt, str) and row_key(step_key, prompt) == key:
                return ShownPrompt(prompt, is_cut=place > 0)
    return ShownPrompt(None, lack="The prompt cannot be rendered again from the published row.")


def find_text_column(published: Published) -> str | None:
    """The source column that the job calls {text}: the one with which a row's key comes out.

    None if no prompt shows it; then the column named "text", or the first one of text.
    """
    names = published.source_columns(published.schema.names)
    texts = [name for name in names if is_text(published.schema.field(name).type)]
    candidates = sorted(texts, key=lambda name: name != TEXT)
    for step in published.steps:
        if step.settings is None or TEXT not in placeholders(step.settings.prompt_template):
            continue
        row = _first_asked(published, step)
        for name in candidates if row is not None else ():
            if shown_prompt(published, step, len(published.files) - 1, row, name).text:
                return name
    return candidates[0] if candidates else None


def own_columns(published: Published, step: ViewedStep, text_column: str | None) -> list[str]:
    """The source columns that the prompt of `step` shows; none if that is not known."""
    if step.settings is None:
        return []
    names = dict.fromkeys(placeholders(step.settings.prompt_template))
    shown = [text_column if name == TEXT and text_column is not None else name for name in names]
    if step.settings.history_column is not None:
        shown.append(step.settings.history_column)
    return published.source_columns([name for name in shown if name in published.schema.names])


def _first_asked(published: Published, step: ViewedStep) -> pa.Table | None:
    """The first row of the newest file that has a prompt of `step`."""
    file = len(published.files) - 1
    for number in range(min(published.files[file].rows, 100)):
        row = published.row(file, number)
        if row.column(Columns(step.name).key)[0].is_valid:
            return row
    return None


def _values(
    published: Published, step: AnyStep, row: pa.Table, text_column: str | None
) -> dict[str, PromptValue | NoPrompt] | None:
    """What the prompt takes from the row; None if it lacks a column."""
    earlier = [other for other in published.steps if other.name != step.name]
    names = [other.name for other in earlier]
    beside = set(published.schema.names) - set(published.source_columns(published.schema.names))
    columns = {}
    answers, fields = [], []
    for name in placeholders(step.prompt_template):
        if name in names:
            answers.append(name)
        elif name in beside:
            fields.append(name)
        else:
            columns[name] = text_column if name == TEXT and text_column is not None else name
    questions = [name for name, column in columns.items() if column == step.history_column]
    inputs = PromptInputs(
        columns={name: columns[name] for name in columns if name not in questions},
        earlier=tuple(answers),
        texts=(),
        history=step.history_column,
        questions=tuple(questions),
    )
    if not set(inputs.sources.values()) <= set(row.column_names):
        return None
    values = {name: column[0] for name, column in source_values(inputs, row).items()}
    values |= {name: earlier_values(row, name)[0] for name in answers}
    return values | {name: column_texts(row.column(name))[0] for name in fields}


def _texts(step: AnyStep, text_column: str | None) -> list[str]:
    """The placeholders that stand for the text column, or for the last question of the turns."""
    names = {TEXT, text_column, step.history_column}
    return [name for name in placeholders(step.prompt_template) if name in names]


def _shorter(
    values: Mapping[str, PromptValue | NoPrompt], texts: list[str]
) -> Iterator[Mapping[str, PromptValue | NoPrompt]]:
    """The values, then without the oldest turns, then with less and less of the text too.

    These are all the ways in which `on_too_long: truncate` cuts a prompt.
    """
    yield values
    history = values.get(HISTORY)
    if isinstance(history, History) and history.rounds:
        for start in range(1, len(history.rounds) + 1):
            shorter = replace(history, rounds=history.rounds[start:])
            yield {**values, HISTORY: shorter}
        values = {**values, HISTORY: replace(history, rounds=())}
    whole = values[texts[0]] if texts else None
    if isinstance(whole, str):
        for length in range(min(len(whole) - 1, MOST_CUTS), 0, -1):
            yield {**values, **dict.fromkeys(texts, whole[:length])}
