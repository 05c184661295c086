"""The form of an answer with typed fields: a JSON object whose values alone the model chooses.

    {"product": "      forced: one chunk of known tokens
    lamp               chosen, within the grammar of the field
    ", "rating":       forced
    4                  chosen
    }                  forced

llguidance says which tokens may come next inside a value. What it says depends on the grammar and
the vocabulary alone. No tensors.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from glmbatch.glm.engine.protocol import Advance
from glmbatch.glm.form_tokens import form_tokens
from glmbatch.glm.json_text import end_of_items, end_of_text
from glmbatch.glm.tokenizer import Tokenizer

# No white space that the model would choose, and lists as json.dumps writes them.
_STYLE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", "}}
_JSON = json.JSONDecoder()
# Positions that closing a value may take beyond its tokens: a quote or bracket and the rest of a
# token that was cut, or the letters of null behind its first.
CLOSING_TOKENS = 16


@dataclass(frozen=True, slots=True)
class FormField:
    """One field of a form, in order.

    `schema` is the JSON schema of its value as text; None if the value is always known beforehand,
    with `reserved` tokens at most. A bounded value has at most `reserved` tokens. A text or a list
    has none reserved: it shares what is left of `max_tokens`, and is cut where that ends.
    """

    name: str
    schema: str | None
    reserved: int = 0
    is_list: bool = False

    @property
    def shares(self) -> bool:
        """Whether the value may be cut."""
        return self.schema is not None and not self.reserved

    @property
    def least(self) -> int:
        """The tokens without which the field cannot be written."""
        if self.schema is None:
            return 0
        return self.reserved or 1


def least_tokens(fields: Sequence[FormField]) -> int:
    """The least `max_tokens` with which the values of `fields` can be written."""
    return sum(field.least for field in fields)


@dataclass(frozen=True)
class Form:
    """The form of a step's answers: the same for all rows, and small when it is pickled."""

    fields: tuple[FormField, ...]
    max_tokens: int
    tokenizer: Tokenizer

    @property
    def longest(self) -> int:
        """The most token ids of an answer, forced ones included."""
        return self.max_tokens + _grammar(self.fields, self.tokenizer).most_forced

    def read(self, ids: Sequence[int]) -> dict[str, Any]:
        """The values of an answer by field name, as JSON has them."""
        values: dict[str, Any] = json.loads(form_tokens(self.tokenizer).bytes_of(ids))
        return values

    def numbers_by_field(
        self, ids: Sequence[int], numbers: Sequence[float]
    ) -> dict[str, list[float]]:
        """The `numbers` of the ids that were chosen for each value, its end included.

        `ids` are an answer, each with a number; it is nan where the form gave the id.
        """
        pieces = [form_tokens(self.tokenizer).bytes_of([token]) for token in ids]
        ends = self._value_ends(b"".join(pieces))
        of_fields: list[list[float]] = [[] for _ in self.fields]
        at = 0
        for piece, number in zip(pieces, numbers, strict=True):
            if not math.isnan(number):
                of_fields[bisect_left(ends, at)].append(number)
            at += len(piece)
        return {field.name: of for field, of in zip(self.fields, of_fields, strict=True)}

    def _value_ends(self, answer: bytes) -> list[int]:
        """Where each value in `answer` ends, in bytes."""
        text = answer.decode("latin-1")  # a character for each byte
        ends: list[int] = []
        at = 0
        for place in range(len(self.fields)):
            _, end_of_value = _JSON.raw_decode(text, at + len(before(self.fields, place)))
            ends.append(end_of_value)
            at = end_of_value + len(end(self.fields, place))
        return ends


@dataclass(frozen=True, slots=True)
class RowForm:
    """The form of one row's answer; `known` has the JSON text of values that are known already."""

    form: Form
    known: Mapping[str, str]

    @property
    def longest(self) -> int:
        """The most token ids of the answer, forced ones included."""
        return self.form.longest

    def begin(self) -> FormState:
        """The state of a new answer."""
        return FormState(self.form, self.known)


class _Grammar:
    """What all rows of a form share: compiled grammars, and the text in front of each value."""

    def __init__(self, fields: Sequence[FormField], tokenizer: Tokenizer) -> None:
        self.tokens = form_tokens(tokenizer)
        self.matchers: list[LLMatcher | None] = []
        # Begins of values that have only one: the quote of a text, the bracket of a list.
        self.begins: list[bytes] = []
        for place, field in enumerate(fields):
            matcher = None
            begin = b""
            if field.schema is not None:
                matcher = LLMatcher(
                    self.tokens.of_llguidance, _lark(field.schema, end(fields, place).decode())
                )
                assert not matcher.is_error(), matcher.get_error()
                begin = self.tokens.consume_forced(matcher)
            self.matchers.append(matcher)
            self.begins.append(begin)
        self.most_forced = 0
        for place, field in enumerate(fields):
            text = before(fields, place) + self.begins[place]
            self.most_forced += len(self.tokens.encode(text)) + field.reserved * (
                field.schema is None
            )
            self.most_forced += CLOSING_TOKENS


