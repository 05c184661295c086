"""Questions that have values of their own behind one text: read apart, together, and by the rule.

    python benchmarks/behind.py          8 rows of five questions, the `mid` shape, one core

A question joins others behind the text if that costs less (`read_together`). Here it never does,
then always, then by the rule. Figures are medians of CPU seconds over rounds in which all three
take turns. Weights are random, and so are the ids. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from job import write_checkpoint
from workload import SHAPES

from glmbatch.glm.engine import classify
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.protocol import ClassifyRequest
from glmbatch.settings.job import ModelConfig, RuntimeConfig

# Tokens of the text, and of each question behind it.
LENGTHS = [(20, 10), (20, 40), (20, 150), (60, 30), (60, 120), (150, 60), (150, 150), (300, 200)]
COSTS = {"apart": 1e9, "together": 0.0, "rule": classify.BEHIND_COST}
QUESTIONS = 5
LABELS = ((5, 6), (7,), (8, 9, 10))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch) / "model", options.shape)
        runtime = RuntimeConfig(device="cpu", engine_process=False)
        engine = load_engine(ModelConfig(path=str(Path(scratch) / "model")), runtime)
        for text, behind in LENGTHS:
            requests = asked(text, behind, options.rows)
            result = {"text": text, "behind": behind, **measure(engine, requests, options.rounds)}
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            results.append(result)
        engine.close()
    print(json.dumps({"shape": options.shape, "rows": options.rows, "results": results}))


def asked(text: int, behind: int, rows: int) -> list[ClassifyRequest]:
    """Requests of `rows` rows: a text, and behind it the ids of each question."""
    rng = random.Random(0)
    requests = []
    for row in range(rows):
        begin = [rng.randint(10, 2000) for _ in range(text)]
        questions = []
        for number in range(QUESTIONS):
            ids = [*begin, *(rng.randint(10, 2000) for _ in range(behind))]
            questions.append(ClassifyRequest(row * QUESTIONS + number, ids, LABELS))
        requests.append(replace(questions[0], beside=tuple(questions[1:])))
    return requests


def measure(engine: Any, requests: list[ClassifyRequest], rounds: int) -> dict[str, float]:
    """Medians of the seconds, and the ratios to those apart."""
    seconds: dict[str, list[float]] = {name: [] for name in COSTS}
    for _ in range(rounds):
        for name, cost in COSTS.items():
            classify.BEHIND_COST = cost
            began = time.process_time()
            assert len(list(engine.classify(requests))) == QUESTIONS * len(requests)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    result = {name: round(median, 3) for name, median in medians.items()}
    for name in ("together", "rule"):
        result[f"{name}_to_apart"] = round(medians[name] / medians["apart"], 2)
    return result


if __name__ == "__main__":
    main()
