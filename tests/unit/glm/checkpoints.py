"""Small checkpoints of every kind in ChatGLM2's published layout, with random weights.

Shares no code with the code under test.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDENS = Path(__file__).parents[2] / "goldens"
TOKENIZER = GOLDENS / "base-sharded" / "tokenizer.model"
QUANTIZED = (
    "query_key_value.weight",
    "dense.weight",
    "dense_h_to_4h.weight",
    "dense_4h_to_h.weight",
)

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 56,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "kv_channels": 16,  # heads x channels is 64 here, unlike hidden_size
    "layernorm_epsilon": 0.002,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 1024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LABELS = ("负面", "中性", "正面")
CLASSIFIER = {
    "architectures": ["ChatGLMForSequenceClassification"],
    "id2label": {str(row): label for row, label in enumerate(LABELS)},
    "label2id": {label: row for row, label in enumerate(LABELS)},
}

# Every kind of checkpoint: what differs in its config and its files.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"files": "sharded"},
    "legacy": {"files": "legacy"},
    "safetensors": {"files": "safetensors"},
    "safetensors-sharded": {"files": "safetensors-sharded"},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "no-qkv-bias": {"config": {"add_qkv_bias": False}},
    "multi-head": {"config": {"multi_query_attention": False, "multi_query_group_num": 1}},
    "multi-head-int8": {"config": {"multi_query_attention": False, "quantization_bit": 8}},
    "32k": {"config": {"rope_ratio": 16, "seq_length": 32768}},
    "first-revision": {"config": {"model_type": None, "eos_token_id": None, "pad_token_id": None}},
    "int8": {"config": {"quantization_bit": 8}},
    "int4": {"config": {"quantization_bit": 4}},
    "int4-sharded": {"config": {"quantization_bit": 4}, "files": "sharded"},
    "classifier": {"config": CLASSIFIER, "dtype": torch.float32},
    "classifier-int4": {"config": CLASSIFIER | {"quantization_bit": 4}},
    "prefix": {"config": {"pre_seq_len": 7}},
    "prefix-projection": {"config": {"pre_seq_len": 5, "prefix_projection": True}},
    "prefix-int4": {"config": {"pre_seq_len": 7, "quantization_bit": 4}},
    "prefix-classifier": {"config": CLASSIFIER | {"pre_seq_len": 7}},
}


def make_variant(directory: Path, name: str, **more: Any) -> Path:
    """Write the checkpoint `name` of `VARIANTS` into `directory` and return it."""
    return make_checkpoint(directory, **{**VARIANTS[name], **more})


def make_checkpoint(
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    files: str = "bin",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `directory` and return it; a config key given as None is left out."""
    stated = {
        key: value for key, value in (CONFIG | dict(config or {})).items() if value is not None
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", stated)
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    write_weights(directory, make_state(stated, dtype, seed), files)
    return directory


def make_state(
    config: Mapping[str, Any], dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under the published keys."""
    random = torch.Generator().manual_seed(seed)
    hidden, ffn, channels = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads = config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    rows = (heads + 2 * groups) * channels
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden)
    }
    for layer in range(config["num_layers"]):
        shapes |= {
            f"transformer.encoder.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (hidden,),
                "self_attention.query_key_value.weight": (rows, hidden),
                "self_attention.query_key_value.bias": (rows,),
                "self_attention.dense.weight": (hidden, heads * channels),
                "post_attention_layernorm.weight": (hidden,),
                "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
                "mlp.dense_4h_to_h.weight": (hidden, ffn),
            }.items()
            if config["add_qkv_bias"] or not name.endswith("bias")
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (config["padded_vocab_size"], hidden)
    shapes["transformer.rotary_pos_emb.inv_freq"] = (channels // 4,)
    if labels := len(config.get("id2label", ())):
        shapes |= {"classifier_head.weight": (labels, hidden), "classifier_head.bias": (labels,)}
    if length := config.get("pre_seq_len"):
        width = config["num_layers"] * 2 * groups * channels
        shapes["transformer.prefix_encoder.embedding.weight"] = (length, width)
        if config.get("prefix_projection"):
            shapes |= {
                "transformer.prefix_encoder.trans.0.weight": (hidden, width),
                "transformer.prefix_encoder.trans.0.bias": (hidden,),
                "transformer.prefix_encoder.trans.2.weight": (width, hidden),
                "transformer.prefix_encoder.trans.2.bias": (width,),
            }
    state = {key: _values(key, shape, random).to(dtype) for key, shape in shapes.items()}
    return quantized(state, config["quantization_bit"]) if config.get("quantization_bit") else state


def _values(key: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=random)
    if "layernorm" in key:
        return 1 + 0.2 * values
    if "prefix_encoder.embedding" in key or "bias" in key:
        return values
    # Large enough that logits differ by whole units, so that a mistake is far above rounding.
    return values * (
        2.0 / math.sqrt(shape[-1]) if len(shape) == 2 and "embeddings" not in key else 1.0
    )


def quantized(state: Mapping[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """`state` with linear layers in int8, or in signed int4, two to a byte, the high one first."""
    packed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if not key.endswith(QUANTIZED):
            packed[key] = tensor
            continue
        most = 2 ** (bits - 1) - 1
        scale = (tensor.float().abs().amax(1) / most).to(tensor.dtype)
        whole = (
            (tensor.float() / scale.float()[:, None]).round().clamp(-most - 1, most).to(torch.int32)
        )
        if bits == 4:
            whole = (whole[:, 0::2] & 15) << 4 | (whole[:, 1::2] & 15)
            whole = torch.where(whole > 127, whole - 256, whole)
        packed[key] = whole.to(torch.int8)
        packed[f"{key}_scale"] = scale
    return packed


def write_weights(directory: Path, state: dict[str, torch.Tensor], files: str = "bin") -> None:
    """Write `state` as one .bin (in either format) or .safetensors, or as three with an index."""
    if files == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif files == "legacy":
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif files == "safetensors":
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        stem, suffix = (
            ("model", "safetensors")
            if files.startswith("safetensors")
            else ("pytorch_model", "bin")
        )
        names = [f"{stem}-{number:05}-of-00003.{suffix}" for number in (1, 2, 3)]
        keys = list(state)
        for place, name in enumerate(names):
            shard = {key: state[key] for key in keys[place::3]}
            save_file(shard, directory / name) if suffix == "safetensors" else torch.save(
                shard, directory / name
            )
        weight_map = {key: names[place % 3] for place, key in enumerate(keys)}
        write_json(
            directory / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map}
        )


def read_state(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the .bin files in `directory`."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.bin")):
        state |= torch.load(file, weights_only=True)
    return state


def change_tensor(
    directory: Path, key: str, change: Callable[[torch.Tensor], object], files: str = "*"
) -> None:
    """Apply `change` to tensor `key` in its file, whatever the file's format."""
    for file in [*directory.glob(f"{files}.bin"), *directory.glob(f"{files}.safetensors")]:
        is_bin = file.suffix == ".bin"
        state = torch.load(file, weights_only=True) if is_bin else load_file(file)
        if key in state:
            change(state[key])
            torch.save(state, file) if is_bin else save_file(state, file)


def read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; a key given as None is removed."""
    config = read_json(directory / "config.json") | changes
    write_json(
        directory / "config.json",
        {key: value for key, value in config.items() if value is not None},
    )
