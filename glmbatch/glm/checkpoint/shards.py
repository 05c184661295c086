"""The weight files of a checkpoint: finding them, and reading their headers and tensors.

Safetensors and PyTorch .bin files. Executes nothing in a file and checks everything that it uses.
Knows nothing of the model.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from glmbatch.errors import InputError, OutOfMemory
from glmbatch.glm.checkpoint.layout import PREFIX_KEYS
from glmbatch.glm.files import file_error, index_names, refuse_stand_in

Item = TypeVar("Item")

# The name of a single weight file and the pattern of shards, in transformers' order of preference.
_KINDS = {"model.safetensors": "model*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}
# The pages of a tensor stay mapped while its file is open. The file is reopened after this many
# bytes, so that memory does not grow with the size of the file.
_BYTES_PER_OPENING = 32 * 2**20
# fmt: off
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8",
    "U8": "uint8", "I64": "int64", "I32": "int32", "I16": "int16", "BOOL": "bool",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and dtype of one tensor in a weight file; the dtype as torch names it ("float16")."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file and the keys that the index assigns to it; None without an index."""

    file: Path
    keys: frozenset[str] | None


def list_weight_files(directory: Path) -> list[Path]:
    """Every file in `directory` named like a weight file, sorted, whether it is loaded or not."""
    files: list[Path] = []
    for pattern in _KINDS.values():
        files += directory.glob(pattern)
    return sorted(files)


def find_shards(directory: Path) -> tuple[list[Shard], list[str]]:
    """The weight files to load, and a warning for each file that is not used.

    Raises InputError if there are none, if some are missing, or if it is unclear which to load.
    """
    prefixes = _prefix_files(list_weight_files(directory))
    files: dict[str, list[Path]] = {}
    for kind, pattern in _KINDS.items():
        candidates = sorted(set(directory.glob(pattern)) - set(prefixes))
        if candidates or _index_of(directory / kind).exists():
            files[kind] = candidates
    if not files:
        patterns = " or ".join(_KINDS.values())
        raise InputError(
            f"{directory}: no weights ({patterns}). Set model.path to a directory that has them."
        )
    chosen, *others = files
    warnings = [f"the weights are also stored as {kind}, which is not used" for kind in others]
    single = directory / chosen
    index = _index_of(single)
    shards = _indexed_shards(index) if index.exists() else [Shard(single, None)]
    assigned = {shard.file for shard in shards}
    extra = [file.name for file in files[chosen] if file not in assigned]
    if index.exists() and single.name in extra:
        raise InputError(
            f"{directory}: has both {single.name} and {index.name}, and it is unclear which to "
            "load. Remove one."
        )
    if not index.exists() and extra:
        raise InputError(
            f"{directory}: has {', '.join(extra)}, but no {index.name} for them. "
            "Copy the index too."
        )
    warnings += [f"{name} is not listed in {index.name}, so it is not used" for name in extra]
    return [*shards, *(Shard(file, None) for file in prefixes)], warnings


def _index_of(single: Path) -> Path:
    return single.with_name(f"{single.name}.index.json")


def _prefix_files(files: list[Path]) -> list[Path]:
    """The files that contain only a P-Tuning v2 prefix, as ChatGLM2's ptuning scripts save it.

    Such a file is named like a single weight file and is copied beside the base model's shards.
    """
    if len(files) < 2:
        return []
    return [file for file in files if file.name in _KINDS and _holds_only_prefix(file)]


def _holds_only_prefix(file: Path) -> bool:
    keys = read_headers(file).keys()
    return bool(keys) and all(key.startswith(PREFIX_KEYS) for key in keys)


def _indexed_shards(index: Path) -> list[Shard]:
    keys_of: dict[str, set[str]] = {}
    for key, name in index_names(index).items():
        keys_of.setdefault(name, set()).add(key)
    shards = []
    for name, keys in sorted(keys_of.items()):
        shards.append(Shard(index.parent / name, frozenset(keys)))
    missing = [shard.file.name for shard in shards if not shard.file.is_file()]
    if missing:
        raise InputError(
            f"{index}: lists {', '.join(missing)}, which does not exist. Copy the missing shards."
        )
    return shards


