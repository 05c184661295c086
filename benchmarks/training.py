"""Compare training with a plain Trainer loop on the same rows: tokens per second and peak memory.

    python benchmarks/training.py                 all weights of a small model, float32 on CPU
    python benchmarks/training.py --shape mid --method lora

Two variants take turns, each round in its own process. One is `glmbatch.tuning.train`. The other is
transformers' Trainer as its documentation shows it, with shuffled rows and padded batches. Both use
the same base, batch size, evaluations and saves.

Seconds are the CPU time of all threads within `Trainer.train`. Tokens do not include padding.
Weights are random, and lengths are log-normal. The ceiling is the model's largest matrix product,
measured in the same process. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
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

from workload import SHAPES, Lengths, Shape

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
LABELS = [f"label {number}" for number in range(4)]
OURS = "glmbatch"
PLAIN = "plain Trainer"
KEPT = ("shape", "method", "rows", "batch", "threads", "rounds")  # options copied into the report


def main() -> None:
    options = _options()
    if options.way:
        print(json.dumps(measure(options)))
        return
    runs = run_in_turn(options)
    result: dict[str, Any] = {name: getattr(options, name) for name in KEPT}
    for way, facts in runs.items():
        result[way] = {}
        for key in facts[0]:
            result[way][key] = round(statistics.median(run[key] for run in facts), 4)
    ratio = result[OURS]["tokens_per_second"] / result[PLAIN]["tokens_per_second"]
    result["times_plain"] = round(ratio, 3)
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
    parser.add_argument("--way", choices=(OURS, PLAIN), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_in_turn(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of each variant and round."""
    # Separate processes: peak memory is per process, and each replaces Trainer.train.
    command = [sys.executable, __file__, *sys.argv[1:], "--way"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    runs: dict[str, list[dict[str, float]]] = {OURS: [], PLAIN: []}
    for turn in range(options.rounds):
        # The order alternates, so that a machine that slows down affects both.
        ways = (OURS, PLAIN) if turn % 2 else (PLAIN, OURS)
        for way in ways:
            done = subprocess.run(
                [*command, way], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}, {way}: {runs[way][-1]}", file=sys.stderr)
    return runs


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train one epoch in this process; return its rates and peak memory."""
    import torch
    from contestants.machine import product_flops

    torch.set_num_threads(options.threads)
    # The checkpoint needs more ids than the tokenizer has.
    shape = SHAPES[options.shape]
    shape = replace(shape, vocabulary=max(shape.vocabulary, 4096))
    rows = make_rows(shape, options)
    seconds = time_training()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder / "base", shape)
        valid = rows[: options.rows // 10]
        train = train_ours if options.way == OURS else train_plain
        train(options, folder, rows, valid)
    tokens = sum(len(row.ids) for row in rows)
    # Two operations per weight in each pass: forward, gradients of activations and, if all weights
    # are trained, gradients of weights.
    operations = (6 if options.method == "full" else 4) * shape.body_weights * tokens
    on_gpu = options.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    limit = product_flops(shape.hidden, 2 * shape.inner, dtype, options.device)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if on_gpu:
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return {
        "tokens_per_second": tokens / seconds[0],
        "of_product_rate": operations / seconds[0] / limit,
        "peak_gib": peak_gib,
    }


def make_rows(shape: Shape, options: argparse.Namespace) -> list[Any]:
    """Rows of random ids and labels, the same for both variants."""
    from glmbatch.tuning.encode import TrainingRow

    rng = random.Random(0)
    rows = []
    for number, length in enumerate(Lengths(options.mean_tokens, 4, 512).draw(rng, options.rows)):
        ids = [rng.randrange(31, shape.vocabulary) for _ in range(length)]
        rows.append(TrainingRow(ids, rng.randrange(len(LABELS)), f"row {number}"))
    return rows


def time_training() -> list[float]:
    """Return a list to which each call of `Trainer.train` in this process adds its CPU seconds.

    Both variants end in that call. It excludes loading, saving the result and calibration.
    """
    from transformers import Trainer

    seconds: list[float] = []
    plain_train = Trainer.train

    def timed(*arguments: Any, **more: Any) -> Any:
        start = time.process_time()
        result = plain_train(*arguments, **more)
        seconds.append(time.process_time() - start)
        return result

    Trainer.train = timed  # type: ignore[method-assign]
    return seconds


def write_base(directory: Path, shape: Shape) -> None:
    """Write a checkpoint of random weights in the published layout."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from glmbatch.glm.checkpoint.save import save_checkpoint

    torch.manual_seed(0)
    config = GlmConfig(**shape.config() | {"id2label": {0: "LABEL_0"}})
    tokenizer = SAMPLE / "tiny-chatglm2" / "tokenizer.model"
    save_checkpoint(GlmForCausalLM(config), directory, tokenizer_model=tokenizer, dtype="float32")


def train_ours(options: argparse.Namespace, folder: Path, rows: Any, valid: Any) -> None:
    from glmbatch.settings.tuning import TuneConfig
    from glmbatch.tuning.train import train

    config = TuneConfig.model_validate(
        {
            "data": {"input": "none"},
            "output": str(folder),
            "model": str(folder / "base"),
            "training": {
                "method": options.method,
                "epochs": 1,
                "batch_rows": options.batch,
                "gradient_checkpointing": False,
            },
            "runtime": {"device": options.device},
        }
    )
    train(config, LABELS, rows, valid, folder / "run")


def train_plain(options: argparse.Namespace, folder: Path, rows: Any, valid: Any) -> None:
    """Train the same base with the same settings through transformers and peft alone."""
    import torch
    from transformers import Trainer, TrainingArguments

    def pad(batch: Any) -> dict[str, Any]:
        ids = [torch.tensor(row.ids) for row in batch]
        ones = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(ones, batch_first=True),
            "labels": torch.tensor([row.label for row in batch]),
        }

    on_gpu = options.device.startswith("cuda")
    steps = math.ceil(len(rows) / options.batch)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        num_train_epochs=1,
        learning_rate=1e-4,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        logging_steps=max(1, steps // 10),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        model=plain_model(folder / "base", options),
        args=arguments,
        train_dataset=rows,
        eval_dataset=valid,
        data_collator=pad,
    ).train()


def plain_model(base: Path, options: argparse.Namespace) -> Any:
    """The base's weights under a new classification head, prepared as peft documents it."""
    from transformers import GlmForSequenceClassification

    from glmbatch.glm.checkpoint.load import load_model

    # On a GPU, frozen weights stay in bfloat16, as in our own training.
    half = options.device.startswith("cuda") and options.method != "full"
    loaded = load_model(base, "bfloat16" if half else "float32", options.device)
    config = loaded.config
    config.id2label = dict(enumerate(LABELS))
    config.pad_token_id = 0
    config.use_cache = False
    config.problem_type = "single_label_classification"
    model: Any = GlmForSequenceClassification(config)
    model.model = loaded.model
    model.to(options.device)
    if options.method == "head":
        model.requires_grad_(False)
        model.score.requires_grad_(True)
    else:
        model.requires_grad_(True)
    if options.method != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    from glmbatch.settings.tuning import LORA_TARGETS, TrainingConfig

    ours = TrainingConfig()
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=ours.lora_rank,
        lora_alpha=ours.lora_alpha,
        lora_dropout=ours.lora_dropout,
        target_modules=[*LORA_TARGETS],
        modules_to_save=["score"],
    )
    return get_peft_model(model, adapter)


if __name__ == "__main__":
    main()
