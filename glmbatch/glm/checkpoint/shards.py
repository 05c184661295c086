"""The weight files of a checkpoint: which there are, what each holds, and its tensors, a few at a time.

Nothing in a file is ever executed, and a file is believed only as far as it was checked. Knows nothing of the model.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glmbatch.errors import InputError, OutOfMemory
from glmbatch.glm.checkpoint.layout import PREFIX_KEYS
from glmbatch.glm.files import file_error, index_names

# Name of a whole checkpoint's file and pattern of its shards', in transformers' own order of preference.
_KINDS = {"model.safetensors": "model*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}
# A tensor's pages stay mapped while its file is open: the file is reopened after so many bytes to let them go.
_BYTES_PER_OPENING = 32 * 2**20
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8",
    "I64": "int64", "I32": "int32", "I16": "int16", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file and the keys its index assigns to it; None when there is no index."""

    file: Path
    keys: frozenset[str] | None


def list_weight_files(directory: Path) -> list[Path]:
    """Every file in `directory` that is named as weights are, whether it is to be loaded or not."""
    return sorted(file for pattern in _KINDS.values() for file in directory.glob(pattern))


def find_shards(directory: Path) -> tuple[list[Shard], list[str]]:
    """The weight files to load, and warnings; InputError when there are none or it is unclear which are meant."""
    prefixes = _prefix_files(list_weight_files(directory))
    found = {
        single: sorted(set(directory.glob(pattern)) - set(prefixes))
        for single, pattern in _KINDS.items()
    }
    kinds = [kind for kind, files in found.items() if files or _index_of(directory / kind).exists()]
    if not kinds:
        raise InputError(
            f"{directory}: no weights ({' or '.join(_KINDS.values())}). Set model.path."
        )
    single, index = directory / kinds[0], _index_of(directory / kinds[0])
    warnings = [f"weights are there as {kind} too, which is not used" for kind in kinds[1:]]
    shards = _indexed_shards(index) if index.exists() else [Shard(single, None)]
    extra = [file.name for file in found[kinds[0]] if file not in {shard.file for shard in shards}]
    if index.exists() and single.name in extra:
        raise InputError(
            f"{directory}: both {single.name} and {index.name}; it is unclear which is meant. Remove one."
        )
    if not index.exists() and extra:
        raise InputError(
            f"{directory}: {', '.join(extra)}, but no {index.name} that says what each holds."
        )
    warnings += [f"{name} is not named in {index.name} and not used" for name in extra]
    return [*shards, *(Shard(file, None) for file in prefixes)], warnings


def _index_of(single: Path) -> Path:
    return single.with_name(f"{single.name}.index.json")


def _prefix_files(files: list[Path]) -> list[Path]:
    """Those of several files that hold a P-Tuning v2 prefix alone, as its official training saves it."""
    held = {file: read_headers(file) for file in files if file.name in _KINDS and len(files) > 1}
    return [
        file
        for file, keys in held.items()
        if keys and all(key.startswith(PREFIX_KEYS) for key in keys)
    ]


def _indexed_shards(index: Path) -> list[Shard]:
    assigned: dict[str, set[str]] = {}
    for key, name in index_names(index).items():
        assigned.setdefault(name, set()).add(key)
    shards = [
        Shard(index.parent / name, frozenset(keys)) for name, keys in sorted(assigned.items())
    ]
    missing = [shard.file.name for shard in shards if not shard.file.is_file()]
    if missing:
        raise InputError(
            f"{index}: {', '.join(missing)} is named in it but is not there. Copy the missing shards."
        )
    return shards


def read_headers(file: Path) -> dict[str, Header]:
    """Shape and dtype of each tensor in `file`, by key; the numbers are left on disk (a legacy .bin is read whole)."""
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            keys = list(opened.keys())
            return {key: _safetensors_header(file, key, opened.get_slice(key)) for key in keys}
    return {
        key: Header(tuple(value.shape), _dtype_name(value))
        for key, value in _load_bin(file).items()
    }


def read_tensors(file: Path, headers: Mapping[str, Header]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of `headers` in `file`. A tensor lives in the file's pages: copy it before taking the next."""
    if file.suffix == ".bin" and not _is_zip(file):
        state = _load_bin(file)
        yield from ((key, state.pop(key)) for key in headers)
        return
    for keys in _groups(headers):
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                yield from ((key, opened.get_tensor(key)) for key in keys)
        else:
            state = _load_bin(file)
            yield from ((key, state.pop(key)) for key in keys)
            del state


def _groups(headers: Mapping[str, Header]) -> Iterator[list[str]]:
    group: list[str] = []
    size_bytes = 0
    for key, header in headers.items():
        size_bytes += torch.Size(header.shape).numel() * _itemsize(header.dtype)
        group.append(key)
        if size_bytes >= _BYTES_PER_OPENING:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Only the zip form can be mapped; torch wrote another one before version 1.6.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: damaged, or holds something other than tensors; nothing in it was run."
        ) from error
    except OSError as error:
        raise file_error(file, error) from error
    except MemoryError as error:
        raise OutOfMemory(f"{file}: no memory left to read it.") from error
    except Exception as error:
        # A damaged file can make torch's reader raise anything.
        raise InputError(f"{file}: damaged or cut short ({type(error).__name__}).") from error
    if not isinstance(state, dict):
        raise InputError(
            f"{file}: a dictionary of tensors is expected; it holds a {type(state).__name__}."
        )
    for key, value in state.items():
        if (
            not isinstance(key, str)
            or not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
        ):
            raise InputError(f"{file}: {key!r} holds a {type(value).__name__}, not a plain tensor.")
    return state


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short ({error}).") from error
    except OSError as error:
        raise file_error(file, error) from error


def _safetensors_header(file: Path, key: str, view: Any) -> Header:
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
    if dtype is None:
        raise InputError(
            f"{file}: {key!r} is stored as {view.get_dtype()}, which is not a dtype of ChatGLM2 weights."
        )
    return Header(tuple(view.get_shape()), dtype)
