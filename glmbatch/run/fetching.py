"""Where a checkpoint or adapter comes from: a directory of this machine, the hub, or a folder in an object store."""

from __future__ import annotations

import os
from pathlib import Path

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.hub import SMALL_FILES, fetch_weights, locate_checkpoint
from glmbatch.glm.files import ADAPTER_FILES
from glmbatch.store.files import naming
from glmbatch.store.paths import is_remote
from glmbatch.store.snapshot import Snapshot, snapshot_of

# In a checkpoint that was fine-tuned here: the prompt of its training, which a step must use too.
PROMPT_FILE = "glmbatch.json"
# All that is ever read of a checkpoint, never code of it.
KINDS = ("*.json", "*.model", "*.safetensors", "*.bin")


def needs_network(path: str, revision: str | None, adapter: str | None) -> bool:
    """Whether a checkpoint or its adapter may have to be fetched before it can be looked at."""
    return revision is not None or is_remote(path) or is_remote(adapter or "")


def local_checkpoint(path: str, revision: str | None, cache: str) -> Path:
    """The directory of checkpoint `path`; one in a store or on the hub is fetched first, never code of it.

    InputError when there is no such checkpoint, TransientError when store, hub or network failed.
    """
    if not is_remote(path):
        return locate_checkpoint(path, revision)
    if revision is not None:
        raise InputError(
            f"{path}: an object store has no revision {revision!r}. Unset model.revision."
        )
    with naming("model.path"):
        snapshot = _snapshot(path, cache, "model.path")
        return fetch_weights(snapshot.fetch([*SMALL_FILES, PROMPT_FILE]), snapshot.fetch, path)


def local_adapter(path: str, cache: str) -> str:
    """The directory of the LoRA adapter `path`; InputError when there is none."""
    if is_remote(path):
        with naming("model.adapter"):
            return str(_snapshot(path, cache, "model.adapter").fetch(ADAPTER_FILES))
    directory = os.path.expanduser(path)
    if not os.path.isdir(directory):
        raise InputError(
            f"{directory}: no such directory. Set model.adapter to the directory of a LoRA adapter."
        )
    return directory


def _snapshot(address: str, cache: str, setting: str) -> Snapshot:
    snapshot = snapshot_of(address, cache, KINDS)
    if snapshot is None:
        raise InputError(
            f"{address}: there is no such folder in the store, or no checkpoint in it. Set {setting}."
        )
    return snapshot
