"""Reads and writes the config.json of ChatGLM2's published layout and of transformers' GLM.

Both layouts are checked and read into one `Architecture`. No tensors, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.config_check import ConfigCheck
from glmbatch.glm.files import RANDOM_WEIGHTS

Layout = Literal["original", "native"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything in a config that changes an answer.

    `groups` is the number of key/value heads, `kv_channels` the size of a head. `labels` name the
    rows of a classification head. `max_positions` limits the tokens of prompt and answer together;
    transformers' model does not enforce it.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    groups: int
    kv_channels: int
    max_positions: int
    epsilon: float
    qkv_bias: bool
    qkv_per_head: bool
    eos_id: int
    pad_id: int
    rope_ratio: float
    fp32_residual: bool
    quantization_bit: int
    pre_seq_len: int
    prefix_projection: bool
    labels: tuple[str, ...]

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers in the KV cache per token: 14,336 for ChatGLM2-6B."""
        return 2 * self.layers * self.groups * self.kv_channels


@dataclass(frozen=True, slots=True)
class _Number:
    """An integer of the config: its attribute, its key in each layout, its largest valid value."""

    attribute: str
    original: str
    native: str
    maximum: int = 2**24


# 1,000 layers and 2**24 of anything else are far above any such model. The bounds keep a mistyped
# number from filling memory with a list of tensors.
_NUMBERS = (
    _Number("layers", "num_layers", "num_hidden_layers", 1_000),
    _Number("vocab_size", "padded_vocab_size", "vocab_size"),
    _Number("hidden_size", "hidden_size", "hidden_size"),
    _Number("ffn_size", "ffn_hidden_size", "intermediate_size"),
    _Number("heads", "num_attention_heads", "num_attention_heads"),
    _Number("kv_channels", "kv_channels", "head_dim"),
    _Number("max_positions", "seq_length", "max_position_embeddings"),
)

# The value that each key must have: transformers' GLM classes support no other.
_FIXED: dict[Layout, dict[str, object]] = {
    "original": {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
    },
    "native": {"hidden_act": "silu", "tie_word_embeddings": False, "partial_rotary_factor": 0.5},
}

# Keys that are read below, in addition to _NUMBERS and _FIXED.
# fmt: off
_READ: dict[Layout, frozenset[str]] = {
    "original": frozenset({
        "layernorm_epsilon", "multi_query_attention", "multi_query_group_num", "add_qkv_bias",
        "eos_token_id", "pad_token_id", "rope_ratio", "rope_scaling", "fp32_residual_connection",
        "quantization_bit", "pre_seq_len", "prefix_projection", "id2label", "num_labels",
    }),
    "native": frozenset({
        "rms_norm_eps", "num_key_value_heads", "attention_bias", "eos_token_id", "pad_token_id",
        "rope_parameters", "pre_seq_len", "id2label", "num_labels",
    }),
}
# Bookkeeping, training settings, and switches between ways to compute the same numbers.
_HARMLESS = frozenset({
    "_name_or_path", "apply_query_key_layer_scaling", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "auto_map", "bias_dropout_fusion", "bos_token_id",
    "classifier_dropout", "dtype", "function_to_apply", "hidden_dropout", "initializer_range",
    "label2id", "model_type",
    "original_rope", "problem_type", RANDOM_WEIGHTS, "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache",
})
# fmt: on

_ROPE_THETA = 10_000.0
_MAX_STRETCH = 1_000.0  # chatglm2-6b-32k has 16
# ChatGLM2 rotates only the first half of each head; the other half carries no position.
_ROTARY_SHARE = 0.5


