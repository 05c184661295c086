"""Whether a tokenizer belongs to the weights beside it. People copy one from another folder.

No tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from glmbatch.errors import InputError
from glmbatch.glm.files import small_json
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# ChatGLM2 and its siblings of one tokenizer: ids, the vocabulary padded, and ids of a text.
PUBLISHED_SIZE = 64_794
_PUBLISHED_PADDED = 65_024
_PUBLISHED_IDS = {"你好": (36_474, 54_591)}
# Vocabularies are padded to a multiple of some hundreds. Further apart, they are of two models.
_MOST_PADDING = 1_024
_MOST_PADDING_SHARE = 0.1


def read_tokenizer(directory: Path, padded: int | None, eos_id: int | None) -> Tokenizer | None:
    """The tokenizer of `directory`, None when there is none.

    `padded` rows of weights and the end's id are what config.json states; None if it is unsound.

    InputError when it is damaged, or certainly another checkpoint's.
    """
    file = directory / TOKENIZER_FILE
    if not os.path.lexists(file):
        return None
    tokenizer = load_tokenizer(directory)
    size = tokenizer.vocab_size
    advice = "It belongs to another checkpoint: copy the one of the base."
    _refuse_other_ids(directory, tokenizer, advice)
    extended = padded == _PUBLISHED_PADDED and size > PUBLISHED_SIZE
    if size == PUBLISHED_SIZE or extended:
        _refuse_other_texts(file, tokenizer, advice)
    if padded is None or eos_id is None:
        return tokenizer
    if size > padded:
        raise InputError(
            f"{file}: {size} ids, more than the {padded} that config.json states. {advice}"
        )
    if padded == _PUBLISHED_PADDED and size < PUBLISHED_SIZE:
        raise InputError(
            f"{file}: {size:,} ids; weights of {_PUBLISHED_PADDED:,} rows, as config.json states, "
            f"have the published tokenizer of {PUBLISHED_SIZE:,}. {advice}"
        )
    word = tokenizer.word_of(eos_id)
    if word is not None:
        raise InputError(
            f"{file}: id {eos_id}, with which config.json ends a text, is the word "
            f"{word[:40]!r}. {advice}"
        )
    return tokenizer


def tokenizer_doubts(tokenizer: Tokenizer, padded: int, eos_id: int) -> Iterator[str]:
    """What makes it doubtful that the tokenizer belongs to the weights."""
    if tokenizer.eos_id != eos_id:
        yield (
            f"{TOKENIZER_FILE} ends a text with id {tokenizer.eos_id}, config.json with {eos_id}"
        )
    more = tokenizer.vocab_size - PUBLISHED_SIZE
    if padded == _PUBLISHED_PADDED and more > 0:
        yield (
            f"{TOKENIZER_FILE} has {more:,} ids more than the published one, and so other ids of "
            f"[gMASK] and its like: weights that were not trained with it answer garbage"
        )
    padding = padded - tokenizer.vocab_size
    if padding > min(_MOST_PADDING, _MOST_PADDING_SHARE * padded):
        yield (
            f"{TOKENIZER_FILE} has {tokenizer.vocab_size:,} ids, far fewer than the "
            f"{padded:,} of the weights: it may be another checkpoint's, and "
            "answers would be garbage"
        )


def _refuse_other_texts(file: Path, tokenizer: Tokenizer, advice: str) -> None:
    """InputError when a published text has other ids. Words that users add come after these."""
    published_size = tokenizer.vocab_size == PUBLISHED_SIZE
    for text, published in _PUBLISHED_IDS.items():
        ids = tuple(tokenizer.encode_plain([text])[0])
        if ids == published:
            continue
        if published_size:
            advice = "Copy it again from THUDM/chatglm2-6b."
        size = "has the size of" if published_size else "is larger than"
        raise InputError(
            f"{file}: {size} the published tokenizer, but {text} gives {ids} and not {published}. "
            f"{advice}"
        )


def _refuse_other_ids(directory: Path, tokenizer: Tokenizer, advice: str) -> None:
    """InputError when a file beside the tokenizer gives a special token another id."""
    for name, token, stated in _stated_ids(directory):
        own = tokenizer.special_ids.get(token)
        if own is not None and own != stated:
            raise InputError(
                f"{directory / TOKENIZER_FILE}: makes {token} id {own}, {name} says {stated}. "
                f"{advice}"
            )


def _stated_ids(directory: Path) -> Iterator[tuple[str, str, int]]:
    added = small_json(directory / "added_tokens.json")
    for token, number in added.items():
        if isinstance(number, int):
            yield "added_tokens.json", token, number
    decoder = small_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if number.isdecimal() and isinstance(token, dict):
            yield "tokenizer_config.json", str(token.get("content")), int(number)
