"""The model to train, its memory, and its batches: the base with a head, an adapter or neither.

Shapes: B rows of a batch, T tokens of its longest row, L labels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GlmForSequenceClassification

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.config_check import PROBLEM_TYPES, Predicts
from glmbatch.glm.checkpoint.load import Checkpoint, ClassifierHead, load_model, read_checkpoint
from glmbatch.glm.device import DTYPE_BYTES, free_memory_bytes, resolve_device
from glmbatch.settings.job import ModelConfig
from glmbatch.settings.tuning import LoraTarget, TrainingConfig, TuneConfig
from glmbatch.tuning.encode import TrainingRow

PAD_ID = 0  # the unknown token; no encoded text contains it, because bytes encode every character
IGNORED = -100  # label of a token without loss, as in torch and transformers
# Inputs and outputs of each matrix, as multiples of the hidden size and of the size between the
# matrices of the MLP. Keys and values have few outputs, which are not counted.
SIDES: Mapping[LoraTarget, tuple[int, int]] = {
    "q_proj": (2, 0),
    "k_proj": (1, 0),
    "v_proj": (1, 0),
    "o_proj": (2, 0),
    "gate_up_proj": (1, 2),
    "down_proj": (1, 1),
}
# Bytes per trained weight: the weight, its gradient and two moments, in float32.
BYTES_TRAINED = 16
# Values that a layer keeps per token for the backward pass, in units of the hidden size; measured
# and rounded up.
KEPT_NUMBERS = 40


def local_rank() -> int:
    """Rank of this training process on its machine, from 0; 0 if it is the only one."""
    # torchrun sets it for each process that it starts.
    return int(os.environ.get("LOCAL_RANK", "0"))


def training_device(name: str, processes: int) -> str:
    """The device of this process: "cpu", or the GPU of its rank. InputError if there is none."""
    device = resolve_device(name)
    if device not in ("cpu", "cuda:0"):
        raise InputError(
            f"{device}: training uses the first visible GPUs. Set runtime.device to cuda and "
            "choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if device == "cpu":
        return device
    if processes > torch.cuda.device_count():
        raise InputError(
            f"only {torch.cuda.device_count()} CUDA devices are visible. "
            "Lower training.processes to that number."
        )
    return f"cuda:{local_rank()}"


def read_base(model: ModelConfig) -> Checkpoint:
    """The checked base checkpoint without its weights; `model` must be a local directory."""
    return read_checkpoint(model.path, model.adapter)


def build_model(
    config: TuneConfig, labels: Sequence[str], device: str, *, several: bool = False
) -> Any:
    """The base of `config`, with a head for `labels` if it learns to classify.

    The head judges each label by itself if a row may have `several`.
    Only the weights that the method trains require gradients. InputError if the base cannot be
    trained.
    """
    training = config.training
    # Frozen weights are published in 16 bits and need no more.
    frozen = training.method != "full" and device.startswith("cuda")
    base = _load(config.model, "bfloat16" if frozen else "float32", device)
    if config.writes:
        if hasattr(base, "score"):
            raise InputError(
                f"{config.model.path}: has a classification head and cannot learn to generate. "
                "Set model to one without a head."
            )
        model = base
    else:
        model = _with_head(base, labels, device, "labels" if several else "label")
    # The cache of keys and values is for generation; here it would only take memory.
    model.config.use_cache = False
    model.requires_grad_(True)
    if training.gradient_checkpointing:
        # Frozen embeddings have no gradient, but a checkpointed layer needs one at its input.
        model.enable_input_require_grads()
    if training.method == "head":
        model.model.requires_grad_(False)
    return _with_adapter(model, training, config.writes) if training.method == "lora" else model


def _load(model: ModelConfig, dtype: str, device: str) -> Any:
    base = load_model(model.path, dtype, device, model.adapter)
    if base.prefix_kv is not None:
        raise InputError(
            f"{model.path}: has a trained prefix (P-Tuning), which training does not support. "
            "Set model to one without."
        )
    return base


def _with_head(base: Any, labels: Sequence[str], device: str, predicts: Predicts) -> Any:
    """A classifier with the weights of `base`; keeps its head if that predicts the same labels."""
    config = base.config
    keeps_head = hasattr(base, "score") and tuple(config.id2label.values()) == tuple(labels)
    # transformers leaves it out for a head that chooses one label.
    problem = PROBLEM_TYPES[predicts] if predicts != "label" else None
    keeps_head = keeps_head and config.problem_type in (problem, PROBLEM_TYPES[predicts])
    config.problem_type = problem
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.pad_token_id = PAD_ID
    with torch.device("meta"):  # allocates nothing, because it takes the weights of the base
        model: Any = GlmForSequenceClassification(config)  # type: ignore[no-untyped-call]
    model.model = base.model
    if keeps_head:
        model.score = base.score
        return model
    model.score = ClassifierHead(config.hidden_size, len(labels)).to(device)
    # As in transformers: small weights, so that all labels are about equally likely at first.
    torch.nn.init.normal_(model.score.weight, 0.0, 0.02)
    torch.nn.init.zeros_(model.score.bias)
    return model


def _with_adapter(model: Any, training: TrainingConfig, writes: bool) -> Any:
    """`model` wrapped by peft: only a LoRA adapter and a classifier's head are trainable."""
    from peft import LoraConfig, TaskType, get_peft_model

    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM if writes else TaskType.SEQ_CLS,
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=[*training.lora_targets],
        modules_to_save=None if writes else ["score"],
    )
    with warnings.catch_warnings():
        # peft still uses a deprecated name of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, adapter)


