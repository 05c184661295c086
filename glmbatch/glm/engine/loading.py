"""Loads an engine from the model settings of a job. Importing this module loads no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from glmbatch.glm.engine.protocol import ClassifyRequest, Engine, GenerateRequest
from glmbatch.glm.tfidf.engine import TfidfEngine
from glmbatch.glm.tfidf.model import is_tfidf, load_tfidf

if TYPE_CHECKING:  # not at run time, so that the model also runs without pydantic
    from glmbatch.glm.engine.worker import TorchEngine
    from glmbatch.settings.job import ModelConfig, RuntimeConfig

logger = logging.getLogger(__name__)

# A decode step is recorded when its number of rows comes up for the third time. The first token of
# an answer comes from the prompt, and one more is for a row that ends a step late.
WARM_UP_STEPS = 5


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
    arenas_bytes: int = 0


def load_engine(
    model: ModelConfig, runtime: RuntimeConfig, models_at_once: int = 1, arenas_bytes: int = 0
) -> Engine:
    """An engine over the checkpoint in directory `model.path`, loaded onto the device.

    The size of its KV cache leaves room for `models_at_once` engines on that device, whose arenas
    hold `arenas_bytes` already.

    Raises InputError if the checkpoint is invalid, TransientError if the machine fails, DeviceLost
    if a GPU failed before in this process.
    """
    if is_tfidf(model.path):
        return TfidfEngine(load_tfidf(model.path))
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
        arenas_bytes=arenas_bytes,
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

    from glmbatch.glm.checkpoint.load import load_weights, read_checkpoint
    from glmbatch.glm.engine.worker import TorchEngine
    from glmbatch.glm.oom import device_lost

    checkpoint = read_checkpoint(settings.path)
    try:
        loaded = load_weights(settings.path, settings.dtype, settings.device, settings.adapter)
        engine = TorchEngine(
            loaded,
            eos_id=loaded.config.eos_token_id,
            token_count=checkpoint.tokenizer_size or checkpoint.architecture.vocab_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_slots=settings.max_slots,
            models_at_once=settings.models_at_once,
            arenas_bytes=settings.arenas_bytes,
            quantization=settings.quantization,
        )
    except RuntimeError as error:
        lost = device_lost(error, torch.device(settings.device))
        if lost is None:
            raise
        raise lost from error
    # Neither on CPU nor in float32 is there anything to compile or to record.
    if settings.device != "cpu" and settings.dtype != "float32":
        try:
            warm_up(engine)
        except BaseException:  # an interrupt too
            engine.close()
            raise
    return engine


def warm_up(engine: TorchEngine) -> None:
    """Run all kinds of forwards once, so that no row waits for kernels to compile and be recorded.

    Generation begins with as many rows as ever run at once; after every few tokens half of them
    end. Raises as the engine does. If memory runs out, the limits are lowered for the warm-up
    alone, since its rows are as many as there can be.
    """
    began = perf_counter()
    limits = replace(engine.limits)
    labels = None if engine.model_limits.has_head else ((0, 0), (1,))
    list(engine.classify([ClassifyRequest(0, (0, 0), labels)]))
    if labels is not None:
        halvings = (engine.slots - 1).bit_length()
        answers = [WARM_UP_STEPS * (1 + halvings - at.bit_length()) for at in range(engine.slots)]
        list(
            engine.generate(
                GenerateRequest(at, (0, 0), tokens, temperature=at % 2, min_tokens=tokens)
                for at, tokens in enumerate(answers)
            )
        )
    engine.limits.restore(limits)
    logger.info("warmed up in %.1f s", perf_counter() - began)


def import_engine() -> None:
    """Import what `load_here` needs, which takes as long as loading a small model."""
    import glmbatch.glm.checkpoint.load
    import glmbatch.glm.engine.worker  # noqa: F401
