"""Turn a model's settings into a checked checkpoint on this machine. Loads no weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.hub import SMALL_FILES, fetch_weights, locate_checkpoint
from glmbatch.glm.files import ADAPTER_FILES, PROMPT_FILE
from glmbatch.glm.tfidf.grams import Grams
from glmbatch.glm.tfidf.model import VOCABULARY, digest_tfidf, is_tfidf, load_tfidf
from glmbatch.glm.tokenizer import Encoder, Tokenizer, load_tokenizer
from glmbatch.run.work import Model
from glmbatch.settings.job import AnyStep, JobConfig, ModelConfig, RuntimeConfig
from glmbatch.store.files import naming
from glmbatch.store.paths import is_remote
from glmbatch.store.snapshot import Snapshot, snapshot_of

# The only files that are read from a checkpoint; its code never is.
KINDS = ("*.json", "*.model", "*.safetensors", "*.bin")
# Memory for a model in multiples of its weights: half as much again for caches and activations.
ROOM = 1.5
# The positions of a model that reads texts of any length.
NO_LIMIT = 2**31 - 1


def job_models(model: ModelConfig, steps: Sequence[AnyStep]) -> list[ModelConfig]:
    """The distinct models of a job's steps, in the order of their first use; `model` is its own."""
    return list(dict.fromkeys(step.model or model for step in steps))


def prepare_models(job: JobConfig) -> list[Model]:
    """Every model of the job, located and checked, in the order of `job_models`."""
    return [
        prepare_model(locate_model(model, job.runtime))
        for model in job_models(job.model, job.steps)
    ]


def locate_model(model: ModelConfig, runtime: RuntimeConfig) -> ModelConfig:
    """`model` with a directory on this machine as its path, and with a definite dtype.

    Fetches the checkpoint from the hub or a store if needed. Safe to repeat: files that were
    fetched before are reused. InputError when there is no such checkpoint, adapter or device;
    TransientError when the hub or store cannot be reached.
    """
    from glmbatch.glm.device import resolve_device, resolve_dtype

    # The small adapter first: a wrong address shows before gigabytes of weights are fetched.
    adapter = None if model.adapter is None else local_adapter(model.adapter, runtime.cache)
    directory = local_checkpoint(model.path, model.revision, runtime.cache)
    if is_tfidf(directory):
        _check_tfidf(model)
        stored = {"path": str(directory), "revision": None, "dtype": "float32"}
        return model.model_copy(update=stored)
    device = resolve_device(runtime.device)
    dtype = resolve_dtype(model.dtype, device)
    if model.quantization != "none":
        from glmbatch.glm.model.linear.form import choose_form  # imports torch

        choose_form(model.quantization, device, dtype)
    located = {"path": str(directory), "revision": None, "adapter": adapter, "dtype": dtype}
    return model.model_copy(update=located)


def needs_network(path: str, revision: str | None, adapter: str | None) -> bool:
    """Whether a checkpoint or its adapter may have to be fetched before it can be checked."""
    return revision is not None or is_remote(path) or is_remote(adapter or "")


def local_checkpoint(path: str, revision: str | None, cache: str) -> Path:
    """The local directory of the checkpoint `path`, fetched first from a store or the hub.

    Never fetches code. InputError when there is no such checkpoint, TransientError when the store,
    hub or network failed.
    """
    if not is_remote(path):
        return locate_checkpoint(path, revision)
    if revision is not None:
        raise InputError(
            f"{path}: an object store has no revision {revision!r}. Unset model.revision."
        )
    with naming("model.path"):
        snapshot = _snapshot(path, cache, "model.path")
        return fetch_weights(
            snapshot.fetch([*SMALL_FILES, PROMPT_FILE, VOCABULARY]), snapshot.fetch, path
        )


def local_adapter(path: str, cache: str) -> str:
    """The local directory of the LoRA adapter `path`, fetched first from a store.

    InputError when there is none, TransientError when the store or network failed.
    """
    if is_remote(path):
        with naming("model.adapter"):
            return str(_snapshot(path, cache, "model.adapter").fetch([*ADAPTER_FILES, PROMPT_FILE]))
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
            f"{address}: there is no such folder in the store, or no checkpoint in it. "
            f"Set {setting}."
        )
    return snapshot


def check_headers(located: ModelConfig) -> None:
    """Check a located checkpoint as far as that takes no digests. InputError if it is not sound."""
    if is_tfidf(located.path):
        load_tfidf(located.path)
        return
    from glmbatch.glm.checkpoint.load import read_checkpoint

    read_checkpoint(located.path, located.adapter)


def prepare_model(located: ModelConfig) -> Model:
    """Check and digest a located checkpoint. InputError when it is not sound.

    The result is cached per process until a file of it changes, because `annotate_table` calls this
    every time.
    """
    return _prepared(located, stamp_checkpoint(located))


