"""Saves a GLM model as a checkpoint directory in ChatGLM2's published layout.

Uses the same table as loading. The same model gives the same bytes. Copies one shard at a time.

    N layers   G groups   P prefix length   H kv channels
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.architecture import Architecture, original_config, read_architecture
from glmbatch.glm.checkpoint.checks.matching import WEIGHT_DTYPES
from glmbatch.glm.checkpoint.config_check import PROBLEM_TYPES
from glmbatch.glm.checkpoint.layout import PREFIX_KEY, TensorSpec, list_tensors
from glmbatch.glm.checkpoint.prefix import original_prefix
from glmbatch.glm.checkpoint.shards import group_by_size, list_weight_files
from glmbatch.glm.files import file_error, read_bytes
from glmbatch.glm.tokenizer import TOKENIZER_FILE, load_tokenizer

StoredDtype = Literal["float32", "bfloat16", "float16"]
# Tools that read the published layout expect this file beside tokenizer.model.
_TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/chatglm2-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
}


def save_checkpoint(  # noqa: PLR0913 - independent choices of the caller
    model: Any,
    directory: str | Path,
    *,
    tokenizer_model: bytes | Path,
    extra_config: Mapping[str, Any] | None = None,
    dtype: StoredDtype = "float16",
    shard_size_bytes: int = 2 * 10**9,
    safetensors: bool = False,
) -> None:
    """Write `model` so that `load_model` returns the same weights, rounded to `dtype`.

    `tokenizer_model` is the content of a tokenizer.model or its path. `extra_config` adds keys to
    config.json but must not change any. config.json is moved into place last: a directory without
    it is an unfinished save.

    Raises InputError if the directory already contains a checkpoint or part of one, or if a value
    does not fit `dtype`; TransientError if the disk fails.
    """
    target = Path(directory)
    has_head = hasattr(model, "score")
    if dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(WEIGHT_DTYPES)
        raise InputError(f"{target}: cannot save as {dtype}. Set dtype to one of {allowed}.")
    architecture = _architecture_of(model)
    config = _config(architecture, has_head, dtype, extra_config or {})
    # A head that chooses one label is what a reader expects without it.
    if has_head and model.config.problem_type in (PROBLEM_TYPES["labels"], PROBLEM_TYPES["number"]):
        config["problem_type"] = model.config.problem_type
    tokenizer = tokenizer_model
    if not isinstance(tokenizer, bytes):
        tokenizer = read_bytes(Path(tokenizer))
    tensors = _tensors(model, architecture, has_head, dtype)
    try:
        with _staged(target) as folder:
            (folder / TOKENIZER_FILE).write_bytes(tokenizer)
            _require_fitting_tokenizer(folder, target, architecture)
            _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
            _write_shards(folder, tensors, shard_size_bytes, safetensors)
            _write_json(folder / "config.json", config)
    except OSError as error:
        raise file_error(target, error) from error


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder to write into. Its files move into `target` at the end; an error deletes them."""
    if (target / "config.json").exists() or list_weight_files(target):
        raise InputError(
            f"{target}: already contains a checkpoint. Choose another directory or remove it."
        )
    # Inside the target, so that each move is a rename within one file system.
    folder = target / ".partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        # False sorts before True: config.json is moved last.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(folder)


def _require_fitting_tokenizer(folder: Path, target: Path, architecture: Architecture) -> None:
    size = load_tokenizer(folder).vocab_size
    if size > architecture.vocab_size:
        raise InputError(
            f"{target}: the tokenizer has {size} ids, the model only {architecture.vocab_size}. "
            "Pass the tokenizer.model of the base."
        )


def _architecture_of(model: Any) -> Architecture:
    stated = model.config.to_dict()
    labels = stated.get("id2label", {})
    stated["id2label"] = {str(row): label for row, label in labels.items()}  # JSON keys are text
    prefix_N2GPH = getattr(model, PREFIX_KEY, None)
    stated["pre_seq_len"] = 0 if prefix_N2GPH is None else prefix_N2GPH.shape[3]
    return read_architecture(stated, "model.config")


def _config(
    architecture: Architecture, has_head: bool, dtype: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
    name = "ChatGLMForSequenceClassification" if has_head else "ChatGLMModel"
    config = original_config(architecture) | {"architectures": [name], "torch_dtype": dtype}
    if has_head:
        config["id2label"] = {str(row): label for row, label in enumerate(architecture.labels)}
        config["label2id"] = {label: row for row, label in enumerate(architecture.labels)}
    # Changing the value of a key would describe another model.
    for key, value in extra.items():
        if config.setdefault(key, value) != value:
            raise InputError(
                f"extra_config: {key!r} is {value!r}, but {config[key]!r} in the model. Remove it."
            )
    return config


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the published layout, created only when its shard is written."""

    key: str
    size_bytes: int
    make: Callable[[], torch.Tensor]


def _tensors(model: Any, architecture: Architecture, has_head: bool, dtype: str) -> list[_Tensor]:
    stored: torch.dtype = getattr(torch, dtype)
    state = model.state_dict()
    if has_head:  # transformers' head has no bias; the published one always does
        state.setdefault("score.bias", torch.zeros(len(architecture.labels)))
    tensors = []
    for spec in list_tensors(architecture, "original", has_head).values():
        make = partial(_original_tensor, state, spec, stored)
        tensors.append(_Tensor(spec.key, prod(spec.shape) * stored.itemsize, make))
    return tensors


def _original_tensor(
    state: Mapping[str, torch.Tensor], spec: TensorSpec, dtype: torch.dtype
) -> torch.Tensor:
    # Only the prefix has no parts: nothing is saved quantized, so there are no scales.
    parts = [state[name] for name, _ in spec.parts] or [original_prefix(state[PREFIX_KEY])]
    whole = torch.cat(parts).detach() if len(parts) > 1 else parts[0].detach()
    stored = whole.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if not stored.isfinite().all() and whole.isfinite().all():
        raise InputError(
            f"{spec.key!r}: its values do not fit {dtype}. Save it as float32 or bfloat16."
        )
    return stored


def _write_shards(
    directory: Path, tensors: list[_Tensor], shard_size_bytes: int, safetensors: bool
) -> None:
    sizes = ((tensor, tensor.size_bytes) for tensor in tensors)
    groups = list(group_by_size(sizes, shard_size_bytes))
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"{stem}.{suffix}"
        if len(groups) > 1:
            name = f"{stem}-{number:05}-of-{len(groups):05}.{suffix}"
        shard = {tensor.key: tensor.make() for tensor in group}
        if safetensors:
            save_file(shard, directory / name, metadata={"format": "pt"})
            # safetensors makes its file readable for the owner only; the others follow the umask.
            shutil.copymode(directory / TOKENIZER_FILE, directory / name)
        else:
            torch.save(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(groups) > 1:
        total = sum(tensor.size_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / f"{stem}.{suffix}.index.json", index)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
