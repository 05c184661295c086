"""Text to token ids and back for ChatGLM2. No tensors.

The only module that knows [gMASK], sop and the chat format.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor

from glmbatch.errors import InputError
from glmbatch.glm.files import read_bytes

TOKENIZER_FILE = "tokenizer.model"
# Characters at a cut that normalization may merge with others, such as accents and spaces.
_EDGE_CHARS = 64
# Their ids follow those of the sentencepiece vocabulary, in this order.
_SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# The mark that stands for a blank in pieces.
_BLANK = "\u2581"

_LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# White space, control characters and zero-width marks: invisible between two lines.
_INVISIBLE = r"[\s\x00-\x1f\x7f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
_TURN = r"(?:\[Round *\d+\]|[问答] *[：:])"
# Possessive, and anchored at the start of a run, so that a million newlines take linear time.
_BEFORE_TURN = re.compile(rf"(?<!{_INVISIBLE}){_INVISIBLE}*+(?={_TURN})")

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class Encoder(Protocol):
    """What turns prompts into ids: a tokenizer, or the n-grams of a TF-IDF model."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def __hash__(self) -> int:
        """By identity."""

    def surely_exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` has more than `limit` ids, judged without encoding it."""


class Tokenizer:
    """A checkpoint's tokenizer. It keeps no state between calls, so threads may share it.

    `vocab_size` counts the sentencepiece vocabulary and the special tokens of `special_ids`.
    `source` is the directory that it was read from, and the digest of its file.
    """

    def __init__(
        self, processor: SentencePieceProcessor, source: tuple[str, str] | None = None
    ) -> None:
        self._processor = processor
        self._source = source
        self._pieces = processor.vocab_size()
        self.special_ids = {token: self._pieces + at for at, token in enumerate(_SPECIAL_TOKENS)}
        self._prefix = [self.special_ids["[gMASK]"], self.special_ids["sop"]]
        self.vocab_size = self._pieces + len(_SPECIAL_TOKENS)
        self.eos_id = processor.eos_id()
        self.pad_id = processor.unk_id()  # the published tokenizer pads with <unk>
        self._silent = {self.eos_id, self.pad_id, processor.bos_id()}
        pieces = range(self._pieces)
        self._longest_piece = max(map(len, processor.id_to_piece(list(pieces))), default=1)
        ordinary = map(self._is_ordinary, pieces)
        self._guard = next((at for at, is_one in enumerate(ordinary) if is_one), None)
        # Without byte tokens, a run of unknown characters of any length becomes one id.
        self._has_bytes = sum(map(processor.is_byte, pieces)) == 256

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Any, ...]]:
        """Pickled as its source, so that another process reads the vocabulary only once."""
        if self._source is None:
            return Tokenizer, (self._processor,)
        return _read_again, self._source

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt: [gMASK] sop, then the ids of its text.

        A special token spelled out in a text is encoded as text. Raises InputError for a text that
        is not valid Unicode.
        """
        return [self._prefix + ids for ids in self.encode_plain(texts)]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without [gMASK] sop.

        Raises InputError for a text that is not valid Unicode.
        """
        try:
            ids: list[list[int]] = self._processor.encode(list(texts))
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"cannot be encoded: {_first_fault(texts)}.") from error
        return ids

    def surely_exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` has more than `limit` token ids, judged by its length alone.

        No id covers more characters than the longest piece. True is certain; False means that the
        text must be encoded to know.
        """
        most_chars = limit * self._longest_piece
        step = most_chars + _EDGE_CHARS
        if len(text) <= step or not self._has_bytes:
            return False
        chars = 0
        for start in range(0, len(text), step):
            try:
                # Normalization comes first: some tokenizers merge spaces or drop characters.
                part: str = self._processor.normalize(text[start : start + step])
            except (TypeError, UnicodeEncodeError):
                return False  # `encode` raises the error that names the fault
            chars += max(0, len(part) - _EDGE_CHARS)
            if chars > most_chars:
                return True
        return False

    def word_of(self, token_id: int) -> str | None:
        """The piece with this id, or None if the id is special, unused or out of range."""
        if token_id >= self._pieces or token_id in self._silent:
            return None
        if self._processor.is_control(token_id) or self._processor.is_unused(token_id):
            return None
        word: str = self._processor.id_to_piece(token_id)
        return word

    def _is_ordinary(self, piece: int) -> bool:
        """Whether a piece has the same text anywhere: no byte, no blank, nothing special."""
        word = self.word_of(piece)
        return word is not None and word.isalnum() and not self._processor.is_byte(piece)

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each piece adds to a text, by id; None for those that add none."""
        of_ids: list[bytes | None] = []
        for token_id in range(self._pieces):
            word = self.word_of(token_id)
            if word is not None and self._processor.is_byte(token_id):
                of_ids.append(bytes([int(word[3:5], 16)]))  # such as <0xF0>
            else:
                of_ids.append(word.replace(_BLANK, " ").encode() if word else None)
        return of_ids

    def decode(self, ids: Iterable[int], *, cut: bool = False, continues: bool = False) -> str:
        """The text of `ids`, without the blank at the beginning of a text.

        Special and out-of-range ids are skipped; bytes that form no character become U+FFFD. Set
        `cut` if the ids were cut off: an incomplete character at their end is then skipped too. Set
        `continues` if they continue a text, so that a blank at their beginning belongs to them.
        """
        text_ids = [int(i) for i in ids if 0 <= i < self._pieces and i not in self._silent]
        if cut and (begun := self._begun_bytes(text_ids)):
            del text_ids[-begun:]
        if continues and self._guard is not None:
            # sentencepiece drops the first blank of all that it decodes, so another piece is first.
            guarded: str = self._processor.decode([self._guard, *text_ids])
            return guarded[len(self._processor.id_to_piece(self._guard)) :]
        text: str = self._processor.decode(text_ids)
        return text

    def _begun_bytes(self, ids: Sequence[int]) -> int:
        """Number of byte tokens at the end of `ids` that form an incomplete UTF-8 character."""
        last = list(takewhile(self._processor.is_byte, reversed(ids)))
        pieces = [self._processor.id_to_piece(i) for i in reversed(last)]  # such as <0xF0>
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(int(piece[3:5], 16) for piece in pieces))
        return len(decoder.getstate()[0])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the checkpoint in directory `path`.

    Raises InputError if its tokenizer.model is missing, damaged or another model's.
    """
    file = Path(path) / TOKENIZER_FILE
    proto = read_bytes(file)
    processor = SentencePieceProcessor()
    if _TIKTOKEN.match(proto):
        raise InputError(
            f"{file}: a tiktoken vocabulary (GLM-4 uses one), not the sentencepiece model of "
            "ChatGLM2. Set model.path to a ChatGLM2 checkpoint."
        )
    try:
        processor.LoadFromSerializedProto(proto)
        # Decode every piece now, so that an invalid one fails here and not in a run.
        pieces = processor.id_to_piece(list(range(processor.vocab_size())))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{file}: damaged or not a sentencepiece model ({str(error)[:80]}). Copy it again."
        ) from error
    # "sop" may also be an ordinary piece. A bracketed token, or one marked as control, is special,
    # and its id would then differ from ChatGLM2's.
    for token in _SPECIAL_TOKENS:
        if token in pieces and (token[0] == "[" or processor.is_control(pieces.index(token))):
            raise InputError(
                f"{file}: has {token} among its pieces; in ChatGLM2, its id follows them. "
                "It belongs to another model: copy the tokenizer.model of the base."
            )
    if processor.eos_id() < 0:
        raise InputError(
            f"{file}: this sentencepiece model has no end token, and ChatGLM2's has one. "
            "Copy the tokenizer.model of the base."
        )
    return Tokenizer(processor, (str(Path(path).absolute()), sha256(proto).hexdigest()))


@lru_cache(maxsize=8)
def _read_again(path: str, digest: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer._source != (path, digest):
        raise InputError(f"{path}/{TOKENIZER_FILE}: was changed after this run read it. Run again.")
    return tokenizer


def _first_fault(texts: Sequence[str]) -> str:
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {place} is a {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"text {place} has half a character (a lone surrogate) at {error.start}"
    raise AssertionError("every text is Unicode")


def chat_prompt(
    query: str, history: Iterable[tuple[str, str]] = (), system_prompt: str | None = None
) -> str:
    """`query` in the chat format of ChatGLM2's training: numbered rounds, the last one open.

    `history` has the question and answer of each earlier round. ChatGLM2 has no role for a system
    prompt, so it comes before the first round.
    """
    rounds = [_round(number, *past) for number, past in enumerate(history, 1)]
    rounds.append(_round(len(rounds) + 1, query, ""))
    if system_prompt:
        rounds.insert(0, system_prompt)
    return "\n\n".join(rounds)


def _round(number: int, query: str, answer: str) -> str:
    return f"[Round {number}]\n\n问：{query}\n\n答：{answer}"


def escape_turns(value: str) -> str:
    """`value`, changed so that nothing in it looks like a turn of the chat format.

    Keeps every visible character. A turn starts after a blank line, so a blank line before
    `[Round N]`, `问：` or `答：` becomes a single line break. At the start of `value`, where the
    template may end in a blank line, a space precedes the mark instead.
    """
    # Most texts have none of these marks, and the regular expression takes seconds on a long text.
    if not any(mark in value for mark in ("[Round", "问", "答")):
        return value
    return _BEFORE_TURN.sub(_close_gap, value)


def _close_gap(gap: re.Match[str]) -> str:
    if gap.start() == 0:
        return " "
    return "\n" if len(_LINE_BREAK.findall(gap.group())) > 1 else gap.group()


def clean_answer(text: str) -> str:
    """The answer as ChatGLM2's own `process_response` shows it: stripped, with its date filled in.

    The model writes [[训练时间]], "time of training", in its place.
    """
    return text.strip().replace("[[训练时间]]", "2023年")
