"""A vocabulary as bytes: what llguidance needs of it, and texts as ids that stand inside others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from glmbatch.errors import InputError
from glmbatch.glm.tokenizer import Tokenizer


class FormTokens:
    """The tokens of a checkpoint's vocabulary as bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.token_bytes()
        # Without a token for each byte, a value could come to where no token goes on.
        self._single = {text: at for at, text in enumerate(self._bytes) if text and len(text) == 1}
        if len(self._single) < 256:
            raise InputError(
                "the tokenizer has no tokens for single bytes, so an answer could not be held to "
                "its fields. Set the step's model."
            )
        self.of_llguidance = LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._bytes, tokenizer.eos_id, self._plain)),
            n_vocab=len(self._bytes),
            eos_token=tokenizer.eos_id,
        )
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`."""
        return b"".join(self._bytes[token] or b"" for token in ids)

    def consume_forced(self, matcher: LLMatcher) -> bytes:
        """The bytes that alone can come next, after which `matcher` then stands."""
        forced: bytes = matcher.compute_ff_bytes()
        if forced:
            consumed = matcher.consume_tokens(self._one_by_one(forced))
            assert consumed, matcher.get_error()
        return forced

    def _encode(self, text: bytes) -> tuple[int, ...]:
        """The ids of a text that stands behind other text; it may begin inside a character."""
        return tuple(self._plain(text))

    def _plain(self, text: bytes) -> list[int]:
        # sentencepiece puts a blank in front of a text. Behind a line end it puts none.
        line = b"\n" + text
        try:
            (ids,) = self._tokenizer.encode_plain([line.decode()])
        except UnicodeDecodeError:
            ids = []
        for start in range(1, len(ids)):
            if self.bytes_of(ids[start:]) == text:
                return ids[start:]
        # Its normalization changed the text, or joined the line end to it.
        return self._one_by_one(text)

    def _one_by_one(self, text: bytes) -> list[int]:
        return [self._single[bytes([byte])] for byte in text]


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, token_bytes, eos_id, encode) -> None:  # type: ignore[no-untyped-def]
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.special_token_ids = [at for at, text in enumerate(token_bytes) if text is None]
        self.tokens = [b"" if text is None else text for text in token_bytes]
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._encode(text)
        return ids


@lru_cache(8)
def form_tokens(tokenizer: Tokenizer) -> FormTokens:
    """The tokens of `tokenizer`, made once."""
    return FormTokens(tokenizer)
