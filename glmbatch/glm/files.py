"""The small files of a checkpoint read and any file hashed, with the machine's errors turned into ours. No tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from glmbatch.errors import GlmbatchError, InputError, TransientError

# A LoRA adapter as peft saves it; the last is what names the labels of its head, if anything does.
ADAPTER_FILES = ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_LABELS = (
    "adapter_config.json", "adapter_model.safetensors", "config.json",
)  # fmt: skip
# What a disk or a network file system says when the same read may succeed later.
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENOMEM,
    errno.ECONNRESET,
    errno.ENOTCONN,
}


def file_error(file: Path, error: OSError) -> GlmbatchError:
    """`error` met at `file`, as ours: TransientError when the machine failed, InputError when the file is at fault."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file}: no such file. Set model.path to a directory that holds it.")
    kind = TransientError if error.errno in _PASSING else InputError
    return kind(f"{file}: cannot be read or written ({error.strerror or type(error).__name__}).")


def read_bytes(file: Path) -> bytes:
    """All of `file`."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise file_error(file, error) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; InputError when there is none."""
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a JSON object is expected; it holds a {type(content).__name__}.")
    return content


def index_names(index: Path) -> dict[str, str]:
    """The file name that `index` gives for each key; InputError unless each is a plain name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no 'weight_map' object in it.")
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", name):
            raise InputError(
                f"{index}: {key!r} is assigned to {name!r}, which is not a plain name of a .{suffix} file."
            )
    return weight_map


def digest_file(file: Path) -> str:
    """Hex sha256 of the bytes of `file`, which is also what the hub shows for it."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise file_error(file, error) from error
