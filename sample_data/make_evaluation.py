"""Score a checkpoint on the held-out reviews, with the prompts of `reviews.yaml`. Writes no files.

A reply is sensible if all of these are true:

- it names the product;
- it names an aspect from the review, or no aspect if the review is mixed or mentions none;
- it expresses thanks or regret to match the true sentiment;
- it is in the review's language;
- it ends with the end token.

The prompt of the reply contains the model's own sentiment, not the true one.

A field of the facts scores 1 if it equals the true value. A list scores the F1 of its items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.protocol import Engine
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.settings.job import (
    ClassifyStep,
    ExtractStep,
    GenerateStep,
    JobConfig,
    ModelConfig,
    Step,
)
from glmbatch.steps.classify import Choice, ask_choices, label_set
from glmbatch.steps.extract import Extraction, ask_extractions
from glmbatch.steps.generate import Writing, ask_writings
from glmbatch.steps.prompt import Prompt, build_prompts, one_by_one

TONES = {
    "positive": ("感谢支持！", ": thank you! "),
    "negative": ("非常抱歉", ": we are sorry "),
    "neutral": ("感谢反馈！", "感谢购买！", ": thanks for "),
}


@dataclass(frozen=True)
class Scores:
    """Shares of the held-out rows, from 0 to 1. `checks` are the parts of `sensible`.

    `fields` has the mean score of each field, and `facts` the share of rows with all fields right.
    """

    rows: int
    label_accuracy: float
    recall: Mapping[str, float]
    checks: Mapping[str, float]
    sensible: float
    fields: Mapping[str, float]
    facts: float


def evaluate(
    checkpoint: Path, held_out_file: Path, job: JobConfig, most_rows: int | None = None
) -> Scores:
    """Run all steps of `job` with `checkpoint` on the held-out rows, in float32 on the CPU."""
    rows = pq.ParquetFile(held_out_file).read().to_pylist()[:most_rows]
    label_step, reply_step, facts_step = job.steps
    assert isinstance(label_step, ClassifyStep)
    assert isinstance(reply_step, GenerateStep)
    assert isinstance(facts_step, ExtractStep)
    tokenizer = load_tokenizer(checkpoint)
    runtime = job.runtime.model_copy(update={"device": "cpu"})
    engine = load_engine(ModelConfig(path=str(checkpoint), dtype="float32"), runtime)
    try:
        labels = _ask_labels(label_step, rows, engine, tokenizer)
        asked = [{**row, label_step.name: label} for row, label in zip(rows, labels, strict=True)]
        replies = _ask_replies(reply_step, asked, engine, tokenizer)
        facts = ask_facts(facts_step, rows, engine, tokenizer)
    finally:
        engine.close()
    return _scores(rows, labels, replies, facts)


def _ask_labels(
    step: ClassifyStep, rows: Sequence[dict[str, Any]], engine: Engine, tokenizer: Tokenizer
) -> list[str]:
    asked = one_by_one(_prompts(step, rows, tokenizer))
    outcomes = ask_choices([label_set(step, (), tokenizer)], asked, engine)
    answers = {key: outcome for _, key, outcome in outcomes}
    choices = [answers.get(_key(place)) for place in range(len(rows))]
    return [choice.label if isinstance(choice, Choice) else "" for choice in choices]


def _ask_replies(
    step: GenerateStep, rows: Sequence[dict[str, Any]], engine: Engine, tokenizer: Tokenizer
) -> list[Writing | None]:
    asked = one_by_one(_prompts(step, rows, tokenizer))
    outcomes = ask_writings([(step, True)], asked, engine, tokenizer)
    answers = {key: outcome for _, key, outcome in outcomes}
    writings = [answers.get(_key(place)) for place in range(len(rows))]
    return [writing if isinstance(writing, Writing) else None for writing in writings]


def ask_facts(
    step: ExtractStep, rows: Sequence[dict[str, Any]], engine: Engine, tokenizer: Tokenizer
) -> list[Mapping[str, Any]]:
    """The values of each row by field; empty if the row has no answer."""
    answers = dict(ask_extractions(step, _prompts(step, rows, tokenizer), engine, tokenizer))
    extractions = [answers.get(_key(place)) for place in range(len(rows))]
    return [each.values if isinstance(each, Extraction) else {} for each in extractions]


def _prompts(
    step: Step, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> dict[bytes, Prompt]:
    prompts = build_prompts(step, rows, tokenizer, chat=True, max_input_tokens=960)
    return {
        _key(place): prompt for place, prompt in enumerate(prompts) if isinstance(prompt, Prompt)
    }


def _key(place: int) -> bytes:
    return place.to_bytes(16, "big")


def check_reply(row: Mapping[str, Any], reply: str) -> dict[str, bool]:
    """The result of each single check of `reply` to a labelled row."""
    sides = [names for names in (row["good"], row["bad"], row["middling"]) if names]
    mentioned = [name for names in sides for name in names if name in reply]
    in_chinese = any("\u4e00" <= character <= "\u9fff" for character in reply)
    return {
        "names the product": row["product"] in reply,
        "names the aspect": bool(mentioned) == (len(sides) == 1),
        "right polarity": any(tone in reply for tone in TONES[row["label"]]),
        "same language": bool(reply) and in_chinese == (row["language"] != "en"),
    }


def score_facts(true: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, float]:
    """The score of each field of `facts`, from 0 to 1."""
    scores = {}
    for name, value in true.items():
        answer = facts.get(name)
        is_list = isinstance(value, list) and isinstance(answer, list)
        scores[name] = _f1(value, answer) if is_list else float(answer == value)
    return scores


def _f1(true: Sequence[str], answer: Sequence[str]) -> float:
    """Twice the items in both lists, as a share of all their items; 1 if both are empty."""
    common = sum((Counter(true) & Counter(answer)).values())
    return 2 * common / (len(true) + len(answer)) if true or answer else 1.0


def _scores(
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    replies: Sequence[Writing | None],
    facts: Sequence[Mapping[str, Any]],
) -> Scores:
    hits: dict[str, list[bool]] = {label: [] for label in sorted({row["label"] for row in rows})}
    checks: dict[str, list[bool]] = {}
    sensible = []
    for row, label, reply in zip(rows, labels, replies, strict=True):
        hits[row["label"]].append(label == row["label"])
        of_row = check_reply(row, reply.text if reply else "")
        of_row["ends"] = bool(reply and reply.finish_reason == "stop")
        for name, holds in of_row.items():
            checks.setdefault(name, []).append(holds)
        sensible.append(all(of_row.values()))
    of_fields = [score_facts(row["facts"], each) for row, each in zip(rows, facts, strict=True)]
    return Scores(
        rows=len(rows),
        label_accuracy=sum(map(sum, hits.values())) / len(rows),
        recall={label: _share(of_label) for label, of_label in hits.items()},
        checks={name: _share(held) for name, held in checks.items()},
        sensible=_share(sensible),
        fields={name: _share([of_row[name] for of_row in of_fields]) for name in rows[0]["facts"]},
        facts=_share([set(of_row.values()) == {1.0} for of_row in of_fields]),
    )


def _share(hits: Sequence[float]) -> float:
    return sum(hits) / len(hits)
