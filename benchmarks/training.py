"""Training beside a plain Trainer loop on the same rows: tokens a second, and the most memory.

    python benchmarks/training.py                               all weights of a small model, float32 on CPU
    python benchmarks/training.py --shape mid --method lora

Two in turn, each round in a process of its own: `glmbatch.tuning.train`, and transformers' Trainer as its pages show
it (random order, padding to the longest row of a batch), with the same model, batch, evaluations and saves. Seconds are
those of all threads of the process within `Trainer.train`; tokens are those of the rows, without padding. Weights are
random, lengths as texts have them. The ceiling is the model's largest matrix product, measured in the same process. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "contestants")]

from workload import SHAPES, Lengths  # noqa: E402

LABELS = 4
WAYS = ("glmbatch", "plain Trainer")


def main() -> None:
    options = _options()
    if options.way:
        print(json.dumps(measure(options)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--way"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            done = subprocess.run(
                [*command, way], env=environment, capture_output=True, text=True, check=True
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}, {way}: {found[way][-1]}", file=sys.stderr)
    result: dict[str, Any] = {
        key: vars(options)[key] for key in ("shape", "method", "rows", "batch", "threads", "rounds")
    }
    for way, runs in found.items():
        result[way] = {
            key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]
        }
    ours, plain = (result[way]["tokens_per_second"] for way in WAYS)
    result["times_plain"] = round(ours / plain, 3)
    for key, value in result.items():
        print(f"{key:16} {value}")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--method", choices=("full", "lora", "head"), default="full")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mean-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One epoch in this process."""
    import torch
    from ceiling import _product_flops
    from transformers import GlmConfig, GlmForCausalLM, Trainer

    from glmbatch.glm.checkpoint.save import save_checkpoint
    from glmbatch.settings.tuning import TuneConfig
    from glmbatch.tuning.train import TrainingRow, train

    torch.set_num_threads(options.threads)
    shape, rng = SHAPES[options.shape], random.Random(0)
    shape = replace(shape, vocabulary=max(shape.vocabulary, 4096))  # more than the tokenizer has
    lengths = Lengths(options.mean_tokens, 4, 512).draw(rng, options.rows)
    rows = [
        TrainingRow(
            [rng.randrange(31, shape.vocabulary) for _ in range(length)],
            rng.randrange(LABELS),
            f"row {at}",
        )
        for at, length in enumerate(lengths)
    ]
    seconds: list[float] = []
    plain_train = Trainer.train

    def timed(*arguments: Any, **more: Any) -> Any:
        began = time.process_time()
        done = plain_train(*arguments, **more)
        seconds.append(time.process_time() - began)
        return done

    Trainer.train = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        torch.manual_seed(0)
        config = GlmConfig(**shape.config() | {"id2label": {0: "LABEL_0"}})
        tokenizer = ROOT / "sample_data" / "tiny-chatglm2" / "tokenizer.model"
        save_checkpoint(GlmForCausalLM(config), base, tokenizer_model=tokenizer, dtype="float32")
        tune = TuneConfig.model_validate(
            {
                "data": {"input": "none"},
                "output": scratch,
                "model": str(base),
                "training": {
                    "method": options.method,
                    "epochs": 1,
                    "batch_rows": options.batch,
                    "gradient_checkpointing": False,
                },
                "runtime": {"device": options.device},
            }
        )
        valid = rows[: options.rows // 10]
        if options.way == "glmbatch":
            train(
                tune,
                base,
                [f"label {at}" for at in range(LABELS)],
                rows,
                valid,
                Path(scratch) / "run",
            )
        else:
            _plain(tune, base, rows, valid, Path(scratch) / "run")
    tokens = sum(lengths)
    # Forward and the way back to activations; with all weights trained, also to these.
    operations = (6 if options.method == "full" else 4) * shape.body_weights * tokens
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    limit = _product_flops(shape.hidden, 2 * shape.inner, dtype, options.device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated() / 2**30
    return {
        "tokens_per_second": tokens / seconds[0],
        "of_product_rate": operations / seconds[0] / limit,
        "peak_gib": memory,
    }


def _plain(tune: Any, base: Path, rows: Any, valid: Any, folder: Path) -> None:
    """The model of ours, and nothing else of ours."""
    import math

    import torch
    from transformers import Trainer, TrainingArguments

    from glmbatch.tuning.train import _classifier, _with_method

    def pad(batch: Any) -> dict[str, Any]:
        ids = [torch.tensor(row.ids) for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(each) for each in ids], batch_first=True
        )
        return {
            "input_ids": padded,
            "attention_mask": mask,
            "labels": torch.tensor([row.label for row in batch]),
        }

    every = math.ceil(len(rows) / tune.training.batch_rows)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=tune.training.batch_rows,
        per_device_eval_batch_size=tune.training.batch_rows,
        num_train_epochs=1,
        learning_rate=tune.learning_rate,
        use_cpu=tune.runtime.device == "cpu",
        bf16=tune.runtime.device.startswith("cuda"),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, every // 10),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    labels = [f"label {at}" for at in range(LABELS)]
    model = _with_method(_classifier(tune, base, labels, tune.runtime.device), tune)
    model.config.problem_type = "single_label_classification"
    Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=valid, data_collator=pad
    ).train()


if __name__ == "__main__":
    main()
