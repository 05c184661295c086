"""The Python of each contestant, and its checkpoint, which is made once and kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from roster import OURS, Contestant
from workload import Shape

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "contestants"
# Other formats than transformers' own: a script writes them in the environment of their reader.
CONVERTERS = {"gguf": "write_gguf.py", "openvino": "export_openvino.py"}


class NotHere(Exception):
    """A contestant cannot take part; the message says why."""


def find_python(contestant: Contestant, peers_dir: Path) -> str:
    """The Python of the contestant's environment; for ours and transformers', this one."""
    if contestant.program in {OURS, "transformers"}:
        return sys.executable
    python = peers_dir / contestant.program / "bin" / "python"
    if not python.exists():
        raise NotHere(f"no {python}; benchmarks/README.md says how to make it")
    return str(python)


def find_checkpoint(
    contestant: Contestant, shape: Shape, seed: int, cache: Path, peers_dir: Path
) -> Path:
    """The checkpoint of random weights in the contestant's format, made if the cache lacks it."""
    folder = cache / f"{shape.name}-seed{seed}"
    kind = "classifier" if contestant.task == "classify" else "causal"
    native = folder / kind
    script = str(SCRIPTS / "make_checkpoint.py")
    _make(native, [sys.executable, script, kind, json.dumps(shape.config()), str(seed)])
    if contestant.checkpoint == "transformers":
        return native
    form, _, numbers = contestant.checkpoint.partition("-")
    python = find_python(contestant, peers_dir)
    converted = folder / contestant.checkpoint
    _make(converted, [python, str(SCRIPTS / CONVERTERS[form]), str(native), numbers])
    return converted


def environment(threads: int, python: str) -> dict[str, str]:
    """The variables of a contestant's process: its threads, and no network."""
    settings = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        settings |= dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
        )
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():  # only in vLLM's environment, which wants it preloaded
        settings["LD_PRELOAD"] = str(openmp)
    return {**os.environ, **settings}


def _make(path: Path, command: list[str]) -> None:
    """Run `command` with a folder to write to, and rename that to `path` when it is complete."""
    if path.exists():
        return
    print(f"making {path}", file=sys.stderr)
    # A conversion that was killed leaves a folder that must not pass for a checkpoint.
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    done = subprocess.run(
        [*command, str(part)],
        capture_output=True,
        text=True,
        env=environment(0, command[0]),
        check=False,
    )
    if done.returncode:
        raise NotHere(f"{Path(command[1]).name} failed: {last_line(done.stderr)}")
    part.rename(path)


def last_line(log: str) -> str:
    """The reason in a log: the last line that names an error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1][:300]
