"""A ChatGLM2 checkpoint directory to transformers' GLM model, and its identity.

Strict, safe, one copy in memory. Reading, locating and saving have their own modules and are
offered here too. Knows no prompts and no batches.

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

__all__ = [
    "Checkpoint",
    "ClassifierHead",
    "digest_tokenizer",
    "digest_weights",
    "inspect_checkpoint",
    "load_model",
    "locate_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]


def digest_weights(
    path: str | Path, adapter: str | Path | None = None, checked: Checkpoint | None = None
) -> str:
    """Hex sha256 of everything in a checkpoint that changes the model's answers.

    That is its config, and the bytes of its weight files whatever their names. With an adapter it
    includes how much of it is added to which weight, its labels, and the bytes of its weights.

    Of `checked`, the same checkpoint, each file's numbers are checked as soon as it is digested,
    while its bytes are in memory; InputError as `refuse_non_finite` says.
    """
    directory = Path(path)
    config = read_json(directory / "config.json")
    architecture = read_architecture(config, str(directory / "config.json"))
    # The key is no longer read, but stays in the digest: without it every published answer would be
    # asked again.
    scaling = "linear" if architecture.rope_ratio != 1 else None
    facts = [asdict(architecture) | {"rope_scaling": scaling}, config.get("rope_scaling")]
    shards, _ = find_shards(directory)
    files = [shard.file for shard in shards]
    one_at_a_time = Lock()  # torch uses all cores for one, and an old .bin is in memory whole

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
    """InputError when a weight of `checkpoint` is nan or infinite; names the first tensor.

    Every answer would fail. Reads all weights.
    """
    files = checkpoint.tensors.items()
    _refuse_broken(chain.from_iterable(_broken_tensors(*file) for file in files))


def _broken_tensors(file: Path, headers: Mapping[str, Header]) -> list[str]:
    """A line for each tensor in `file` that is not finite."""
    broken: list[str] = []
    for key, tensor in read_tensors(file, headers):
        if count := count_non_finite(tensor):
            broken.append(f"{file}: {key!r} holds {count:,} of {tensor.numel():,} values")
    return broken


def _refuse_broken(tensors: Iterable[str]) -> None:
    broken = list(tensors)
    if broken:
        more = f"; {len(broken) - 1:,} more tensors have such values" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0]} that are not finite (nan or inf){more}. The training or conversion that "
            "wrote it failed: set model.path to an earlier save."
        )


def digest_tokenizer(path: str | Path) -> str:
    """Hex sha256 of the tokenizer's bytes."""
    return digest_file(Path(path) / TOKENIZER_FILE)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
) -> Any:
    """A checkpoint's `GlmForSequenceClassification` if it has a head, else its `GlmForCausalLM`.

    In eval mode and without gradients. Memory peaks near one copy of the loaded weights.

    The weights of a LoRA `adapter` (a directory as peft writes it) are merged in; a head that it
    brings counts as the checkpoint's own. `model.prefix_kv` holds the keys and values of a P-Tuning
    v2 prefix, or None: `Network` puts them before every prompt, the model's own forward does not.

    InputError when the checkpoint or the adapter is not sound, OutOfMemory when it does not fit.
    """
    checkpoint = read_checkpoint(path, adapter)
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        allowed = ", ".join(WEIGHT_DTYPES)
        raise InputError(f"{path}: cannot compute in {name}. Set model.dtype to one of {allowed}.")
    if checkpoint.architecture.fp32_residual and name != "float32":
        raise InputError(
            f"{checkpoint.path / 'config.json'}: 'fp32_residual_connection' is true, and GLM has "
            f"no counterpart to it in {name}. Set model.dtype to float32."
        )
    try:
        return _load(checkpoint, getattr(torch, name), torch.device(device))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"{path}: no room for its weights on {device} in {name}.") from error


def _load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    architecture = checkpoint.architecture
    model = _empty_model(checkpoint, dtype)
    state: dict[str, torch.Tensor] = {}
    prefix: dict[str, torch.Tensor] = {}
    added, replaced = _adapter_weights(checkpoint)
    for spec, stored in _stored_tensors(checkpoint, dtype, added):
        if not spec.parts:
            prefix[spec.key] = stored.to(torch.float32, copy=True)
        for name, rows in split_rows(architecture, spec, stored):
            merged = added[name].added_to(rows) if name in added else rows
            # Each is copied: nothing may stay backed by the file.
            state[name] = merged.to(
                device, _dtype_of(name, dtype), copy=True, memory_format=torch.contiguous_format
            )
    for name, tensor in replaced.items():
        state[name] = tensor.to(device, _dtype_of(name, dtype))
    prefix_kv = None
    if prefix:
        prefix_kv = native_prefix(architecture, prefix).to(device, dtype)
        _refuse_unfit_numbers(checkpoint, {PREFIX_KEY: prefix_kv}, dtype)
    _refuse_unfit_numbers(checkpoint, state, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    # The rotary tables are computed, not stored: those made on the meta device are empty.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=rotary.config).to(device)
    model.register_buffer(PREFIX_KEY, prefix_kv)
    return model.requires_grad_(False).eval()


def _refuse_unfit_numbers(
    checkpoint: Checkpoint, loaded: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """InputError when a loaded tensor is not finite: as it is stored, or in `dtype` only."""
    for name, tensor in loaded.items():
        if count_non_finite(tensor):
            refuse_non_finite(checkpoint)
            merged = "with the adapter, " if checkpoint.adapter else ""
            raise InputError(
                f"{checkpoint.path}: {merged}{name!r} does not fit {dtype}. "
                "Set model.dtype to float32 or bfloat16."
            )


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

    config = GlmConfig(**native_config(checkpoint.architecture), dtype=dtype)
    with torch.device("meta"):
        if not checkpoint.has_head:
            return GlmForCausalLM(config)
        model: Any = GlmForSequenceClassification(config)  # type: ignore[no-untyped-call]
        # The reference's head has a bias. transformers' class would drop it with only a log line,
        # and logits would be 3.2 off.
        model.score = ClassifierHead(config.hidden_size, len(checkpoint.labels))
    return model


class ClassifierHead(nn.Linear):
    """A head with a bias, kept and computed in float32 whatever the body computes in.

    It has only a few thousand numbers.
    """

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Scores [B, T, labels] in float32."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):  # in training too
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
    """Each tensor to load. Quantized ones are dequantized in the dtype that is computed in.

    Dequantized through float16, logits would be 8.9e-3 off. Weights to which something is `added`
    (native names) come in float32.
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
    """The scales of all quantized weights; a weight and its scale may be in two files."""
    scales: dict[str, torch.Tensor] = {}
    for file, headers in checkpoint.tensors.items():
        wanted = {key: header for key, header in headers.items() if key.endswith("_scale")}
        for key, scale in read_tensors(file, wanted):
            scales[key] = scale.clone()
    return scales
