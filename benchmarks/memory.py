"""What our engine leaves on a GPU when it is closed, how it loads again, and too little memory.

    python benchmarks/memory.py                                 6B in bfloat16 on a GPU
    python benchmarks/memory.py --shape tiny --device cpu       on a CPU, to try it

Answers with little memory must be those with much, but for rounding. Weights are random.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environments import SCRIPTS
from report import write_line
from workload import SHAPES, model_parser

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine

sys.path.insert(0, str(SCRIPTS))
from models import make_model

GIB = 1 << 30
LEFT_BYTES = 5 * GIB // 2  # beside the second engine's weights
TOKENS = 24


def main() -> None:
    options = _options()
    memory = {"before": _memory()}
    engine = _load(options)
    memory["loaded"] = _memory()
    whole = _answers(engine, options.rows)
    memory["after generation"] = _memory()
    engine.close()
    del engine
    memory["closed"] = _memory()
    gc.collect()
    memory["closed, garbage collected"] = _memory()
    for when, reading in memory.items():
        _say(options.out, when, reading)
    start = time.perf_counter()
    engine = _load(options)
    _say(options.out, "loaded again", {**_memory(), "seconds": time.perf_counter() - start})
    filler = None
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        filler = torch.empty(max(0, free - LEFT_BYTES), dtype=torch.uint8, device=options.device)
    start = time.perf_counter()
    tight = _answers(engine, options.rows)
    seconds = time.perf_counter() - start
    del filler
    engine.close()
    reading = {
        "seconds": seconds,
        "rows": len(whole),
        "same": sum(tight[at] == whole[at] for at in whole),
        "errors": sum(isinstance(answer, str) for answer in tight.values()),
    }
    _say(options.out, "2.5 GiB left", reading)


def _load(options: argparse.Namespace) -> TorchEngine:
    shape = SHAPES[options.shape]
    dtype = getattr(torch, options.dtype)
    model = make_model("causal", shape.config(), 0, dtype, options.device)
    return TorchEngine(model, eos_id=-1, token_count=shape.vocabulary)


def _answers(engine: TorchEngine, rows: int) -> dict[int, Any]:
    """The ids of each row, or its error."""
    requests = (GenerateRequest(at, [40 + at % 90] * (100 + at), TOKENS) for at in range(rows))
    return {result.index: result.error or result.ids for result in engine.generate(requests)}


def _memory() -> dict[str, float]:
    """GiB that are free on the card, and those of torch's allocator in this process."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    return {
        "free": torch.cuda.mem_get_info()[0] / GIB,
        "allocated": torch.cuda.memory_allocated() / GIB,
        "reserved": torch.cuda.memory_reserved() / GIB,
        "peak": torch.cuda.max_memory_allocated() / GIB,
    }


def _say(out: Path | None, when: str, reading: dict[str, Any]) -> None:
    facts = [f"{name} {value:.4g}" for name, value in reading.items()]
    print(f"{when}: {', '.join(facts) or 'no GPU'}", flush=True)
    write_line(out, {"part": "memory", "when": when, **reading})


def _options() -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--rows", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