@lru_cache(maxsize=16)
def _prepared(located: ModelConfig, stamp: str) -> Model:
    if is_tfidf(located.path):
        return _prepared_tfidf(located, stamp)
    from glmbatch.glm.checkpoint.load import (
        digest_tokenizer,
        digest_weights,
        read_checkpoint,
    )
    from glmbatch.glm.device import DTYPE_BYTES

    checkpoint = read_checkpoint(located.path, located.adapter)
    weights = digest_weights(located.path, located.adapter, checkpoint)
    tokenizer = digest_tokenizer(located.path)
    chats = checkpoint.family != "CodeGeeX2"
    # The identity ends with the default prompt form. "default" means chat rounds: the word is part
    # of the keys in existing outputs.
    form = "default" if chats else "bare"
    return Model(
        config=located,
        identity="/".join([weights, tokenizer, _numerics(located), form]),
        has_head=checkpoint.has_head,
        labels=checkpoint.labels,
        predicts=checkpoint.predicts,
        parameters=checkpoint.parameters,
        size_bytes=checkpoint.parameters * DTYPE_BYTES[located.dtype],
        max_positions=checkpoint.architecture.max_positions,
        stamp=stamp,
        chats=chats,
        notes=checkpoint.warnings,
    )


def _check_tfidf(model: ModelConfig) -> None:
    """InputError if a setting has no effect on a TF-IDF model."""
    for setting in ("adapter", "quantization", "dtype"):
        if getattr(model, setting) not in (None, "none", "auto"):
            raise InputError(f"{model.path}: is TF-IDF, which has no {setting}. Leave it out.")


def _prepared_tfidf(located: ModelConfig, stamp: str) -> Model:
    model = load_tfidf(located.path)
    return Model(
        config=located,
        identity="/".join(["tfidf", digest_tfidf(located.path), "float64", "bare"]),
        has_head=True,
        labels=model.labels,
        predicts=model.predicts,
        parameters=model.parameters,
        size_bytes=4 * model.parameters,
        max_positions=NO_LIMIT,
        stamp=stamp,
        chats=False,
        notes=(model.kind,),
        is_tfidf=True,
    )


def _numerics(located: ModelConfig) -> str:
    if located.quantization == "none":
        return located.dtype
    return f"{located.dtype} {located.quantization}"


def stamp_checkpoint(model: ModelConfig) -> str:
    """Names, sizes and times of a located model's files; any write to them changes the stamp."""
    directory = Path(model.path)
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    if model.adapter is not None:
        # By name, because a training leaves other files beside its adapter, which are not read.
        for name in ADAPTER_FILES:
            if os.path.isfile(f"{model.adapter}/{name}"):
                files.append(Path(model.adapter) / name)
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return str(stamps)


def describe_model(model: ModelConfig) -> str:
    """The path of `model`, and of its adapter if it has one, for messages."""
    if model.adapter is None:
        return model.path
    return f"{model.path} with the adapter {model.adapter}"


def model_notes(models: Sequence[Model]) -> tuple[str, ...]:
    """The notes about `models`, each once; with several models, each note starts with a path."""
    distinct = {model.config: model for model in models}
    notes: dict[str, None] = {}
    for config, model in distinct.items():
        where = f"{describe_model(config)}: " if len(distinct) > 1 else ""
        notes |= {f"{where}{note}": None for note in model.notes}
    return tuple(notes)


def encoder_of(model: Model) -> Encoder:
    """What turns prompts into the ids of a checked model, read once per process."""
    return _grams(model.config.path, model.identity) if model.is_tfidf else tokenizer_of(model)


@lru_cache(maxsize=8)
def _grams(path: str, identity: str) -> Grams:
    return Grams(load_tfidf(path))


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer of a checked model, read once per process."""
    return _tokenizer(model.config.path, model.identity)


@lru_cache(maxsize=8)
def _tokenizer(path: str, identity: str) -> Tokenizer:
    # `identity` is part of the cache's key, so a checkpoint that changed in place is read again.
    return load_tokenizer(path)


def fitting_models(models: Sequence[Model], runtime: RuntimeConfig) -> int:
    """How many of the models stay loaded together: all if they fit in free memory, else one."""
    if len(models) == 1:
        return 1
    from glmbatch.glm.device import free_memory_bytes, resolve_device

    device = resolve_device(runtime.device)
    processes = 1
    if runtime.cluster and device == "cpu":
        # Without GPUs, all engine processes of a cluster may run on this machine.
        processes = runtime.cluster_workers or 1
    needed = ROOM * processes * sum(model.size_bytes for model in models)
    return len(models) if needed <= free_memory_bytes(device) else 1
