"""Checks a checkpoint directory against its config before any weight is loaded.

Checks config, index, tokenizer, and the key, shape and dtype of every tensor. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.adapter import Adapter, read_adapter
from glmbatch.glm.checkpoint.adapter_base import check_base
from glmbatch.glm.checkpoint.architecture import (
    Architecture,
    Layout,
    detect_layout,
    examine_config,
    unknown_keys,
)
from glmbatch.glm.checkpoint.checks.family import (
    Family,
    family_of,
    refuse_other_folders,
    refuse_pointers,
)
from glmbatch.glm.checkpoint.checks.matching import Headers, Kind, match_tensors
from glmbatch.glm.checkpoint.checks.vocabulary import read_tokenizer, tokenizer_doubts
from glmbatch.glm.checkpoint.config_check import Predicts, head_predicts
from glmbatch.glm.checkpoint.layout import HEAD_KEYS, TensorSpec, list_tensors
from glmbatch.glm.checkpoint.shards import (
    Header,
    Shard,
    find_shards,
    list_weight_files,
    read_headers,
)
from glmbatch.glm.files import read_json
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint, without its weights.

    `tensors` lists what to load from each weight file. `tokenizer_size` is the number of token ids,
    or None without a tokenizer.model; the rows of the vocabulary beyond it are padding. A head that
    an `adapter` brings counts as the checkpoint's own; `predicts` is what it was trained for.
    """

    path: Path
    layout: Layout
    architecture: Architecture
    has_head: bool
    tensors: Headers
    tokenizer_size: int | None
    warnings: tuple[str, ...]
    adapter: Adapter | None = None
    family: Family = "ChatGLM2"
    predicts: Predicts = "label"

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the classification head in the order of its rows; empty without a head."""
        return self.architecture.labels if self.has_head else ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Stored shape and native counterparts of each tensor to load, by its key."""
        return list_tensors(self.architecture, self.layout, self.has_head)

    @property
    def parameters(self) -> int:
        """Number of parameters of the loaded model, without a prefix."""
        total = 0
        for spec in self.specs.values():
            total += sum(prod(shape) for _, shape in spec.parts)
        return total


def read_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """The checkpoint in directory `path`, with the LoRA adapter in directory `adapter` if given.

    Keeps no weights in memory. Raises InputError for the first problem.
    """
    checkpoint, problems = inspect_checkpoint(path, adapter)
    if checkpoint is None:
        raise InputError(problems[0])
    return checkpoint


