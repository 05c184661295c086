"""Compare the whole job with its engine: what reading, tokenizing, writing and Prefect add.

    python benchmarks/job.py               two steps over 4,000 reviews, the `mid` shape, on CPU
    python benchmarks/job.py --shape 6b --device cuda --dtype bfloat16 --rows 100000 \\
        --rows-per-fragment 10000

Three variants take turns on the same rows with the same loaded engine:

- the engine alone, on prompts that are already tokenized
- the job in plain calls
- the flow with a Prefect server; starting the server is timed separately

Weights are random; reviews and tokenizer are the sample's. The figures are medians of wall seconds.
All answers are compared. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
import yaml
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_LOGGING_LEVEL,
    temporary_settings,
)
from transformers import GlmConfig, GlmForCausalLM
from workload import SHAPES

from flows.annotate import annotate
from glmbatch.cli.server import own_server
from glmbatch.config import JobConfig
from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.ledger.ledger import Ledger
from glmbatch.report.counts import busy_seconds
from glmbatch.run.answer import answer, read_parts
from glmbatch.run.ask import ask
from glmbatch.run.job import run_job
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.run.prompts import build_question_prompts, key_prompts
from glmbatch.run.session import session
from glmbatch.steps.prompt import one_by_one

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
ANSWER_TOKENS = 16
ENGINE = "engine"
# Options that are copied into the report.
KEPT = ("shape", "device", "dtype", "threads", "rows", "rows_per_fragment")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for engine processes on a cluster
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        write_checkpoint(folder / "model", options.shape)
        write_input(folder / "in" / "reviews.parquet", options.rows)
        # In production the server is already up, so its start is not part of the flow.
        start = time.perf_counter()
        with (
            own_server() as client,
            temporary_settings(
                {
                    PREFECT_API_URL: client["PREFECT_API_URL"],
                    PREFECT_API_AUTH_STRING: client["PREFECT_API_AUTH_STRING"],
                    PREFECT_LOGGING_LEVEL: "ERROR",
                }
            ),
        ):
            server_seconds = time.perf_counter() - start
            result = measure(Jobs(folder, options), options)
    line = {name: getattr(options, name) for name in KEPT}
    line["torch"] = torch.__version__
    line["server_start_seconds"] = round(server_seconds, 1)
    line |= result
    for key, value in line.items():
        print(f"{key:32} {value}")
    print(json.dumps(line))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        choices=(*SHAPES, "sample"),
        default="mid",
        help="sample: the sample's trained checkpoint",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rows-per-fragment", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cluster-workers",
        type=int,
        nargs="*",
        default=[],
        help="also run the flow on a Ray cluster with these numbers of engines",
    )
    return parser.parse_args()


def write_checkpoint(directory: Path, shape: str) -> None:
    """Write random weights of that shape with the sample's tokenizer, or copy its checkpoint."""
    sample = SAMPLE / "tiny-chatglm2"
    if shape == "sample":
        shutil.copytree(sample, directory)
        return
    torch.manual_seed(0)
    config = GlmConfig(**SHAPES[shape].config() | {"id2label": {0: "LABEL_0"}})
    model = GlmForCausalLM(config)
    save_checkpoint(model, directory, tokenizer_model=sample / "tokenizer.model")


def write_input(file: Path, rows: int) -> None:
    """Repeat the sample's reviews, numbered so that no two prompts are equal."""
    dataset = ds.dataset(SAMPLE / "labelled", format="parquet")
    reviews = dataset.to_table(columns=["text", "product"]).to_pylist()
    texts = []
    products = []
    for row in range(rows):
        review = reviews[row % len(reviews)]
        texts.append(f"{row}. {review['text']}")
        products.append(review["product"])
    file.parent.mkdir()
    pq.write_table(pa.table({"text": texts, "product": products}), file)


class Jobs:
    """Jobs over the same rows, each into its own output, so that none finds known answers."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._made = 0

    def make(self, **runtime: Any) -> JobConfig:
        """The next job: the sample's first two steps with short answers of one length."""
        self._made += 1
        settings = yaml.safe_load((SAMPLE / "reviews.yaml").read_text(encoding="utf-8"))
        settings["data"] = {
            "input": str(self._folder / "in"),
            "output": str(self._output()),
            "rows_per_fragment": self._options.rows_per_fragment,
        }
        settings["model"] = {"path": str(self._folder / "model"), "dtype": self._options.dtype}
        # Random weights rarely end an answer, so each would run to the last position.
        settings["steps"][1] |= {"max_tokens": ANSWER_TOKENS, "stop": []}
        del settings["steps"][2:]
        settings["runtime"] = {"device": self._options.device, **runtime}
        return JobConfig.model_validate(settings)

    def answers(self) -> list[dict[str, Any]]:
        """The rows that the latest job published, in order."""
        table = ds.dataset(self._output(), partitioning=None).to_table(
            columns=["text", "sentiment", "reply"]
        )
        return sorted(table.to_pylist(), key=lambda row: str(row["text"]))

    def busy_seconds(self) -> float:
        """Seconds from the first prompt to the last answer of the latest job.

        Startup, loading and publication do not count.
        """
        return busy_seconds(Ledger(self._output()).published_receipts())

    def _output(self) -> Path:
        return self._folder / f"out-{self._made}"


@contextmanager
def engine_alone(job: JobConfig) -> Iterator[Callable[[], None]]:
    """A function that sends all prompts of `job` to the engine, bundle by bundle."""
    run = plan_run(job)
    with session(run) as opened:
        calls = []
        for assignment in assign(job, run, prepare_models(job)).in_passes():
            # The second step's prompts contain the answers of the first.
            answer(assignment)
            parts, _ = read_parts(assignment, opened)
            rows = [row for part in parts for row in part.rows]
            prompts = build_question_prompts(assignment.question, rows)
            calls.append((assignment.question, key_prompts(assignment.question, prompts)[1]))

        def ask_all() -> None:
            for question, prompts in calls:
                ask([question], one_by_one(prompts), opened, counted=False)

        yield ask_all


def measure(jobs: Jobs, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, and whether all variants gave the same answers."""

    def on_cluster(workers: int) -> object:
        return annotate(jobs.make(cluster="ray", cluster_workers=workers))

    contestants: dict[str, Callable[[], object]] = {
        "job": lambda: run_job(jobs.make()),
        "flow": lambda: annotate(jobs.make()),
    }
    for workers in options.cluster_workers:
        contestants[f"ray_{workers}"] = partial(on_cluster, workers)
    # This also loads the engine, which stays loaded for all following runs.
    run_job(jobs.make())
    expected = jobs.answers()
    same = True
    answering: dict[str, list[float]] = {name: [] for name in contestants}
    with engine_alone(jobs.make()) as ask_all:
        contestants = {ENGINE: ask_all, **contestants}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(options.rounds + 1):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                wall = time.perf_counter() - start
                if name != ENGINE:
                    same = same and jobs.answers() == expected
                if not turn:
                    continue  # the first turn is a warm-up
                seconds[name].append(wall)
                if name != ENGINE:
                    answering[name].append(jobs.busy_seconds())
    return _medians(seconds, answering) | {"same_answers": same}


def _medians(
    seconds: dict[str, list[float]], answering: dict[str, list[float]]
) -> dict[str, float]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {f"{name}_seconds": round(value, 2) for name, value in medians.items()}
    for name, values in answering.items():
        result[f"{name}_answering_seconds"] = round(statistics.median(values), 2)
    for name in ("job", "flow"):
        result[f"{name}_of_engine_rate"] = round(medians[ENGINE] / medians[name], 3)
    return result


if __name__ == "__main__":
    main()
