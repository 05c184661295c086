"""Our engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from models import load_model
from protocol import Run, serve

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    engine = TorchEngine(
        load_model(options, work),
        eos_id=-1,
        token_count=work["config"]["vocab_size"],
        max_batch_tokens=work["batch_tokens"],
        max_slots=work["slots"],
        quantization=options.way or "none",
    )
    rows, shared = work["rows"], work["prefix_tokens"]
    labels = tuple(map(tuple, work["labels"])) if options.task == "labels" else None

    def classify() -> list[tuple[float, ...]]:
        requests = (ClassifyRequest(at, row, labels, shared) for at, row in enumerate(rows))
        return _in_order(
            (result.index, result.scores, result.error) for result in engine.classify(requests)
        )

    def generate() -> list[tuple[int, ...]]:
        lengths = work["answer_tokens"]
        requests = (
            GenerateRequest(at, row, lengths[at], shared_tokens=shared)
            for at, row in enumerate(rows)
        )
        return _in_order(
            (result.index, result.ids, result.error) for result in engine.generate(requests)
        )

    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return version, generate if options.task == "generate" else classify


def _in_order(results: Any) -> list[Any]:
    answers = {}
    for index, answer, error in results:
        if error:
            raise RuntimeError(f"row {index}: {error}")
        answers[index] = answer
    return [answers[at] for at in range(len(answers))]


if __name__ == "__main__":
    serve(load)
