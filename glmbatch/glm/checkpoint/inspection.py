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
from glmbatch.glm.checkpoint.layout import (
    HEAD_KEYS,
    PREFIX_KEYS,
    TensorSpec,
    dropped_keys,
    list_tensors,
)
from glmbatch.glm.checkpoint.shards import Header, Shard, find_shards, read_headers
from glmbatch.glm.files import read_json
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# Weights may be stored in these, and computed in these.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

Headers = Mapping[Path, Mapping[str, Header]]


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
    """What directory `path` holds, with `adapter` over it, or None and all that is wrong."""
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
    # Each part is read even if an earlier one failed, so that one look finds everything.
    problems: list[str] = []
    architecture: Architecture | None = None
    with _noting(problems):
        where = str(directory / "config.json")
        config = read_json(directory / "config.json")
        layout = detect_layout(config, where)
        architecture, wrong = examine_config(config, where)
        problems += wrong
    shards: list[Shard] = []
    warnings: list[str] = []
    with _noting(problems):
        shards, warnings = find_shards(directory)
    headers: dict[Path, dict[str, Header]] = {}
    for shard in shards:
        with _noting(problems):
            headers[shard.file] = _assigned_headers(shard)
    tokenizer: Tokenizer | None = None
    with _noting(problems):
        tokenizer = _fitting_tokenizer(directory, architecture)
    if architecture is None or not headers:
        return None, problems

    # A config that says classifier is believed even without the weights of a head, so that a lost
    # head is reported as missing and not taken for a language model.
    has_head = _says_classifier(config) or _has_key(headers, HEAD_KEYS[layout])
    specs = list_tensors(architecture, layout, has_head)
    complete = len(headers) == len(shards)  # else what is missing may be in an unreadable file
    tensors, wrong = _match(directory, specs, headers, dropped_keys(has_head), complete)
    problems += wrong
    if problems:
        return None, problems
    checkpoint = Checkpoint(
        path=directory,
        layout=layout,
        architecture=architecture,
        has_head=has_head,
        tensors=tensors,
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        warnings=(*warnings, *_doubts(config, layout, architecture, has_head, tokenizer)),
    )
    return checkpoint, []


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


def _fitting_tokenizer(directory: Path, architecture: Architecture | None) -> Tokenizer | None:
    file = directory / TOKENIZER_FILE
    if not file.exists():
        return None
    tokenizer = load_tokenizer(directory)
    # Fewer ids are normal: the published vocabulary is padded from 64,794 to 65,024.
    if architecture is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"{file}: {tokenizer.vocab_size} ids, more than the {architecture.vocab_size} that "
            "config.json states. It belongs to another checkpoint."
        )
    return tokenizer


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


def _match(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    headers: Headers,
    dropped: frozenset[str],
    complete: bool,
) -> tuple[dict[Path, dict[str, Header]], list[str]]:
    """The tensors to load from each file, and everything in which `headers` differ from `specs`."""
    problems: list[str] = []
    file_of: dict[str, Path] = {}
    tensors: dict[Path, dict[str, Header]] = {}
    for file, held in headers.items():
        tensors[file] = {}
        for key, header in held.items():
            # Two values for one tensor: which of them counts would depend on the order of files.
            if key in file_of:
                other = file_of[key].name
                problems.append(f"{file}: {key!r} is also in {other}. Keep one of the two.")
            elif key in specs:
                problems += _differences(file, specs[key], header)
                tensors[file][key] = header
            elif key not in dropped:
                problems.append(
                    f"{file}: {key!r} is not a tensor of the model that config.json describes."
                )
            file_of[key] = file
    missing = [key for key in specs if key not in file_of]
    # The usual mistake after P-Tuning, whose training saves only what it trained.
    if missing and file_of and all(key.startswith(PREFIX_KEYS) for key in file_of):
        problems.append(
            f"{directory}: holds only the trained prefix of P-Tuning v2, and the base model's "
            "weights are missing. Copy the base checkpoint's weight files and index beside it."
        )
    elif missing and complete:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problems.append(
            f"{directory}: no {missing[0]!r}{more} in its weight files. "
            "The checkpoint is incomplete."
        )
    return tensors, problems


def _differences(file: Path, spec: TensorSpec, header: Header) -> Iterator[str]:
    allowed = ("int8",) if spec.stored == "int8" else WEIGHT_DTYPES
    if header.dtype not in allowed:
        wanted = " or ".join(allowed)
        yield f"{file}: {spec.key!r} is stored as {header.dtype}; it must be {wanted}."
    elif header.shape != spec.shape:
        yield (
            f"{file}: {spec.key!r} has shape {list(header.shape)}; "
            f"config.json makes it {list(spec.shape)}."
        )


def _doubts(
    config: Mapping[str, Any],
    layout: Layout,
    architecture: Architecture,
    has_head: bool,
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    # A key that we do not know may belong to a variant of the model that computes something else.
    for key in unknown_keys(config, layout):
        yield f"config.json: {key!r} is not known here and has no effect"
    if architecture.fp32_residual:
        yield "config.json: 'fp32_residual_connection' is true, so it runs in float32 only"
    problem_type = config.get("problem_type")
    # None of these stops the checkpoint from running: they are shown as notes.
    if has_head and problem_type not in (None, "single_label_classification"):
        yield (
            f"config.json: 'problem_type' is {problem_type!r}, but one label is chosen for each row"
        )
    if tokenizer is None:
        yield f"no {TOKENIZER_FILE}"
    elif tokenizer.eos_id != architecture.eos_id:
        yield (
            f"{TOKENIZER_FILE} ends a text with id {tokenizer.eos_id}, "
            f"config.json with {architecture.eos_id}"
        )
