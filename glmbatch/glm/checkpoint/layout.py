"""The table that maps the tensors of ChatGLM2's published layout to those of transformers' GLM.

Loading and saving both use it. Holds no tensors, reads no files. Letters of a shape:

    V padded vocabulary   D hidden size   F feed-forward size   U = 2F   L labels
    A = heads x kv channels   G = groups x kv channels   Q = A + 2G
    P prefix length   W = layers x 2 x G
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from glmbatch.glm.checkpoint.architecture import Architecture, Layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint: its key and its stored shape.

    `parts` has the names and shapes of the native tensors that its rows are split into, in order.
    It is empty for a scale and for the tensors of a prefix, which become no weight by themselves.
    `stored` is "int8" for an int8 weight and for an int4 one, packed two to a byte.
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    stored: Literal["float", "int8"] = "float"


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the table; {n} in a name stands for the layer number."""

    original: str
    shape: str
    parts: tuple[tuple[str, str], ...]
    when: Literal["always", "bias", "causal", "head", "prefix", "projection"] = "always"
    quantizable: bool = False


_LAYER = "transformer.encoder.layers.{n}"
_QKV = f"{_LAYER}.self_attention.query_key_value"
_NATIVE_LAYER = "model.layers.{n}"
_ATTENTION = f"{_NATIVE_LAYER}.self_attn"
PREFIX_KEYS = "transformer.prefix_encoder."
PREFIX_KEY = "prefix_kv"
HEAD_KEYS: dict[Layout, str] = {"original": "classifier_head.weight", "native": "score.weight"}

# Tensors are listed, and saved, in this order.
_ROWS = (
    _Row(
        "transformer.embedding.word_embeddings.weight",
        "VD",
        (("model.embed_tokens.weight", "VD"),),
    ),
    _Row(
        f"{_LAYER}.input_layernorm.weight",
        "D",
        ((f"{_NATIVE_LAYER}.input_layernorm.weight", "D"),),
    ),
    _Row(
        # The published layout fuses query, key and value; transformers keeps them separate.
        f"{_QKV}.weight",
        "QD",
        (
            (f"{_ATTENTION}.q_proj.weight", "AD"),
            (f"{_ATTENTION}.k_proj.weight", "GD"),
            (f"{_ATTENTION}.v_proj.weight", "GD"),
        ),
        quantizable=True,
    ),
    _Row(
        f"{_QKV}.bias",
        "Q",
        (
            (f"{_ATTENTION}.q_proj.bias", "A"),
            (f"{_ATTENTION}.k_proj.bias", "G"),
            (f"{_ATTENTION}.v_proj.bias", "G"),
        ),
        when="bias",
    ),
    _Row(
        f"{_LAYER}.self_attention.dense.weight",
        "DA",
        ((f"{_ATTENTION}.o_proj.weight", "DA"),),
        quantizable=True,
    ),
    _Row(
        f"{_LAYER}.post_attention_layernorm.weight",
        "D",
        ((f"{_NATIVE_LAYER}.post_attention_layernorm.weight", "D"),),
    ),
    _Row(
        # Gate and up are fused in both layouts, in the same order.
        f"{_LAYER}.mlp.dense_h_to_4h.weight",
        "UD",
        ((f"{_NATIVE_LAYER}.mlp.gate_up_proj.weight", "UD"),),
        quantizable=True,
    ),
    _Row(
        f"{_LAYER}.mlp.dense_4h_to_h.weight",
        "DF",
        ((f"{_NATIVE_LAYER}.mlp.down_proj.weight", "DF"),),
        quantizable=True,
    ),
    _Row("transformer.encoder.final_layernorm.weight", "D", (("model.norm.weight", "D"),)),
    # A classification head replaces the language head.
    _Row("transformer.output_layer.weight", "VD", (("lm_head.weight", "VD"),), when="causal"),
    _Row(HEAD_KEYS["original"], "LD", (("score.weight", "LD"),), when="head"),
    _Row("classifier_head.bias", "L", (("score.bias", "L"),), when="head"),
    # P-Tuning v2: together, these tensors become the native prefix_kv.
    _Row(f"{PREFIX_KEYS}embedding.weight", "PW", (), when="prefix"),
    _Row(f"{PREFIX_KEYS}trans.0.weight", "DW", (), when="projection"),
    _Row(f"{PREFIX_KEYS}trans.0.bias", "D", (), when="projection"),
    _Row(f"{PREFIX_KEYS}trans.2.weight", "WD", (), when="projection"),
    _Row(f"{PREFIX_KEYS}trans.2.bias", "W", (), when="projection"),
)

