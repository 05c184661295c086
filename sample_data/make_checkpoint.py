"""Train the sample's tiny ChatGLM2 from random weights, with the project's own training loop.

Each labelled review becomes two instructions: the first two prompts of `reviews.yaml` with their
true answers. Every second review becomes a third, for the job's extraction. Training is seeded, in
float32 and on one thread, so it gives the same bytes each time.
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
from make_base import Shape, make_base
from make_facts import encode_facts, fact_texts
from muon import Muon

from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.glm.tokenizer import TOKENIZER_FILE, load_tokenizer
from glmbatch.settings.job import ExtractStep, JobConfig
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.encode import TEXT_ALONE, TrainingRow
from glmbatch.tuning.model import build_model
from glmbatch.tuning.split import Labelled, read_labelled
from glmbatch.tuning.train import encode_parts
from glmbatch.tuning.trainer import BETA2, WEIGHT_DECAY, make_trainer

MAX_POSITIONS = 1024
SHAPE = Shape(hidden_size=128, layers=4, vocabulary=2800, max_positions=MAX_POSITIONS)
# Every second review is enough for the extraction, whose prompts are twice as long as the others.
FACTS_EVERY = 2
# The longest reply has some 40 tokens.
MAX_ANSWER_TOKENS = 64
TRAINING: dict[str, Any] = {
    "method": "full",
    "epochs": 2,
    "batch_rows": 32,
    # Random weights tolerate a far higher rate than the default of 2e-5 for trained weights.
    "learning_rate": 3e-3,
    "gradient_checkpointing": False,
    "max_input_tokens": MAX_POSITIONS - MAX_ANSWER_TOKENS,
    "max_answer_tokens": MAX_ANSWER_TOKENS,
    "seed": 2,
}
# Fields of the published config.json besides the sizes, for tools that read them.
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
    """Train on the first rows of `train_file`; write the checkpoint to the new `directory`."""
    rows = pq.ParquetFile(train_file).read().to_pylist()[:most_rows]
    with tempfile.TemporaryDirectory() as folder, _deterministic():
        work = Path(folder)
        instructions = work / "instructions.parquet"
        pq.write_table(pa.Table.from_pylist(list(make_instructions(rows, job))), instructions)
        config = _settings(instructions, work)
        labelled = read_labelled(config.data)
        examples = labelled.parts["train"]
        texts = [example.text for example in examples] + [example.label for example in examples]
        asked = rows[::FACTS_EVERY]
        texts += fact_texts(asked, _facts_step(job))
        base = Path(config.model.path)
        make_base(base, texts, SHAPE, config.training.seed)
        facts = encode_facts(asked, _facts_step(job), load_tokenizer(base), MAX_POSITIONS)
        model = _train(config, labelled, facts, work / "trainer")
        # Two shards and an index. The published model has seven shards.
        save_checkpoint(
            model,
            directory,
            tokenizer_model=base / TOKENIZER_FILE,
            extra_config=PUBLISHED_CONFIG,
            dtype="float16",
            shard_size_bytes=2_000_000,
        )


def _settings(instructions: Path, work: Path) -> TuneConfig:
    data = {
        "input": str(instructions),
        "text_column": "prompt",
        "response_column": "answer",
        # These shares only choose between two epochs. Other reviews score the checkpoint.
        "valid_share": 0.01,
        "test_share": 0.01,
    }
    return TuneConfig.model_validate(
        {
            "data": data,
            "output": str(work),
            "model": str(work / "base"),
            "prompt_template": TEXT_ALONE,
            "training": TRAINING,
            "runtime": {"device": "cpu"},
        }
    )


def _train(
    config: TuneConfig, labelled: Labelled, facts: Sequence[TrainingRow], folder: Path
) -> Any:
    """The trained model, with the weights of the better epoch."""
    rows, valid = encode_parts(config, labelled)
    share = len(facts) // 100
    rows += facts[share:]
    valid += facts[:share]
    torch.manual_seed(config.training.seed)
    model = build_model(config, labelled.labels, "cpu")
    trainer = make_trainer(config, model, rows, valid, folder)
    trainer.optimizer = Muon(model, config.learning_rate, WEIGHT_DECAY, BETA2)
    trainer.train()
    return model


def make_instructions(rows: Sequence[dict[str, Any]], job: JobConfig) -> Iterator[dict[str, str]]:
    """The prompts of the job's first two steps about each row, with the true answers.

    The reply's prompt contains the true label instead of the first step's answer.
    """
    label_step, reply_step, _ = job.steps
    for row in rows:
        values = {"text": row["text"], "product": row["product"], label_step.name: row["label"]}
        for step, answer in ((label_step, row["label"]), (reply_step, row["reply"])):
            yield {"prompt": step.prompt_template.format_map(values), "answer": answer}


def _facts_step(job: JobConfig) -> ExtractStep:
    step = job.steps[2]
    assert isinstance(step, ExtractStep)
    return step


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use one thread and only deterministic operations. Restore the earlier settings at the end."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
