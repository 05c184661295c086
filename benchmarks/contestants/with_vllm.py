"""Contestant: vLLM's CPU build, which runs GLM through its transformers backend.

Its prefix cache is reset before each round, because every round has the same prompts.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # stay in this process, whose CPU seconds count
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the cores are shared
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB

import torch
import vllm  # type: ignore[import-not-found]
from protocol import Run, serve


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["VLLM_CACHE_ROOT"] = str(options.checkpoint.parent / "vllm")  # for compiled code
    asks_class = options.task == "classify"
    model = vllm.LLM(
        str(options.checkpoint),
        runner="pooling" if asks_class else "generate",
        convert="classify" if asks_class else "auto",
        model_impl="transformers",
        # vLLM 0.32 cannot load the head of a GlmForSequenceClassification. With this override
        # it adds its own head.
        hf_overrides={"architectures": ["GlmForCausalLM"]},
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=work["config"]["max_position_embeddings"],
        max_num_seqs=work["slots"],
        max_num_batched_tokens=work["batch_tokens"] or 2048,
        enable_prefix_caching=work["prefix_tokens"] > 0,
        seed=0,
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=row) for row in work["rows"]]

    def classify() -> list[list[float]]:
        model.reset_prefix_cache()
        raw = vllm.PoolingParams(use_activation=False)
        return [
            list(result.outputs.probs)
            for result in model.classify(prompts, pooling_params=raw, use_tqdm=False)
        ]

    def generate() -> list[list[int]]:
        model.reset_prefix_cache()
        greedy = [
            vllm.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in work["answer_tokens"]
        ]
        return [
            list(result.outputs[0].token_ids)
            for result in model.generate(prompts, greedy, use_tqdm=False)
        ]

    return (
        f"vllm {vllm.__version__}, torch {torch.__version__}",
        classify if asks_class else generate,
    )


if __name__ == "__main__":
    serve(load)
