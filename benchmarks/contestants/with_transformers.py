"""Contestant: transformers in several variants. All others must agree with its row-by-row loop."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from models import load_model
from protocol import Run, serve

PAD = 0
BLOCK_TOKENS = 256  # default block of the cache in continuous batching
generation: Any = transformers.generation
pipelines: Any = transformers.pipelines


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    ways: dict[str, Callable[..., Run]] = {
        "classify row-by-row": _classify_row_by_row,
        "classify pipeline": _pipeline,
        "classify pipeline-sorted": _pipeline,
        "labels row-by-row": _pairs,
        "one-token row-by-row": _pairs,
        "questions row-by-row": _pairs,
        "labels pairs": _pairs,
        "labels pairs-sorted": _pairs,
        "generate row-by-row": _static,
        "generate static": _static,
        "generate static-sorted": _static,
        "generate continuous": _continuous,
    }
    run = ways[f"{options.task} {options.way}"](load_model(options, work), work, options)
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}",
        torch.inference_mode()(run),
    )


def _classify_row_by_row(model: Any, work: dict[str, Any], options: argparse.Namespace) -> Run:
    def run() -> list[list[float]]:
        answers = []
        for row in work["rows"]:
            ids = torch.tensor([row], device=model.device)
            answers.append(model(ids, use_cache=False).logits[0].tolist())
        return answers

    return run


class _Ids:
    """Replaces the tokenizer: accepts token ids and provides the settings for padding."""

    pad_token_id = PAD
    padding_side = "right"

    def __call__(self, input_ids: list[int], return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([input_ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pipeline(model: Any, work: dict[str, Any], options: argparse.Namespace) -> Run:
    """`TextClassificationPipeline` itself, with padded batches in the given order."""
    pipe: Any = pipelines.TextClassificationPipeline(
        model=model, tokenizer=_Ids(), device=options.device
    )
    rows = work["rows"]
    order = _order(list(map(len, rows)), options.way)

    def run() -> list[list[float]]:
        inputs = [{"input_ids": rows[at]} for at in order]
        results = pipe(inputs, batch_size=work["batch"], top_k=None, function_to_apply="none")
        answers = []
        for scores in results:
            # The pipeline returns the best label first. Answers are compared in label order.
            by_label = sorted(scores, key=lambda score: str(score["label"]))
            answers.append([score["score"] for score in by_label])
        return _back(answers, order)

    return run


def _pairs(model: Any, work: dict[str, Any], options: argparse.Namespace) -> Run:
    """Every (row, label) pair as a row of its own, in padded batches or one at a time."""
    labels: list[list[int]] = work["labels"]
    pairs = list(itertools.product(work["rows"], labels))
    order = _order([len(row) + len(label) for row, label in pairs], options.way)
    batch = 1 if options.way == "row-by-row" else work["batch"]

    def score(asked: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        ids, mask = _padded([[*row, *label] for row, label in asked], "right", model.device)
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        scores = []
        for at, (row, label) in enumerate(asked):
            # The logits at a position score the token after it.
            read = logits[at, len(row) - 1 : len(row) + len(label) - 1]
            chosen = torch.tensor(label, device=model.device)[:, None]
            scores.append(float(read.float().log_softmax(-1).gather(1, chosen).sum()))
        return scores

    def run() -> list[list[float]]:
        scores: list[float] = []
        for part in _batches(order, batch):
            scores += score([pairs[at] for at in part])
        flat = _back(scores, order)
        return [flat[at : at + len(labels)] for at in range(0, len(flat), len(labels))]

    return run


def _static(model: Any, work: dict[str, Any], options: argparse.Namespace) -> Run:
    """`generate` on left-padded batches, each until its longest answer ends, or row by row."""
    rows = work["rows"]
    lengths = work["answer_tokens"]
    order = _order(list(map(len, rows)), options.way)
    batch = 1 if options.way == "row-by-row" else work["slots"]
    model.generation_config = generation.GenerationConfig(do_sample=False, pad_token_id=PAD)

    def generate(part: Sequence[int]) -> list[list[int]]:
        ids, mask = _padded([rows[at] for at in part], "left", model.device)
        longest = max(lengths[at] for at in part)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=longest)
        answers = written[:, ids.shape[1] :].tolist()  # without the prompts
        return [answer[: lengths[at]] for at, answer in zip(part, answers, strict=True)]

    def run() -> list[list[int]]:
        answers: list[list[int]] = []
        for part in _batches(order, batch):
            answers += generate(part)
        return _back(answers, order)

    return run


def _continuous(model: Any, work: dict[str, Any], options: argparse.Namespace) -> Run:
    """transformers' own continuous batching. Its manager stays up between rounds."""
    rows = work["rows"]
    lengths = work["answer_tokens"]
    slots = work["slots"]
    model.set_attn_implementation("sdpa")
    longest = max(len(row) + length for row, length in zip(rows, lengths, strict=True))
    blocks = -(-longest // BLOCK_TOKENS)  # rounded up
    manager = model.init_continuous_batching(
        generation.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD),
        generation.ContinuousBatchingConfig(
            num_blocks=(blocks + 1) * slots,
            max_batch_tokens=work["batch_tokens"] or 2048,
            max_requests_per_batch=slots,
            # Otherwise each round would find the previous round's rows in the cache.
            allow_block_sharing=work["prefix_tokens"] > 0,
        ),
    )
    manager.warmup()
    manager.start()
    rounds = itertools.count()

    def run() -> list[list[int]]:
        this = next(rounds)  # request ids must not repeat
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            manager.add_request(
                row, request_id=f"{this} {at}", max_new_tokens=length, eos_token_id=-1
            )
        answers: dict[str, list[int]] = {}
        while len(answers) < len(rows):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[f"{this} {at}"] for at in range(len(rows))]

    return run


def _order(lengths: list[int], way: str) -> list[int]:
    order = list(range(len(lengths)))
    return sorted(order, key=lengths.__getitem__) if way.endswith("-sorted") else order


def _back(answers: list[Any], order: list[int]) -> list[Any]:
    """`answers`, which are in `order`, rearranged to row order."""
    placed = dict(zip(order, answers, strict=True))
    return [placed[at] for at in range(len(answers))]


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def _padded(
    rows: list[list[int]], side: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[at, place] = torch.tensor(row)
        mask[at, place] = 1
    return ids.to(device), mask.to(device)


if __name__ == "__main__":
    serve(load)
