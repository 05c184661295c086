"""Contestant: our own engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from models import load_model
from protocol import Run, serve

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.tokenizer import load_tokenizer


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    engine = TorchEngine(
        load_model(options, work),
        eos_id=-1,  # no end token: answers have the lengths that the work prescribes
        token_count=work["config"]["vocab_size"],
        max_batch_tokens=work["batch_tokens"],
        max_slots=work["slots"],
        quantization=options.way or "none",
    )
    rows = work["rows"]
    shared = work["prefix_tokens"]
    labels = None
    if work["labels"]:
        labels = tuple(map(tuple, work["labels"]))

    if options.task == "fields":
        return f"torch {torch.__version__}", _fields(engine, work)

    def classify() -> list[Any]:
        asked = [ClassifyRequest(at, row, labels, shared) for at, row in enumerate(rows)]
        beside = work["beside"]
        requests = (
            replace(asked[at], beside=tuple(asked[at + 1 : at + beside]))
            for at in range(0, len(asked), beside)
        )
        return _in_order(engine.classify(requests), "scores")

    def generate() -> list[Any]:
        lengths = work["answer_tokens"]
        requests = (
            GenerateRequest(at, row, lengths[at], seed=at, shared_tokens=shared, **work["sampling"])
            for at, row in enumerate(rows)
        )
        return _in_order(engine.generate(requests), "ids")

    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return version, generate if any(work["answer_tokens"]) else classify


def _fields(engine: TorchEngine, work: dict[str, Any]) -> Run:
    """Each schema is asked in a call of its own; the engine batches across calls."""
    # These need pydantic, which a GPU machine may lack.
    from glmbatch.settings.job import ExtractStep
    from glmbatch.steps.extract import ask_extractions
    from glmbatch.steps.prompt import Prompt

    tokenizer = load_tokenizer(Path(work["tokenizer"]))
    steps = [ExtractStep(**settings) for settings in work["steps"]]
    prompts: list[dict[bytes, Prompt]] = [{} for _ in steps]
    for at, (number, row) in enumerate(zip(work["step_of"], work["rows"], strict=True)):
        prompts[number][at.to_bytes(16)] = Prompt("", row, 0)

    def ask(number: int) -> list[tuple[bytes, Any]]:
        return list(ask_extractions(steps[number], prompts[number], engine, tokenizer))

    def run() -> list[str]:
        answers = {}
        with ThreadPoolExecutor(len(steps)) as pool:
            for part in pool.map(ask, range(len(steps))):
                answers.update({key: answer.text for key, answer in part})
        return [answers[key] for key in sorted(answers)]

    return run


def _in_order(results: Iterable[Any], field: str) -> list[Any]:
    """The answers in row order. The engine yields each one as soon as it is ready."""
    answers = {}
    for result in results:
        if result.error:
            raise RuntimeError(f"row {result.index}: {result.error}")
        answers[result.index] = getattr(result, field)
    return [answers[at] for at in range(len(answers))]


if __name__ == "__main__":
    serve(load)
