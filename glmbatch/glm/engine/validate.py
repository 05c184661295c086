"""What can be answered without the model: requests that cannot run, or that leave nothing to write. No tensors.

Such a request gets its error alone; in a forward it would take its batch-mates down with it.
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


class Model(Protocol):
    """What a model can take in."""

    has_head: bool
    max_positions: int
    vocab_size: int
    token_count: int


def refuse_classify(request: ClassifyRequest, model: Model) -> ClassifyResult | None:
    """The result of a request that cannot run; InputError when none of its kind can."""
    if model.has_head and request.label_ids is not None:
        raise InputError(
            "the checkpoint has a trained head, which has labels of its own; ask without label_ids"
        )
    if not model.has_head and request.label_ids is None:
        raise InputError("the checkpoint has no trained head; ask with label_ids")
    labels = request.label_ids or ()
    # A label's last token is only scored; the others take positions.
    fault = _prompt_fault(request.prompt_ids, max(map(len, labels), default=1) - 1, model)
    if fault is None and request.label_ids is not None:
        fault = _label_fault(labels, model)
    return None if fault is None else ClassifyResult(request.index, (), fault)


def refuse_generate(request: GenerateRequest, model: Model) -> GenerateResult | None:
    """The result of a request that cannot run, or for which nothing can be written."""
    if model.has_head:
        raise InputError(
            "the checkpoint has a trained head and cannot generate; name another model for this step"
        )
    fault = _prompt_fault(request.prompt_ids, 0, model)
    if fault is not None:
        return GenerateResult(request.index, (), "error", fault)
    if request.max_tokens < 1 or len(request.prompt_ids) == model.max_positions:
        return GenerateResult(request.index, (), "length")
    return None


def _prompt_fault(prompt_ids: Sequence[int], more: int, model: Model) -> str | None:
    if not len(prompt_ids):
        return "the prompt has no tokens"
    if len(prompt_ids) + more > model.max_positions:
        and_label = f" and its longest label {more} more" if more else ""
        return f"the prompt has {len(prompt_ids)} tokens{and_label}; the model has {model.max_positions} positions"
    if not _all_within(prompt_ids, model.vocab_size):
        return f"the prompt has an id that is none of the model's {model.vocab_size}"
    return None


def _label_fault(labels: Sequence[Sequence[int]], model: Model) -> str | None:
    if not labels or not all(labels):
        return "there is no label, or one without tokens"
    if not _all_within(chain.from_iterable(labels), model.token_count):
        return f"a label has an id that is none of the model's {model.token_count} tokens"
    return None


def _all_within(ids: Iterable[int], end: int) -> bool:
    distinct = set(ids)
    return min(distinct) >= 0 and max(distinct) < end
