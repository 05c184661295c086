"""What a checkpoint directory is, what it needs to run, and everything that is wrong with it. Loads no weights."""

from __future__ import annotations

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
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

_SAMPLES = ("你好", "Hello, world!", "[gMASK]")
# What the published tokenizer, known by its size, must give.
_PUBLISHED_SIZE, _PUBLISHED_IDS = 64_794, {"你好": (64_790, 64_792, 36_474, 54_591)}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model takes in one dtype: its weights, and each token's keys and values."""

    weights: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`checkpoint` is None, and `problems` says why, when the directory cannot be run. A digest not taken is None."""

    path: Path
    checkpoint: Checkpoint | None
    weights_digest: str | None
    tokenizer_digest: str | None
    sample_ids: tuple[tuple[str, tuple[int, ...]], ...]
    problems: tuple[str, ...]

    @property
    def memory(self) -> dict[str, Memory]:
        """What the model takes, by dtype; empty when it cannot be run."""
        if self.checkpoint is None:
            return {}
        numbers, kept = (
            self.checkpoint.parameters,
            self.checkpoint.architecture.kv_numbers_per_token,
        )
        return {dtype: Memory(numbers * size, kept * size) for dtype, size in DTYPE_BYTES.items()}


def examine(
    path: str | Path,
    *,
    digests: bool = True,
    adapter: str | Path | None = None,
) -> Diagnosis:
    """Look over the checkpoint in directory `path`; whatever is wrong stands in the answer, nothing is raised.

    With an `adapter` it is the checkpoint with that merged into it, and what is wrong with either.

    Takes seconds for a model of any size; `digests` reads every byte, about a second for each gigabyte.
    """
    directory = Path(path)
    problems: list[str] = []
    checkpoint: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    weights_digest = tokenizer_digest = None
    try:
        checkpoint, problems = inspect_checkpoint(directory, adapter)
        if (directory / TOKENIZER_FILE).is_file():
            tokenizer = load_tokenizer(directory)
            tokenizer_digest = digest_tokenizer(directory) if digests else None
        elif directory.is_dir():
            problems.append(
                f"{directory / TOKENIZER_FILE}: is not there; no text can be read. Copy it too."
            )
        if checkpoint and digests:
            weights_digest = digest_weights(directory, adapter)
    except GlmbatchError as error:
        problems += [str(error)] if str(error) not in problems else []
    samples = _sample(tokenizer) if tokenizer else ()
    problems += _unlike_published(tokenizer, directory) if tokenizer else ()
    return Diagnosis(
        directory, checkpoint, weights_digest, tokenizer_digest, samples, tuple(problems)
    )


def _sample(tokenizer: Tokenizer) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (text, tuple(ids)) for text, ids in zip(_SAMPLES, tokenizer.encode(_SAMPLES), strict=True)
    )


def _unlike_published(tokenizer: Tokenizer, directory: Path) -> Iterator[str]:
    if tokenizer.vocab_size != _PUBLISHED_SIZE:
        return
    for text, known in _PUBLISHED_IDS.items():
        if (ids := tuple(tokenizer.encode([text])[0])) != known:
            yield (
                f"{directory / TOKENIZER_FILE}: has the size of the published tokenizer, but {text} gives {ids} and "
                f"not {known}. Copy it again from THUDM/chatglm2-6b."
            )


def describe(diagnosis: Diagnosis) -> str:
    """`diagnosis` as lines to read."""
    return "\n".join(_lines(diagnosis))


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    verdict = f"{len(diagnosis.problems)} problems" if len(diagnosis.problems) != 1 else "1 problem"
    yield f"{diagnosis.path}: {verdict if diagnosis.problems else 'sound'}"
    yield from (f"  problem    {problem}" for problem in diagnosis.problems)
    if diagnosis.checkpoint:
        yield from _facts(diagnosis.checkpoint)
    for dtype, memory in diagnosis.memory.items():
        weights, per_token = memory.weights / 2**30, memory.per_token / 2**10
        yield f"  {dtype:<10} {weights:.2f} GiB of weights, {per_token:g} KiB of keys and values for each token"
    for name, digest in (
        ("weights", diagnosis.weights_digest),
        ("tokenizer", diagnosis.tokenizer_digest),
    ):
        if digest:
            yield f"  {name:<10} sha256 {digest}"
    for text, ids in diagnosis.sample_ids:
        yield f"  {'ids':<10} {text} -> {', '.join(map(str, ids))}"


def _facts(checkpoint: Checkpoint) -> Iterator[str]:
    model = checkpoint.architecture
    stored = sorted(
        {header.dtype for held in checkpoint.tensors.values() for header in held.values()}
    )
    yield f"  {'kind':<10} {', '.join(_kind(checkpoint))}"
    if checkpoint.has_head:
        yield f"  {'labels':<10} {', '.join(checkpoint.labels)}"
    yield (
        f"  {'model':<10} {checkpoint.parameters:,} parameters: {model.layers} layers, hidden {model.hidden_size}, "
        f"{model.heads} heads in {model.groups} groups, {model.max_positions:,} positions"
    )
    yield f"  {'ids':<10} {checkpoint.tokenizer_size} of the tokenizer, padded to {model.vocab_size}"
    yield f"  {'files':<10} {', '.join(file.name for file in checkpoint.tensors)} ({', '.join(stored)})"
    if checkpoint.adapter:
        yield f"  {'adapter':<10} {', '.join(_changes(checkpoint.adapter))}"
    yield from (f"  {'note':<10} {warning}" for warning in checkpoint.warnings)


def _changes(adapter: Adapter) -> Iterator[str]:
    ranks = " and ".join(map(str, adapter.ranks))
    yield f"{adapter.path}: made on the {'original' if adapter.layout == 'original' else 'transformers'} classes"
    if adapter.scales:
        yield f"rank {ranks} in {len(adapter.scales)} linear modules"
    if adapter.whole:
        yield f"whole {' and '.join(adapter.whole)}"


def _kind(checkpoint: Checkpoint) -> Iterator[str]:
    model = checkpoint.architecture
    yield f"{checkpoint.layout} layout"
    yield (
        f"classifier of {len(checkpoint.labels)} labels"
        if checkpoint.has_head
        else "language model"
    )
    if model.quantization_bit:
        yield f"int{model.quantization_bit}"
    if model.pre_seq_len:
        yield f"P-Tuning v2 prefix of {model.pre_seq_len}"
    if model.rope_ratio != 1:
        yield f"positions stretched {model.rope_ratio:g} times"
