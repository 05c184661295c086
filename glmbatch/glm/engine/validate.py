"""Answers requests that need no model: they cannot run, or leave nothing to generate.

Such a request gets its own error here; in a forward it would fail the whole batch. No tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)


class ModelLimits(Protocol):
    """What a model can take in. Ids from `token_count` on have scores but no token."""

    has_head: bool
    max_positions: int
    vocab_size: int
    token_count: int


def refuse_classify(request: ClassifyRequest, model: ModelLimits) -> ClassifyResult | None:
    """The result of a request that cannot run, else None.

    InputError when the model can run no such request at all.
    """
    if model.has_head and request.label_ids is not None:
        raise InputError(
            "the checkpoint has a trained head, which has labels of its own; ask without label_ids"
        )
    if not model.has_head and request.label_ids is None:
        raise InputError("the checkpoint has no trained head; ask with label_ids")
    labels = request.label_ids or ()
    # The last token of a label is only scored; those before it take positions.
    positions = max(map(len, labels), default=1) - 1
    fault = _prompt_fault(request.prompt_ids, positions, model)
    if fault is None and request.label_ids is not None:
        fault = _label_fault(labels, model)
    return None if fault is None else ClassifyResult(request.index, (), fault)


def refuse_generate(request: GenerateRequest, model: ModelLimits) -> GenerateResult | None:
    """The result of a request that cannot run or has no room for an answer, else None.

    InputError when the model can run no such request at all.
    """
    if model.has_head:
        raise InputError(
            "the checkpoint has a trained head and cannot generate; "
            "name another model for this step"
        )
    # An answer may be cut off at the last position, so it needs no room of its own here.
    fault = _prompt_fault(request.prompt_ids, 0, model)
    if fault is not None:
        return GenerateResult(request.index, (), "error", fault)
    if request.max_tokens < 1 or len(request.prompt_ids) == model.max_positions:
        return GenerateResult(request.index, (), "length")
    return None


def _prompt_fault(
    prompt_ids: Sequence[int], label_positions: int, model: ModelLimits
) -> str | None:
    tokens = len(prompt_ids)
    if not tokens:
        return "the prompt has no tokens"
    if tokens + label_positions > model.max_positions:
        label = f" and its longest label {label_positions} more" if label_positions else ""
        return (
            f"the prompt has {tokens} tokens{label}; the model has {model.max_positions} positions"
        )
    # Checked on the host: on CUDA an index out of range ends the process's use of the device.
    if not _all_within(prompt_ids, model.vocab_size):
        return f"the prompt has an id that is none of the model's {model.vocab_size}"
    return None


def _label_fault(labels: Sequence[Sequence[int]], model: ModelLimits) -> str | None:
    if not labels or not all(labels):
        return "there is no label, or one without tokens"
    if not _all_within(chain.from_iterable(labels), model.token_count):
        return f"a label has an id that is none of the model's {model.token_count} tokens"
    return None


def _all_within(ids: Iterable[int], end: int) -> bool:
    distinct = set(ids)  # in C: this runs over every token of every prompt
    return min(distinct) >= 0 and max(distinct) < end
