"""The earlier turns of a row's conversation, from the values of a list column.

Text only: no tensors, no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmbatch.errors import shown
from glmbatch.steps.prompt import History, RowFault

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SHOWN_ROLE = 20  # most characters of an unknown role in a message


class _BadTurnError(Exception):
    """Why the turns of one row are no conversation, as the end of a sentence."""


def read_histories(
    name: str, values: Sequence[Sequence[Any] | None], *, ends_open: bool
) -> list[History | RowFault]:
    """The earlier turns of each row from the column `name`, in order; a fault where they are none.

    A turn is a mapping of `role` and `content`, or a round: a pair of question and answer, or a
    mapping of both. Null and an empty list are no turns. With `ends_open`, the last turn is a
    question, and otherwise an answer.
    """
    histories: list[History | RowFault] = []
    for turns in values:
        try:
            histories.append(_history(_flat(turns or ()), ends_open=ends_open))
        except _BadTurnError as error:
            reason = f"{name} is null" if turns is None else f"{name}: {error}"
            histories.append(RowFault("null_value" if turns is None else "bad_history", reason))
    return histories


def _flat(turns: Sequence[Any]) -> list[tuple[str, str]]:
    """The role and the content of each turn; a round is two of them."""
    flat: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and "role" in turn:
            content = _text(turn["content"], f"turn {number} has no content")
            flat.append((_text(turn["role"], f"turn {number} has no role"), content))
            continue
        texts = [*turn.values()] if isinstance(turn, Mapping) else turn
        if texts is None or len(texts) != 2:
            raise _BadTurnError(f"round {number} is no pair of question and answer")
        flat.append((USER, _text(texts[0], f"round {number} has no question")))
        flat.append((ASSISTANT, _text(texts[1], f"round {number} has no answer")))
    return flat


def _text(value: object, if_null: str) -> str:
    if isinstance(value, bytes):
        raise _BadTurnError("a text is not UTF-8")
    if not isinstance(value, str):
        raise _BadTurnError(if_null)
    return value


def _history(turns: Sequence[tuple[str, str]], *, ends_open: bool) -> History:
    system = None
    first = 0
    if turns and turns[0][0] == SYSTEM:
        system, first = turns[0][1], 1
    texts: list[str] = []
    for number, (role, content) in enumerate(turns[first:], first + 1):
        due = ASSISTANT if len(texts) % 2 else USER
        if role != due:
            raise _BadTurnError(f"turn {number} {_wrong(role)}, where {due!r} is due")
        texts.append(content)
    if ends_open and len(texts) % 2 == 0:
        raise _BadTurnError("it ends without a question of the user")
    if not ends_open and len(texts) % 2:
        raise _BadTurnError(
            "it ends with a question; name the column in prompt_template to ask that question"
        )
    question = texts.pop() if ends_open else None
    return History(tuple(zip(texts[::2], texts[1::2], strict=True)), system, question)


def _wrong(role: str) -> str:
    if role in (SYSTEM, USER, ASSISTANT):
        return f"is of {role!r}"
    return f"has the role {shown(role)[:SHOWN_ROLE]!r}"
