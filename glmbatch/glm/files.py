"""Reads the small files of a checkpoint and hashes any of them; OS errors become ours.

No tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError

# A LoRA adapter as peft saves it. The last two, if they are there, name the labels of its head, and
# the weights that it was trained over.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_LABELS = "config.json"
ADAPTER_BASE = "glmbatch_base.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_LABELS, ADAPTER_BASE)


# What Git has in place of a large file until Git LFS has fetched it.
POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def begins_with(file: Path, content: bytes) -> bool:
    """Whether `file` is there and begins with these bytes."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(content)) == content
    except OSError:
        return False


def refuse_stand_in(file: Path, begin: bytes) -> None:
    """InputError when `begin`, the first bytes of `file`, are of something in its place."""
    if begin.startswith(POINTER):
        raise InputError(
            f"{file}: a Git LFS pointer, not the file itself. Run `git lfs pull` in {file.parent}."
        )
    if begin.lstrip()[:9].lower().startswith(_PAGES):
        raise InputError(
            f"{file}: a web page, such as a download that was refused. Download the file again."
        )


def file_error(file: Path, error: OSError) -> GlmbatchError:
    """The error of ours for an `error` at `file`.

    TransientError when the machine failed, InputError when the file is at fault.
    """
    if file.is_dir():
        inside = ", ".join(sorted(os.listdir(file))[:3]) or "nothing"
        return InputError(
            f"{file}: a folder (with {inside} in it), not a file. Move the file out of it."
        )
    if file.is_symlink() and not file.exists():
        return InputError(
            f"{file}: a link to {os.readlink(file)}, which is not there. Copy the file itself."
        )
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file}: no such file. Set model.path to a directory that holds it.")
    kind = TransientError if error.errno in MACHINE_ERRNOS else InputError
    return kind(f"{file}: cannot be read or written ({error.strerror or type(error).__name__}).")


def read_bytes(file: Path) -> bytes:
    """All of `file`; InputError or TransientError when it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise file_error(file, error) from error
    refuse_stand_in(file, content[:64])
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; InputError when there is none."""
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a JSON object is expected; it holds a {type(content).__name__}.")
    return content


def small_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty when there is none that can be read."""
    try:
        return read_json(file)
    except InputError:  # no answer depends on it
        return {}


def index_names(index: Path) -> dict[str, str]:
    """The file name that `index` gives for each key; InputError unless each is a plain name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no 'weight_map' object in it.")
    # "pytorch_model.bin.index.json" gives "bin".
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    plain_name = re.compile(rf"[\w-][\w.-]*\.{suffix}")  # no folder, so it cannot lead elsewhere
    for key, name in weight_map.items():
        if not isinstance(name, str) or not plain_name.fullmatch(name):
            raise InputError(
                f"{index}: {key!r} is assigned to {name!r}, which is not a plain name of a "
                f".{suffix} file."
            )
    return weight_map


def digest_file(file: Path) -> str:
    """Hex sha256 of the bytes of `file`, as the hub shows it too."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise file_error(file, error) from error
