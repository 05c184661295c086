"""Identity: when two answers are the same answer. Pure hashing; reads no files.

    step key      what changes a step's answers: settings, weights, tokenizer, numerics, version
    row key       step key + the row's rendered prompt; the same key is the same answer everywhere
    answers key   step key + the rows of one fragment + the answers its prompts use
    output key    a fragment's place and rows + the answers beside them

A fragment's rows are named by the digest of their file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from glmbatch.ledger.fragments import Fragment
from glmbatch.settings.job import GenerateStep, Step

# Raise it by hand when the same settings, weights and prompt give another answer than before.
ANSWERS_VERSION = 2
KEY_BYTES = 16


def _digest(parts: object) -> str:
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * KEY_BYTES]


def answer_settings(step: Step) -> dict[str, Any]:
    """The settings of `step` that change its answers: not its name, audits or model's path."""
    settings = step.model_dump(mode="json", exclude={"name", "model", "audits"})
    if isinstance(step, GenerateStep):
        # Keys of existing outputs hold what an empty `chat` of a generate step means.
        settings["chat"] = step.chat is not False
        if step.temperature == 0:
            for unused in ("top_p", "top_k", "seed"):
                del settings[unused]
    return settings


def step_key(step: Step, model_identity: str) -> str:
    """Key of all that changes the answers of `step`, except its rows.

    `model_identity` stands for weights, tokenizer and numerics.
    """
    return _digest([ANSWERS_VERSION, answer_settings(step), model_identity])


def row_key(step_key: str, prompt: str) -> bytes:
    """Key of one row's answer, 16 bytes."""
    return hashlib.blake2b(prompt.encode(), key=step_key.encode(), digest_size=KEY_BYTES).digest()


def row_seed(seed: int, key: bytes) -> int:
    """Seed of one row's draws, 64 bits: the same wherever and whenever the row is answered."""
    mixed = hashlib.blake2b(key, key=seed.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(mixed, "big")


def answers_key(
    fragment: Fragment,
    step: str,
    step_key: str,
    columns: Mapping[str, str],
    earlier: Mapping[str, str],
) -> str:
    """Key of the answers of the step named `step` over the rows of `fragment`.

    `columns` maps the placeholders of its prompt to source columns. `earlier` maps the steps that
    its prompt uses to their answers keys. The file's name is no part of it: a renamed file has the
    same answers. The step's name is: it names the columns.
    """
    rows = [fragment.digest, fragment.first_row, fragment.rows]
    asked = {name: value for name, value in fragment.partitions if name in columns.values()}
    # Of those that a folder's name gives: the bytes of the file do not tell them.
    given: list[object] = [asked] if asked else []
    if fragment.int96:  # as which a prompt shows its times
        given.append(fragment.int96)
    return _digest([step, step_key, rows, dict(columns), dict(earlier), *given])


def output_key(fragment: Fragment, answers: Mapping[str, str], format: str = "parquet") -> str:
    """Key of the output file of `fragment`, from its place, its rows and its answers.

    `answers` maps steps to answers keys.
    """
    place = fragment.model_dump(mode="json", exclude={"path", "stamp", "partitions"})
    # These and the format joined later, and keys of other outputs were to stay as they are.
    for later in ("form", "typed", "int96"):
        if not place[later]:
            del place[later]
    return _digest([place, list(answers.items()), *([] if format == "parquet" else [format])])
