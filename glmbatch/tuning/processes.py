"""One training in several processes of this machine, each with a card of its own. Each of them runs this module.

torchrun starts them and ends all when one fails; the Trainer shares out the batches and joins the gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from glmbatch.errors import GlmbatchError, InputError, TransientError
from glmbatch.settings.tuning import TuneConfig

FAILED = "failed.json"


def train_together(config: TuneConfig, run: Path) -> None:
    """Train in `config.training.processes` processes; the error of the first that failed is raised here."""
    failed = run / FAILED
    failed.unlink(missing_ok=True)
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(config.training.processes),
    ]
    worker = ["-m", __name__, config.model_dump_json(), str(run)]
    log = run / "processes.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, *launch, *worker], stdout=output, stderr=output, check=False
        )
    if failed.is_file():
        told = json.loads(failed.read_text(encoding="utf-8"))
        raise (InputError if told["input"] else TransientError)(told["message"])
    if done.returncode:
        raise TransientError(
            f"{log}: one of {config.training.processes} processes ended with {done.returncode}."
        )


def local_rank() -> int:
    """Which of the processes this one is, counted from 0; 0 where it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def main() -> int:
    """Train in this process as one of several."""
    import torch.distributed

    from glmbatch.tuning.finetune import train_here

    run = Path(sys.argv[2])
    try:
        train_here(TuneConfig.model_validate_json(sys.argv[1]), run)
    except GlmbatchError as error:
        told = {"input": isinstance(error, InputError), "message": str(error)}
        (run / FAILED).write_text(json.dumps(told), encoding="utf-8")
        return 1
    # Else threads of the backend live on while the interpreter ends, and now and then abort a process that is done.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
