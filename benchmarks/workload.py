"""The model's shape, the rows to answer, and the arithmetic that they need.

Standard library only. Lengths are log-normal, like those of real texts. The seed determines
everything.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

TASKS = ("classify", "labels", "one-token", "generate", "sample", "questions", "fields")
USUAL_TASKS = ("classify", "labels", "generate")
WRITING_TASKS = {"generate", "sample"}
ONE_TOKEN_TASKS = {"one-token", "questions"}
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.8}  # in the task "sample"
# Token ids of 8 labels of 1 to 6 tokens. Some share a prefix, as words of one language do.
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
ONE_TOKEN_LABELS = ((11,), (12,), (13,))
FIRST_ID = 31  # first id in prompts, above those of padding, the end token and the labels
LABEL_TEMPLATE_TOKENS = 100
LABEL_TEXT_TOKENS = 40
QUESTIONS = 5  # about each text of the task "questions"
QUESTION_TOKENS = 12

Work = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a ChatGLM2 model.

    It has fused gate and up projections, grouped-query attention, and rotary positions on half of
    each head.
    """

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
        """All sizes joined: the name of the checkpoint in the cache."""
        return "-".join(f"{field}{number}" for field, number in asdict(self).items())

    @property
    def body_weights(self) -> int:
        """Number of weights that every token is multiplied by."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        """Number of weights in the output layer, used for each token that is chosen or scored."""
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
    # 65,280 rather than 65,024 rows, which only the published tokenizer has.
    "6b": Shape(4096, 13696, 28, 32, 2, 128, 65280),
}


@dataclass(frozen=True)
class Lengths:
    """Distribution of the lengths of prompts or answers, in tokens."""

    mean: int
    least: int
    most: int

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """`count` lengths, cut to `least` and `most`."""
        lengths = []
        for _ in range(count):
            # The mean of a log-normal is exp(mu + sigma**2 / 2), and 0.32 = 0.8**2 / 2.
            length = rng.lognormvariate(log(self.mean) - 0.32, 0.8)
            lengths.append(int(min(max(length, self.least), self.most)))
        return lengths


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark of our engine alone, by default 6B on a GPU."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="add each reading as a JSON line")
    return parser


def make_work(
    task: str, shape: Shape, rows: int, prompts: Lengths, answers: Lengths, prefix: int, seed: int
) -> Work:
    """Make the work of a contestant: rows of token ids, and what to do with them.

    All rows begin with the same `prefix` ids.
    """
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST_ID, shape.vocabulary) for _ in range(count)]

    template = ids(prefix)
    texts = [ids(length) for length in prompts.draw(rng, rows)]
    if task == "labels":
        texts = [text[:LABEL_TEXT_TOKENS] for text in texts]
    if task == "questions":
        questions = [ids(QUESTION_TOKENS) for _ in range(QUESTIONS)]
        texts = [text + question for text in texts for question in questions]
    return {
        "task": task,
        "config": shape.config(),
        "seed": seed,
        "indexes": list(range(len(texts))),
        "beside": QUESTIONS if task == "questions" else 1,
        "rows": [template + text for text in texts],
        "prefix_tokens": prefix,
        "labels": {"labels": LABELS}.get(task, ONE_TOKEN_LABELS if task in ONE_TOKEN_TASKS else ()),
        "answer_tokens": answers.draw(rng, rows) if task in WRITING_TASKS else [0] * len(texts),
        "sampling": SAMPLING if task == "sample" else {},
    }


def part_of(work: Work, rows: int) -> Work:
    """The work on only `rows` rows, spread evenly from short to long, for slow contestants."""

    def length(index: int) -> int:
        return len(work["rows"][index]) + int(work["answer_tokens"][index])

    by_length = sorted(work["indexes"], key=length)
    count = len(by_length)
    # The middle row of each of `rows` equal parts.
    middles = [(2 * part + 1) * count // (2 * rows) for part in range(min(rows, count))]
    kept = sorted(by_length[at] for at in middles)
    return {
        **work,
        "beside": 1,
        "indexes": kept,
        "rows": [work["rows"][index] for index in kept],
        "answer_tokens": [work["answer_tokens"][index] for index in kept],
    }


def tokens_of(work: Work) -> int:
    """Number of prompt and generated tokens, without padding."""
    return sum(len(row) for row in work["rows"]) + int(sum(work["answer_tokens"]))


def least_operations(work: Work, shape: Shape) -> int:
    """Minimum operations: two for each weight that a token must be multiplied by.

    A shared prefix counts once. Attention, a few percent here, does not count. The last layer
    counts for all tokens, although an engine can skip parts of it for tokens whose output is not
    used. Such an engine can reach 1.1 of this limit at 8 layers, and 1.04 at 28.
    """
    rows = len(work["rows"])
    read: int = sum(map(len, work["rows"])) - work["prefix_tokens"] * (rows - 1)
    if work["beside"] > 1:  # a text is read once for all its questions
        read = sum(len(row) for row in work["rows"][:: work["beside"]])
        read += QUESTION_TOKENS * (rows - rows // work["beside"])
    scored: int = 0
    if work["task"] in WRITING_TASKS:
        written = sum(work["answer_tokens"])
        read += written - rows  # the last token of an answer is never fed back
        scored = written
    if work["labels"]:
        # Labels with a common prefix share its tokens, as in a tree.
        beginnings = set()
        for label in work["labels"]:
            beginnings.update(tuple(label[:end]) for end in range(1, len(label)))
        read += len(beginnings) * rows
        scored = (len(beginnings) + 1) * rows
    return 2 * (shape.body_weights * read + shape.head_weights * scored)
