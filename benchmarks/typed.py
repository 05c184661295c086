"""The work of the task `fields`: the same schemas and rows for every engine, as token ids."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

from extract import SCHEMAS, WORDS, exact, prompts_of, schema_of
from jsonschema import Draft202012Validator

from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.settings.job import ExtractStep
from glmbatch.steps.extract import form_of
from glmbatch.steps.prompt import Prompt

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data" / "tiny-chatglm2"


def fields_work(rows: int, more_tokens: int, words: int, seed: int) -> dict[str, Any]:
    """Rows of the schemas in turn, each with `more_tokens` beyond the least that it needs.

    `limits` is what a whole document may take, so that engines that write the forced tokens too
    have the same room.
    """
    rng = random.Random(seed)
    tokenizer = load_tokenizer(SAMPLE)
    work: dict[str, Any] = {"steps": [], "schemas": [], "step_of": [], "rows": [], "limits": []}
    for number, fields in enumerate(SCHEMAS):
        plain: dict[str, Any] = {"name": "facts", "fields": fields, "max_tokens": 32_768}
        step = ExtractStep(**plain)
        plain["max_tokens"] = max(1, sum(field.least_tokens for field in step.fields) + more_tokens)
        step = ExtractStep(**plain)
        texts = [
            " ".join(rng.choices(WORDS, k=words)) + " lamp" for _ in range(rows // len(SCHEMAS))
        ]
        prompts = prompts_of(step, texts, tokenizer)
        work["steps"].append(plain)
        work["schemas"].append(schema_of(step))
        for prompt in prompts:
            assert isinstance(prompt, Prompt)
            work["step_of"].append(number)
            work["rows"].append(list(prompt.ids))
            work["limits"].append(form_of(step, tokenizer).longest)
    count = len(work["rows"])
    return work | {
        "tokenizer": str(SAMPLE),
        "indexes": list(range(count)),
        "answer_tokens": [0] * count,
    }


def invalid(work: dict[str, Any], documents: list[str]) -> int:
    """How many documents do not parse or are refused by their schema."""
    validators = [Draft202012Validator(exact(schema)) for schema in work["schemas"]]
    count = 0
    for number, document in zip(work["step_of"], documents, strict=True):
        count += not _is_valid(validators[number], document)
    return count


def _is_valid(validator: Any, document: str) -> bool:
    try:
        # As decimal numbers: 0.57 is no multiple of 0.01 as a float.
        return bool(validator.is_valid(json.loads(document, parse_float=Decimal)))
    except ValueError:
        return False
