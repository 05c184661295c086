"""Turn a row's values into its prompt, or say why it has none. Text only: no tensors, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from typing import Literal

from glmbatch.glm.tokenizer import Encoder, chat_prompt, escape_turns
from glmbatch.settings.job import TEXT, ClassifyStep, ExtractStep, Step, placeholders
from glmbatch.settings.steps.fields import instructions
from glmbatch.settings.steps.step import ANSWER

# Stands for any value when only the template matters; no template has this private-use character.
VALUE = "\ue000"

# The key of a row's earlier turns among its values; no placeholder has a bracket.
HISTORY = "[history]"

FaultKind = Literal[
    "unreadable_line",
    "null_value",
    "empty_text",
    "not_utf8",
    "bad_history",
    "earlier_step_failed",
    "too_long",
    "model_failed",
]


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why one row has no answer to one step: a `kind` to count, and the `reason` as text."""

    kind: FaultKind
    reason: str


@dataclass(frozen=True, slots=True)
class NotAsked:
    """Stands for the prompt and the answer of a row that a step is not asked about. No failure."""


@dataclass(frozen=True, slots=True)
class History:
    """The earlier turns of a row's conversation: its rounds, each a question and its answer.

    `system` is an instruction before them, and `question` the one that they end with.
    """

    rounds: Sequence[tuple[str, str]] = ()
    system: str | None = None
    question: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one row: its text, and its token ids with the model's prefix.

    The first `shared_tokens` ids come from the template, so all prompts of the step share them.
    `is_cut` is true if the row's oldest turns were left out, or the end of its text was cut off.
    """

    text: str
    ids: Sequence[int]
    shared_tokens: int = 0
    is_cut: bool = False


NoPrompt = RowFault | NotAsked
PromptValue = str | bytes | History | NoPrompt | None
# The values of a row's placeholders, and its earlier turns.
RowValues = Mapping[str, PromptValue]
# The prompts of one row: for each, the number of the step that it is for, its row key, and itself.
RowPrompts = Sequence[tuple[int, bytes, Prompt]]


@dataclass(frozen=True, slots=True)
class _Row:
    """What is in one prompt: the text of each placeholder, and the earlier turns."""

    values: Mapping[str, str]
    history: History = History()


def one_by_one(prompts: Mapping[bytes, Prompt]) -> Iterator[RowPrompts]:
    """The prompts of one step, by row key, each as a row of its own."""
    for key, prompt in prompts.items():
        yield [(0, key, prompt)]


def uses_chat(step: Step, *, has_head: bool, chats: bool = True) -> bool:
    """Whether prompts of `step` get the chat form.

    If the step does not say, they get it unless the model has a trained head (`has_head`) or was
    not trained on chats (`chats`).
    """
    return (chats and not has_head) if step.chat is None else step.chat


def longest_prompt(step: Step, max_positions: int, answer_tokens: int) -> int:
    """The most tokens that a prompt may have: the setting, limited by the positions left.

    The answer takes `answer_tokens` of the model's `max_positions`.
    """
    room = max_positions - answer_tokens
    return room if step.max_input_tokens is None else min(room, step.max_input_tokens)


def build_prompts(  # noqa: PLR0913 - facts about model and data beside the rows
    step: Step,
    rows: Sequence[RowValues | NoPrompt],
    tokenizer: Encoder,
    *,
    chat: bool,
    max_input_tokens: int,
    texts: Sequence[str] = (TEXT,),
) -> list[Prompt | NoPrompt]:
    """The prompt of each row, in the order of `rows`, or why it has none.

    A row maps each placeholder of the template to its value, and HISTORY to earlier turns if it has
    them, or says itself why it has no prompt. A value never acts as a chat turn, a placeholder or a
    special token, nor does one in an example or a turn. `texts` are the placeholders of the text
    column: `on_too_long: truncate` leaves out the oldest rounds, and then cuts the end of the text,
    until the prompt has `max_input_tokens`.
    """
    needed = placeholders(step.prompt_template)
    render = partial(_render, step, chat, _examples(step, chat))
    history = History([(VALUE, VALUE)]) if step.history_column else History()
    first = _Row(dict.fromkeys(needed, VALUE), history)
    head = _head_ids(render(first).partition(VALUE)[0], tokenizer)
    checked = [_check_row(row, needed, texts) for row in rows]
    # One call to the tokenizer per fragment, with an empty text for a row without a prompt.
    rendered = ["" if isinstance(row, NoPrompt) else render(row) for row in checked]
    # Texts that are surely too long are not encoded: 50 MB would take 2 GB and 18 s.
    endless = [tokenizer.surely_exceeds(text, max_input_tokens) for text in rendered]
    known = zip(rendered, endless, strict=True)
    encoded = tokenizer.encode(["" if is_endless else text for text, is_endless in known])
    prompts: list[Prompt | NoPrompt] = []
    for row, text, ids, is_endless in zip(checked, rendered, encoded, endless, strict=True):
        if isinstance(row, NoPrompt):
            prompts.append(row)
        elif not is_endless and len(ids) <= max_input_tokens:
            shared = len(head) if ids[: len(head)] == head else 0
            prompts.append(Prompt(text, ids, shared))
        else:
            count = f"more than {max_input_tokens}" if is_endless else len(ids)
            reason = f"the prompt has {count} tokens, {max_input_tokens} are allowed"
            shorter = None
            if step.on_too_long == "truncate" and (texts or row.history.rounds):
                shorter = _shortened(row, texts, max_input_tokens, render, tokenizer)
                reason += ", and the template alone fills them"
            prompts.append(shorter or RowFault("too_long", reason))
    return prompts


def render_prompt(
    step: Step, row: RowValues | NoPrompt, *, chat: bool, texts: Sequence[str] = (TEXT,)
) -> str | NoPrompt:
    """The text of one row's prompt, however long, or why it has none; as `build_prompts`."""
    checked = _check_row(row, placeholders(step.prompt_template), texts)
    if isinstance(checked, NoPrompt):
        return checked
    return _render(step, chat, _examples(step, chat), checked)