def inspect_checkpoint(
    path: str | Path, adapter: str | Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint in directory `path`, with `adapter`, or None, and a list of every problem.

    Raises InputError if the directory contains no ChatGLM2 checkpoint at all: another model,
    another format, an adapter or Git LFS pointers.
    """
    directory = Path(path)
    if not directory.is_dir():
        return None, [
            f"{directory}: not a directory. Set model.path to the checkpoint's directory."
        ]
    checkpoint, problems = _inspect_base(directory)
    if checkpoint is None or problems or adapter is None:
        return checkpoint, problems
    with _noting(problems):
        added = read_adapter(
            adapter, checkpoint.architecture, checkpoint.layout, checkpoint.has_head
        )
        notes = check_base(
            added.path, directory, checkpoint.architecture, checkpoint.specs, checkpoint.tensors
        )
        added = replace(added, warnings=(*added.warnings, *notes))
        return _adapted(checkpoint, added), []
    return None, problems


def _inspect_base(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    refuse_pointers(directory)
    # Read each part even if an earlier one failed, so that one pass finds all problems.
    problems: list[str] = []
    config: dict[str, Any] = {}
    with _noting(problems):
        config = read_json(directory / "config.json")
    if not list_weight_files(directory):
        refuse_other_folders(directory)
    # A damaged config does not show which model it belongs to.
    family, warnings = family_of(directory, config) if config else ("ChatGLM2", [])
    architecture: Architecture | None = None
    where = str(directory / "config.json")
    if not problems:
        with _noting(problems):
            architecture, wrong = examine_config(config, where)
            problems += wrong
    headers, complete, unused = _read_headers(directory, problems)
    warnings += unused
    tokenizer = _fitting_tokenizer(directory, architecture, problems)
    if architecture is None or not headers:
        return None, problems

    layout = detect_layout(config, where)
    # If the config names a classifier, a missing head is reported as missing. Without this, the
    # checkpoint would be mistaken for a language model.
    has_head = _says_classifier(config) or _has_key(headers, HEAD_KEYS[layout])
    kind = Kind(architecture, layout, has_head)
    match = match_tensors(directory, config, kind, headers, complete)
    problems += match.problems
    predicts, wrong = head_predicts(config, len(architecture.labels), where)
    problems += wrong if has_head else []
    if problems:
        return None, problems
    return Checkpoint(
        path=directory,
        layout=layout,
        architecture=architecture,
        has_head=has_head,
        tensors=match.tensors,
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        warnings=(*warnings, *match.notes, *_doubts(config, layout, architecture, tokenizer)),
        family=family,
        predicts=predicts if has_head else "label",
    ), []


def _read_headers(
    directory: Path, problems: list[str]
) -> tuple[dict[Path, dict[str, Header]], bool, list[str]]:
    """Headers of each weight file, whether all could be read, and notes on files not used."""
    shards: list[Shard] = []
    unused: list[str] = []
    with _noting(problems):
        shards, unused = find_shards(directory)
    headers: dict[Path, dict[str, Header]] = {}
    for shard in shards:
        with _noting(problems):
            headers[shard.file] = _assigned_headers(shard)
    return headers, len(headers) == len(shards), unused


def _fitting_tokenizer(
    directory: Path, architecture: Architecture | None, problems: list[str]
) -> Tokenizer | None:
    with _noting(problems):
        if architecture is None:
            return read_tokenizer(directory, None, None)
        return read_tokenizer(directory, architecture.vocab_size, architecture.eos_id)
    return None


def _adapted(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """`checkpoint` with `adapter` over it, without the tensors of a head that it replaces."""
    warnings = (*checkpoint.warnings, *adapter.warnings)
    adapted = replace(checkpoint, adapter=adapter, warnings=warnings)
    if not adapter.labels:
        return adapted
    architecture = replace(checkpoint.architecture, labels=adapter.labels)
    predicts: Predicts = "number" if len(adapter.labels) == 1 else "label"
    if adapter.predicts is not None:
        predicts = adapter.predicts
    elif checkpoint.has_head and len(adapter.labels) == len(checkpoint.labels):
        predicts = checkpoint.predicts  # as its labels, from the base
    with_head = replace(adapted, has_head=True, architecture=architecture, predicts=predicts)
    # The adapter's head replaces the base's, whose tensors are not read and may have other shapes.
    own = {key for key, spec in with_head.specs.items() if not _is_of_head(spec)}
    tensors: dict[Path, dict[str, Header]] = {}
    for file, headers in checkpoint.tensors.items():
        tensors[file] = {key: header for key, header in headers.items() if key in own}
    return replace(with_head, tensors=tensors)


def _is_of_head(spec: TensorSpec) -> bool:
    return any(name.startswith("score.") for name, _ in spec.parts)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Append the message of an InputError to `problems` instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _says_classifier(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    if not isinstance(names, list):
        return False
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def _has_key(headers: Headers, key: str) -> bool:
    return any(key in held for held in headers.values())


def _assigned_headers(shard: Shard) -> dict[str, Header]:
    """Headers of `shard`; raises InputError unless its keys are those that the index assigns to it.

    They differ if index and shards come from two downloads.
    """
    headers = read_headers(shard.file)
    if shard.keys is None:
        return headers
    if absent := sorted(shard.keys - headers.keys()):
        raise InputError(
            f"{shard.file}: has no {absent[0]!r}, which the index assigns to it. Copy both again."
        )
    if extra := sorted(headers.keys() - shard.keys):
        raise InputError(
            f"{shard.file}: has {extra[0]!r}, which the index does not assign to it. "
            "Copy both again."
        )
    return headers


def _doubts(
    config: Mapping[str, Any],
    layout: Layout,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    """Notes on what looks wrong but does not keep the checkpoint from running."""
    # An unknown key may belong to a variant of the model that computes something else.
    for key in unknown_keys(config, layout):
        yield f"config.json: {key!r} is unknown and has no effect"
    if architecture.fp32_residual:
        yield "config.json: 'fp32_residual_connection' is true, so the model runs in float32 only"
    if tokenizer is None:
        yield f"no {TOKENIZER_FILE}"
    else:
        yield from tokenizer_doubts(tokenizer, architecture.vocab_size, architecture.eos_id)
