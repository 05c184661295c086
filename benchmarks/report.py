"""What the runs come to: medians, shares of the limit, ratios to ours, and whether the answers are the same."""

from __future__ import annotations

import statistics
from typing import Any

from roster import OURS, REFERENCE
from workload import Shape, least_operations, tokens_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


def decode_limit(
    shape: Shape, slots: int, dtype: str, ceiling: dict[str, float]
) -> dict[str, float]:
    """New tokens a second with `slots` rows at once: what arithmetic, and what reading the weights, allow."""
    weights = shape.body_weights + shape.head_weights
    return {
        "by_arithmetic": ceiling["gemm_flops"] / (2 * weights),
        "by_bandwidth": slots * ceiling["bytes_per_second"] / (weights * DTYPE_BYTES[dtype]),
    }


def judge(
    results: dict[str, dict[str, Any]],
    shape: Shape,
    clock: str,
    ceiling: dict[str, float],
    limit: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """For each contestant its rates, its share of the limit, how many times faster ours is, and its answers."""
    present = {name: result for name, result in results.items() if "not_here" not in result}
    seconds = {name: [run[clock] for run in result["runs"][1:]] for name, result in present.items()}
    judged: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        if name not in present:
            judged[name] = {"not_here": result["not_here"]}
            continue
        work, runs = result["work"], result["runs"]
        median = statistics.median(seconds[name])
        tokens = tokens_of(work)
        judged[name] = {
            "version": result["version"],
            "rows": len(work["rows"]),
            "tokens": tokens,
            "seconds": seconds[name],
            "tokens_per_second": tokens / median,
            "rows_per_second": len(work["rows"]) / median,
            "new_tokens_per_second": sum(work["answer_tokens"]) / median,
            "gemm_seconds": least_operations(work, shape) / ceiling["gemm_flops"],
            "of_gemm_limit": least_operations(work, shape) / ceiling["gemm_flops"] / median,
            "times_ours": _times(
                seconds[name], tokens, seconds[OURS], tokens_of(results[OURS]["work"])
            ),
            "peak_gib": max(run["peak_bytes"] for run in runs) / GIB,
            "peak_gpu_gib": max(run["peak_gpu_bytes"] or 0 for run in runs) / GIB,
            **_compared(result, results[REFERENCE]),
        }
        if work["task"] == "generate":
            judged[name]["of_decode_limit"] = _least_seconds(work, shape, ceiling, limit) / median
    return judged


def _times(theirs: list[float], their_tokens: int, ours: list[float], our_tokens: int) -> float:
    """How many times as long as ours a token takes; of each round, since the machine's speed drifts between rounds."""
    return statistics.median(
        (their / their_tokens) / (our / our_tokens) for their, our in zip(theirs, ours, strict=True)
    )


def _least_seconds(
    work: dict[str, Any], shape: Shape, ceiling: dict[str, float], limit: dict[str, float]
) -> float:
    """Prompts at the speed of arithmetic, then new tokens at the decode limit. Reading keys and values is left out."""
    prompts = 2 * shape.body_weights * sum(len(row) for row in work["rows"]) / ceiling["gemm_flops"]
    return prompts + int(sum(work["answer_tokens"])) / min(limit.values())


def _compared(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Against the plain loop, on the rows that both were given, in all rounds."""
    expected = dict(zip(reference["work"]["indexes"], reference["runs"][0]["answers"], strict=True))
    compared, same, difference = 0, 0, 0.0
    generated = result["work"]["task"] == "generate"
    for run in result["runs"]:
        answers = dict(zip(result["work"]["indexes"], run["answers"], strict=True))
        for index in answers.keys() & expected.keys():
            answer, right = answers[index], expected[index]
            compared += 1
            same += answer == right if generated else _first_best(answer) == _first_best(right)
            if not generated:
                difference = max(
                    difference,
                    *(abs(one - other) for one, other in zip(answer, right, strict=True)),
                )
    scores = {} if generated else {"largest_score_difference": difference}
    return {"compared": compared, "same": same, **scores}


def _first_best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def ceiling_table(
    first: dict[str, float], last: dict[str, float], limit: dict[str, float], slots: int
) -> str:
    """For people: what the machine reached before and after, and what that allows."""
    readings = [
        f"{when}: {reading['gemm_flops'] / 1e9:.0f} GFLOP/s, {reading['bytes_per_second'] / 1e9:.1f} GB/s"
        for when, reading in (("before", first), ("after", last))
    ]
    allowed = ", ".join(f"{name.replace('_', ' ')} {rate:.0f}" for name, rate in limit.items())
    return "\n".join(["ceiling", *readings, f"new tokens/s that {slots} slots allow: {allowed}"])


def table(task: str, judged: dict[str, dict[str, Any]]) -> str:
    """For people: one line for each contestant."""
    unit = "new tokens/s" if task == "generate" else "rows/s"
    key = "new_tokens_per_second" if task == "generate" else "rows_per_second"
    lines = [
        "",
        f"{task:28}{'rows':>6}{'tokens/s':>10}{unit:>14}{'of limit':>10}{'ours is':>10}  same answers",
    ]
    for name, result in judged.items():
        if "not_here" in result:
            lines.append(f"{name:28}not here: {result['not_here']}")
            continue
        share = result.get("of_decode_limit", result["of_gemm_limit"])
        difference = result.get("largest_score_difference")
        apart = "" if difference is None else f", scores within {difference:.1e}"
        memory = f", {result['peak_gpu_gib']:.1f} GiB of the GPU" if result["peak_gpu_gib"] else ""
        lines.append(
            f"{name:28}{result['rows']:6}{result['tokens_per_second']:10.0f}{result[key]:14.2f}{share:10.2f}"
            f"{result['times_ours']:9.2f}x  {result['same']} of {result['compared']}{apart}{memory}"
        )
    return "\n".join(lines)
