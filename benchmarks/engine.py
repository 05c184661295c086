"""The engine beside transformers' own loop: same rows, same answers, interleaved, against the measured ceiling.

    python benchmarks/engine.py                        classification, labels and generation on a middle model
    python benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda      the full shape, on a GPU

Random weights: only speed is measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

from glmbatch.glm.engine import ClassifyRequest, GenerateRequest
from glmbatch.glm.torch_engine import TorchEngine

SHAPES = {
    "mid": {"hidden_size": 512, "intermediate_size": 1712, "num_hidden_layers": 8, "num_attention_heads": 8},
    "big": {"hidden_size": 1024, "intermediate_size": 3424, "num_hidden_layers": 16, "num_attention_heads": 16},
    "6b": {"hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28, "num_attention_heads": 32},
}
VOCABULARY = {"mid": 8192, "big": 16384, "6b": 65024}
HEAD_DIM = {"mid": 64, "big": 64, "6b": 128}
LABELS = ((11,), (12, 13), (14, 15, 16), (14, 17), (18, 19, 20, 21), (22,), (23, 24), (25, 26, 27, 28, 29, 30))


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.dtype), options.device
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(31, 8000, length).tolist() for length in _lengths(rng, options.rows, 127, 8, 512)]
    answers = _lengths(rng, options.rows, 50, 4, 256)
    config = _config(options.shape)
    ceiling = measure_gemm(config, dtype, device)
    results = {
        "classify": measure_classify(config, dtype, device, prompts, ceiling, options.rounds),
        "labels": measure_labels(config, dtype, device, prompts, options.rounds),
        "generate": measure_generate(config, dtype, device, prompts, answers, options.rounds),
    }
    facts = {
        "shape": options.shape,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": options.rows,
        "gemm_gflops": round(ceiling / 1e9, 1),
    }
    for name, result in results.items():
        print(name, ", ".join(f"{key} {value}" for key, value in result.items()))
    print(json.dumps({**facts, **results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 0: torch's own choice")
    return parser.parse_args()


def _lengths(rng: np.random.Generator, rows: int, mean: float, least: int, most: int) -> list[int]:
    """Log-normal lengths, as texts have them."""
    lengths = rng.lognormal(np.log(mean) - 0.32, 0.8, rows).clip(least, most)
    return [int(length) for length in lengths]


def _config(shape: str) -> GlmConfig:
    return GlmConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY[shape],
        num_key_value_heads=2,
        head_dim=HEAD_DIM[shape],
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        attention_bias=True,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


def measure_gemm(config: GlmConfig, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the largest matrix product of a layer over 2,048 tokens: no forward can be faster."""
    left = torch.randn(2048, config.hidden_size, device=device, dtype=dtype)
    right = torch.randn(2 * config.intermediate_size, config.hidden_size, device=device, dtype=dtype)
    seconds = [_timed(lambda: torch.nn.functional.linear(left, right), device)[0] for _ in range(12)]
    return float(2 * left.numel() * right.shape[0] / statistics.median(seconds))


def measure_classify(
    config: GlmConfig, dtype: torch.dtype, device: str, prompts: list[list[int]], ceiling: float, rounds: int
) -> dict[str, Any]:
    model = GlmForSequenceClassification(copy.deepcopy(config)).eval().to(device, dtype)
    plain = copy.deepcopy(model)
    body = sum(
        weight.numel() for name, weight in model.model.named_parameters() if weight.dim() > 1 and "embed" not in name
    )
    ideal = 2 * body * sum(map(len, prompts)) / ceiling
    engine = TorchEngine(model, eos_id=2, token_count=config.vocab_size)

    def ours() -> list[int]:
        results = engine.classify(ClassifyRequest(at, prompt) for at, prompt in enumerate(prompts))
        scores = {result.index: result.scores for result in results}
        return [int(np.argmax(scores[at])) for at in range(len(prompts))]

    def alone() -> list[int]:
        with torch.inference_mode():
            return [int(plain(torch.tensor([prompt], device=device)).logits[0].argmax()) for prompt in prompts]

    mine, theirs, same = _interleaved(ours, alone, device, rounds)
    engine.close()
    return {
        "rows_per_second": round(len(prompts) / mine, 2),
        "of_gemm_ceiling": round(ideal / mine, 2),
        "times_row_by_row": round(theirs / mine, 2),
        "same_labels": same,
    }


