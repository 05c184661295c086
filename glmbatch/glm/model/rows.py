"""Plans one forward over rows of an arena: decode steps, and pieces of prompts, in one batch.

Shapes: T tokens of the batch, R rows, S rows of one new token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from glmbatch.glm.model import flash
from glmbatch.glm.model.arena import Arena, ArenaKeys
from glmbatch.glm.model.attention import AttentionPlan, CausalSpans, ForwardPlan, Span, SpanPlan
from glmbatch.glm.model.flash import FlashCall, FlashPlan, SingleQueries, single_queries

logger = logging.getLogger(__name__)

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a forward: `counts[r]` new tokens are the last of the `used[r]` places of row r.

    `starts[r]` is the row's first place. The first `single` rows have one new token each.
    """

    starts: Sequence[int]
    used: Sequence[int]
    counts: Sequence[int]
    single: int


def plan_rows(arena: Arena, rows: Rows, trained_places: int) -> ForwardPlan:
    """The forward over `rows`, which reads the last token of each.

    The first `trained_places` places of a row have no positions.
    """
    device = arena.kv_N2GPD.device
    starts_R, used_R, counts_R = (
        np.array(numbers, np.int64) for numbers in (rows.starts, rows.used, rows.counts)
    )
    ends_R = counts_R.cumsum()
    tokens = int(ends_R[-1])
    # The place of each token within its row.
    row_places_T = np.arange(tokens) + np.repeat(used_R - ends_R, counts_R)
    places_T, positions_T, reads_R, *bounds = to_device(
        device,
        row_places_T + np.repeat(starts_R, counts_R),
        row_places_T - trained_places,
        ends_R - 1,
        np.append(0, ends_R),
        np.append(starts_R, 0),
        used_R,
        np.arange(len(starts_R) + 1),
    )
    store = ArenaKeys(arena, places_T)
    plan: AttentionPlan
    last_plan: AttentionPlan
    if flash.serves(device, arena.kv_N2GPD.dtype):
        plan, last_plan = _flash_plans(store, rows, bounds)
    else:
        plan, last_plan = _span_plans(store, rows, starts_R, used_R)
    return ForwardPlan(positions_T, reads_R, plan, last_plan)


def _flash_plans(
    store: ArenaKeys, rows: Rows, bounds: Sequence[torch.Tensor]
) -> tuple[FlashPlan, FlashPlan]:
    ends_R1, starts_R1, used_R, one_each_R1 = (numbers.int() for numbers in bounds)
    single, max_used = rows.single, max(rows.used)
    calls: list[tuple[slice, FlashCall | SingleQueries]] = []
    if single:
        to = single + 1
        decoded = single_queries(one_each_R1[:to], starts_R1[:to], used_R[:single], max_used)
        calls.append((slice(0, single), decoded))
    if single < len(rows.used):
        ends = ends_R1[single:] - single
        max_count = max(rows.counts[single:])
        call = FlashCall(ends, starts_R1[single:], used_R[single:], max_count, max_used, True)
        calls.append((slice(single, None), call))
    last = single_queries(one_each_R1, starts_R1, used_R, max_used)
    return FlashPlan(store, calls), FlashPlan(store, [(slice(None), last)])


def _span_plans(
    store: ArenaKeys, rows: Rows, starts_R: IntArray, used_R: IntArray
) -> tuple[AttentionPlan, AttentionPlan]:
    kv = store.arena.kv_N2GPD
    kernel = _kernel_plan() if kv.device.type == "cpu" and kv.dtype == torch.float32 else None
    causal = CausalSpans(max(rows.used), kv.dtype, kv.device)
    spans: list[Span] = []
    last_spans: list[Span] = []
    first = 0
    for row, (start, used, count) in enumerate(
        zip(rows.starts, rows.used, rows.counts, strict=True)
    ):
        if row >= rows.single or kernel is None:
            spans += causal.spans(first, count, start, used)
        if kernel is None:
            last_spans += causal.spans(row, 1, start, used)
        first += count
    if kernel is None:
        return SpanPlan(store, spans), SpanPlan(store, last_spans)
    last_plan = kernel(store, starts_R, used_R, [])
    if not rows.single:
        return SpanPlan(store, spans), last_plan
    single = slice(0, rows.single)
    return kernel(store, starts_R[single], used_R[single], spans), last_plan


@cache
def _kernel_plan() -> Any:
    """`KernelPlan`, or None without numba."""
    try:
        from glmbatch.glm.model.decode_kernel import KernelPlan
    except ImportError as error:
        logger.info("decode steps use torch's attention: %s", error)
        return None
    return KernelPlan


def to_device(device: torch.device, *arrays: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    """The `arrays`, all of one dtype, as tensors on `device`, with one copy for all of them."""
    host = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        # From pinned memory, so that the host does not wait for the device.
        host = host.pin_memory().to(device, non_blocking=True)
    parts = torch.split(host, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
