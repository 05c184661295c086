"""The protocol between contestant and runner: one JSON line when ready, one for each `run`.

Standard library only, because this module runs in the environment of every contestant.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Work = dict[str, Any]
# Does the whole work once; returns one answer for each row, in the order of the rows.
Run = Callable[[], Sequence[Any]]


def serve(load: Callable[[argparse.Namespace, Work], tuple[str, Run]]) -> None:
    """Load once, then do the work for each input line `run`, until the input ends."""
    # Standard output carries only answers. Whatever libraries print goes to the log.
    with os.fdopen(os.dup(1), "w", buffering=1) as output:
        os.dup2(2, 1)
        options = _options()
        work = json.loads(options.work.read_text())
        version, run = load(options, work)
        output.write(json.dumps({"ready": True, "version": version}) + "\n")
        for line in sys.stdin:
            if line.strip() == "run":
                output.write(json.dumps(_measured(run)) + "\n")
    os._exit(0)  # a library's leftover threads would keep the process alive


def _measured(run: Run) -> dict[str, Any]:
    """The answers, CPU seconds of all threads, wall seconds and peak memory in bytes."""
    gc.collect()
    cpu = time.process_time()
    wall = time.perf_counter()
    answers = run()  # values, not tensors, so the GPU has finished
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": _peak_gpu_bytes(),
        "answers": answers,
    }


def _peak_gpu_bytes() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint in the contestant's format; default: random weights from the seed",
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--way", default="", help="variant, if the contestant has several")
    parser.add_argument("--threads", type=int, default=1, help="0: the library's own choice")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()
