"""How much faster 8-bit products are than exact ones, and how many answers they change.

    python benchmarks/quantized.py                                      6B, fp8 beside bfloat16
    python benchmarks/quantized.py --shape tiny --device cpu --rows 3   on a CPU, to try it: int8

Both engines answer the same rows, one engine after the other. A flip is another label, or another
next token after the same text. Weights are random, so scores lie closer together than those of a
trained model, and more answers flip.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from environments import SCRIPTS
from report import write_line
from workload import LABEL_TEMPLATE_TOKENS, SHAPES, Lengths, Work, make_work, tokens_of

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine

sys.path.insert(0, str(SCRIPTS))
from models import make_model

PROMPTS, ANSWERS = Lengths(128, 8, 512), Lengths(58, 4, 256)
ROUNDS = 3
TOKENS = 4  # about so many next tokens of each answer are compared


def main() -> None:
    options = _options()
    tasks = {}
    for task, prefix in (("labels", LABEL_TEMPLATE_TOKENS), ("generate", 0)):
        shape = SHAPES[options.shape]
        tasks[task] = make_work(task, shape, options.rows, PROMPTS, ANSWERS, prefix, seed=0)
    exact = _measure("none", tasks, None, options)
    gc.collect()  # frees the weights before those of the next engine are made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    quick = _measure(options.way, tasks, exact["generate"], options)
    for task, work in tasks.items():
        rates = [tokens_of(work) / measured["seconds"][task] for measured in (exact, quick)]
        pairs = list(zip(exact[task], quick[task], strict=True))
        flips = sum(one != other for one, other in pairs) / len(pairs)
        reading = {"exact_tokens_per_s": rates[0], f"{options.way}_tokens_per_s": rates[1]}
        reading |= {"times_faster": rates[1] / rates[0], "flips": flips, "compared": len(pairs)}
        facts = [f"{name} {value:.4g}" for name, value in reading.items()]
        print(f"{task}: {', '.join(facts)}", flush=True)
        write_line(options.out, {"part": "quantized", "task": task, **reading})


def _measure(
    way: str, tasks: dict[str, Work], texts: list[Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """The labels; the next tokens after each of the exact engine's texts; the seconds of a run.

    Without `texts`, the engine's own are taken, and the tokens are those that follow in them.
    """
    shape = SHAPES[options.shape]
    model = make_model("causal", shape.config(), 0, getattr(torch, options.dtype), options.device)
    engine = TorchEngine(
        model,
        eos_id=-1,
        token_count=shape.vocabulary,
        max_slots=options.slots,
        quantization=way,
    )
    del model
    try:
        labels, generate = tasks["labels"], tasks["generate"]
        scores, label_seconds = _timed(lambda: _scores(engine, labels))
        ids, seconds = _timed(lambda: _written(engine, generate["rows"], generate["answer_tokens"]))
        if texts is None:
            texts = _cut(generate["rows"], ids)
        followed = _written(engine, [text for text, _ in texts], [1] * len(texts))
    finally:
        engine.close()
    chosen = [max(range(len(row)), key=row.__getitem__) for row in scores]
    tokens = [(text, token) for (text, _), (token,) in zip(texts, followed, strict=True)]
    measured = {"labels": label_seconds, "generate": seconds}
    return {"labels": chosen, "generate": tokens, "seconds": measured}


def _cut(rows: list[list[int]], answers: list[Any]) -> list[Any]:
    """Each row with the first part of its answer, cut at some places, and the token after it."""
    texts = []
    for row, answer in zip(rows, answers, strict=True):
        for at in range(0, len(answer), max(1, len(answer) // TOKENS)):
            texts.append(([*row, *answer[:at]], answer[at]))
    return texts


def _scores(engine: TorchEngine, work: Work) -> list[Any]:
    labels = tuple(map(tuple, work["labels"]))
    shared = work["prefix_tokens"]
    requests = (ClassifyRequest(at, row, labels, shared) for at, row in enumerate(work["rows"]))
    return _in_order(engine.classify(requests), "scores")


def _written(engine: TorchEngine, rows: list[list[int]], tokens: list[int]) -> list[Any]:
    requests = (GenerateRequest(at, row, tokens[at]) for at, row in enumerate(rows))
    return _in_order(engine.generate(requests), "ids")


def _in_order(results: Iterable[Any], field: str) -> list[Any]:
    answers = sorted(results, key=lambda result: result.index)
    assert not any(result.error for result in answers)
    return [getattr(result, field) for result in answers]


def _timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float]:
    """The answers, and the median time of a run after the first."""
    answers = work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return answers, statistics.median(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=("fp8", "int8"), help="default: fp8, on CPU int8")
    parser.add_argument("--shape", choices=SHAPES, default="6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="default: bfloat16, on CPU float32")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=1024, help="rows generated at once")
    parser.add_argument("--out", type=Path, help="add each reading as a JSON line")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.way = options.way or ("int8" if on_cpu else "fp8")
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    return options


if __name__ == "__main__":
    main()
