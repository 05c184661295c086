"""The report on all runs: medians, shares of the limit, ratios to ours, agreement of answers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from roster import OURS, REFERENCE
from workload import WRITING_TASKS, Shape, least_operations, tokens_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


def decode_limit(
    shape: Shape, slots: int, dtype: str, ceiling: dict[str, float]
) -> dict[str, float]:
    """New tokens per second with `slots` rows at once, limited by arithmetic and by bandwidth."""
    weights = shape.body_weights + shape.head_weights
    return {
        "by_arithmetic": ceiling["gemm_flops"] / (2 * weights),
        # One read of all weights gives each slot one token.
        "by_bandwidth": slots * ceiling["bytes_per_second"] / (weights * DTYPE_BYTES[dtype]),
    }


def judge(
    results: dict[str, dict[str, Any]],
    shape: Shape,
    clock: str,
    ceiling: dict[str, float],
    limit: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """Each contestant's rates, share of the limit, time relative to ours, and agreement."""
    return {name: judge_one(name, results, shape, clock, ceiling, limit) for name in results}


def judge_one(
    name: str,
    results: dict[str, dict[str, Any]],
    shape: Shape,
    clock: str,
    ceiling: dict[str, float],
    limit: dict[str, float],
) -> dict[str, Any]:
    """One contestant, compared with ours and the reference where `results` has them."""
    result = results[name]
    if "not_here" in result:
        return {"not_here": result["not_here"]}
    work = result["work"]
    seconds = _seconds(result, clock)
    median = statistics.median(seconds)
    least_seconds = least_operations(work, shape) / ceiling["gemm_flops"]
    judged = {
        "version": result["version"],
        "rows": len(work["rows"]),
        "tokens": tokens_of(work),
        "seconds": seconds,
        "tokens_per_second": tokens_of(work) / median,
        "rows_per_second": len(work["rows"]) / median,
        "new_tokens_per_second": sum(work["answer_tokens"]) / median,
        "gemm_seconds": least_seconds,
        "of_gemm_limit": least_seconds / median,
        "peak_gib": max(run["peak_bytes"] for run in result["runs"]) / GIB,
        "peak_gpu_gib": max(run["peak_gpu_bytes"] or 0 for run in result["runs"]) / GIB,
        "compared": 0,
        "same": 0,
        **_card(result["runs"]),
    }
    if (
        work["task"] == "fields"
    ):  # how many tokens an engine writes for a document is its own matter
        from typed import invalid  # it needs pydantic, which a GPU machine may lack

        judged["of_gemm_limit"] = None
        judged["invalid"] = max(invalid(work, run["answers"]) for run in result["runs"])
    if results.get(OURS, {}).get("runs"):
        judged["times_ours"] = _times(result, results[OURS], clock)
    if results.get(REFERENCE, {}).get("runs"):
        judged |= _compared(result, results[REFERENCE])
    if work["answer_tokens"][0]:
        judged["of_decode_limit"] = _decode_seconds(work, shape, ceiling, limit) / median
    return judged


def _card(runs: list[dict[str, Any]]) -> dict[str, float]:
    """What the GPU's driver read in the rounds: share of time with a kernel, peak of memory."""
    readings = [run["card"] for run in runs[1:] if run.get("card")]
    if not readings:
        return {}
    return {
        "busy": statistics.median(reading["busy"] for reading in readings),
        "card_gib": max(reading["card_gib"] for reading in readings),
    }


def _seconds(result: dict[str, Any], clock: str) -> list[float]:
    """The seconds of each round, without the warm-up."""
    # The first run is slower: it compiles, fills caches and touches new memory.
    return [run[clock] for run in result["runs"][1:]]


def _times(theirs: dict[str, Any], ours: dict[str, Any], clock: str) -> float:
    """Time per token, as a multiple of ours.

    Ratios are taken within each round, because the machine's speed drifts. Returns their median.
    """
    per_token = tokens_of(ours["work"]) / tokens_of(theirs["work"])
    rounds = zip(_seconds(theirs, clock), _seconds(ours, clock), strict=True)
    return statistics.median(their / our * per_token for their, our in rounds)


def _decode_seconds(
    work: dict[str, Any], shape: Shape, ceiling: dict[str, float], limit: dict[str, float]
) -> float:
    """Minimum seconds: prompts limited by arithmetic, new tokens by the slower decode limit.

    Reads of keys and values do not count.
    """
    prompts = 2 * shape.body_weights * sum(len(row) for row in work["rows"]) / ceiling["gemm_flops"]
    return prompts + int(sum(work["answer_tokens"])) / min(limit.values())


