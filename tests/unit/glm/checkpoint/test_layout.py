"""The published config is read key by key, and an invalid value is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.architecture import (
    native_config,
    original_config,
    read_architecture,
    unknown_keys,
)
from glmbatch.glm.checkpoint.layout import list_tensors
from tests.unit.glm.checkpoints import CLASSIFIER, CONFIG

CHATGLM2_6B = CONFIG | {
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def read(**changes: Any) -> Any:
    config = {key: value for key, value in (CHATGLM2_6B | changes).items() if value != "absent"}
    return read_architecture(config, "config.json")


def test_the_published_config_becomes_the_native_one() -> None:
    config = native_config(read())
    assert config == {
        "vocab_size": 65024,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "id2label": {0: "LABEL_0", 1: "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "rope_parameters": ROPE,
    }


def test_the_published_model_has_its_tensors_and_size() -> None:
    specs = list_tensors(read(), "original", has_head=False)
    assert len(specs) == 199  # the published index has one more, the rotary buffer
    sizes = [
        spec.shape[0] * (spec.shape[1] if len(spec.shape) > 1 else 1) for spec in specs.values()
    ]
    assert sum(sizes) == 6_243_584_000
    assert read().kv_numbers_per_token * 2 == 28 * 2**10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_ratio": 16},
        {"add_qkv_bias": False},
        {"pre_seq_len": 128},
        CLASSIFIER,
    ],
)
def test_both_layouts_give_the_same_architecture(changes: dict[str, Any]) -> None:
    architecture = read(**changes)
    labelled = {key: changes[key] for key in ("id2label",) if key in changes}
    assert (
        read_architecture(original_config(architecture) | labelled, "config.json") == architecture
    )
    native = native_config(architecture) | {"model_type": "glm"}
    native["id2label"] = {str(row): label for row, label in native["id2label"].items()}
    assert read_architecture(native, "config.json") == architecture


def test_every_tensor_has_its_counterparts() -> None:
    architecture = read(**CLASSIFIER)
    original = list_tensors(architecture, "original", has_head=True)
    native = list_tensors(architecture, "native", has_head=True)
    parts: list[Any] = []
    for spec in original.values():
        parts += spec.parts
    assert parts == [spec.parts[0] for spec in native.values()]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", "28"),
        ("num_layers", -1),
        ("num_layers", 0),
        ("num_layers", 28.0),
        ("num_layers", True),
        ("num_layers", 10**9),
        ("num_layers", None),
        ("hidden_size", []),
        ("hidden_size", "absent"),
        ("kv_channels", 126),
        ("kv_channels", 127),
        ("padded_vocab_size", 10**30),
        ("seq_length", -5),
        ("layernorm_epsilon", 0),
        ("layernorm_epsilon", "1e-5"),
        ("layernorm_epsilon", float("nan")),
        ("layernorm_epsilon", 10**400),
        ("layernorm_epsilon", "absent"),
        ("add_qkv_bias", 1),
        ("add_qkv_bias", None),
        ("multi_query_attention", "true"),
        ("multi_query_group_num", 0),
        ("multi_query_group_num", 33),
        ("multi_query_group_num", None),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("add_bias_linear", True),
        ("quantization_bit", 3),
        ("quantization_bit", "4"),
        ("pre_seq_len", -1),
        ("prefix_projection", "no"),
        ("rope_ratio", 0),
        ("rope_ratio", "16"),
        ("eos_token_id", 65024),
        ("eos_token_id", [2]),
        ("pad_token_id", -1),
        ("id2label", {"1": "a", "2": "b"}),
        ("id2label", ["a"]),
        ("id2label", {"0": 1}),
        ("id2label", {}),
        ("id2label", {"0": "a", "1": "a"}),
        ("num_labels", "two"),
        ("fp32_residual_connection", 7),
    ],
)
def test_an_invalid_value_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^config\.json: '{key}' is [^\n]*; it must be [^\n]*$"):
        read(**{key: value})


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(InputError, match="heads cannot be shared"):
        read(multi_query_group_num=3)


def test_positions_scaled_in_another_way_are_refused() -> None:
    for scaling in ("ntk", {"type": "linear"}):
        with pytest.raises(InputError, match=r"'rope_scaling' is .*; it must be 'linear'"):
            read(rope_ratio=16, rope_scaling=scaling)
    with pytest.raises(InputError, match=r"'rope_ratio' is 50 .*chatglm3.*Set model\.path"):
        read(rope_ratio=50, _name_or_path="THUDM/chatglm3-6b-32k")
    assert read(rope_ratio=16, rope_scaling="linear").rope_ratio == 16
    assert read(_name_or_path="THUDM/chatglm3-6b") == read()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "chatglm"},
        {"model_type": "llama", "num_layers": 2},
        {"num_layers": 2, "padded_vocab_size": 9},
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json: not a ChatGLM2 config.*Set model\.path"):
        read_architecture(config, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("head_dim", 6),
        ("rms_norm_eps", None),
        ("rope_parameters", None),
        ("rope_parameters", {**ROPE, "rope_type": "yarn"}),
        ("rope_parameters", {**ROPE, "rope_theta": 5e5}),
        ("rope_parameters", {**ROPE, "partial_rotary_factor": 1.0}),
    ],
)
def test_a_native_config_that_is_not_chatglm2_is_refused(key: str, value: object) -> None:
    native = native_config(read()) | {"model_type": "glm", "id2label": None, key: value}
    with pytest.raises(InputError, match=r"^config\.json: .*; it must be"):
        read_architecture(native, "config.json")


def test_unknown_keys_exclude_bookkeeping() -> None:
    assert unknown_keys(CHATGLM2_6B, "original") == []
    assert unknown_keys(CHATGLM2_6B | {"interleaved_qkv": True}, "original") == ["interleaved_qkv"]
