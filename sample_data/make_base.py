"""Write a small ChatGLM2 in the published layout: random weights, and a tokenizer for the texts.

    python sample_data/make_base.py TRAINING.yaml    the base that this training names as its model

`docs/training.md` shows such a training.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.architecture import native_config, read_architecture
from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.glm.files import RANDOM_WEIGHTS
from glmbatch.settings.jobfile import load_settings
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.examples import TEXT_ALONE
from glmbatch.tuning.split import read_labelled

HEADS = 4
GROUPS = 2
# Unused rows of the vocabulary, as in the published model.
UNUSED_ROWS = 8
MOST_SENTENCES = 200_000
# sentencepiece skips sentences of more than 4,192 bytes.
MOST_CHARACTERS = 1000
# The base for a training. Few texts have fewer pieces.
PIECES = 8000
WIDTH = 128
LAYERS = 2
# How sharply the first heads look at one token, by rotary frequency, as logits; and how far back.
SHARPNESS = (6.0, 4.0, 4.0, 4.0)
LOOKS_BACK = (1, 2)
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
    """Sizes of the model. `vocabulary` is the maximum number of pieces; few texts give fewer.

    `inner` is the width between the matrices of the MLP, as a multiple of `hidden_size`.
    """

    hidden_size: int
    layers: int
    vocabulary: int
    max_positions: int
    inner: int = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="YAML file of a training, as for glmbatch train")
    try:
        print(make_base_for(load_settings(parser.parse_args().file, TuneConfig)))
    except InputError as error:
        print(f"make_base.py: {error}", file=sys.stderr)
        return 2
    return 0


def make_base_for(config: TuneConfig) -> str:
    """Write the base that `config` names as its model, for its training rows; returns a summary.

    InputError if a checkpoint is there, or if the rows cannot be trained on.
    """
    path = config.model.path
    if "://" in path:
        raise InputError(f"{path}: is not a folder of this machine. Set model to a new folder.")
    labelled = read_labelled(config.data, config.prompt_template or TEXT_ALONE)
    texts = [example.text for example in labelled.parts["train"]]
    training = config.training
    positions = training.max_input_tokens + (training.max_answer_tokens if config.writes else 0)
    inner = 3 if config.writes else 1
    shape = Shape(WIDTH, LAYERS, PIECES, positions, inner)
    pieces = make_base(Path(path), texts, shape, training.seed, to_classify=not config.writes)
    return f"{path}: random weights, and a vocabulary of {pieces} pieces from {len(texts)} texts"


def make_base(
    directory: Path, texts: Sequence[str], shape: Shape, seed: int, *, to_classify: bool = False
) -> int:
    """Write the checkpoint to `directory`; returns the number of pieces in its vocabulary.

    It has the same bytes each time on the same hardware. A base `to_classify` sees neighbouring
    tokens from the start, and says that its weights are random, so that a training distils TF-IDF.
    """
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer, pieces = _train_tokenizer(texts, shape.vocabulary)
    published = {
        "model_type": "chatglm",
        "num_layers": shape.layers,
        "padded_vocab_size": pieces + UNUSED_ROWS,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.inner * shape.hidden_size,
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
    if to_classify:
        _look_back(model)
    marks = {RANDOM_WEIGHTS: True} if to_classify else {}
    save_checkpoint(
        model, directory, tokenizer_model=tokenizer, extra_config=marks, dtype="float32"
    )
    return pieces


@torch.no_grad()
def _look_back(model: Any) -> None:
    """Let the first heads of the first layer look at the token before, and at the one before that.

    The biases alone do it: rotated, they make attention depend on the distance. So the second layer
    can average over pairs and triples of tokens, as TF-IDF has n-grams.
    """
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    rotated = round(width * model.config.rope_parameters["partial_rotary_factor"])
    for pair, sharpness in enumerate(SHARPNESS):
        # Rotated by the same angle, query and key give `sharpness`; 1 / sqrt(width) scales them.
        length = math.sqrt(sharpness * math.sqrt(width))
        angle = model.config.rope_parameters["rope_theta"] ** (-2 * pair / rotated)
        attention.k_proj.bias[2 * pair] = length  # of the group to which these heads belong
        for head, distance in enumerate(LOOKS_BACK):
            first = head * width + 2 * pair
            attention.q_proj.bias[first] = length * math.cos(angle * distance)
            attention.q_proj.bias[first + 1] = -length * math.sin(angle * distance)


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

    Half of the vocabulary at most is for single characters. Texts with too few distinct pieces get
    a smaller vocabulary.
    """
    lines = _without_rare(texts[:MOST_SENTENCES], vocabulary // 2)
    settings = TOKENIZER_SETTINGS | {"vocab_size": vocabulary}
    try:
        model = _sentencepiece(lines, settings)
    except RuntimeError:
        model = _sentencepiece(lines, settings | {"hard_vocab_limit": False})
    return model, SentencePieceProcessor(model_proto=model).vocab_size()


def _sentencepiece(lines: Sequence[str], settings: dict[str, Any]) -> bytes:
    """RuntimeError if the lines have fewer distinct pieces than a hard limit of the vocabulary."""
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=_short(lines), model_writer=model, **settings)
    return model.getvalue()


def _without_rare(texts: Sequence[str], most: int) -> list[str]:
    """The lines of `texts`, divided at each character that is not among the `most` frequent.

    Bytes spell those: Chinese texts have thousands, and pieces are better spent on words. To set
    `character_coverage` instead would fail, because sentencepiece refuses one below 0.98.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    rare = {character for character, _ in counts.most_common()[most:]}
    divided = str.maketrans(dict.fromkeys(rare, "\n"))
    lines: list[str] = []
    for text in texts:
        lines += [line for line in text.translate(divided).splitlines() if line.strip()]
    return lines


def _short(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), MOST_CHARACTERS):
            yield line[start : start + MOST_CHARACTERS]


if __name__ == "__main__":
    sys.exit(main())
