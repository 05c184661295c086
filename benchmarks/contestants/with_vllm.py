"""Contestant: vLLM. On CPU it runs GLM through its transformers backend, on a GPU its own GLM.

On a GPU it fills the weights itself, and as they are not ours its answers are not compared. Its
prefix cache is reset before each round, because every round has the same prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ON_GPU = any(argument.startswith("cuda") for argument in sys.argv)
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_HOST_IP"] = "127.0.0.1"
if ON_GPU:
    if find_spec("flashinfer") is None:
        # Otherwise it takes FlashInfer for installed and fails. Its own Triton kernel samples.
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
else:
    # Stay in this process, whose CPU seconds count.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the cores are shared
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB

import torch  # noqa: E402
import vllm  # type: ignore[import-not-found]  # noqa: E402
from protocol import Run, serve  # noqa: E402


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    if options.threads and not ON_GPU:
        torch.set_num_threads(options.threads)
    asks_class = options.task == "classify"
    checkpoint = options.checkpoint or _config_alone(options.work.parent, work["config"])
    os.environ["VLLM_CACHE_ROOT"] = str(checkpoint.parent / "vllm")  # for compiled code
    model = vllm.LLM(
        str(checkpoint),
        runner="pooling" if asks_class else "generate",
        convert="classify" if asks_class else "auto",
        # vLLM 0.32 cannot load the head of a GlmForSequenceClassification. With this override
        # it adds its own head.
        hf_overrides={"architectures": ["GlmForCausalLM"]},
        **_tokenizer(options.work.parent, work),
        dtype=options.dtype,
        max_model_len=work["config"]["max_position_embeddings"],
        max_num_seqs=work["slots"],
        enable_prefix_caching=work["prefix_tokens"] > 0 or work["beside"] > 1,
        seed=0,
        **_limits(options, work),
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=row) for row in work["rows"]]
    sampling = [_sampling(work, at) for at in range(len(prompts))]

    def classify() -> list[Any]:
        model.reset_prefix_cache()
        raw = vllm.PoolingParams(use_activation=False)
        results = model.classify(prompts, pooling_params=raw, use_tqdm=False)
        return _ours([list(result.outputs.probs) for result in results])

    def generate() -> list[Any]:
        model.reset_prefix_cache()
        results = model.generate(prompts, sampling, use_tqdm=False)
        answers = [list(result.outputs[0].token_ids) for result in results]
        assert list(map(len, answers)) == [wanted.max_tokens for wanted in sampling]
        if work["labels"] and not ON_GPU:
            return [work["labels"].index(answer) for answer in answers]
        return _ours(answers)

    def fields() -> list[Any]:
        model.reset_prefix_cache()
        results = model.generate(prompts, sampling, use_tqdm=False)
        return [result.outputs[0].text for result in results]

    if options.task == "fields":
        return f"vllm {vllm.__version__}", fields
    return (
        f"vllm {vllm.__version__}, torch {torch.__version__}",
        classify if asks_class else generate,
    )


def _limits(options: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """The settings that depend on the device. On a GPU, vLLM chooses the size of a batch."""
    limits: dict[str, Any] = {}
    if options.checkpoint is None:
        limits["load_format"] = "dummy"
    if not ON_GPU:
        limits["model_impl"] = "transformers"
    if work["batch_tokens"] or not ON_GPU:
        limits["max_num_batched_tokens"] = work["batch_tokens"] or 2048
    return limits


def _sampling(work: dict[str, Any], at: int) -> Any:
    """What to generate for row `at`. The best of several one-token labels is one greedy token."""
    if work["task"] == "fields":
        return vllm.SamplingParams(
            temperature=0,
            max_tokens=work["limits"][at],
            structured_outputs=vllm.sampling_params.StructuredOutputsParams(
                json=work["schemas"][work["step_of"][at]]
            ),
        )
    asked: dict[str, Any] = {"temperature": 0, **work["sampling"]}
    if work["labels"] and not ON_GPU:
        # Its answer must be a label to be compared. This costs vLLM a mask for each row.
        asked["allowed_token_ids"] = [label[0] for label in work["labels"]]
    tokens = work["answer_tokens"][at] or 1
    return vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **asked)


def _tokenizer(folder: Path, work: dict[str, Any]) -> dict[str, Any]:
    """The settings of its tokenizer, which only forms need: else it gets token ids alone."""
    if work["task"] != "fields":
        return {"skip_tokenizer_init": True}
    path = folder / "vllm-tokenizer"
    path.mkdir(exist_ok=True)
    shutil.copy(Path(work["tokenizer"]) / "tokenizer.model", path)
    # The published class is remote code. This one reads the same pieces.
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return {
        "tokenizer": str(path),
        # Otherwise a model of random weights writes white space without end. Its other backend,
        # xgrammar, refuses some of the schemas.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }


def _ours(answers: list[Any]) -> list[Any]:
    """The answers, or None for each where the weights are not ours."""
    return [None] * len(answers) if ON_GPU else answers


def _config_alone(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a model's config and no weights."""
    from transformers import GlmConfig

    path = folder / "vllm-config"
    GlmConfig(**config, architectures=["GlmForCausalLM"]).save_pretrained(path)
    return path


if __name__ == "__main__":
    serve(load)
