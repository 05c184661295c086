"""The model's shape, the rows to be answered, and the arithmetic that they take. Standard library only.

Lengths are log-normal, as texts have them. Everything follows from the seed.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from math import log
from typing import Any

TASKS = ("classify", "labels", "generate")
LABELS = (
    (11,),
    (12, 13),
    (14, 15, 16),
    (14, 17),
    (18, 19, 20, 21),
    (22,),
    (23, 24),
    (25, 26, 27, 28, 29, 30),
)
FIRST_ID = 31  # of prompts: behind padding, the end token and the labels
LABEL_TEMPLATE_TOKENS = 100
LABEL_TEXT_TOKENS = 40

Work = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of a ChatGLM2 model: fused gate and up projections, grouped queries, rotary positions on half of each head."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    positions: int = 2048
    classes: int = 4

    @property
    def name(self) -> str:
        return "-".join(f"{field}{number}" for field, number in asdict(self).items())

    @property
    def body_weights(self) -> int:
        """Weights that every token is multiplied with."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        """Weights of the token scores, for each token that is chosen or scored."""
        return self.hidden * self.vocabulary

    def config(self) -> dict[str, Any]:
        """The arguments of transformers' `GlmConfig`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "num_labels": self.classes,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        }


SHAPES = {
    "tiny": Shape(128, 320, 2, 4, 2, 32, 512),
    "mid": Shape(512, 1712, 8, 8, 2, 64, 8192),
    "big": Shape(1024, 3424, 16, 16, 2, 64, 16384),
    "6b": Shape(4096, 13696, 28, 32, 2, 128, 65024),
}


@dataclass(frozen=True)
class Lengths:
    """Of prompts or answers, in tokens."""

    mean: int
    least: int
    most: int

    def draw(self, rng: random.Random, count: int) -> list[int]:
        drawn = (
            rng.lognormvariate(log(self.mean) - 0.32, 0.8) for _ in range(count)
        )  # 0.32 = 0.8 ** 2 / 2
        return [int(min(max(length, self.least), self.most)) for length in drawn]


def make_work(
    task: str, shape: Shape, rows: int, prompts: Lengths, answers: Lengths, prefix: int, seed: int
) -> Work:
    """What a contestant is asked: rows of token ids that begin with the same `prefix` ids, and what to do with them."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST_ID, shape.vocabulary) for _ in range(count)]

    template = ids(prefix)
    texts = [ids(length) for length in prompts.draw(rng, rows)]
    if task == "labels":
        texts = [text[:LABEL_TEXT_TOKENS] for text in texts]
    return {
        "task": task,
        "config": shape.config(),
        "seed": seed,
        "indexes": list(range(rows)),
        "rows": [template + text for text in texts],
        "prefix_tokens": prefix,
        "labels": LABELS if task == "labels" else (),
        "answer_tokens": answers.draw(rng, rows) if task == "generate" else [0] * rows,
    }


def part_of(work: Work, rows: int) -> Work:
    """The work on some of the rows, evenly from short to long, for those who would take too long with all."""
    by_length = sorted(
        work["indexes"], key=lambda at: len(work["rows"][at]) + work["answer_tokens"][at]
    )
    count = len(by_length)
    kept = sorted(by_length[(2 * at + 1) * count // (2 * rows)] for at in range(min(rows, count)))
    parts = {name: [work[name][at] for at in kept] for name in ("rows", "answer_tokens")}
    return {**work, **parts, "indexes": kept}


def tokens_of(work: Work) -> int:
    """Prompt and generated tokens, without padding."""
    return sum(len(row) for row in work["rows"]) + sum(
        int(length) for length in work["answer_tokens"]
    )


def least_operations(work: Work, shape: Shape) -> int:
    """Two for each weight that a token must be multiplied with. Attention, a few percent here, is left out.

    A shared prefix counts once. The last layer counts for all tokens, though some of it can be left out for those that
    nobody reads: at 8 layers that allows 1.1 of this limit, at 28 layers 1.04.
    """
    read: int = sum(map(len, work["rows"])) - work["prefix_tokens"] * (len(work["rows"]) - 1)
    scored: int = 0
    if work["task"] == "generate":
        read += sum(work["answer_tokens"]) - len(
            work["rows"]
        )  # an answer's last token is not read again
        scored = sum(work["answer_tokens"])
    if work["task"] == "labels":
        beginnings = {
            tuple(label[:end]) for label in work["labels"] for end in range(1, len(label))
        }
        read += len(beginnings) * len(work["rows"])
        scored = (len(beginnings) + 1) * len(work["rows"])
    return 2 * (shape.body_weights * read + shape.head_weights * scored)
