"""Contestant: our own engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from models import load_model
from protocol import Run, serve

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine


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

    def classify() -> list[Any]:
        requests = (ClassifyRequest(at, row, labels, shared) for at, row in enumerate(rows))
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
