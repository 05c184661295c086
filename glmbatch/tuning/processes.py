"""One training in several processes on this machine, each with its own GPU.

torchrun starts this module in each process, and ends all of them if one fails. The Trainer
distributes the batches and averages the gradients. Also what a process makes of a full disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmbatch.errors import GlmbatchError, InputError, TransientError
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.errors import one_line
from glmbatch.store.files import writable

# What torch and safetensors say of a full disk, for which they have no class of error.
DISK_ERRORS = ("No space left", "PytorchStreamWriter failed", "unexpected pos")
FAILED = "failed.json"  # passes an error of a process to the one that started it


def train_together(config: TuneConfig, run: Path) -> None:
    """Train in `config.training.processes` processes. Raises the error of the first that failed."""
    failed = run / FAILED
    failed.unlink(missing_ok=True)  # left by an earlier attempt
    processes = config.training.processes
    # Tethered, so that a killed training leaves no process that occupies a GPU.
    launcher = ["-m", "glmbatch.tethered", "torch.distributed.run"]
    launcher += ["--standalone", "--nproc-per-node", str(processes)]
    worker = ["-m", __name__, config.model_dump_json(), str(run)]
    # Their output goes to a log, because the terminal belongs to the flow.
    log = run / "processes.log"
    with log.open("wb") as output:
        command = [sys.executable, *launcher, *worker]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output
        ) as started:
            code = started.wait()
    if failed.is_file():
        failure = json.loads(failed.read_text(encoding="utf-8"))
        raise (InputError if failure["input"] else TransientError)(failure["message"])
    if code:  # killed, so there is no file with the reason
        raise TransientError(f"{log}: one of {processes} processes ended with code {code}.")


@contextmanager
def writable_run(run: Path) -> Iterator[None]:
    """Turn errors of writing below `run` into ours; torch and safetensors have some of their own.

    TransientError for a full disk, InputError when the caller may not write.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in {errno.EROFS, errno.EDQUOT, errno.ENOSPC}:
            with writable(run, "output"):
                raise
        if not any(words in str(error) for words in DISK_ERRORS):
            raise
        raise TransientError(
            f"{run}: cannot be written: {os.strerror(errno.ENOSPC)} ({one_line(error)})."
        ) from error


def main() -> int:
    """Train in this process as one of several; returns the exit code."""
    import torch.distributed

    from glmbatch.tuning.train import train_here

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    run = Path(sys.argv[2])
    try:
        train_here(TuneConfig.model_validate_json(sys.argv[1]), run)
    except GlmbatchError as error:
        failure = {"input": isinstance(error, InputError), "message": str(error)}
        (run / FAILED).write_text(json.dumps(failure), encoding="utf-8")
        return 1
    # Otherwise the backend's threads outlive the interpreter and sometimes abort a done process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