def read_headers(file: Path) -> dict[str, Header]:
    """Shape and dtype of each tensor in `file`, by key.

    Reads no values, except from a .bin written by torch before 1.6, which can only be read whole.
    Raises InputError if the file is damaged.
    """
    headers: dict[str, Header] = {}
    refuse_stand_in(file, _first_bytes(file))
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - it is not a mapping
                headers[key] = _safetensors_header(opened.get_slice(key))
    else:
        for key, tensor in _load_bin(file).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            headers[key] = Header(tuple(tensor.shape), dtype)
    return headers


def read_tensors(file: Path, headers: Mapping[str, Header]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `file` that `headers` lists, one by one, as stored.

    A tensor is mapped from the file: copy what you need of it before you take the next.
    """
    if file.suffix == ".bin" and not _is_zip(file):
        state = _load_bin(file)
        for key in headers:
            yield key, state.pop(key)
        return
    sizes = ((key, _size_bytes(header)) for key, header in headers.items())
    for keys in group_by_size(sizes, _BYTES_PER_OPENING):
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                for key in keys:
                    yield key, opened.get_tensor(key)
        else:
            state = _load_bin(file)
            for key in keys:
                yield key, state.pop(key)
            del state


def count_non_finite(tensor: torch.Tensor) -> int:
    """Number of values in `tensor` that are nan or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    # Minimum and maximum are nan if any value is. A mask of all values would take 30 times as long.
    if all(map(math.isfinite, map(float, tensor.aminmax()))):
        return 0
    return int((~tensor.isfinite()).sum())


def group_by_size(sizes: Iterable[tuple[Item, int]], most_bytes: int) -> Iterator[list[Item]]:
    """The items of `sizes` (item, bytes) in order, in groups of at most `most_bytes`.

    A larger item gets a group of its own.
    """
    group: list[Item] = []
    group_bytes = 0
    for item, size_bytes in sizes:
        if group and group_bytes + size_bytes > most_bytes:
            yield group
            group = []
            group_bytes = 0
        group.append(item)
        group_bytes += size_bytes
    if group:
        yield group


def dequantized(
    stored: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [out, in] in `dtype` from its int8 values [out, in] and a scale per row [out].

    With `bits` 4, `stored` is [out, in / 2], two values to a byte. Both are the formats of the int4
    and int8 releases of ChatGLM2 (quantization.py of the checkpoint).
    """
    if bits == 4:
        # Both signed: the high four bits are the even input column, the low four the odd one.
        stored = torch.stack((stored >> 4, (stored << 4) >> 4), dim=-1).flatten(1)
    return stored.to(dtype) * scale.to(dtype)[:, None]


def _size_bytes(header: Header) -> int:
    dtype: torch.dtype = getattr(torch, header.dtype)
    return torch.Size(header.shape).numel() * dtype.itemsize


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(64)
    except OSError as error:
        raise file_error(file, error) from error


def _is_zip(file: Path) -> bool:
    return _first_bytes(file).startswith(b"PK\x03\x04")


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Only zip files can be memory-mapped; torch wrote another format before version 1.6.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: damaged, or contains something other than tensors. "
            "Nothing in it was executed."
        ) from error
    except OSError as error:
        raise file_error(file, error) from error
    except MemoryError as error:
        raise OutOfMemory(f"{file}: not enough memory to read it.") from error
    except Exception as error:
        # torch.load may raise any exception on a damaged file.
        raise InputError(
            f"{file}: damaged or cut short ({type(error).__name__}). Copy it again."
        ) from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise InputError(f"{file}: expected a dictionary of tensors, found a {kind}.")
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain_tensor(value):
            kind = type(value).__name__
            raise InputError(f"{file}: {key!r} is a {kind}, not a plain tensor.")
    return state


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short ({error}). Copy it again.") from error
    except OSError as error:
        raise file_error(file, error) from error


def _safetensors_header(view: Any) -> Header:
    # Any other dtype is refused later, by the check for the dtypes that a weight may have.
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
    return Header(tuple(view.get_shape()), dtype)
