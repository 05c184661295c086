"""From a row's values to its prompt, and why a row has none. Text only: no tensors, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Literal

from glmbatch.glm.tokenizer import Tokenizer, chat_prompt, escape_turns
from glmbatch.settings.job import TEXT, Step, placeholders

# Stands for a value where only the template counts; a private-use character that no template holds.
VALUE = "\ue000"

FaultKind = Literal[
    "null_value", "empty_text", "not_utf8", "earlier_step_failed", "too_long", "model_failed"
]


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why one row of one step has no answer."""

    kind: FaultKind
    reason: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked of one row: the text, and its token ids with the model's prefix.

    The first `shared_tokens` ids come from the template alone, so all rows of the step begin with
    them. `is_cut`: the end of the row's text is not in it.
    """

    text: str
    ids: Sequence[int]
    shared_tokens: int = 0
    is_cut: bool = False


RowValues = Mapping[str, str | bytes | RowFault | None]


def uses_chat(step: Step, *, has_head: bool, chats: bool = True) -> bool:
    """Whether prompts of `step` are put in the chat form.

    Unless the step says, a trained head reads the prompt bare, and so does a model that no chat was
    taught to.
    """
    return (chats and not has_head) if step.chat is None else step.chat


def longest_prompt(step: Step, max_positions: int, answer_tokens: int) -> int:
    """Most tokens of a prompt: the setting, within the positions that the answer leaves."""
    room = max_positions - answer_tokens
    return room if step.max_input_tokens is None else min(room, step.max_input_tokens)


def build_prompts(  # noqa: PLR0913 - facts about model and data beside the rows
    step: Step,
    rows: Sequence[RowValues],
    tokenizer: Tokenizer,
    *,
    chat: bool,
    max_input_tokens: int,
    texts: Sequence[str] = (TEXT,),
) -> list[Prompt | RowFault]:
    """The prompt of each row, in the order of `rows`, or why it has none.

    A row maps each placeholder of the template to its value. A value is never taken for a turn of
    the chat form, a placeholder or a special token. `texts` are the placeholders that hold the
    text: `on_too_long: truncate` cuts it at its end until the prompt fits.
    """

    needed = placeholders(step.prompt_template)
    render = partial(_render, step, chat)
    head = _head_ids(render(dict.fromkeys(needed, VALUE)).partition(VALUE)[0], tokenizer)
    checked = [_check_row(row, needed, texts) for row in rows]
    # Encoded all at once, with an empty text where a row has none: one call for each fragment.
    rendered = ["" if isinstance(row, RowFault) else render(row) for row in checked]
    # A cell of 50 MB would take 2 GB and 18 s to be encoded.
    endless = [tokenizer.surely_exceeds(text, max_input_tokens) for text in rendered]
    known = zip(rendered, endless, strict=True)
    encoded = tokenizer.encode(["" if is_endless else text for text, is_endless in known])
    prompts: list[Prompt | RowFault] = []
    for row, text, ids, is_endless in zip(checked, rendered, encoded, endless, strict=True):
        if isinstance(row, RowFault):
            prompts.append(row)
        elif not is_endless and len(ids) <= max_input_tokens:
            shared = len(head) if ids[: len(head)] == head else 0
            prompts.append(Prompt(text, ids, shared))
        else:
            count = f"more than {max_input_tokens}" if is_endless else len(ids)
            reason = f"the prompt has {count} tokens, {max_input_tokens} are allowed"
            shorter = None
            if step.on_too_long == "truncate" and texts:
                shorter = _longest(row, texts, max_input_tokens, render, tokenizer)
                reason += ", and the template alone fills them"
            prompts.append(shorter or RowFault("too_long", reason))
    return prompts


def _render(step: Step, chat: bool, row: Mapping[str, str]) -> str:
    """The template of `step` with the values of `row`, in the form that the model reads."""
    if not chat:
        filled = step.prompt_template.format_map(row)
        return filled if step.system_prompt is None else f"{step.system_prompt}\n\n{filled}"
    escaped = {name: escape_turns(value) for name, value in row.items()}
    filled = step.prompt_template.format_map(escaped)
    return chat_prompt(filled, system_prompt=step.system_prompt)


def _head_ids(head: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the template's text before the first value that no value can join or change."""
    # Values of several kinds: what all of them leave as it is, any value does.
    tried = tokenizer.encode([head + value for value in ("a", "B", "1", "好", "。", " ", "\n")])
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*tried, strict=False))]


def _check_row(
    row: RowValues, needed: Sequence[str], texts: Sequence[str]
) -> Mapping[str, str] | RowFault:
    """The row with text alone in it, or the first reason why it cannot be asked."""
    values: dict[str, str] = {}
    for name in needed:
        value = row[name]
        if isinstance(value, RowFault):
            return value
        if value is None:
            return RowFault("null_value", f"{name} is null")
        if isinstance(value, bytes):
            return RowFault("not_utf8", f"{name} is not UTF-8")
        # Only the text must say something: other columns may be blank on purpose.
        if name in texts and not value.strip():
            return RowFault("empty_text", f"{name} is empty")
        values[name] = value
    return values


def _longest(
    row: Mapping[str, str],
    texts: Sequence[str],
    limit: int,
    render: Callable[[Mapping[str, str]], str],
    tokenizer: Tokenizer,
) -> Prompt | None:
    """The prompt with as much of the text as fits `limit` tokens; None when none of it does."""
    # Tokens are no fixed number of characters: the longest text that fits lies between two lengths
    # that close in.
    whole = row[texts[0]]
    fits, over = 0, len(whole)
    best: Prompt | None = None
    while over - fits > 1:
        length = (fits + over) // 2
        text = render({**row, **dict.fromkeys(texts, whole[:length])})
        if tokenizer.surely_exceeds(text, limit):
            over = length
            continue
        ids = tokenizer.encode([text])[0]
        if len(ids) > limit:
            over = length
        else:
            fits, best = length, Prompt(text, ids, is_cut=True)
    return best if whole[:fits].strip() else None