def pad(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `RowDataset` as one batch, padded on the right.

    Causal attention never looks to the right, so padding does not change a row. `labels` has B
    label numbers, or BL of 1.0 and 0.0 where rows may have several, or BT token ids: the next token
    of the answer at each position, else IGNORED. `soft` has BL probabilities if the rows do.
    """
    longest = max(len(row["ids"]) for row in batch)
    # GLM's classifier reads the last id that is not PAD_ID.
    ids_BT = torch.full((len(batch), longest), PAD_ID)
    mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
    for at, row in enumerate(batch):
        ids_BT[at, : len(row["ids"])] = torch.tensor(row["ids"])
        mask_BT[at, : len(row["ids"])] = 1
    labels = torch.tensor([row["label"] for row in batch])
    if labels.dim() > 1:
        labels = labels.float()
    if batch[0]["answer"]:
        labels = torch.full((len(batch), longest), IGNORED)
        for at, row in enumerate(batch):
            end = len(row["ids"])
            first = end - row["answer"]
            labels[at, first - 1 : end - 1] = ids_BT[at, first:end]
    padded = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "labels": labels,
        "at": torch.tensor([row["at"] for row in batch]),
    }
    if len(batch[0]["soft"]):
        padded["soft"] = torch.from_numpy(np.stack([row["soft"] for row in batch]))
    return padded


def check_memory(config: TuneConfig, rows: Sequence[TrainingRow], device: str) -> None:
    """Estimate the memory of training before loading weights. InputError if it exceeds the free.

    The message names a setting that would make training fit.
    """
    training = config.training
    base = read_base(config.model)
    weights = _weight_bytes(base, training, device)
    row = _row_bytes(base, training, device, max(row.length for row in rows))
    if config.writes:  # logits of every token and their gradients, in float32
        row += 8 * max(row.length for row in rows) * base.architecture.vocab_size
    free = free_memory_bytes(device)
    if device == "cpu":  # processes share the machine's memory, but each has its own GPU
        free //= training.processes
    needed = weights + training.batch_rows * row
    if needed <= free:
        return
    fit = (free - weights) // row
    if fit < 1:  # not even one row
        advice = "training.method to lora or head, or another device"
    else:
        advice = f"training.batch_rows to {fit}"
        if not training.gradient_checkpointing:
            advice += ", or training.gradient_checkpointing to true"
    raise InputError(
        f"{device}: training needs about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} are free. "
        f"Set {advice}."
    )


def _number_bytes(device: str) -> int:
    return DTYPE_BYTES["bfloat16" if device.startswith("cuda") else "float32"]


def _weight_bytes(base: Checkpoint, training: TrainingConfig, device: str) -> int:
    """Bytes of the weights, and of gradients and optimizer state for the trained ones."""
    if training.method == "full":
        return base.parameters * BYTES_TRAINED
    weights = base.parameters * _number_bytes(device)
    if training.method == "lora":
        shape = base.architecture
        # A LoRA pair has rank times (inputs + outputs) weights for each matrix that it adapts.
        for target in training.lora_targets:
            hidden, between = SIDES[target]
            sides = hidden * shape.hidden_size + between * shape.ffn_size
            weights += BYTES_TRAINED * training.lora_rank * shape.layers * sides
    return weights


def _row_bytes(base: Checkpoint, training: TrainingConfig, device: str, length: int) -> int:
    """Bytes of the activations that the backward pass of one row of `length` tokens needs."""
    shape = base.architecture
    kept = shape.layers * KEPT_NUMBERS
    if training.gradient_checkpointing:
        # The input of each layer, and all activations of the layer that is being recomputed.
        kept = shape.layers + KEPT_NUMBERS
    return _number_bytes(device) * length * shape.hidden_size * kept
