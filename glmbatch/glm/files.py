"""Reads a checkpoint's small files and hashes its files of any size. No tensors.

Every OSError is raised as an InputError or a TransientError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError

# The files of a LoRA adapter as peft saves it. The last two are optional: the labels of its head,
# and a sample of the weights it was trained on.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_LABELS = "config.json"
ADAPTER_BASE = "glmbatch_base.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_LABELS, ADAPTER_BASE)
# `glmbatch train` records the prompt of the training here; a step must use the same one.
PROMPT_FILE = "glmbatch.json"
# A key of config.json: true if nothing has been learned yet.
RANDOM_WEIGHTS = "random_weights"

# How the small text file begins that Git keeps in place of a large file until Git LFS fetches it.
POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def begins_with(file: Path, content: bytes) -> bool:
    """Whether `file` exists and its first bytes are `content`; False if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(content)) == content
    except OSError:
        return False


def refuse_stand_in(file: Path, begin: bytes) -> None:
    """Raise InputError if `file` is a Git LFS pointer or a web page.

    `begin` is its first 64 bytes.
    """
    if begin.startswith(POINTER):
        raise InputError(
            f"{file}: a Git LFS pointer, not the file itself. Run `git lfs pull` in {file.parent}."
        )
    if begin.lstrip()[:9].lower().startswith(_PAGES):
        raise InputError(
            f"{file}: a web page, probably left by a failed download. Download the file again."
        )


def file_error(file: Path, error: OSError) -> GlmbatchError:
    """The error to raise for an OSError at `file`.

    A TransientError if the machine failed (see `MACHINE_ERRNOS`), an InputError otherwise.
    """
    if file.is_dir():
        inside = ", ".join(sorted(os.listdir(file))[:3]) or "nothing"
        return InputError(
            f"{file}: a folder (containing {inside}), not a file. Move the file out of it."
        )
    if file.is_symlink() and not file.exists():
        return InputError(f"{file}: a broken link to {os.readlink(file)}. Copy the file itself.")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file}: no such file. Set model.path to a directory that has it.")
    kind = TransientError if error.errno in MACHINE_ERRNOS else InputError
    return kind(f"{file}: cannot be read or written ({error.strerror or type(error).__name__}).")


def read_bytes(file: Path) -> bytes:
    """The content of `file`.

    Raises InputError or TransientError if it cannot be read, and InputError if it is a Git LFS
    pointer or a web page.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise file_error(file, error) from error
    refuse_stand_in(file, content[:64])
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises InputError if the file is missing or contains anything else.
    """
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: not valid JSON ({error}). Correct it, or copy it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file}: expected a JSON object, found a {type(content).__name__}. Correct it."
        )
    return content


def small_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or an empty one if it is missing or damaged.

    For optional files that no answer depends on.
    """
    try:
        return read_json(file)
    except InputError:
        return {}


def index_names(index: Path) -> dict[str, str]:
    """The weight file of each tensor, from the 'weight_map' of a transformers index file.

    Raises InputError if there is no such map, or if a file name in it includes a folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no 'weight_map' object. Copy it again.")
    # "pytorch_model.bin.index.json" gives "bin".
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    plain_name = re.compile(rf"[\w-][\w.-]*\.{suffix}")  # without a folder: it stays in this one
    for key, name in weight_map.items():
        if not isinstance(name, str) or not plain_name.fullmatch(name):
            raise InputError(
                f"{index}: assigns {key!r} to {name!r}, which is not a plain .{suffix} file name."
            )
    return weight_map


def digest_file(file: Path) -> str:
    """SHA-256 of the content of `file` in hex, as the Hugging Face hub shows it."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise file_error(file, error) from error


def recorded_prompt(path: str, adapter: str | None) -> dict[str, Any] | None:
    """What `glmbatch train` recorded beside an adapter or a checkpoint on this machine, if any."""
    for folder in (adapter, path):
        file = None if folder is None else Path(folder).expanduser() / PROMPT_FILE
        if file is not None and file.is_file():
            return read_json(file)
    return None