def _render(step: Step, chat: bool, examples: Sequence[tuple[str, str]], row: _Row) -> str:
    """The template of `step` filled with the values of `row`, in the form that the model reads.

    `examples` are pairs of a filled template and its answer. In a chat, the row's earlier turns
    follow them.
    """
    filled = _fill(step, chat, row.values)
    if chat:
        earlier = [(escape_turns(one), escape_turns(other)) for one, other in row.history.rounds]
        leads = [step.system_prompt, escape_turns(row.history.system or "")]
        lead = "\n\n".join(part for part in leads if part)
        return chat_prompt(filled, [*examples, *earlier], lead)
    # Labels are scored behind a blank.
    gap = " " if isinstance(step, ClassifyStep) else ""
    parts = [f"{question}{gap}{answer}" for question, answer in examples]
    system = [] if step.system_prompt is None else [step.system_prompt]
    return "\n\n".join([*system, *parts, filled])


def _fill(step: Step, chat: bool, row: Mapping[str, str]) -> str:
    """The template of `step` with the values of `row`, and what an extract step adds to it."""
    fields = ""
    if isinstance(step, ExtractStep):
        # Without a round of a chat, the answer begins on a line of its own.
        fields = f"\n\n{instructions(step.fields)}" + ("" if chat else "\n")
    values = {name: escape_turns(value) for name, value in row.items()} if chat else row
    return step.prompt_template.format_map(values) + fields


def _examples(step: Step, chat: bool) -> list[tuple[str, str]]:
    rows = step.examples.rows if step.examples is not None else []
    examples = []
    for row in rows:
        answer = escape_turns(row[ANSWER]) if chat else row[ANSWER]
        examples.append((_fill(step, chat, row), answer))
    return examples


@lru_cache(64)  # the same for all fragments of a step
def _head_ids(head: str, tokenizer: Encoder) -> list[int]:
    """The ids of `head`, the template before its first value, that no value can change."""
    # Tried with values of several kinds: ids that are the same for all of them always are.
    tried = tokenizer.encode([head + value for value in ("a", "B", "1", "好", "。", " ", "\n")])
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*tried, strict=False))]


def _check_row(
    row: RowValues | NoPrompt, needed: Sequence[str], texts: Sequence[str]
) -> _Row | NoPrompt:
    """The values of the `needed` placeholders as text, or the first reason against a prompt."""
    if isinstance(row, NoPrompt):
        return row
    history = row.get(HISTORY, History())
    if isinstance(history, RowFault):
        return history
    assert isinstance(history, History)
    values: dict[str, str] = {}
    for name in needed:
        value = check_value(name, row[name], is_text=name in texts)
        if not isinstance(value, str):
            return value
        values[name] = value
    return _Row(values, history)


def check_value(name: str, value: PromptValue, *, is_text: bool) -> str | NoPrompt:
    """The value of the placeholder `name` as text, or the reason against a prompt."""
    if isinstance(value, NoPrompt):
        return value
    if value is None:
        return RowFault("null_value", f"{name} is null")
    if isinstance(value, bytes):
        return RowFault("not_utf8", f"{name} is not UTF-8")
    assert isinstance(value, str)
    # Only the text must not be blank: other columns may be blank on purpose.
    if is_text and not value.strip():
        return RowFault("empty_text", f"{name} is empty")
    return value


def _shortened(
    row: _Row,
    texts: Sequence[str],
    limit: int,
    render: Callable[[_Row], str],
    tokenizer: Encoder,
) -> Prompt | None:
    """The prompt within `limit` tokens: without the oldest rounds, or with less of the text too.

    None if it does not fit without all of them.
    """
    rounds = row.history.rounds

    def with_latest(count: int) -> _Row:
        kept = rounds[len(rounds) - count :]
        return replace(row, history=replace(row.history, rounds=kept))

    # One more than the rounds that are kept, because none may be.
    _, prompt = _longest(
        len(rounds) + 1, lambda length: render(with_latest(length - 1)), limit, tokenizer
    )
    if prompt is not None or not texts:
        return prompt
    row = with_latest(0)
    # The text and the last question of a conversation may be two values; both are cut.
    whole = {name: row.values[name] for name in texts}

    def with_text(length: int) -> _Row:
        cut = {name: text[:length] for name, text in whole.items()}
        return replace(row, values={**row.values, **cut})

    longest = max(map(len, whole.values()))
    fits, prompt = _longest(longest, lambda length: render(with_text(length)), limit, tokenizer)
    return prompt if all(text[:fits].strip() for text in whole.values()) else None


def _longest(
    over: int, text_of: Callable[[int], str], limit: int, tokenizer: Encoder
) -> tuple[int, Prompt | None]:
    """The greatest length below `over` whose text fits into `limit` tokens, and its prompt.

    0 and None if none does.
    """
    # By bisection over the length, because the number of tokens varies.
    fits = 0
    best: Prompt | None = None
    while over - fits > 1:
        length = (fits + over) // 2
        text = text_of(length)
        if tokenizer.surely_exceeds(text, limit):
            over = length
            continue
        ids = tokenizer.encode([text])[0]
        if len(ids) > limit:
            over = length
        else:
            fits, best = length, Prompt(text, ids, is_cut=True)
    return fits, best
