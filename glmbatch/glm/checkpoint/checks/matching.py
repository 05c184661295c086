"""Compares the tensors in a checkpoint's files with those that its config requires.

Works on keys, shapes and dtypes. A fault that all tensors share is reported once. Reads the values
of two tensors only to see whether one is a copy of the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from glmbatch.glm.checkpoint.architecture import Architecture, Layout
from glmbatch.glm.checkpoint.layout import PREFIX_KEYS, TensorSpec, dropped_keys, list_tensors
from glmbatch.glm.checkpoint.shards import Header, read_tensors

# The dtypes in which weights may be stored and computed.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

Headers = Mapping[Path, Mapping[str, Header]]

OUTPUT = "transformer.output_layer.weight"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
# Some trainers save the output layer a second time, under the name that other models use.
_LANGUAGE_HEAD = "lm_head.weight"
# Last parts of the names of tensors that other tools write for a quantized weight.
_QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_scale_inv": "FP8",
    "W_q": "HQQ",
    "codebooks": "AQLM",
}
_LORA = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer)\.")


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of checkpoint that a config describes."""

    architecture: Architecture
    layout: Layout
    has_head: bool

    def specs(
        self, *, layout: Layout | None = None, quantization_bit: int | None = None
    ) -> dict[str, TensorSpec]:
        """The tensors that such a checkpoint must have, by key.

        `layout` and `quantization_bit` (0, 4 or 8) replace those of the config.
        """
        architecture = self.architecture
        if quantization_bit is not None:
            architecture = replace(architecture, quantization_bit=quantization_bit)
        return list_tensors(architecture, layout or self.layout, self.has_head)


