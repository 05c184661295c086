"""The Python interpreter of each contestant, and its checkpoint, which is cached."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from roster import OURS, Contestant
from workload import Shape

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "contestants"
# Formats other than transformers' own. A script in the reader's environment writes them.
CONVERTERS = {"gguf": "write_gguf.py", "openvino": "export_openvino.py"}


class NotHere(Exception):
    """A contestant cannot run, for the reason in the message."""


def find_python(contestant: Contestant, peers_dir: Path) -> str:
    """The Python of the contestant's environment.

    Ours and transformers' use this one, and so does a peer that is installed here.
    """
    if contestant.program in {OURS, "transformers"}:
        return sys.executable
    python = peers_dir / contestant.program / "bin" / "python"
    if not python.exists() and find_spec(contestant.program) is not None:
        return sys.executable
    if not python.exists():
        raise NotHere(f"no {python}; see benchmarks/README.md to install it")
    return str(python)


def find_checkpoint(
    contestant: Contestant, shape: Shape, seed: int, cache: Path, peers_dir: Path
) -> Path:
    """The checkpoint of random weights in the contestant's format, written if not yet cached."""
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
    """Environment variables of a contestant's process. They set its threads and bar the network."""
    settings = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        settings |= dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
        )
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():  # only in vLLM's environment, where it must be preloaded
        settings["LD_PRELOAD"] = str(openmp)
    return {**os.environ, **settings}


def _make(path: Path, command: list[str]) -> None:
    """Run `command` with a temporary folder to write to, and rename it to `path` at the end."""
    if path.exists():
        return
    print(f"making {path}", file=sys.stderr)
    # The folder of a killed conversion must not be mistaken for a checkpoint.
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
    """The last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(Error|Exception)\b", line)]
    return (errors or lines or ["no output"])[-1][:300]
