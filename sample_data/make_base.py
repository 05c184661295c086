"""Write a small ChatGLM2 in the published layout: random weights, and a tokenizer for the texts."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer

from glmbatch.glm.checkpoint.architecture import native_config, read_architecture
from glmbatch.glm.checkpoint.save import save_checkpoint

HEADS = 4
GROUPS = 2
# Unused rows of the vocabulary, as in the published model.
UNUSED_ROWS = 8
MOST_SENTENCES = 200_000
# sentencepiece skips sentences of more than 4,192 bytes.
MOST_CHARACTERS = 1000
# The published tokenizer's settings.
TOKENIZER_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9995,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "add_dummy_prefix": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `vocabulary` is the maximum number of pieces; few texts give fewer."""

    hidden_size: int
    layers: int
    vocabulary: int
    max_positions: int


def make_base(directory: Path, texts: Sequence[str], shape: Shape, seed: int) -> None:
    """Write the checkpoint to `directory`, with the same bytes each time on the same hardware."""
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer, pieces = _train_tokenizer(texts, shape.vocabulary)
    published = {
        "model_type": "chatglm",
        "num_layers": shape.layers,
        "padded_vocab_size": pieces + UNUSED_ROWS,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": 3 * shape.hidden_size,
        "num_attention_heads": HEADS,
        "kv_channels": shape.hidden_size // HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "seq_length": shape.max_positions,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = GlmConfig(**native_config(read_architecture(published, "the sample's base")))
    model: Any = GlmForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = _first_scale(name, weight.shape[1])
            torch.nn.init.normal_(weight, 0.0, scale, generator=generator)
    save_checkpoint(model, directory, tokenizer_model=tokenizer, dtype="float32")


def _first_scale(name: str, inputs: int) -> float:
    """The standard deviation of a matrix's initial weights.

    With small queries and keys, attention starts out uniform over the whole text. Such a small
    model then learns many times faster.
    """
    if "embed_tokens" in name:
        return 0.05
    if any(part in name for part in ("q_proj", "k_proj", "lm_head")):
        return 0.02
    into_residual = "o_proj" in name or "down_proj" in name
    return (0.35 if into_residual else 1.0) / math.sqrt(inputs)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> tuple[bytes, int]:
    """A sentencepiece model with the published settings, and its number of pieces.

    sentencepiece raises RuntimeError if the texts have too few distinct pieces. Smaller
    vocabularies are then tried, down to the 256 bytes and the characters.
    """
    lines = []
    for text in texts[:MOST_SENTENCES]:
        lines += [line for line in text.splitlines() if line.strip()]
    settings = TOKENIZER_SETTINGS | {"character_coverage": _coverage(lines, vocabulary // 2)}
    while True:
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_short(lines),
                model_writer=model,
                vocab_size=vocabulary,
                **settings,
            )
            return model.getvalue(), vocabulary
        except RuntimeError:
            vocabulary = int(vocabulary * 0.8)
            if vocabulary < 300:
                raise


def _coverage(lines: Sequence[str], most: int) -> float:
    """The share of the text in the `most` frequent characters. All others are spelled as bytes.

    Chinese texts have thousands of mostly rare characters. Pieces are better spent on words.
    """
    counts = Counter[str]()
    for line in lines:
        counts.update(line)
    common = sum(count for _, count in counts.most_common(most)) / max(1, counts.total())
    return min(common, float(TOKENIZER_SETTINGS["character_coverage"]))


def _short(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), MOST_CHARACTERS):
            yield line[start : start + MOST_CHARACTERS]
