"""Loads an engine from the model settings of a job. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmbatch.glm.engine.protocol import Engine

if TYPE_CHECKING:  # not at run time, so that the model also runs without pydantic
    from glmbatch.glm.engine.worker import TorchEngine
    from glmbatch.settings.job import ModelConfig, RuntimeConfig


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is loaded from: plain values, which another process can read.

    `device` and `dtype` are resolved; the limits are as in `TorchEngine`.
    """

    path: str
    adapter: str | None
    dtype: str
    quantization: str
    device: str
    max_batch_tokens: int | None
    max_slots: int | None
    models_at_once: int


def load_engine(model: ModelConfig, runtime: RuntimeConfig, models_at_once: int = 1) -> Engine:
    """An engine over the checkpoint in directory `model.path`, loaded onto the device.

    The size of its KV cache leaves room for `models_at_once` engines on that device.

    Raises InputError if the checkpoint is invalid, TransientError if the machine fails, DeviceLost
    if a GPU failed before in this process.
    """
    from glmbatch.glm.device import resolve_device, resolve_dtype

    device = resolve_device(runtime.device)
    settings = EngineSettings(
        path=model.path,
        adapter=model.adapter,
        dtype=resolve_dtype(model.dtype, device),
        quantization=model.quantization,
        device=device,
        max_batch_tokens=runtime.max_batch_tokens,
        max_slots=runtime.max_slots,
        models_at_once=models_at_once,
    )
    if not has_own_process(runtime):
        return load_here(settings)
    from glmbatch.glm.engine.process import EngineProcess

    return EngineProcess(settings)


def has_own_process(runtime: RuntimeConfig) -> bool:
    """Whether `load_engine` starts a process for the engine."""
    from glmbatch.glm.device import resolve_device

    if runtime.engine_process is None:
        return resolve_device(runtime.device) != "cpu"
    return runtime.engine_process


def load_here(settings: EngineSettings) -> TorchEngine:
    """The engine in this process. Raises as `load_engine`."""
    import torch

    from glmbatch.glm.checkpoint.load import load_model, read_checkpoint
    from glmbatch.glm.engine.worker import TorchEngine
    from glmbatch.glm.oom import device_lost

    checkpoint = read_checkpoint(settings.path)
    try:
        loaded = load_model(settings.path, settings.dtype, settings.device, settings.adapter)
        return TorchEngine(
            loaded,
            eos_id=loaded.config.eos_token_id,
            token_count=checkpoint.tokenizer_size or checkpoint.architecture.vocab_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_slots=settings.max_slots,
            models_at_once=settings.models_at_once,
            quantization=settings.quantization,
        )
    except RuntimeError as error:
        lost = device_lost(error, torch.device(settings.device))
        if lost is None:
            raise
        raise lost from error


def import_engine() -> None:
    """Import what `load_here` needs, which takes as long as loading a small model."""
    from transformers import GlmForCausalLM  # noqa: F401 - imported by name only

    import glmbatch.glm.checkpoint.load
    import glmbatch.glm.engine.worker  # noqa: F401