def detect_layout(config: Mapping[str, Any], where: str) -> Layout:
    """The layout of `config`, recognized by its keys.

    Raises InputError if it is neither; `where` names the config in the message.
    """
    # The first published revision has no model_type, but its key names are unique.
    multi_query = any(key.startswith("multi_query_") for key in config)
    if multi_query and {"num_layers", "padded_vocab_size"} <= config.keys():
        return "original"
    if config.get("model_type") == "glm":
        return "native"
    raise InputError(
        f"{where}: not a ChatGLM2 config: model_type is {config.get('model_type')!r}, and "
        "'num_layers', 'padded_vocab_size' and 'multi_query_*' are not all there. "
        "Set model.path to a ChatGLM2 checkpoint."
    )


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that `config` describes.

    Raises InputError for the first problem, naming `where` and the key.
    """
    architecture, problems = examine_config(config, where)
    if architecture is None:
        raise InputError(problems[0])
    return architecture


def examine_config(config: Mapping[str, Any], where: str) -> tuple[Architecture | None, list[str]]:
    """The architecture that `config` describes, or None, and a list of every problem in it.

    Raises InputError if `config` is in neither layout.
    """
    layout = detect_layout(config, where)
    check = ConfigCheck(config, where)
    for key, value in _FIXED[layout].items():
        check.fixed(key, value)
    values: dict[str, Any] = {}
    for number in _NUMBERS:
        values[number.attribute] = check.integer(getattr(number, layout), 1, number.maximum)
    values["eos_id"] = check.integer("eos_token_id", 0, values["vocab_size"] - 1, default=2)
    values["pad_id"] = check.integer("pad_token_id", 0, values["vocab_size"] - 1, default=0)
    if layout == "original":
        values |= _read_original(check, heads=values["heads"])
    else:
        values |= _read_native(check, heads=values["heads"])
    values["labels"] = check.labels()
    # A refused value was replaced by a placeholder, which must not be judged.
    if not check.problems and values["heads"] % values["groups"]:
        heads, groups = values["heads"], values["groups"]
        check.problems.append(f"{where}: {heads} heads cannot be shared among {groups} groups.")
    if not check.problems and values["kv_channels"] % 4:
        key = "kv_channels" if layout == "original" else "head_dim"
        check.refuse(key, "a multiple of 4: half of it is rotated in pairs")
    return (None if check.problems else Architecture(**values)), check.problems


def _read_original(check: ConfigCheck, heads: int) -> dict[str, Any]:
    multi_query = check.flag("multi_query_attention")
    groups = heads
    if multi_query:
        groups = check.integer("multi_query_group_num", 1, heads)
    return {
        "groups": groups,
        "epsilon": check.real("layernorm_epsilon", 1.0),
        "qkv_bias": check.flag("add_qkv_bias"),
        "qkv_per_head": not multi_query,
        "rope_ratio": _rope_ratio(check),
        "fp32_residual": check.flag("fp32_residual_connection", default=False),
        "quantization_bit": check.choice("quantization_bit", (0, 4, 8), default=0),
        "pre_seq_len": check.integer("pre_seq_len", 0, 2**20, default=0),
        "prefix_projection": check.flag("prefix_projection", default=False),
    }


def _rope_ratio(check: ConfigCheck) -> float:
    """The number that every position is divided by; 16 in chatglm2-6b-32k."""
    ratio = check.real("rope_ratio", _MAX_STRETCH, default=1.0)
    if ratio == 1:
        return ratio
    # chatglm3-6b-32k has the same key, but multiplies the rotary base by it. Run as a ChatGLM2
    # checkpoint, its logits would be off by 10.
    if "chatglm3" in str(check.config.get("_name_or_path", "")).lower():
        check.problems.append(
            f"{check.where}: 'rope_ratio' is {ratio:g} and '_name_or_path' names chatglm3, which "
            "scales positions in another way than ChatGLM2. Set model.path to a ChatGLM2 "
            "checkpoint."
        )
    # Earlier versions of glmbatch wrote this key, with "ntk" for the way of chatglm3.
    if check.config.get("rope_scaling", "linear") != "linear":
        check.refuse("rope_scaling", "'linear', the only way in which ChatGLM2 scales positions")
    return ratio


def _read_native(check: ConfigCheck, heads: int) -> dict[str, Any]:
    stated = check.config.get("rope_parameters")
    rope = ConfigCheck(
        stated if isinstance(stated, dict) else {},
        f"{check.where}: rope_parameters",
        check.problems,
    )
    kind = rope.choice("rope_type", ("default", "linear"))
    rope.fixed("partial_rotary_factor", _ROTARY_SHARE)
    if rope.config.get("rope_theta") != _ROPE_THETA:
        rope.refuse("rope_theta", f"{_ROPE_THETA:g}, the base of every ChatGLM2 checkpoint")
    ratio = 1.0
    if kind == "linear":
        ratio = rope.real("factor", _MAX_STRETCH)
    return {
        "groups": check.integer("num_key_value_heads", 1, heads),
        "epsilon": check.real("rms_norm_eps", 1.0),
        "qkv_bias": check.flag("attention_bias"),
        "qkv_per_head": False,
        "rope_ratio": ratio,
        "fp32_residual": False,
        "quantization_bit": 0,
        "pre_seq_len": check.integer("pre_seq_len", 0, 2**20, default=0),
        "prefix_projection": False,
    }


def unknown_keys(config: Mapping[str, Any], layout: Layout) -> list[str]:
    """The keys of `config`, sorted, that are neither read here nor known to be harmless."""
    numbers = {getattr(number, layout) for number in _NUMBERS}
    return sorted(config.keys() - _HARMLESS - _READ[layout] - _FIXED[layout].keys() - numbers)


def native_config(architecture: Architecture) -> dict[str, Any]:
    """Arguments for transformers' `GlmConfig`.

    All of them are given, because its defaults are those of another model (GLM-4-9B).
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _ROPE_THETA,
        "partial_rotary_factor": _ROTARY_SHARE,
    }
    if architecture.rope_ratio != 1:
        rope |= {"rope_type": "linear", "factor": architecture.rope_ratio}
    config = {number.native: getattr(architecture, number.attribute) for number in _NUMBERS}
    config |= {
        "num_key_value_heads": architecture.groups,
        "rms_norm_eps": architecture.epsilon,
        "attention_bias": architecture.qkv_bias,
        "rope_parameters": rope,
        "eos_token_id": architecture.eos_id,
        "pad_token_id": architecture.pad_id,
        # The published model never ties them, whatever its config says.
        "tie_word_embeddings": False,
        "id2label": dict(enumerate(architecture.labels)),
        "label2id": {label: row for row, label in enumerate(architecture.labels)},
    }
    if architecture.pre_seq_len:
        config["pre_seq_len"] = architecture.pre_seq_len
    return config


def original_config(architecture: Architecture) -> dict[str, Any]:
    """The config.json of `architecture` in the published layout, without quantization.

    A prefix is described without its projection, as `save_checkpoint` writes it.
    """
    config = {number.original: getattr(architecture, number.attribute) for number in _NUMBERS}
    config |= _FIXED["original"]
    config |= {
        "model_type": "chatglm",
        "add_qkv_bias": architecture.qkv_bias,
        "layernorm_epsilon": architecture.epsilon,
        # With as many groups as heads this is multi-head attention, but its fused rows are not
        # interleaved head by head.
        "multi_query_attention": True,
        "multi_query_group_num": architecture.groups,
        "eos_token_id": architecture.eos_id,
        "pad_token_id": architecture.pad_id,
        "tie_word_embeddings": False,
    }
    if architecture.rope_ratio != 1:
        config["rope_ratio"] = architecture.rope_ratio
    if architecture.pre_seq_len:
        config |= {"pre_seq_len": architecture.pre_seq_len, "prefix_projection": False}
    return config
