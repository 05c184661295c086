"""Loads a ChatGLM2 checkpoint directory for the engine or as transformers' model, and digests it.

Every tensor must be present and fit, and memory peaks near one copy of the weights. Also exports
what the modules for locating, reading and saving offer. Knows no prompts and no batches.

    B rows   T tokens   D hidden size
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

from glmbatch.errors import InputError, OutOfMemory
from glmbatch.glm.checkpoint.adapter import LowRank, load_adapter
from glmbatch.glm.checkpoint.architecture import native_config, read_architecture
from glmbatch.glm.checkpoint.checks.matching import WEIGHT_DTYPES
from glmbatch.glm.checkpoint.config_check import PROBLEM_TYPES
from glmbatch.glm.checkpoint.hub import locate_checkpoint
from glmbatch.glm.checkpoint.inspection import Checkpoint, inspect_checkpoint, read_checkpoint
from glmbatch.glm.checkpoint.layout import PREFIX_KEY, TensorSpec, split_rows
from glmbatch.glm.checkpoint.prefix import native_prefix
from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.glm.checkpoint.shards import (
    Header,
    count_non_finite,
    dequantized,
    find_shards,
    read_tensors,
)
from glmbatch.glm.files import digest_file, read_json
from glmbatch.glm.tokenizer import TOKENIZER_FILE
from glmbatch.glm.weights import bare_model

__all__ = [
    "Checkpoint",
    "ClassifierHead",
    "digest_tokenizer",
    "digest_weights",
    "inspect_checkpoint",
    "load_model",
    "load_weights",
    "locate_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]


def digest_weights(
    path: str | Path, adapter: str | Path | None = None, checked: Checkpoint | None = None
) -> str:
    """SHA-256 in hex of everything in a checkpoint that changes the model's answers.

    That is its config and the bytes of its weight files, whatever their names. With an adapter, it
    is also the scale of each adapted weight, the labels, and the bytes of the adapter's weights.

    `checked` is the same checkpoint, already inspected. If it is given, the values of each file are
    checked right after its digest, while its bytes are in memory. Raises InputError if a weight is
    then not finite.
    """
    directory = Path(path)
    config = read_json(directory / "config.json")
    architecture = read_architecture(config, str(directory / "config.json"))
    # This key is no longer read. It stays in the digest, since without it every published answer
    # would be computed again.
    scaling = "linear" if architecture.rope_ratio != 1 else None
    facts = [asdict(architecture) | {"rope_scaling": scaling}, config.get("rope_scaling")]
    shards, _ = find_shards(directory)
    files = [shard.file for shard in shards]
    one_at_a_time = Lock()  # one check uses all cores, and an old .bin is read into memory whole

    def digest_one(file: Path) -> tuple[str, list[str]]:
        content = digest_file(file)
        if checked is None:
            return content, []
        with one_at_a_time:
            return content, _broken_tensors(file, checked.tensors.get(file, {}))

    with ThreadPoolExecutor(max_workers=min(16, len(files))) as pool:
        digested = list(pool.map(digest_one, files))
    _refuse_broken(chain.from_iterable(broken for _, broken in digested))
    contents = sorted(content for content, _ in digested)
    digest = _digest([json.dumps(facts, sort_keys=True), *contents])
    if adapter is None:
        return digest
    adapted = (checked or read_checkpoint(directory, adapter)).adapter
    assert adapted is not None
    facts = [dict(adapted.scales), adapted.labels]
    return _digest([digest, json.dumps(facts, sort_keys=True), digest_file(adapted.file)])


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def refuse_non_finite(checkpoint: Checkpoint) -> None:
    """Raise InputError if any weight of `checkpoint` is nan or infinite, naming the first tensor.

    Such a model would fail on every row. Reads all weights.
    """
    files = checkpoint.tensors.items()
    _refuse_broken(chain.from_iterable(_broken_tensors(*file) for file in files))


def _broken_tensors(file: Path, headers: Mapping[str, Header]) -> list[str]:
    """The start of a message for each tensor in `file` with values that are not finite."""
    broken: list[str] = []
    for key, tensor in read_tensors(file, headers):
        if count := count_non_finite(tensor):
            broken.append(f"{file}: {key!r} has {count:,} of {tensor.numel():,} values")
    return broken


def _refuse_broken(tensors: Iterable[str]) -> None:
    broken = list(tensors)
    if broken:
        more = f"; {len(broken) - 1:,} more tensors have such values" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0]} that are not finite (nan or inf){more}. The training or conversion that "
            "wrote it failed. Set model.path to an earlier save."
        )


def digest_tokenizer(path: str | Path) -> str:
    """SHA-256 in hex of the bytes of the tokenizer.model in directory `path`.

    Raises InputError if there is none.
    """
    return digest_file(Path(path) / TOKENIZER_FILE)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
) -> Any:
    """The `GlmForSequenceClassification` of a checkpoint with a head, else its `GlmForCausalLM`.

    The model is in eval mode and needs no gradients. Memory peaks near one copy of its weights.

    The weights of a LoRA `adapter` (a directory as peft writes it) are merged in, and a head that
    it brings replaces the checkpoint's. `model.prefix_kv` has the keys and values of a P-Tuning v2
    prefix [layers, 2, groups, prefix length, kv channels], or is None. `Network` puts them before
    every prompt; the model's own forward ignores them.

    Raises InputError if the checkpoint or the adapter is invalid, or if its values do not fit
    `dtype`; OutOfMemory if the weights do not fit on `device`.
    """
    checkpoint = read_checkpoint(path, adapter)
    weights, prefix_kv = _read_weights(checkpoint, dtype, device)
    model = _empty_model(checkpoint, dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    # The rotary frequencies are computed, not stored: those from the meta device are empty.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=rotary.config).to(device)
    model.register_buffer(PREFIX_KEY, prefix_kv)
    return model.requires_grad_(False).eval()


def load_weights(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
) -> Any:
    """The weights of `load_model` for the engine, which is not given transformers' classes.

    They have the same names, and `config` the same values. transformers is not imported. Raises as
    `load_model`.
    """
    checkpoint = read_checkpoint(path, adapter)
    weights, prefix_kv = _read_weights(checkpoint, dtype, device)
    model = bare_model(weights, native_config(checkpoint.architecture))
    model.register_buffer(PREFIX_KEY, prefix_kv)
    return model


def _read_weights(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """All weights by their native names, and the keys and values of a prefix."""
    name = str(dtype).removeprefix("torch.")
    path = checkpoint.path
    if name not in WEIGHT_DTYPES:
        allowed = ", ".join(WEIGHT_DTYPES)
        raise InputError(f"{path}: cannot compute in {name}. Set model.dtype to one of {allowed}.")
    if checkpoint.architecture.fp32_residual and name != "float32":
        raise InputError(
            f"{path / 'config.json'}: 'fp32_residual_connection' is true, which "
            f"is not supported in {name}. Set model.dtype to float32."
        )
    try:
        return _converted(checkpoint, getattr(torch, name), torch.device(device))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"{path}: its weights in {name} do not fit on {device}.") from error


def _converted(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    architecture = checkpoint.architecture
    weights: dict[str, torch.Tensor] = {}
    prefix: dict[str, torch.Tensor] = {}
    added, replaced = _adapter_weights(checkpoint)
    for spec, stored in _stored_tensors(checkpoint, dtype, added):
        if not spec.parts:
            prefix[spec.key] = stored.to(torch.float32, copy=True)
        for name, rows in split_rows(architecture, spec, stored):
            merged = added[name].added_to(rows) if name in added else rows
            weights[name] = _copied(merged, device, _dtype_of(name, dtype))
    for name, tensor in replaced.items():
        weights[name] = tensor.to(device, _dtype_of(name, dtype))
    prefix_kv = None
    if prefix:
        prefix_kv = native_prefix(architecture, prefix).to(device, dtype)
        _refuse_unfit_numbers(checkpoint, {PREFIX_KEY: prefix_kv}, dtype)
    _refuse_unfit_numbers(checkpoint, weights, dtype)
    return weights, prefix_kv


def _copied(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy of `tensor` on `device`, in `dtype`, which maps no file."""
    if device.type == "cuda":
        # Converted on the GPU: one core of the CPU converts 1 GB a second.
        return tensor.to(device, memory_format=torch.contiguous_format).to(dtype)
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _refuse_unfit_numbers(
    checkpoint: Checkpoint, loaded: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Raise InputError if a loaded tensor is not finite, in the file or only in `dtype`."""
    for name, tensor in loaded.items():
        if count_non_finite(tensor):
            refuse_non_finite(checkpoint)
            merged = "with the adapter, " if checkpoint.adapter else ""
            raise InputError(
                f"{checkpoint.path}: {merged}{name!r} does not fit {dtype}. "
                "Set model.dtype to float32 or bfloat16."
            )


def _empty_model(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Any:
    from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

    stated = native_config(checkpoint.architecture)
    if checkpoint.predicts != "label":
        stated["problem_type"] = PROBLEM_TYPES[checkpoint.predicts]
    config = GlmConfig(**stated, dtype=dtype)
    with torch.device("meta"):
        if not checkpoint.has_head:
            return GlmForCausalLM(config)
        model: Any = GlmForSequenceClassification(config)  # type: ignore[no-untyped-call]
        # The published head has a bias. transformers' class would drop it with only a log message,
        # and logits would be off by 3.2.
        model.score = ClassifierHead(config.hidden_size, len(checkpoint.labels))
    return model


class ClassifierHead(nn.Linear):
    """A classification head with a bias, stored and computed in float32 in a model of any dtype.

    With a few thousand parameters, that costs nothing.
    """

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, labels] in float32."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):  # also in mixed training
            return nn.functional.linear(hidden_BTD.float(), self.weight.float(), self.bias.float())


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith("score.") else dtype


def _adapter_weights(checkpoint: Checkpoint) -> tuple[dict[str, LowRank], dict[str, torch.Tensor]]:
    if checkpoint.adapter is None:
        return {}, {}
    return load_adapter(checkpoint.adapter, checkpoint.architecture, checkpoint.has_head)


def _stored_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype, added: Collection[str]
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Each tensor to load; a quantized one is dequantized to `dtype`.

    Dequantized to float16 first, logits would be off by 8.9e-3. Weights in `added` (native names),
    to which an adapter is added, are dequantized to float32.
    """
    specs = checkpoint.specs
    bits = checkpoint.architecture.quantization_bit
    scales = _read_scales(checkpoint)
    for file, headers in checkpoint.tensors.items():
        weights = {key: header for key, header in headers.items() if key not in scales}
        for key, stored in read_tensors(file, weights):
            spec = specs[key]
            if spec.stored == "int8":
                merged = any(name in added for name, _ in spec.parts)
                numbers = torch.float32 if merged else dtype
                yield spec, dequantized(stored, scales[f"{key}_scale"], bits, numbers)
            else:
                yield spec, stored


def _read_scales(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The scales of all quantized weights. A weight and its scale may be in different files."""
    scales: dict[str, torch.Tensor] = {}
    for file, headers in checkpoint.tensors.items():
        wanted = {key: header for key, header in headers.items() if key.endswith("_scale")}
        for key, scale in read_tensors(file, wanted):
            scales[key] = scale.clone()
    return scales
