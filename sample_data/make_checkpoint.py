"""Trains the tiny ChatGLM2 of the sample data by the project's own fine-tuning, from random weights.

Each labelled review becomes two instructions: the very prompts that `reviews.yaml` asks, and their true answers.
Seeded, in float32, on one thread: the same bytes each time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.glm.tokenizer import TOKENIZER_FILE
from glmbatch.settings.job import JobConfig
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import finetune

MAX_POSITIONS = 1024
TRAINING: dict[str, Any] = {
    "data": {
        "text_column": "prompt",
        "response_column": "answer",
        "valid_share": 0.01,
        "test_share": 0.01,
    },
    "scratch": {
        "hidden_size": 128,
        "layers": 4,
        "vocabulary": 2800,
        "max_positions": MAX_POSITIONS,
    },
    "training": {
        "epochs": 2,
        "batch_rows": 32,
        "learning_rate": 3e-3,
        "max_input_tokens": MAX_POSITIONS - 64,
        "max_answer_tokens": 64,
        "seed": 2,
    },
    "metric": "exact_match",
    "runtime": {"device": "cpu"},
}
# What the published config.json says beside the sizes, for tools that ask it.
PUBLISHED_CONFIG = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    },
    "apply_query_key_layer_scaling": True,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "original_rope": True,
    "use_cache": True,
    "transformers_version": "4.27.1",
}


def build_checkpoint(
    train_file: Path, job: JobConfig, directory: Path, most_rows: int | None = None
) -> None:
    """Train on the first rows of `train_file` and write the checkpoint into `directory`, which holds none yet."""
    rows = pq.ParquetFile(train_file).read().to_pylist()[:most_rows]
    with tempfile.TemporaryDirectory() as work, _deterministic():
        instructions = Path(work) / "instructions.parquet"
        pq.write_table(pa.Table.from_pylist(list(make_instructions(rows, job))), instructions)
        data = TRAINING["data"] | {"input": str(instructions)}
        report = finetune(
            TuneConfig(**TRAINING | {"data": data, "output": str(Path(work) / "tuned")})
        )
        trained = Path(report.checkpoint)
        # Two shards and an index, as published (there, seven).
        save_checkpoint(
            load_model(trained, "float32"),
            directory,
            tokenizer_model=trained / TOKENIZER_FILE,
            extra_config=PUBLISHED_CONFIG,
            dtype="float16",
            shard_size_bytes=2_000_000,
        )


def make_instructions(rows: Sequence[dict[str, Any]], job: JobConfig) -> Iterator[dict[str, str]]:
    """What the job asks about each row, and the true answer; the true label stands in for the first step's answer."""
    label_step, reply_step = job.steps
    for row in rows:
        values = {"text": row["text"], "product": row["product"], label_step.name: row["label"]}
        for step, answer in ((label_step, row["label"]), (reply_step, row["reply"])):
            yield {"prompt": step.prompt_template.format_map(values), "answer": answer}


@contextmanager
def _deterministic() -> Iterator[None]:
    """One thread, and no operation whose result varies; what was set before is set again at the end."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
