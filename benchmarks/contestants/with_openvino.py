"""Contestant: OpenVINO GenAI with continuous batching, on CPU."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]
from protocol import Run, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = work["slots"]
    scheduler.max_num_batched_tokens = work["batch_tokens"] or 2048
    scheduler.enable_prefix_caching = False  # it would find the rows of earlier rounds
    scheduler.cache_size = 2  # GiB
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[options.dtype]}
    if options.way == "f32":
        # 8 bits by default.
        properties["KV_CACHE_PRECISION"] = PRECISIONS[options.dtype]
    if options.threads:
        properties |= {"INFERENCE_NUM_THREADS": options.threads, "ENABLE_CPU_PINNING": False}
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(options.checkpoint), scheduler, "CPU", properties
    )
    prompts = [openvino.Tensor(np.array([row], dtype=np.int64)) for row in work["rows"]]
    configs = [_config(length) for length in work["answer_tokens"]]

    def run() -> list[list[int]]:
        results = pipeline.generate(prompts, configs)
        return [list(result.m_generation_ids[0]) for result in results]

    return f"openvino-genai {openvino_genai.__version__}", run


def _config(tokens: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    serve(load)
