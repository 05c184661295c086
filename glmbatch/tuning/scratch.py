"""A small ChatGLM2 with random weights and a tokenizer of given texts, in the published layout: a base to train."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceTrainer

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.architecture import native_config, read_architecture
from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.settings.tuning import ScratchConfig

HEADS, GROUPS, SPECIAL = 4, 2, 8
MOST_SENTENCES = 200_000


def make_base(directory: Path, texts: Sequence[str], scratch: ScratchConfig, seed: int) -> None:
    """Write the checkpoint into `directory`. The same call writes the same bytes on the same kind of machine."""
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer, pieces = _train_tokenizer(texts, scratch.vocabulary)
    stated = {
        "model_type": "chatglm",
        "num_layers": scratch.layers,
        "padded_vocab_size": pieces + SPECIAL,
        "hidden_size": scratch.hidden_size,
        "ffn_hidden_size": 3 * scratch.hidden_size,
        "num_attention_heads": HEADS,
        "kv_channels": scratch.hidden_size // HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "seq_length": scratch.max_positions,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model: Any = GlmForCausalLM(GlmConfig(**native_config(read_architecture(stated, "scratch"))))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(
                weight, 0.0, _first_scale(name, weight.shape[1]), generator=generator
            )
    save_checkpoint(model, directory, tokenizer_model=tokenizer, dtype="float32")


def _first_scale(name: str, inputs: int) -> float:
    """Small queries and keys begin as an even look at the whole text: so small a model learns many times faster."""
    if "embed_tokens" in name:
        return 0.05
    if any(part in name for part in ("q_proj", "k_proj", "lm_head")):
        return 0.02
    into_residual = "o_proj" in name or "down_proj" in name
    return (0.35 if into_residual else 1.0) / math.sqrt(inputs)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> tuple[bytes, int]:
    """A sentencepiece model with the published one's settings, and its number of pieces."""
    lines = [line for text in texts[:MOST_SENTENCES] for line in text.splitlines() if line.strip()]
    most, coverage = vocabulary, _coverage(lines, vocabulary // 2)
    while True:
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_short(lines),
                model_writer=model,
                vocab_size=most,
                **TOKENIZER_SETTINGS | {"character_coverage": coverage},
            )
            return model.getvalue(), most
        except RuntimeError as error:  # too few different pieces in so few texts
            most = int(most * 0.8)
            if most < 300:
                raise InputError(
                    f"the texts are too few or too alike for a tokenizer: {error}"
                ) from error


def _coverage(lines: Sequence[str], most: int) -> float:
    """Share of the text that has pieces of its own, so that at most `most` characters do; bytes spell the others.

    Chinese texts have thousands of different characters, most of them rare; pieces are better spent on words.
    """
    counts = Counter[str]()
    for line in lines:
        counts.update(line)
    common = sum(count for _, count in counts.most_common(most)) / max(1, counts.total())
    return min(common, float(TOKENIZER_SETTINGS["character_coverage"]))


def _short(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:  # sentencepiece leaves out longer ones
        yield from (line[at : at + 1000] for at in range(0, len(line), 1000))


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
