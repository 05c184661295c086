"""LoRA adapters for the small checkpoints: made by peft, or by hand with the original names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.unit.glm.checkpoints import CONFIG, write_json

NATIVE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
ORIGINAL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def peft_model(base: Any, **settings: Any) -> Any:
    """`base` with a peft adapter whose weights are all random."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(NATIVE), **settings})
    )
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return adapted.eval()


def original_modules(
    config: Mapping[str, Any], names: Sequence[str] = ORIGINAL
) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear modules of the original classes, by name."""
    hidden, ffn, channels = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads = config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    shapes = {
        "self_attention.query_key_value": ((heads + 2 * groups) * channels, hidden),
        "self_attention.dense": (hidden, heads * channels),
        "mlp.dense_h_to_4h": (2 * ffn, hidden),
        "mlp.dense_4h_to_h": (hidden, ffn),
    }
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(config["num_layers"]):
        for name, shape in shapes.items():
            if name.rpartition(".")[2] in names:
                modules[f"transformer.encoder.layers.{layer}.{name}"] = shape
    return modules


def make_original_adapter(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    whole: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Write an adapter of rank 4 and alpha 6 for the original classes; returns each B @ A."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    products: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in original_modules(CONFIG | dict(config or {})).items():
        a, b = (0.1 * torch.randn(shape, generator=random) for shape in ((4, columns), (rows, 4)))
        state |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        products[module] = b @ a
    state |= {f"base_model.model.{key}": tensor for key, tensor in (whole or {}).items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
    }
    write_json(
        directory / "adapter_config.json", stated | {"target_modules": list(ORIGINAL)} | settings
    )
    return products