def _compared(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How many answers agree with the reference, over the rows that both answered, in all rounds.

    Scores differ by rounding, so they agree if the best label is the same. Token ids must be equal.
    """
    expected = _by_row(reference, reference["runs"][0])
    generated = any(result["work"]["answer_tokens"])
    compared = 0
    same = 0
    difference = 0.0
    # Every round counts: an engine may batch differently, but must give the same answers.
    for run in result["runs"]:
        answers = _by_row(result, run)
        for index in answers.keys() & expected.keys():
            answer = answers[index]
            right = expected[index]
            if answer is None:  # its weights are not ours
                continue
            compared += 1
            if generated:
                same += answer == right
                continue
            if isinstance(answer, int):  # the best label alone, without scores
                same += answer == _best(right)
                continue
            same += _best(answer) == _best(right)
            for score, right_score in zip(answer, right, strict=True):
                difference = max(difference, abs(score - right_score))
    scores = {} if generated or not compared else {"largest_score_difference": difference}
    return {"compared": compared, "same": same, **scores}


def _by_row(result: dict[str, Any], run: dict[str, Any]) -> dict[int, Any]:
    return dict(zip(result["work"]["indexes"], run["answers"], strict=True))


def _best(scores: list[float]) -> int:
    """Index of the highest score, the first one on a tie."""
    return scores.index(max(scores))


def write_line(path: Path | None, line: dict[str, Any]) -> None:
    """Add `line` to the file of JSON lines, if one is asked for."""
    if path is not None:
        with path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def ceiling_table(
    first: dict[str, float], last: dict[str, float], limit: dict[str, float], slots: int
) -> str:
    """Text: the speeds the machine reached before and after, and the limit they imply."""
    lines = ["ceiling"]
    for when, reading in (("before", first), ("after", last)):
        gflops = reading["gemm_flops"] / 1e9
        gigabytes = reading["bytes_per_second"] / 1e9
        lines.append(f"{when}: {gflops:.0f} GFLOP/s, {gigabytes:.1f} GB/s")
    allowed = ", ".join(f"{name.replace('_', ' ')} {rate:.0f}" for name, rate in limit.items())
    lines.append(f"limit of new tokens/s with {slots} slots: {allowed}")
    return "\n".join(lines)


def table(task: str, judged: dict[str, dict[str, Any]]) -> str:
    """Text: a table with one line for each contestant."""
    lines = [table_line(task, name, result) for name, result in judged.items()]
    return "\n".join([table_head(task), *lines])


def table_head(task: str) -> str:
    """Text: the columns of a task's table."""
    unit = "new tokens/s" if task in WRITING_TASKS else "rows/s"
    heads = f"{'rows':>6}{'tokens/s':>10}{unit:>14}{'of limit':>10}{'ours is':>10}"
    return f"\n{task:28}{heads}  same answers"


def table_line(task: str, name: str, result: dict[str, Any]) -> str:
    """Text: the line of one contestant."""
    if "not_here" in result:
        return f"{name:28}not available: {result['not_here']}"
    key = "new_tokens_per_second" if task in WRITING_TASKS else "rows_per_second"
    limit = result.get("of_decode_limit", result["of_gemm_limit"])
    share = f"{limit:10.2f}" if limit else f"{'-':>10}"
    rates = f"{result['rows']:6}{result['tokens_per_second']:10.0f}{result[key]:14.2f}"
    times = f"{result['times_ours']:9.2f}x" if "times_ours" in result else f"{'-':>10}"
    facts = [f"{result['same']} of {result['compared']}"]
    if "invalid" in result:
        facts = [f"{result['invalid']} of {result['rows']} documents are invalid"]
    if "largest_score_difference" in result:
        facts.append(f"scores within {result['largest_score_difference']:.1e}")
    if result["peak_gpu_gib"]:
        facts.append(f"{result['peak_gpu_gib']:.1f} GiB of GPU memory in tensors")
    if "busy" in result:
        facts.append(f"{result['card_gib']:.1f} GiB in all")
        facts.append(f"the GPU waits {1 - result['busy']:.0%} of the time")
    return f"{name:28}{rates}{share}{times}  {', '.join(facts)}"
