"""Turn a model's settings into a checked checkpoint on this machine. Loads no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from glmbatch.errors import InputError, some_of
from glmbatch.glm.checkpoint.config_check import Predicts
from glmbatch.glm.checkpoint.hub import SMALL_FILES, fetch_weights, locate_checkpoint
from glmbatch.glm.files import ADAPTER_FILES
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.run.work import Model
from glmbatch.settings.job import (
    AnyStep,
    ClassifyStep,
    ExtractStep,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
    Step,
    placeholders,
)
from glmbatch.steps.extract import form_of
from glmbatch.steps.prompt import uses_chat
from glmbatch.store.files import naming
from glmbatch.store.paths import is_remote
from glmbatch.store.snapshot import Snapshot, snapshot_of

# `glmbatch train` records the prompt of the training here; a step must use the same one.
PROMPT_FILE = "glmbatch.json"
# The only files that are read from a checkpoint; its code never is.
KINDS = ("*.json", "*.model", "*.safetensors", "*.bin")
# Memory for a model in multiples of its weights: half as much again for caches and activations.
ROOM = 1.5


def job_models(job: JobConfig) -> list[ModelConfig]:
    """The distinct models of the job's steps, in the order of their first use."""
    return list(dict.fromkeys(job.model_of(step) for step in job.steps))


def prepare_models(job: JobConfig) -> list[Model]:
    """Every model of the job, located and checked, in the order of `job_models`."""
    return [prepare_model(locate_model(model, job.runtime)) for model in job_models(job)]


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
        return fetch_weights(snapshot.fetch([*SMALL_FILES, PROMPT_FILE]), snapshot.fetch, path)


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


def prepare_model(located: ModelConfig) -> Model:
    """Check and digest a located checkpoint. InputError when it is not sound.

    The result is cached per process until a file of it changes, because `annotate_table` calls this
    every time.
    """
    return _prepared(located, stamp_checkpoint(located))


@lru_cache(maxsize=16)
def _prepared(located: ModelConfig, stamp: str) -> Model:
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


def check_step(step: Step, model: Model) -> None:
    """InputError when `model` cannot answer `step`."""
    where = f"step {step.name!r}: the checkpoint {describe_model(model.config)}"
    if model.has_head and step.examples is not None:
        raise InputError(f"{where} has a trained head, which reads no examples. Unset examples.")
    if step.history_column and not uses_chat(step, has_head=model.has_head, chats=model.chats):
        raise InputError(f"{where} is asked without the chat form. Unset history_column.")
    if isinstance(step, GenerateStep):
        _check_writer(where, model, step.max_tokens)
    elif isinstance(step, ExtractStep):
        _check_writer(where, model, form_of(step, tokenizer_of(model)).longest)
    elif isinstance(step, ClassifyStep):
        _check_classifier(where, step, model)


def _check_writer(where: str, model: Model, answer_tokens: int) -> None:
    if model.has_head:
        raise InputError(
            f"{where} has a classification head and cannot generate. Set the step's model."
        )
    if answer_tokens >= model.max_positions:
        raise InputError(
            f"{where} has {model.max_positions} positions, none left for a prompt. Set max_tokens."
        )


def _check_classifier(where: str, step: ClassifyStep, model: Model) -> None:
    if not model.has_head:
        if step.number:
            raise InputError(f"{where} has no trained head to predict a number. Set its model.")
        if step.labels is None:
            raise InputError(f"{where} has no trained head. Set the step's labels.")
        return
    _check_predicts(where, step, model)
    if step.compare != "sum":
        raise InputError(f"{where} has a head, whose labels have no length. Leave compare out.")
    if step.verdicts is not None:
        raise InputError(f"{where} has a head, which gives no verdicts. Leave verdicts out.")
    _check_trained_prompt(where, step, model)
    for setting, given in (("threshold", step.threshold), ("abstain_below", step.abstain_below)):
        unknown = sorted(given.keys() - set(model.labels)) if isinstance(given, dict) else []
        if unknown:
            raise InputError(
                f"{where} was trained for {some_of(model.labels)}, not {some_of(unknown)}. "
                f"Set the step's {setting}."
            )
    if step.labels is not None and sorted(step.labels) != sorted(model.labels):
        advice = "Set the step's labels"
        if model.config.adapter:
            advice += f", or name them with id2label in {model.config.adapter}/config.json"
        raise InputError(
            f"{where} was trained for {some_of(model.labels)}, not {some_of(step.labels)}. "
            f"{advice}."
        )


def _check_predicts(where: str, step: ClassifyStep, model: Model) -> None:
    """InputError when the step wants another kind of answer than the head gives."""
    setting = "number" if step.number else "multiple" if step.multiple else None
    wanted: Predicts = "number" if step.number else "labels" if step.multiple else "label"
    if wanted == model.predicts:
        return
    if model.predicts == "label":
        raise InputError(
            f"{where} has a head that was trained to choose one label. Leave {setting} out, or set "
            "the step's model."
        )
    does, right = {
        "labels": ("judges each label by itself", "multiple"),
        "number": ("predicts a number", "number"),
    }[model.predicts]
    instead = f" instead of {setting}" if setting else ""
    raise InputError(f"{where} has a head that {does}. Set {right}: true{instead}.")


def trained_prompt(model: Model) -> dict[str, Any] | None:
    """The prompt that a head was trained with by `glmbatch train`; else None."""
    for folder in (model.config.adapter, model.config.path):
        file = None if folder is None else Path(folder) / PROMPT_FILE
        if model.has_head and file is not None and file.is_file():
            recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return recorded
    return None


def as_trained(step: AnyStep, model: Model) -> AnyStep:
    """`step` with the prompt that its head was trained with, where the step sets none."""
    trained = trained_prompt(model) if isinstance(step, ClassifyStep) else None
    if trained is None:
        return step
    taken = {}
    if step.prompt_template == ClassifyStep.model_fields["prompt_template"].default:
        taken["prompt_template"] = trained["prompt_template"]
        if step.system_prompt is None:
            taken["system_prompt"] = trained["system_prompt"]
    if step.chat is None and "chat" in trained:
        taken["chat"] = trained["chat"]
    return step.model_copy(update=taken)


def _check_trained_prompt(where: str, step: ClassifyStep, model: Model) -> None:
    """InputError when the step's prompt is not the one that the head was trained with."""
    trained = trained_prompt(model)
    if trained is None:
        return
    template = step.prompt_template
    names = placeholders(template)
    if len(names) == 1:  # training calls its only placeholder {text}
        template = template.replace(f"{{{names[0]}}}", "{text}")
    asked: dict[str, str | bool | None] = {
        "prompt_template": template,
        "system_prompt": step.system_prompt,
    }
    if "chat" in trained:
        asked["chat"] = step.chat
    for setting, value in asked.items():
        if value != trained[setting]:
            raise InputError(
                f"{where} was trained with the {setting} {trained[setting]!r}. "
                f"Set the step's {setting}."
            )
