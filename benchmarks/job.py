"""The whole job beside its engine: what reading, tokenizing, writing and Prefect add to the model's own time.

    python benchmarks/job.py                                    two steps over 4,000 reviews, the `mid` shape, on CPU
    python benchmarks/job.py --shape 6b --device cuda --dtype bfloat16 --rows 100000 --rows-per-fragment 10000

Three in turn, on the same rows with the same loaded engine: the engine alone, on token ids made beforehand; the job in
plain calls; the flow with a Prefect server, whose start is measured apart. Random weights, the sample's reviews and
tokenizer. Wall seconds, medians; the answers are compared. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import pyarrow.dataset as ds  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings  # noqa: E402
from transformers import GlmConfig, GlmForCausalLM  # noqa: E402
from workload import SHAPES  # noqa: E402

from flows.annotate import annotate  # noqa: E402
from glmbatch.cli.server import own_server  # noqa: E402
from glmbatch.glm.checkpoint.save import save_checkpoint  # noqa: E402
from glmbatch.glm.engine.protocol import ClassifyRequest, Engine, GenerateRequest  # noqa: E402
from glmbatch.ledger.ledger import Ledger  # noqa: E402
from glmbatch.report.counts import busy_seconds  # noqa: E402
from glmbatch.run import session  # noqa: E402
from glmbatch.run.job import run_job  # noqa: E402
from glmbatch.settings.job import JobConfig  # noqa: E402

SAMPLE = ROOT / "sample_data"
ANSWER_TOKENS = 16


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for engine processes on a cluster
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        if options.shape == "sample":
            shutil.copytree(SAMPLE / "tiny-chatglm2", folder / "model")
        else:
            write_checkpoint(folder / "model", options.shape)
        write_input(folder / "in" / "reviews.parquet", options.rows)
        began = time.perf_counter()
        with (
            own_server() as address,
            temporary_settings({PREFECT_API_URL: address, PREFECT_LOGGING_LEVEL: "ERROR"}),
        ):
            server_seconds = time.perf_counter() - began
            result = measure(folder, options)
    facts = {
        key: vars(options)[key]
        for key in ("shape", "device", "dtype", "threads", "rows", "rows_per_fragment")
    }
    line = {
        **facts,
        "torch": torch.__version__,
        "server_start_seconds": round(server_seconds, 1),
        **result,
    }
    for key, value in line.items():
        print(f"{key:32} {value}")
    print(json.dumps(line))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=(*SHAPES, "sample"), default="mid", help="sample: its trained checkpoint"
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
        help="the flow on a Ray cluster too, with so many engines",
    )
    return parser.parse_args()


def write_checkpoint(directory: Path, shape: str) -> None:
    torch.manual_seed(0)
    config = GlmConfig(**SHAPES[shape].config() | {"id2label": {0: "LABEL_0"}})
    save_checkpoint(
        GlmForCausalLM(config),
        directory,
        tokenizer_model=SAMPLE / "tiny-chatglm2" / "tokenizer.model",
    )


def write_input(file: Path, rows: int) -> None:
    """The sample's reviews again and again, numbered, so that no prompt repeats."""
    reviews = (
        ds.dataset(SAMPLE / "labelled", format="parquet")
        .to_table(columns=["text", "product"])
        .to_pylist()
    )
    chosen = [reviews[row % len(reviews)] for row in range(rows)]
    texts = [f"{row}. {review['text']}" for row, review in enumerate(chosen)]
    file.parent.mkdir()
    pq.write_table(
        pa.table({"text": texts, "product": [review["product"] for review in chosen]}), file
    )


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    calls: list[tuple[str, list[Any]]] = []
    runs = 0

    def job(**runtime: Any) -> JobConfig:
        nonlocal runs
        runs += 1
        settings = yaml.safe_load((SAMPLE / "reviews.yaml").read_text(encoding="utf-8"))
        settings["data"] = {
            "input": str(folder / "in"),
            "output": str(folder / f"out-{runs}"),
            "rows_per_fragment": options.rows_per_fragment,
        }
        settings["model"] = {"path": str(folder / "model"), "dtype": options.dtype}
        settings["steps"][1] |= {"max_tokens": ANSWER_TOKENS, "stop": []}
        settings["runtime"] = {"device": options.device, **runtime}
        return JobConfig.model_validate(settings)

    def answers() -> list[Any]:
        """The latest run's, by row."""
        table = ds.dataset(folder / f"out-{runs}", partitioning=None).to_table(
            columns=["text", "sentiment", "reply"]
        )
        return sorted(table.to_pylist(), key=lambda row: str(row["text"]))

    engine = _recording_engine(job(), calls)
    expected = answers()

    def alone() -> None:
        for kind, requests in calls:
            for _ in getattr(engine, kind)(iter(requests)):
                pass

    def on_cluster(workers: int) -> object:
        return annotate(job(cluster="ray", cluster_workers=workers))

    def answering_seconds() -> float:
        """Of the latest run, from the first question to the last answer: without starts, loading and publication."""
        receipts = list(Ledger(folder / f"out-{runs}").published_receipts())
        return busy_seconds(receipts)

    contestants: dict[str, Callable[[], object]] = {
        "engine": alone,
        "job": lambda: run_job(job()),
        "flow": lambda: annotate(job()),
        **{f"ray_{workers}": partial(on_cluster, workers) for workers in options.cluster_workers},
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answering: dict[str, list[float]] = {name: [] for name in contestants if name != "engine"}
    same = True
    for turn in range(options.rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
            if name != "engine":
                answering[name].append(answering_seconds())
                same = same and answers() == expected
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_seconds": round(value, 2) for name, value in medians.items()},
        **{
            f"{name}_answering_seconds": round(statistics.median(values), 2)
            for name, values in answering.items()
        },
        "job_of_engine_rate": round(medians["engine"] / medians["job"], 3),
        "flow_of_engine_rate": round(medians["engine"] / medians["flow"], 3),
        "same_answers": same,
    }


def _recording_engine(job: JobConfig, calls: list[tuple[str, list[Any]]]) -> Engine:
    """Run the job once and keep what it asks of its engine, which is returned."""
    engines: list[Engine] = []
    load = session.load_engine

    def recording(*arguments: Any) -> Engine:
        engine = load(*arguments)
        engines.append(engine)
        for kind in ("classify", "generate"):
            setattr(engine, kind, _recorded(kind, getattr(engine, kind), calls))
        return engine

    session.load_engine = recording  # type: ignore[assignment]
    run_job(job)
    session.load_engine = load
    (engine,) = engines
    del engine.classify, engine.generate  # type: ignore[method-assign]
    return engine


def _recorded(
    kind: str, ask: Callable[[Any], Any], calls: list[tuple[str, list[Any]]]
) -> Callable[[Any], Any]:
    def record(requests: Any) -> Any:
        kept: list[ClassifyRequest | GenerateRequest] = list(requests)
        calls.append((kind, kept))
        return ask(iter(kept))

    return record


if __name__ == "__main__":
    main()
