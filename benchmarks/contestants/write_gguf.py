"""Convert a causal checkpoint to GGUF: python write_gguf.py CHECKPOINT NUMBERS FOLDER.

NUMBERS is f32, bf16 or q8_0. llama.cpp's own converter knows only GLM's original tensor names, so
this script maps the names itself. The architecture "chatglm" is the same model. Runs in llama.cpp's
own environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import numpy as np
from safetensors import safe_open

# Tensor names: transformers' after "model.layers.N." -> llama.cpp's after "blk.N.".
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(checkpoint: Path, numbers: str, path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "chatglm")
    _describe(writer, config)
    tensors: dict[str, Any] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is not a dict
                tensors[name] = stored.get_tensor(name)
    for theirs, ours in _names(config["num_hidden_layers"]).items():
        data = np.concatenate([tensors.pop(name) for name in ours]).astype(np.float32)
        kind = _kind(data, numbers)
        writer.add_tensor(theirs, gguf.quants.quantize(data, kind), raw_dtype=kind)
    assert not tensors, f"unknown tensors: {sorted(tensors)}"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    head = config["head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head // 2)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])


def _names(layers: int) -> dict[str, list[str]]:
    """llama.cpp's name of each tensor -> transformers' names of its parts."""
    names = {theirs: [ours] for ours, theirs in WHOLE.items()}
    for layer in range(layers):
        ours = f"model.layers.{layer}."
        theirs = f"blk.{layer}."
        names |= {theirs + after: [ours + before] for before, after in LAYER.items()}
        for part in ("weight", "bias"):
            # llama.cpp keeps the three projections in one tensor.
            names[f"{theirs}attn_qkv.{part}"] = [
                f"{ours}self_attn.{letter}_proj.{part}" for letter in "qkv"
            ]
    return names


def _kind(data: Any, numbers: str) -> Any:
    """The type of a tensor, as llama.cpp's quantizer chooses it.

    q8_0 needs rows that divide into blocks of 32.
    """
    if numbers == "f32" or data.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if numbers == "bf16":
        return gguf.GGMLQuantizationType.BF16
    return gguf.GGMLQuantizationType.F16 if data.shape[-1] % 32 else gguf.GGMLQuantizationType.Q8_0


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) / "model.gguf")
