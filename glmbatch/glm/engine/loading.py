"""Loads an engine from the model settings of a job. Importing this module loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glmbatch.glm.engine.protocol import Engine

if TYPE_CHECKING:  # not at run time, so that the model also runs without pydantic
    from glmbatch.settings.job import ModelConfig, RuntimeConfig


def load_engine(model: ModelConfig, runtime: RuntimeConfig, models_at_once: int = 1) -> Engine:
    """An engine over the checkpoint in directory `model.path`, loaded onto the device.

    The size of its KV cache leaves room for `models_at_once` engines on that device.

    Raises InputError if the checkpoint is invalid, TransientError if the machine fails.
    """
    from glmbatch.glm.checkpoint.load import load_model, read_checkpoint
    from glmbatch.glm.device import resolve_device, resolve_dtype
    from glmbatch.glm.engine.worker import TorchEngine

    device = resolve_device(runtime.device)
    dtype = resolve_dtype(model.dtype, device)
    checkpoint = read_checkpoint(model.path)
    loaded = load_model(model.path, dtype, device, model.adapter)
    return TorchEngine(
        loaded,
        eos_id=loaded.config.eos_token_id,
        token_count=checkpoint.tokenizer_size or checkpoint.architecture.vocab_size,
        max_batch_tokens=runtime.max_batch_tokens,
        max_slots=runtime.max_slots,
        models_at_once=models_at_once,
        quantization=model.quantization,
    )


def import_engine() -> None:
    """Import what `load_engine` needs, which takes as long as loading a small model."""
    from transformers import GlmForCausalLM  # noqa: F401 - imported by name only

    import glmbatch.glm.checkpoint.load
    import glmbatch.glm.engine.worker  # noqa: F401
