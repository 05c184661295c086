"""Keys that say when two answers are the same answer. Pure hashing; reads no files.

    step key      all that changes a step's answers: settings, weights, tokenizer, numerics, version
    row key       step key + the row's rendered prompt; the same key means the same answer
    answers key   step key + the rows of one fragment + the earlier answers that its prompts use
    output key    a fragment's place and rows + the answers beside them
    bundle key    the keys of fragments that share their tasks

The digest of a file identifies its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmbatch.ledger.fragments import Fragment
from glmbatch.settings.job import ExtractStep, GenerateStep, Step

# Raise it by hand when a change of the code gives other answers for the same settings, weights and
# prompt.
ANSWERS_VERSION = 2
# The same for texts that continue a bare prompt.
CONTINUATIONS_VERSION = 1
# The same for extract steps alone: the text that tells a model its fields is in each row key, but
# not what the form of an answer allows, nor how its values are read.
FORM_VERSION = 2
KEY_BYTES = 16
_OFF = {
    "examples": None,
    "history_column": None,
    "n": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_tokens": 0,
    "log_probs": False,
    "confidence": False,
    "abstain_below": None,
    "multiple": False,
    "number": False,
    "compare": "sum",
    "threshold": None,
    "verdicts": None,
}
# Those of them that change no answer's confidence.
_SHOWN = ("abstain_below", "confidence", "log_probs", "threshold")


def _digest(parts: object) -> str:
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * KEY_BYTES]


def answer_settings(step: Step) -> dict[str, Any]:
    """The settings of `step` that change its answers, without its name, audits and model path.

    A condition is left out too: it decides which rows are asked, and not what they are answered.
    """
    settings = step.model_dump(mode="json", exclude={"name", "model", "audits", "when"})
    if isinstance(step, ExtractStep):
        settings["form"] = FORM_VERSION
        # Without what is not set, so that a later setting of fields leaves these keys valid.
        settings["fields"] = [
            field.model_dump(mode="json", exclude_defaults=True) for field in step.fields
        ]
    if isinstance(step, GenerateStep | ExtractStep):
        # An unset `chat` counts as true: the keys of existing outputs contain the effective value.
        settings["chat"] = step.chat is not False
        if step.temperature == 0:
            for unused in ("top_p", "top_k", "seed"):
                del settings[unused]
    # Left out while off: keys from before these settings existed stay valid.
    for later, off in _OFF.items():
        if later in settings and settings[later] == off:
            del settings[later]
    return settings


def step_key(step: Step, model_identity: str, *, chat: bool = True) -> str:
    """The key of everything that changes the answers of `step`, except its rows; 32 hex digits.

    `model_identity` identifies the weights, the tokenizer and the numerics. `chat` says whether
    prompts get the chat form.
    """
    parts = [ANSWERS_VERSION, answer_settings(step), model_identity]
    if isinstance(step, GenerateStep) and not chat:
        parts.append(CONTINUATIONS_VERSION)
    return _digest(parts)


def confidence_key(step: Step, model_identity: str, *, chat: bool = True) -> str:
    """The key of everything that changes how sure `step` is of its answers; as `step_key`.

    Thresholds and columns of confidence are left out: they choose among answers, or show more.
    """
    off = {name: _OFF[name] for name in _SHOWN if name in type(step).model_fields}
    return step_key(step.model_copy(update=off), model_identity, chat=chat)


def row_key(step_key: str, prompt: str) -> bytes:
    """The key of the answer to one rendered `prompt`, 16 bytes."""
    return hashlib.blake2b(prompt.encode(), key=step_key.encode(), digest_size=KEY_BYTES).digest()


def row_seed(seed: int, key: bytes, draw: int = 0) -> int:
    """The seed for sampling one of a row's answers, 64 bits.

    Depends only on `seed`, the row key and the number of the draw.
    """
    drawn = key + draw.to_bytes(2, "big") if draw else key
    mixed = hashlib.blake2b(drawn, key=seed.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(mixed, "big")


def answers_key(  # noqa: PLR0913 - all that decides the answers beside the rows
    fragment: Fragment,
    step: str,
    step_key: str,
    columns: Mapping[str, str],
    earlier: Mapping[str, str],
    *,
    when: tuple[str, Mapping[str, str]] | None = None,
) -> str:
    """The key of the answers of the step named `step` over the rows of `fragment`, 32 hex digits.

    `columns` maps the placeholders of its prompt to source columns. `earlier` maps the steps that
    its prompt or condition uses to their answers keys. `when` is the condition, with the source
    columns by their names in it. The key ignores the file's name, so a renamed file keeps its
    answers. It includes the step's name, because that names the columns.
    """
    rows = [fragment.digest, fragment.first_row, fragment.rows]
    sources = {*columns.values(), *(when[1].values() if when else ())}
    asked = {name: value for name, value in fragment.partitions if name in sources}
    # Values from folder names are not in the file, so its digest does not cover them.
    given: list[object] = [asked] if asked else []
    if fragment.span:
        given.append([fragment.span, fragment.picked])
    if fragment.int96:  # the unit changes how a prompt shows times
        given.append(fragment.int96)
    if fragment.reading:  # the same bytes read in another way are other rows
        given.append(fragment.reading)
    if fragment.fitted:
        given.append({"fitted": fragment.fitted})
    if when:
        given.append([when[0], dict(when[1])])
    return _digest([step, step_key, rows, dict(columns), dict(earlier), *given])


def bundle_key(keys: Sequence[str]) -> str:
    """The key of what is made for several fragments at once, each of which has one of `keys`.

    What is made for one fragment has the fragment's own key.
    """
    return keys[0] if len(keys) == 1 else _digest(list(keys))


def output_key(
    fragment: Fragment,
    answers: Mapping[str, str],
    format: str = "parquet",
    calibration: str = "",
) -> str:
    """The key of the output file of `fragment`, from its place, rows and answers; 32 hex digits.

    `answers` maps steps to their answers keys, in step order. `calibration` is the digest of the
    maps that are applied to them.
    """
    place = fragment.model_dump(mode="json", exclude={"path", "stamp", "partitions", "stored"})
    # Left out when empty, as is the format: keys from before these fields existed stay valid.
    for later in (
        "form",
        "typed",
        "int96",
        "columns",
        "where",
        "span",
        "picked",
        "reading",
        "fitted",
    ):
        if not place[later]:
            del place[later]
    others: list[object] = [] if format == "parquet" else [format]
    if calibration:
        others.append({"calibration": calibration})
    return _digest([place, list(answers.items()), *others])
