"""What more classify steps over the same texts cost: the job with one step, and with all five.

    python benchmarks/questions.py               60 texts of 500 tokens, the `mid` shape, one core
    python benchmarks/questions.py --question-first        the text last, so that none is shared

Then one step that chooses one of 20 labels, and one that judges each of them by itself. Jobs take
turns on the same rows with the same loaded engine, and the figures are medians of CPU
seconds. Weights are random; texts and tokenizer are the sample's. The answers of the five steps are
compared with those of a job for each step. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from job import SAMPLE, write_checkpoint
from workload import SHAPES

from glmbatch.config import JobConfig
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.run.job import run_job

QUESTIONS = {
    "sentiment": ("What does the customer feel?", ["positive", "negative", "neutral"]),
    "late": ("Was the delivery late?", ["yes", "no", "not said"]),
    "broken": ("Did anything arrive broken?", ["yes", "no", "not said"]),
    "wish": ("What does the customer want?", ["a refund", "a repair", "a new one", "nothing"]),
    "again": ("Would the customer buy it again?", ["yes", "no", "not said"]),
}

TOPICS = """price, delivery, packing, size, color, material, smell, noise, battery, manual, support,
refund, repair, warranty, safety, weight, design, cleaning, spare parts, advertising"""
TOPIC_LABELS = [topic.strip() for topic in TOPICS.split(",")]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "model", options.shape)
        tokens = write_texts(folder / "in" / "texts.parquet", options)
        result = measure(Jobs(folder, options), options.rounds)
    line = {"shape": options.shape, "rows": options.rows, "mean_tokens": tokens, **result}
    for key, value in line.items():
        print(f"{key:20} {value}")
    print(json.dumps(line))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--question-first", action="store_true")
    return parser.parse_args()


def write_texts(file: Path, options: argparse.Namespace) -> float:
    """Write texts of about as many tokens each; returns their mean."""
    tokenizer = load_tokenizer(SAMPLE / "tiny-chatglm2")
    dataset = ds.dataset(SAMPLE / "labelled", format="parquet")
    reviews = dataset.to_table(columns=["text"]).column("text").to_pylist()
    texts = []
    for row in range(options.rows):
        text = f"{row}."
        at = 37 * row
        while len(tokenizer.encode_plain([text])[0]) < options.tokens:
            text += f" {reviews[at % len(reviews)]}"
            at += 1
        texts.append(text)
    file.parent.mkdir()
    pq.write_table(pa.table({"text": texts}), file)
    return statistics.mean(map(len, tokenizer.encode_plain(texts)))


class Jobs:
    """Jobs over the same rows, each into an output of its own, so that none finds known answers."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._question_first = options.question_first
        self._made = 0

    def questions(self, names: list[str]) -> list[dict[str, Any]]:
        """Steps that ask these questions."""
        return [self._step(name, *QUESTIONS[name]) for name in names]

    def topics(self, *, multiple: bool) -> list[dict[str, Any]]:
        """A step that chooses one of 20 labels, or judges each by itself."""
        step = self._step("topics", "What is it about?", TOPIC_LABELS)
        if multiple:
            # Each is one token of the sample's small vocabulary, which splits "yes" in two.
            step |= {"multiple": True, "verdicts": ["ok", "no"]}
        return [step]

    def _step(self, name: str, question: str, labels: list[str]) -> dict[str, Any]:
        parts = ["{text}", question]
        template = "\n\n".join(parts[::-1] if self._question_first else parts)
        return {"kind": "classify", "name": name, "labels": labels, "prompt_template": template}

    def run(self, steps: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
        """CPU seconds of a job with these steps, and its rows."""
        self._made += 1
        output = self._folder / f"out-{self._made}"
        job = JobConfig.model_validate(
            {
                "data": {"input": str(self._folder / "in"), "output": str(output)},
                "model": {"path": str(self._folder / "model")},
                "steps": steps,
                "runtime": {"device": "cpu", "engine_process": False},
            }
        )
        began = time.process_time()
        run_job(job)
        seconds = time.process_time() - began
        return seconds, ds.dataset(output, partitioning=None).to_table().to_pylist()


def measure(jobs: Jobs, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, and the largest difference of a score from the step's alone."""
    names = list(QUESTIONS)
    contestants = {
        "one_step": jobs.questions(names[:1]),
        "five_steps": jobs.questions(names),
        "20_labels": jobs.topics(multiple=False),
        "20_independent_labels": jobs.topics(multiple=True),
    }
    together = jobs.run(jobs.questions(names))[1]  # loads the model
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, steps in contestants.items():
            seconds[name].append(jobs.run(steps)[0])
    different, most = 0, 0.0
    for name in names:
        alone = jobs.run(jobs.questions([name]))[1]
        for row, other in zip(together, alone, strict=True):
            different += row[name] != other[name]
            most = max(most, abs(row[f"{name}_score"] - other[f"{name}_score"]))
    result: dict[str, Any] = {}
    for name, measured in seconds.items():
        result[f"{name}_seconds"] = round(statistics.median(measured), 3)
    result["five_to_one"] = _ratio(seconds["five_steps"], seconds["one_step"])
    result["independent_to_one_of_20"] = _ratio(
        seconds["20_independent_labels"], seconds["20_labels"]
    )
    return result | {"different_labels": different, "largest_difference": most}


def _ratio(seconds: list[float], others: list[float]) -> float:
    """The median over rounds of their ratio."""
    return round(statistics.median(map(truediv, seconds, others)), 3)


if __name__ == "__main__":
    main()
