"""Checks that a tokenizer belongs to the weights beside it, since people copy it from elsewhere.

No tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from glmbatch.errors import InputError
from glmbatch.glm.files import small_json
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# The tokenizer of ChatGLM2 and CodeGeeX2: its ids, the padded vocabulary, and the ids of a text.
PUBLISHED_SIZE = 64_794
_PUBLISHED_PADDED = 65_024
_PUBLISHED_IDS = {"你好": (36_474, 54_591)}
# Vocabularies are padded to a multiple of a few hundred. More padding suggests another model.
_MOST_PADDING = 1_024
_MOST_PADDING_SHARE = 0.1


def read_tokenizer(directory: Path, padded: int | None, eos_id: int | None) -> Tokenizer | None:
    """The tokenizer in `directory`, or None if there is none.

    `padded` is the vocabulary size and `eos_id` the end token in config.json; None if it is
    invalid. Raises InputError if the tokenizer is damaged or certainly another checkpoint's.
    """
    file = directory / TOKENIZER_FILE
    if not os.path.lexists(file):
        return None
    tokenizer = load_tokenizer(directory)
    size = tokenizer.vocab_size
    advice = "It belongs to another checkpoint: copy the tokenizer.model of the base."
    _refuse_other_ids(directory, tokenizer, advice)
    extended = padded == _PUBLISHED_PADDED and size > PUBLISHED_SIZE
    if size == PUBLISHED_SIZE or extended:
        _refuse_other_texts(file, tokenizer, advice)
    if padded is None or eos_id is None:
        return tokenizer
    if size > padded:
        raise InputError(f"{file}: has {size} ids, more than the {padded} in config.json. {advice}")
    if padded == _PUBLISHED_PADDED and size < PUBLISHED_SIZE:
        raise InputError(
            f"{file}: has {size:,} ids; weights of {_PUBLISHED_PADDED:,} rows, as in config.json, "
            f"need the published tokenizer of {PUBLISHED_SIZE:,}. {advice}"
        )
    word = tokenizer.word_of(eos_id)
    if word is not None:
        raise InputError(
            f"{file}: id {eos_id}, the end token of config.json, is the piece "
            f"{word[:40]!r}. {advice}"
        )
    return tokenizer


def tokenizer_doubts(tokenizer: Tokenizer, padded: int, eos_id: int) -> Iterator[str]:
    """Notes on why the tokenizer may not belong to the weights.

    `padded` is the vocabulary size and `eos_id` the end token in config.json.
    """
    if tokenizer.eos_id != eos_id:
        yield (f"{TOKENIZER_FILE} has the end token {tokenizer.eos_id}, config.json has {eos_id}")
    more = tokenizer.vocab_size - PUBLISHED_SIZE
    if padded == _PUBLISHED_PADDED and more > 0:
        yield (
            f"{TOKENIZER_FILE} has {more:,} ids more than the published one, so [gMASK] and other "
            "special tokens have other ids: weights that were not trained with it answer garbage"
        )
    padding = padded - tokenizer.vocab_size
    if padding > min(_MOST_PADDING, _MOST_PADDING_SHARE * padded):
        yield (
            f"{TOKENIZER_FILE} has {tokenizer.vocab_size:,} ids, far fewer than the "
            f"{padded:,} of the weights: if it is another checkpoint's, answers are garbage"
        )


def _refuse_other_texts(file: Path, tokenizer: Tokenizer, advice: str) -> None:
    """Raise InputError if a known text is encoded otherwise than by the published tokenizer.

    This holds for extended tokenizers too, since users add pieces after the published ones.
    """
    published_size = tokenizer.vocab_size == PUBLISHED_SIZE
    for text, published in _PUBLISHED_IDS.items():
        ids = tuple(tokenizer.encode_plain([text])[0])
        if ids == published:
            continue
        if published_size:
            advice = "Copy it again from THUDM/chatglm2-6b."
        size = "has the size of" if published_size else "is larger than"
        raise InputError(
            f"{file}: {size} the published tokenizer, but encodes {text} as {ids}, not as "
            f"{published}. {advice}"
        )


def _refuse_other_ids(directory: Path, tokenizer: Tokenizer, advice: str) -> None:
    """Raise InputError if a file beside the tokenizer gives a special token another id."""
    for name, token, stated in _stated_ids(directory):
        own = tokenizer.special_ids.get(token)
        if own is not None and own != stated:
            raise InputError(
                f"{directory / TOKENIZER_FILE}: {token} has id {own}, but {stated} in {name}. "
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
