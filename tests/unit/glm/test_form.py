"""Answers with typed fields: always whole, always within their schema, cut at characters."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from glmbatch.glm.form import Form, FormField, RowForm, least_tokens
from glmbatch.glm.form_tokens import form_tokens
from glmbatch.glm.json_text import end_of_items, end_of_text
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from tests.support import CAUSAL

UGLY = 'a "quote" \\ back\\slash, a\ttab,\na line, \x00\x1f\x7f \U0001f600 é 好 </s> [gMASK] }'


def field(name: str, schema: Any, reserved: int = 0, is_list: bool = False) -> FormField:
    return FormField(name, json.dumps(schema), reserved, is_list)


TEXT = field("text", {"type": "string"})
FIELDS = (
    TEXT,
    FormField("known", None, 20),
    field("rating", {"type": ["integer", "null"], "minimum": 1, "maximum": 10}, 5),
    field("名字", {"type": ["string", "null"], "maxLength": 9}),
    field("tags", {"type": "array", "items": {"type": "string"}, "maxItems": 4}, is_list=True),
    field("ok", {"type": "boolean"}, 6),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CAUSAL)


def choices(mask: bytes) -> list[int]:
    return [at for at in range(8 * len(mask)) if mask[at // 8] >> at % 8 & 1]


def write(form: RowForm, choose: Any) -> tuple[list[int], bool, int]:
    """Ids of an answer, whether it was cut, and how many tokens were chosen."""
    state = form.begin()
    ids = list(state.begin())
    chosen = 0
    ended = False
    while not ended:
        ids.append(choose(choices(state.allowed())))
        chosen += 1
        dropped, forced, ended = state.advance(ids[-1])
        del ids[len(ids) - dropped :]
        ids += forced
    return ids, state.was_cut, chosen


def spell(form: RowForm, tokenizer: Tokenizer, text: str) -> tuple[list[int], bool]:
    """The answer if the model would choose byte by byte the text of a whole document."""
    tokens = form_tokens(tokenizer)
    wanted = text.encode()
    state = form.begin()
    ids = list(state.begin())
    ended = False
    while not ended:
        byte = wanted[len(tokens.bytes_of(ids)) :][:1]
        (token, *_) = [at for at in choices(state.allowed()) if tokens.bytes_of([at]) == byte]
        ids.append(token)
        dropped, forced, ended = state.advance(token)
        del ids[len(ids) - dropped :]
        ids += forced
    return ids, state.was_cut


def test_random_tokens_give_whole_documents(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    single = form_tokens(tokenizer).bytes_of

    def choose(allowed: Sequence[int]) -> int:
        ends = [token for token in allowed if single([token]) in (b'"', b"]", b"n")]
        return rng.choice(ends if ends and rng.random() < 0.3 else allowed)

    cut = 0
    for row in range(150):
        max_tokens = least_tokens(FIELDS) + row // 5
        form = RowForm(Form(FIELDS, max_tokens, tokenizer), {"known": '"\\"x"'})
        ids, was_cut, chosen = write(form, choose)
        values = form.form.read(ids)
        assert list(values) == [field.name for field in FIELDS]
        assert values["known"] == '"x'
        assert values["rating"] is None or 1 <= values["rating"] <= 10
        assert values["名字"] is None or len(values["名字"]) <= 9
        assert len(values["tags"]) <= 4
        assert chosen <= max_tokens and len(ids) <= form.longest
        cut += was_cut
    assert 0 < cut < 150


def test_numbers_of_ids_are_those_of_their_fields(tokenizer: Tokenizer) -> None:
    fields = (
        field("a", {"type": "string"}),
        FormField("known", None, 20),
        field("n", {"type": "integer", "minimum": 0, "maximum": 99}, 3),
        field("好", {"type": "string"}),
    )
    form = RowForm(Form(fields, 10, tokenizer), {"known": '"x"'})
    single = form_tokens(tokenizer).bytes_of
    texts = [b'"', b"7", b",", *(bytes([byte]) for byte in "好yyyyyyyyy".encode())]
    state = form.begin()
    ids = list(state.begin())
    chosen = [False] * len(ids)
    for text in texts:
        (token, *_) = [at for at in choices(state.allowed()) if single([at]) == text]
        dropped, forced, ended = state.advance(token)
        ids = [*ids, token][: len(ids) + 1 - dropped] + list(forced)
        chosen = [*chosen, True][: len(chosen) + 1 - dropped] + [False] * len(forced)
        if ended:
            break
    assert state.was_cut and ended
    numbers = [float(at) if was else math.nan for at, was in enumerate(chosen)]
    by_field = form.form.numbers_by_field(ids, numbers)
    texts_of = {
        name: b"".join(single([ids[int(at)]]) for at in of) for name, of in by_field.items()
    }
    assert texts_of == {"a": b'"', "known": b"", "n": b"7,", "好": "好yyyy".encode()}


def test_ugly_text_stays_in_its_field(tokenizer: Tokenizer) -> None:
    fields = (TEXT, field("list", {"type": "array", "items": {"type": "string"}}, is_list=True))
    form = RowForm(Form(fields, 2000, tokenizer), {})
    # As JSON writes it; U+007F must be escaped here, and need not be in JSON.
    text = json.dumps(UGLY, ensure_ascii=False).replace("\x7f", "\\u007f")
    ids, was_cut = spell(form, tokenizer, f'{{"text": {text}, "list": [{text}, {text}]}}')
    assert form.form.read(ids) == {"text": UGLY, "list": [UGLY, UGLY]}
    assert not was_cut


@pytest.mark.parametrize(
    ("max_tokens", "characters"),
    # Byte by byte: x, the emoji's four, the quote's two, the backslash's two, é's two, then x.
    list(enumerate([1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6], start=1)),
)
def test_a_cut_text_ends_before_half_a_character(
    tokenizer: Tokenizer, max_tokens: int, characters: int
) -> None:
    whole = 'x\U0001f600"\\éxxxxx'
    form = RowForm(Form((TEXT,), max_tokens, tokenizer), {})
    text = json.dumps(whole, ensure_ascii=False)
    ids, was_cut = spell(form, tokenizer, f'{{"text": {text}}}')
    assert was_cut
    assert form.form.read(ids) == {"text": whole[:characters]}


def test_what_a_text_leaves_the_next_one_has(tokenizer: Tokenizer) -> None:
    fields = (field("a", {"type": "string"}), field("b", {"type": "string"}))
    form = RowForm(Form(fields, 10, tokenizer), {})
    ids, _ = spell(form, tokenizer, '{"a": "", "b": "123456789012"}')
    assert form.form.read(ids) == {"a": "", "b": "123456789"}


@pytest.mark.parametrize(
    ("value", "end"),
    [
        (b'"abc', 4),
        (b'"ab\\', 3),
        (b'"ab\\u00e', 3),
        (b'"ab\\u00e9', 9),
        (b'"ab\\\\', 5),
        ('"好'.encode(), 4),
        ('"好'.encode()[:3], 1),
        (b'"', 1),
    ],
)
def test_the_end_of_a_text_is_a_whole_character(value: bytes, end: int) -> None:
    assert end_of_text(value) == end


@pytest.mark.parametrize(
    ("value", "end"),
    [
        (b"[", 1),
        (b"[12", 1),
        (b"[12,", 3),
        (b"[12, 3", 3),
        (b'["a', 1),
        (b'["a"', 4),
        (b'["a", "b', 4),
        (b'["a,]\\"", "', 8),
        (b"[true, fal", 5),
    ],
)
def test_the_end_of_a_list_is_a_whole_item(value: bytes, end: int) -> None:
    assert end_of_items(value) == end


def test_texts_are_encoded_without_a_blank_in_front(tokenizer: Tokenizer) -> None:
    tokens = form_tokens(tokenizer)
    for text in ("a", " a", '{"a": "', UGLY, "\n\n", "  ", "好"):
        assert tokens.bytes_of(tokens.encode(text.encode())) == text.encode()


def test_special_tokens_are_never_allowed(tokenizer: Tokenizer) -> None:
    form = RowForm(Form((TEXT,), 20, tokenizer), {})
    state = form.begin()
    state.begin()
    allowed: Sequence[int] = choices(state.allowed())
    assert not {tokenizer.eos_id, tokenizer.pad_id, *tokenizer.special_ids.values()} & set(allowed)