def measure_labels(
    config: GlmConfig, dtype: torch.dtype, device: str, prompts: list[list[int]], rounds: int
) -> dict[str, Any]:
    """Eight labels of 1 to 6 tokens after a template of 100 tokens that all rows share."""
    model = GlmForCausalLM(copy.deepcopy(config)).eval().to(device, dtype)
    plain = copy.deepcopy(model)
    engine = TorchEngine(model, eos_id=2, token_count=config.vocab_size)
    template = list(range(100, 200))
    rows = [template + prompt[:40] for prompt in prompts]
    few = rows[: max(1, len(rows) // 12)]

    def ours(asked: list[list[int]] = rows) -> list[int]:
        results = engine.classify(ClassifyRequest(at, row, LABELS, len(template)) for at, row in enumerate(asked))
        scores = {result.index: result.scores for result in results}
        return [int(np.argmax(scores[at])) for at in range(len(asked))]

    def naive() -> list[int]:
        return [int(np.argmax([_likelihood(plain, row, label, device) for label in LABELS])) for row in few]

    mine, theirs, _ = _interleaved(ours, naive, device, rounds)
    same = ours(few) == naive()
    engine.close()
    return {
        "rows_per_second": round(len(rows) / mine, 2),
        "times_naive": round((theirs / len(few)) / (mine / len(rows)), 1),
        "same_labels": same,
    }


def _likelihood(model: Any, row: list[int], label: tuple[int, ...], device: str) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([[*row, *label]], device=device)).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(row) - 1 + at, token]) for at, token in enumerate(label))


def measure_generate(
    config: GlmConfig, dtype: torch.dtype, device: str, prompts: list[list[int]], answers: list[int], rounds: int
) -> dict[str, Any]:
    """Answers of fixed lengths (no end token), 16 slots on CPU; beside `generate`, one row at a time, on a third."""
    model = GlmForCausalLM(copy.deepcopy(config)).eval().to(device, dtype)
    plain = copy.deepcopy(model)
    plain.generation_config.eos_token_id = None
    engine = TorchEngine(model, eos_id=-1, token_count=config.vocab_size, max_slots=None if device != "cpu" else 16)
    few = max(1, len(prompts) // 8)

    def ours() -> list[tuple[int, ...]]:
        requests = (GenerateRequest(at, prompt, answers[at]) for at, prompt in enumerate(prompts))
        written = {result.index: result.ids for result in engine.generate(requests)}
        return [written[at] for at in range(few)]

    def alone() -> list[tuple[int, ...]]:
        return [_generate(plain, prompts[at], answers[at], device) for at in range(few)]

    mine, theirs, same = _interleaved(ours, alone, device, rounds)
    engine.close()
    rate = sum(answers) / mine
    return {
        "new_tokens_per_second": round(rate, 1),
        "times_row_by_row": round(rate / (sum(answers[:few]) / theirs), 2),
        "same_tokens": same,
    }


def _generate(model: Any, prompt: list[int], tokens: int, device: str) -> tuple[int, ...]:
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tuple(written[0, len(prompt) :].tolist())


def _interleaved(
    ours: Callable[[], Any], theirs: Callable[[], Any], device: str, rounds: int
) -> tuple[float, float, bool]:
    """Median seconds of each, in turn after one warm-up round, and whether the answers were the same."""
    ours(), theirs()
    pairs = [(_timed(ours, device), _timed(theirs, device)) for _ in range(rounds)]
    mine, other = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    return mine, other, pairs[0][0][1] == pairs[0][1][1]


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds and result: of the processor on CPU, where the machine may be shared, of the wall on a GPU."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    began = clock()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - began, result


if __name__ == "__main__":
    main()