@dataclass(frozen=True, slots=True)
class Match:
    """The tensors to load from each file, every problem, and notes on tensors not used."""

    tensors: dict[Path, dict[str, Header]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Folder:
    """The tensors in the files (`found`) and those that the config requires (`specs`)."""

    path: Path
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    dropped: frozenset[str]
    found: tuple[tuple[Path, str, Header], ...]

    @property
    def missing(self) -> list[str]:
        keys = {key for _, key, _ in self.found}
        return [key for key in self.specs if key not in keys]

    @property
    def unknown(self) -> list[tuple[Path, str, Header]]:
        known = self.specs.keys() | self.dropped
        return [item for item in self.found if item[1] not in known]


def match_tensors(
    directory: Path, config: Mapping[str, Any], kind: Kind, headers: Headers, complete: bool
) -> Match:
    """Compare `headers` with the tensors that a checkpoint of this `kind` must have.

    Unless `complete`, some files could not be read, and missing tensors are not reported.
    """
    specs = kind.specs()
    found: list[tuple[Path, str, Header]] = []
    for file, held in headers.items():
        found += [(file, key, header) for key, header in held.items()]
    folder = _Folder(directory, config, specs, dropped_keys(kind.has_head), tuple(found))
    cause = next(_causes(folder, kind), None)
    if cause is not None:
        return Match(problems=[cause])
    tensors: dict[Path, dict[str, Header]] = {file: {} for file in headers}
    for file, key, header in found:
        if key in specs:
            tensors[file][key] = header
    match = Match(tensors)
    _add_faults(match, folder)
    if folder.missing and complete:
        match.problems.append(_incomplete(folder))
    return match


def _add_faults(match: Match, folder: _Folder) -> None:
    """Add each kind of fault once, with the first tensor that has it."""
    repeated: list[str] = []
    unfit: dict[str, list[str]] = {"dtype": [], "shape": []}
    seen: dict[str, Path] = {}
    for file, key, header in folder.found:
        # With two values for one tensor, the order of the files would decide.
        if key in seen:
            repeated.append(f"{file}: {key!r} is also in {seen[key].name}. Keep one of the two.")
        elif key in folder.specs:
            for kind, problem in _differences(file, folder.specs[key], header):
                unfit[kind].append(problem)
        seen[key] = file
    unknown: list[str] = []
    for file, key, header in folder.unknown:
        twin = _twin(folder, key, header)
        if twin is not None:
            match.notes.append(f"{key!r} is a copy of {twin!r} and is not used")
        elif key.endswith(_LANGUAGE_HEAD):
            unknown.append(
                f"{file}: {key!r} is another name for {OUTPUT!r}, which it differs from. "
                "Remove the one that was not trained."
            )
        else:
            unknown.append(
                f"{file}: {key!r} is not a tensor of the model that config.json describes. "
                "Copy the config.json that was saved with it."
            )
    for lines in (repeated, *unfit.values(), unknown):
        match.problems.extend(_once(lines))


def _once(lines: list[str]) -> Iterator[str]:
    if lines:
        yield lines[0] + (f" The same holds for {len(lines) - 1} more." if len(lines) > 1 else "")


def _differences(file: Path, spec: TensorSpec, header: Header) -> Iterator[tuple[str, str]]:
    allowed = ("int8",) if spec.stored == "int8" else WEIGHT_DTYPES
    if header.dtype not in allowed:
        wanted = " or ".join(allowed)
        yield "dtype", f"{file}: {spec.key!r} is stored as {header.dtype}; it must be {wanted}."
    elif header.shape != spec.shape:
        yield (
            "shape",
            f"{file}: {spec.key!r} has shape {list(header.shape)}; "
            f"by config.json, it must be {list(spec.shape)}. "
            "Copy the config.json that was saved with it.",
        )


def _twin(folder: _Folder, key: str, header: Header) -> str | None:
    """The embedding or output layer that `key` is an exact copy of, or None."""
    for twin in (OUTPUT, EMBEDDING):
        spec = folder.specs.get(twin)
        # Only these two: small tensors of ones or zeros are equal without being copies.
        if spec and header.shape == spec.shape and twin not in folder.missing:
            first, second = _tensor(folder, key), _tensor(folder, twin)
            if torch.equal(first, second.to(first.dtype)):
                return twin
    return None


def _tensor(folder: _Folder, wanted: str) -> torch.Tensor:
    for file, key, header in folder.found:
        if key == wanted:
            return next(read_tensors(file, {key: header}))[1]
    raise AssertionError(wanted)


def _incomplete(folder: _Folder) -> str:
    missing = folder.missing
    # The usual mistake after P-Tuning, which saves only the trained prefix.
    if folder.found and all(key.startswith(PREFIX_KEYS) for _, key, _ in folder.found):
        return (
            f"{folder.path}: has only the trained prefix of P-Tuning v2; the base model's weights "
            "are missing. Copy the base checkpoint's weight files and index into it."
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{folder.path}: no {missing[0]!r}{more} in its weight files. The checkpoint is "
        "incomplete: copy it again."
    )


def _causes(folder: _Folder, kind: Kind) -> Iterator[str]:
    """Problems that all tensors have in common."""
    yield from _quantized_elsewhere(folder)
    yield from _unmerged(folder)
    yield from _empty(folder)
    yield from _other_layout(folder, kind)
    yield from _renamed(folder)
    yield from _otherwise_quantized(folder, kind)


def _quantized_elsewhere(folder: _Folder) -> Iterator[str]:
    stated = folder.config.get("quantization_config")
    stated = stated.get("quant_method") if isinstance(stated, dict) else None
    for file, key, _ in folder.unknown:
        method = _QUANTIZED.get(key.rpartition(".")[2])
        if method is not None:
            yield (
                f"{file}: quantized by {stated or method} ({key!r}), which is not supported. Set "
                "model.path to the checkpoint before quantization, or to THUDM's int4 or int8."
            )
    if stated and folder.missing:
        yield (
            f"{folder.path / 'config.json'}: quantized by {stated} ('quantization_config'), which "
            "is not supported. Set model.path to the checkpoint before quantization, or to "
            "THUDM's int4 or int8."
        )


def _unmerged(folder: _Folder) -> Iterator[str]:
    for file, key, _ in folder.unknown:
        if _LORA.search(key):
            yield (
                f"{file}: contains a LoRA adapter inside the model ({key!r}). Merge it "
                "(peft's merge_and_unload), or save the adapter alone and set model.adapter."
            )


def _empty(folder: _Folder) -> Iterator[str]:
    empty = [(file, key) for file, key, header in folder.found if 0 in header.shape]
    if empty:
        file, key = empty[0]
        yield (
            f"{file}: {len(empty)} of {len(folder.found)} tensors are empty ({key!r} first), as "
            "DeepSpeed ZeRO-3 saves them without gathering. Convert its own checkpoint with "
            "zero_to_fp32.py."
        )


def _other_layout(folder: _Folder, kind: Kind) -> Iterator[str]:
    other: Layout = "native" if kind.layout == "original" else "original"
    keys = {key for _, key, _ in folder.found}
    if keys and keys <= kind.specs(layout=other).keys():
        names = {"original": "ChatGLM2's published", "native": "transformers' GLM"}
        yield (
            f"{folder.path}: config.json is in {names[kind.layout]} layout, the weights in "
            f"{names[other]} layout ({min(keys)!r}). Copy the config.json that was saved with them."
        )


def _renamed(folder: _Folder) -> Iterator[str]:
    """Tensors that have a longer or shorter name than the one that is missing."""
    pairs: list[tuple[Path, str, str]] = []
    missing = folder.missing
    for file, key, header in folder.unknown:
        for wanted in missing:
            if header.shape == folder.specs[wanted].shape and _is_renamed(key, wanted):
                pairs.append((file, key, wanted))
                break
    if not pairs:
        return
    file, key, wanted = pairs[0]
    count = f"all {len(pairs)}" if len(pairs) == len(folder.found) else f"{len(pairs)}"
    begin = key.removesuffix(wanted)
    lacking = wanted.removesuffix(key)
    if begin != key and all(key == begin + wanted for _, key, wanted in pairs):
        yield (
            f"{file}: {count} keys begin with {begin!r}, which a wrapper in training added. "
            "Strip it from the keys."
        )
    elif lacking != wanted and all(wanted == lacking + key for _, key, wanted in pairs):
        yield (
            f"{file}: {count} keys lack the prefix {lacking!r}, as if a part of the model was "
            "saved alone. Add it to the keys."
        )
    else:
        more = f" ({len(pairs)} such keys)" if len(pairs) > 1 else ""
        yield f"{file}: {key!r} must be named {wanted!r}{more}: training renamed it. Rename it."


def _is_renamed(key: str, wanted: str) -> bool:
    """Whether one name is the other with parts inserted, as wrappers of a module do."""
    if key.endswith(_LANGUAGE_HEAD) and wanted == OUTPUT:
        return True
    longer, shorter = key.split("."), wanted.split(".")
    if len(longer) < len(shorter):
        longer, shorter = shorter, longer
    rest = iter(longer)
    return len(shorter) > 2 and longer[-1] == shorter[-1] and all(part in rest for part in shorter)


def _otherwise_quantized(folder: _Folder, kind: Kind) -> Iterator[str]:
    """A config whose 'quantization_bit' is not that of the weights, as P-Tuning's may be."""
    specs = kind.specs(quantization_bit=8)
    # An int8 weight has the shape of the weight itself.
    whole = {key: spec.shape for key, spec in specs.items() if spec.stored == "int8"}
    stored: dict[int | None, str] = {}
    for file, key, header in folder.found:
        if key in whole:
            stored.setdefault(_bits(header, whole[key]), f"{file.name}: {key!r} first")
    stated = kind.architecture.quantization_bit
    if len(stored) != 1 or not stored.keys() - {None, stated}:
        return
    bits, first = stored.popitem()
    weights = f"are int{bits}" if bits else "are not quantized"
    yield (
        f"{folder.path / 'config.json'}: 'quantization_bit' is {stated}, but the weights {weights} "
        f"({first}). Set it to {bits}."
    )


def _bits(header: Header, whole: tuple[int, ...]) -> int | None:
    """Bits in which a weight of shape `whole` is stored: 0 if not quantized, None if unclear."""
    if header.dtype in WEIGHT_DTYPES:
        return 0 if header.shape == whole else None
    if header.dtype != "int8":
        return None
    return {whole: 8, (whole[0], whole[1] // 2): 4}.get(header.shape)
