"""Locates the checkpoint of a model setting: a local directory or a pinned download of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from glmbatch.errors import InputError, TransientError
from glmbatch.glm.files import index_names
from glmbatch.glm.tokenizer import TOKENIZER_FILE

# Owner and name on the Hugging Face hub. Anything else counts as a mistyped path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ["config.json", TOKENIZER_FILE, "tokenizer_config.json", "*.index.json"]
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def locate_checkpoint(path: str, revision: str | None = None) -> Path:
    """The directory of the checkpoint `path`: a directory, or an id on the Hugging Face hub.

    An id is downloaded at `revision`: config, weights and tokenizer, never code. Raises InputError
    if there is no such checkpoint, TransientError if the network fails.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise InputError(
                f"{path}: a directory has no revision {revision!r}. Unset model.revision."
            )
        return local
    if local.exists():
        raise InputError(
            f"{path}: a file, not a directory. Set model.path to the checkpoint's directory."
        )
    if not _HUB_ID.fullmatch(path):
        raise InputError(
            f"{path}: no such directory, and not a hub id (owner/name). Set model.path."
        )
    if revision is None:
        raise InputError(
            f"{path}: no such directory; a hub id needs its revision, so that every run has the "
            "same weights. Set model.revision to a commit of the repository."
        )
    directory = _download(path, revision, SMALL_FILES)
    commit = directory.name  # pinned, because a branch may move between two downloads
    return fetch_weights(directory, partial(_download, path, commit), f"{path} at {commit}")


def fetch_weights(directory: Path, fetch: Callable[[list[str]], Path], where: str) -> Path:
    """The directory into which `fetch` has downloaded the weight files of a checkpoint.

    `directory` has the checkpoint's small files. `fetch` takes file names and returns the directory
    that it downloads them to. Raises InputError, naming `where`, if there are no weights.
    """
    for single in _SINGLE_FILES:
        index = directory / f"{single}.index.json"
        if index.exists():
            return fetch(sorted(set(index_names(index).values())))
        fetched = fetch([single])
        if (fetched / single).exists():
            return fetched
    raise InputError(f"{where}: no weights ({' or '.join(_SINGLE_FILES)}). Set model.path.")


def _download(path: str, revision: str, files: list[str]) -> Path:
    """The directory of the snapshot `revision` with `files` in it, cached if possible."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's error derives from OSError and from the base error of the HTTP library that it uses.
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    where = f"{path} at {revision}"
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{where}: the hub has no such repository or revision, or you may not read it. "
            "Set model.path and model.revision."
        ) from error
    except network_errors as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{where}: not in the hub's cache, and HF_HUB_OFFLINE is set. "
                "Unset it, or download the checkpoint first."
            ) from error
        raise TransientError(f"{where}: the download failed ({type(error).__name__}).") from error