# Allowed but not used: a buffer of early revisions, and a classifier's language head.
_DROPPED = ("transformer.rotary_pos_emb.inv_freq",)
_DROPPED_BESIDE_HEAD = ("transformer.output_layer.weight", "lm_head.weight")


def list_tensors(
    architecture: Architecture, layout: Layout, has_head: bool
) -> dict[str, TensorSpec]:
    """Every tensor that such a checkpoint must have, by its key in `layout`, layer by layer."""
    specs = (_original_specs if layout == "original" else _native_specs)(architecture, has_head)
    return {spec.key: spec for spec in specs}


def dropped_keys(has_head: bool) -> frozenset[str]:
    """Keys that a checkpoint in the published layout may have and that are not loaded."""
    return frozenset(_DROPPED + (_DROPPED_BESIDE_HEAD if has_head else ()))


def split_rows(
    architecture: Architecture, spec: TensorSpec, stored: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the native tensors that the rows of `stored` are split into.

    The values are views of `stored`, or copies where its rows are interleaved head by head.
    """
    names = [name for name, _ in spec.parts]
    if len(names) > 1 and architecture.qkv_per_head:
        # Without multi-query attention, the rows are the query, key and value of the first head,
        # then those of the next.
        heads = stored.view(
            architecture.heads, len(names), architecture.kv_channels, *stored.shape[1:]
        )
        for name, rows in zip(names, heads.unbind(1), strict=True):
            yield name, rows.flatten(0, 1)
    elif names:
        # With it, all rows of the query come first, then those of key and value.
        sizes = [shape[0] for _, shape in spec.parts]
        yield from zip(names, stored.split_with_sizes(sizes), strict=True)


def _original_specs(architecture: Architecture, has_head: bool) -> Iterator[TensorSpec]:
    bits = architecture.quantization_bit
    for row, layer in _rows(architecture, has_head):
        key = row.original.format(n=layer)
        shape = _sizes(architecture, row.shape)
        parts = tuple(
            (name.format(n=layer), _sizes(architecture, letters)) for name, letters in row.parts
        )
        if bits and row.quantizable:
            # int4 packs two input columns into one byte.
            yield TensorSpec(key, (shape[0], shape[1] * bits // 8), parts, "int8")
            # The scale becomes no tensor of the model: its weight is dequantized with it.
            yield TensorSpec(f"{key}_scale", shape[:1], ())
        else:
            yield TensorSpec(key, shape, parts)


def _native_specs(architecture: Architecture, has_head: bool) -> Iterator[TensorSpec]:
    for row, layer in _rows(architecture, has_head):
        for name, letters in row.parts:
            key = name.format(n=layer)
            shape = _sizes(architecture, letters)
            yield TensorSpec(key, shape, ((key, shape),))
    if architecture.pre_seq_len:
        yield TensorSpec(PREFIX_KEY, prefix_shape(architecture), ())


def prefix_shape(architecture: Architecture) -> tuple[int, ...]:
    """Shape of the native prefix: [layers, 2 (key, value), groups, prefix length, kv channels]."""
    return (
        architecture.layers,
        2,
        architecture.groups,
        architecture.pre_seq_len,
        architecture.kv_channels,
    )


def _rows(architecture: Architecture, has_head: bool) -> Iterator[tuple[_Row, int]]:
    """The rows of the table that apply, with their layer: embedding, layer by layer, the rest."""
    applies = {
        "always": True,
        "bias": architecture.qkv_bias,
        "causal": not has_head,
        "head": has_head,
        "prefix": architecture.pre_seq_len > 0,
        "projection": architecture.pre_seq_len > 0 and architecture.prefix_projection,
    }
    rows = [row for row in _ROWS if applies[row.when]]
    layered = [row for row in rows if "{n}" in row.original]
    first = rows.index(layered[0])
    for row in rows[:first]:
        yield row, 0
    for layer in range(architecture.layers):
        for row in layered:
            yield row, layer
    for row in rows[first + len(layered) :]:
        yield row, 0


def _sizes(architecture: Architecture, letters: str) -> tuple[int, ...]:
    attended = architecture.heads * architecture.kv_channels
    grouped = architecture.groups * architecture.kv_channels
    size = {
        "V": architecture.vocab_size,
        "D": architecture.hidden_size,
        "F": architecture.ffn_size,
        "U": 2 * architecture.ffn_size,
        "L": len(architecture.labels),
        "A": attended,
        "G": grouped,
        "Q": attended + 2 * grouped,
        "P": architecture.pre_seq_len,
        "W": architecture.layers * 2 * grouped,
    }
    return tuple(size[letter] for letter in letters)
