"""Diagnoses a checkpoint directory: its model, the memory it needs, and every problem in it.

Loads no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glmbatch.errors import GlmbatchError
from glmbatch.glm.checkpoint.adapter import Adapter
from glmbatch.glm.checkpoint.load import (
    Checkpoint,
    digest_tokenizer,
    digest_weights,
    inspect_checkpoint,
)
from glmbatch.glm.device import DTYPE_BYTES
from glmbatch.glm.tfidf.model import TfidfModel, digest_tfidf, is_tfidf, load_tfidf
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# One is a special token: spelled out in a text, it must be encoded as text.
_SAMPLES = ("你好", "Hello, world!", "[gMASK]")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model takes in one dtype: its weights, and the KV cache per token."""

    weights: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of `examine`.

    If the checkpoint cannot run, `checkpoint` is None and `problems` has the reasons. A digest that
    was not computed is None. `sample_ids` has the token ids of a few texts.
    `tfidf` is the exported baseline of a training, which is no checkpoint.
    """

    path: Path
    checkpoint: Checkpoint | None
    weights_digest: str | None
    tokenizer_digest: str | None
    sample_ids: tuple[tuple[str, tuple[int, ...]], ...]
    problems: tuple[str, ...]
    tfidf: TfidfModel | None = None

    @property
    def memory(self) -> dict[str, Memory]:
        """The memory that the model takes, by dtype; empty if it cannot run."""
        if self.checkpoint is None:
            return {}
        parameters = self.checkpoint.parameters
        per_token = self.checkpoint.architecture.kv_numbers_per_token
        memory = {}
        for dtype, size in DTYPE_BYTES.items():
            memory[dtype] = Memory(parameters * size, per_token * size)
        return memory


def examine(
    path: str | Path, *, digests: bool = True, adapter: str | Path | None = None
) -> Diagnosis:
    """The diagnosis of the checkpoint in directory `path`, with `adapter` merged into it.

    Every problem of either is in the result; no GlmbatchError is raised. Takes seconds for a model
    of any size; `digests` read every byte, which takes about a second per gigabyte.
    """
    directory = Path(path)
    if is_tfidf(directory):
        return _examine_tfidf(directory, digests=digests)
    problems: list[str] = []
    checkpoint: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    weights_digest: str | None = None
    tokenizer_digest: str | None = None
    # Any other error is a bug and must not be hidden among the problems.
    try:
        checkpoint, problems = inspect_checkpoint(directory, adapter)
        if (directory / TOKENIZER_FILE).is_file():
            tokenizer = load_tokenizer(directory)
            tokenizer_digest = digest_tokenizer(directory) if digests else None
        elif directory.is_dir() and not os.path.lexists(directory / TOKENIZER_FILE):
            problems.append(
                f"{directory / TOKENIZER_FILE}: no such file, so no text can be encoded. "
                "Copy it too."
            )
        if checkpoint and digests:
            weights_digest = digest_weights(directory, adapter, checkpoint)
    except GlmbatchError as error:
        checkpoint = None
        # The inspection has already reported a damaged tokenizer.
        if str(error) not in problems:
            problems.append(str(error))
    samples: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if tokenizer:
        samples = _sample(tokenizer)
    return Diagnosis(
        directory, checkpoint, weights_digest, tokenizer_digest, samples, tuple(problems)
    )


def _examine_tfidf(directory: Path, *, digests: bool) -> Diagnosis:
    try:
        tfidf = load_tfidf(directory)
        digest = digest_tfidf(directory) if digests else None
    except GlmbatchError as error:
        return Diagnosis(directory, None, None, None, (), (str(error),))
    return Diagnosis(directory, None, digest, None, (), (), tfidf)


def _sample(tokenizer: Tokenizer) -> tuple[tuple[str, tuple[int, ...]], ...]:
    encoded = tokenizer.encode(_SAMPLES)
    return tuple((text, tuple(ids)) for text, ids in zip(_SAMPLES, encoded, strict=True))


def describe(diagnosis: Diagnosis) -> str:
    """`diagnosis` as text: the verdict, then an indented line for each problem and fact."""
    return "\n".join(_lines(diagnosis))


def _line(name: str, fact: str) -> str:
    # Ten columns hold the longest name, "tokenizer".
    return f"  {name:<10} {fact}"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    count = len(diagnosis.problems)
    verdict = "sound" if not count else "1 problem" if count == 1 else f"{count} problems"
    yield f"{diagnosis.path}: {verdict}"
    for problem in diagnosis.problems:
        yield _line("problem", problem)
    if diagnosis.checkpoint:
        yield from _facts(diagnosis.checkpoint)
    if diagnosis.tfidf:
        yield from _tfidf_facts(diagnosis.tfidf)
    for dtype, memory in diagnosis.memory.items():
        weights = f"{memory.weights / 2**30:.2f} GiB of weights"
        per_token = f"{memory.per_token / 2**10:g} KiB of KV cache per token"
        yield _line(dtype, f"{weights}, {per_token}")
    if diagnosis.weights_digest:
        yield _line("weights", f"sha256 {diagnosis.weights_digest}")
    if diagnosis.tokenizer_digest:
        yield _line("tokenizer", f"sha256 {diagnosis.tokenizer_digest}")
    for text, ids in diagnosis.sample_ids:
        yield _line("ids", f"{text} -> {', '.join(map(str, ids))}")


def _tfidf_facts(model: TfidfModel) -> Iterator[str]:
    yield _line("kind", model.kind)
    yield _line("labels", ", ".join(model.labels))
    grams = f"{len(model.vocabulary):,} n-grams of {model.lengths[0]} to {model.lengths[1]}"
    yield _line("model", f"{model.parameters:,} parameters: {grams} {model.units}")


def _facts(checkpoint: Checkpoint) -> Iterator[str]:
    model = checkpoint.architecture
    yield _line("kind", ", ".join(_kind(checkpoint)))
    if checkpoint.has_head and checkpoint.predicts != "number":
        yield _line("labels", ", ".join(checkpoint.labels))
    sizes = f"{model.layers} layers, hidden {model.hidden_size}"
    heads = f"{model.heads} heads in {model.groups} groups, {model.max_positions:,} positions"
    yield _line("model", f"{checkpoint.parameters:,} parameters: {sizes}, {heads}")
    ids = f"{checkpoint.tokenizer_size} in the tokenizer, padded to {model.vocab_size}"
    yield _line("ids", ids)
    # A quantized checkpoint has two dtypes: int8 weights, and float scales and embeddings.
    dtypes: set[str] = set()
    for headers in checkpoint.tensors.values():
        dtypes |= {header.dtype for header in headers.values()}
    names = ", ".join(file.name for file in checkpoint.tensors)
    yield _line("files", f"{names} ({', '.join(sorted(dtypes))})")
    if checkpoint.adapter:
        yield _line("adapter", ", ".join(_changes(checkpoint.adapter)))
    for warning in checkpoint.warnings:
        yield _line("note", warning)


def _changes(adapter: Adapter) -> Iterator[str]:
    classes = "original" if adapter.layout == "original" else "transformers"
    yield f"{adapter.path}: trained on the {classes} classes"
    # Several ranks come from peft's `rank_pattern`.
    if adapter.scales:
        ranks = " and ".join(map(str, adapter.ranks))
        yield f"rank {ranks} in {len(adapter.scales)} linear modules"
    if adapter.whole:
        yield f"whole {' and '.join(adapter.whole)}"


def _kind(checkpoint: Checkpoint) -> Iterator[str]:
    model = checkpoint.architecture
    yield checkpoint.family
    yield f"{checkpoint.layout} layout"
    if checkpoint.has_head and checkpoint.predicts == "number":
        yield "head that predicts a number"
    elif checkpoint.has_head:
        several = " that may apply together" if checkpoint.predicts == "labels" else ""
        yield f"classifier of {len(checkpoint.labels)} labels{several}"
    else:
        yield "language model"
    if model.quantization_bit:
        yield f"int{model.quantization_bit}"
    if model.pre_seq_len:
        yield f"P-Tuning v2 prefix of {model.pre_seq_len}"
    if model.rope_ratio != 1:
        yield f"positions divided by {model.rope_ratio:g}"
