"""What a checkpoint directory holds, compared with what its config needs, before a weight is read.

Trusts nothing: config, index, and the key, shape and dtype of every tensor are checked. Loads and
writes nothing.
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
from glmbatch.glm.checkpoint.config_check import other_losses
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
    """A sound checkpoint, without its weights.

    `tensors` says what to load from each weight file. `tokenizer_size` is None when there is no
    tokenizer.model; ids from there on have scores but no token. A head that an `adapter` brings
    counts as the checkpoint's own.
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

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the trained head in the order of its rows; empty without one."""
        return self.architecture.labels if self.has_head else ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What each tensor to load must be, and what it becomes."""
        return list_tensors(self.architecture, self.layout, self.has_head)

    @property
    def parameters(self) -> int:
        """Numbers in the loaded model, without a prefix."""
        total = 0
        for spec in self.specs.values():
            total += sum(prod(shape) for _, shape in spec.parts)
        return total


def read_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """What directory `path` holds, with the LoRA `adapter` over it. Keeps no weights in memory.

    InputError that names the first thing wrong.
    """
    checkpoint, problems = inspect_checkpoint(path, adapter)
    if checkpoint is None:
        raise InputError(problems[0])
    return checkpoint


def inspect_checkpoint(
    path: str | Path, adapter: str | Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """What directory `path` holds, with `adapter` over it, or None and all that is wrong.

    InputError when it is something else altogether, which has no faults of ours.
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
    # Each part is read even if an earlier one failed, so that one look finds everything.
    problems: list[str] = []
    config: dict[str, Any] = {}
    with _noting(problems):
        config = read_json(directory / "config.json")
    if not list_weight_files(directory):
        refuse_other_folders(directory)
    # Damage to the config says nothing of whose it is.
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
    # A config that says classifier is believed even without the weights of a head, so that a lost
    # head is reported as missing and not taken for a language model.
    has_head = _says_classifier(config) or _has_key(headers, HEAD_KEYS[layout])
    kind = Kind(architecture, layout, has_head)
    match = match_tensors(directory, config, kind, headers, complete)
    problems += match.problems
    if has_head:
        problems += other_losses(config, len(architecture.labels), where)
    if problems:
        return None, problems
    checkpoint = Checkpoint(
        path=directory,
        layout=layout,
        architecture=architecture,
        has_head=has_head,
        tensors=match.tensors,
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        warnings=(*warnings, *match.notes, *_doubts(config, layout, architecture, tokenizer)),
        family=family,
    )
    return checkpoint, []


def _read_headers(
    directory: Path, problems: list[str]
) -> tuple[dict[Path, dict[str, Header]], bool, list[str]]:
    """Headers of each weight file, whether all could be read, and which files are not used."""
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
    with_head = replace(adapted, has_head=True, architecture=architecture)
    # The base's own head is replaced, so its tensors need not be read, nor have its shape.
    own = {key for key, spec in with_head.specs.items() if not _is_of_head(spec)}
    tensors: dict[Path, dict[str, Header]] = {}
    for file, headers in checkpoint.tensors.items():
        tensors[file] = {key: header for key, header in headers.items() if key in own}
    return replace(with_head, tensors=tensors)


def _is_of_head(spec: TensorSpec) -> bool:
    return any(name.startswith("score.") for name, _ in spec.parts)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Add an InputError to `problems` and go on."""
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
    """Headers of `shard`; InputError unless they are the keys that its index assigns to it."""
    # An index and shards of two different downloads differ here.
    headers = read_headers(shard.file)
    if shard.keys is None:
        return headers
    if absent := sorted(shard.keys - headers.keys()):
        raise InputError(
            f"{shard.file}: lacks {absent[0]!r}, which the index assigns to it. Copy both again."
        )
    if extra := sorted(headers.keys() - shard.keys):
        raise InputError(
            f"{shard.file}: holds {extra[0]!r}, which the index does not assign to it. "
            "Copy both again."
        )
    return headers


def _doubts(
    config: Mapping[str, Any],
    layout: Layout,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    """What does not stop the checkpoint from running, and is shown as notes."""
    # A key that we do not know may belong to a variant of the model that computes something else.
    for key in unknown_keys(config, layout):
        yield f"config.json: {key!r} is not known here and has no effect"
    if architecture.fp32_residual:
        yield "config.json: 'fp32_residual_connection' is true, so it runs in float32 only"
    if tokenizer is None:
        yield f"no {TOKENIZER_FILE}"
    else:
        yield from tokenizer_doubts(tokenizer, architecture.vocab_size, architecture.eos_id)