@lru_cache(64)
def _grammar(fields: tuple[FormField, ...], tokenizer: Tokenizer) -> _Grammar:
    return _Grammar(fields, tokenizer)


def before(fields: Sequence[FormField], place: int) -> bytes:
    """The text between the comma behind the value before, or the start, and a value."""
    name = json.dumps(fields[place].name, ensure_ascii=False)
    return f"{' ' if place else '{'}{name}: ".encode()


def end(fields: Sequence[FormField], place: int) -> bytes:
    """The character behind the value at `place`. A number ends where the model chooses it."""
    return b"," if place < len(fields) - 1 else b"}"


def _lark(schema: str, behind: str) -> str:
    return f'start: %json {json.dumps({**_STYLE, **json.loads(schema)})} "{behind}"'


def is_value(schema: str, text: str) -> bool:
    """Whether a model whose value is held to `schema` could write `text`."""
    grammar = LLMatcher.grammar_from_json_schema({**_STYLE, **json.loads(schema)})
    matcher = LLMatcher(_of_bytes(), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode("utf-8", "surrogatepass"))
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    matcher.consume_tokens(tokens)
    return bool(matcher.is_accepting())


@lru_cache(1)
def _of_bytes() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes."""
    return LLTokenizer("byte")


class FormState:
    """How far one answer is: the field that is being written, its text so far and its budget."""

    def __init__(self, form: Form, known: Mapping[str, str]) -> None:
        self._fields = form.fields
        self._grammar = _grammar(form.fields, form.tokenizer)
        self._known = known
        self._left = form.max_tokens  # for the values from this field on
        self._place = -1
        # The value being written: its bytes, and their number after each of its tokens.
        self._value = bytearray()
        self._ends: list[int] = []
        self._budget = 0
        # Made when the first token is chosen, because requests wait in thousands.
        self._matcher: LLMatcher | None = None
        self.was_cut = False

    def begin(self) -> Sequence[int]:
        """The ids with which the answer begins."""
        return self._next_field(b"").ids

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit for each id, the lowest bit first."""
        mask: bytes = self._running().compute_bitmask()
        return mask

    def advance(self, token: int) -> Advance:
        """Take the chosen `token`; says what is forced behind it."""
        tokens = self._grammar.tokens
        matcher = self._running()
        if not matcher.consume_token(token):
            # A limit of llguidance, since the token was allowed.
            raise ValueError(matcher.get_error().split("\n")[0])
        self._add(tokens.bytes_of([token]))
        forced = tokens.consume_forced(matcher)
        if matcher.is_accepting():
            self._left -= min(len(self._ends) - 1, self._budget)
            return self._next_field(forced)
        ids: Sequence[int] = ()
        if forced:
            ids = tokens.encode(forced)
            for one in ids:
                self._add(tokens.bytes_of([one]))
        if self._fields[self._place].shares and len(self._ends) > self._budget:
            return self._cut(ids)
        return Advance(0, ids)

    def _running(self) -> LLMatcher:
        if self._matcher is None:
            matcher = self._grammar.matchers[self._place]
            assert matcher is not None
            self._matcher = matcher.deep_copy()
        return self._matcher

    def _add(self, text: bytes) -> None:
        self._value += text
        self._ends.append(len(self._value))

    def _cut(self, forced: Sequence[int]) -> Advance:
        """End the value where its budget ended: behind its last whole character, or its last item.

        `forced` ids are in the value, but not yet in the answer.
        """
        self.was_cut = True
        is_list = self._fields[self._place].is_list
        kept = (end_of_items if is_list else end_of_text)(self._value)
        # The first end is that of the begin, which was forced with the text before it.
        whole = sum(end <= kept for end in self._ends)
        rest = bytes(self._value[self._ends[whole - 1] : kept])
        close = rest + (b"]" if is_list else b'"') + end(self._fields, self._place)
        written = len(self._ends) - len(forced)
        self._left -= self._budget
        following = self._next_field(close)
        ids = [*forced[: max(0, whole - written)], *following.ids]
        return Advance(max(0, written - whole), ids, following.ended)

    def _next_field(self, text: bytes) -> Advance:
        """Force `text`, known values and all up to the next value to choose, or to the end."""
        for place in range(self._place + 1, len(self._fields)):
            field = self._fields[place]
            text += before(self._fields, place) + self._grammar.begins[place]
            known = self._known.get(field.name)
            if known is None:
                self._start(place)
                return Advance(0, self._grammar.tokens.encode(text))
            text += known.encode() + end(self._fields, place)
        return Advance(0, self._grammar.tokens.encode(text), ended=True)

    def _start(self, place: int) -> None:
        self._place = place
        self._matcher = None
        self._value = bytearray(self._grammar.begins[place])
        self._ends = [len(self._value)]
        # Texts and lists share alike; what one leaves, those behind it have.
        behind = self._fields[place:]
        sharing = sum(field.shares for field in behind)
        self._budget = self._fields[place].least
        if sharing:
            self._budget += (self._left - least_tokens(behind)) // sharing
