"""A model setting becomes a checkpoint directory: a local one, or a pinned download."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from glmbatch.errors import InputError, TransientError
from glmbatch.glm.files import index_names
from glmbatch.glm.tokenizer import TOKENIZER_FILE

# Owner and name on the hub; anything else is taken for a mistyped path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ["config.json", TOKENIZER_FILE, "tokenizer_config.json", "*.index.json"]
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def locate_checkpoint(path: str, revision: str | None = None) -> Path:
    """The directory of checkpoint `path`.

    A hub id is downloaded at `revision`: weights and tokenizer only, never code. InputError when
    there is no such checkpoint, TransientError when the network fails.
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
            f"{path}: a file, not a directory. Set model.path to the directory that holds the "
            "checkpoint."
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
    commit = directory.name  # a branch may move between two downloads
    return fetch_weights(directory, partial(_download, path, commit), f"{path} at {commit}")


def fetch_weights(directory: Path, fetch: Callable[[list[str]], Path], where: str) -> Path:
    """The directory that `fetch` fills with the weight files of a checkpoint.

    `directory` holds the checkpoint's small files, `where` names it in the InputError when there
    are no weights.
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
    """The snapshot of `revision` with `files` in it, from the hub's cache where it has them."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's error derives from OSError and from the base error of whichever HTTP library it
    # uses.
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
                f"{where}: not in the hub's cache, and HF_HUB_OFFLINE is set."
            ) from error
        raise TransientError(f"{where}: the download failed ({type(error).__name__}).") from error
