"""Validates requests: answers those that cannot run, or have nothing to generate, at once.

An invalid request gets an error of its own; in a forward it would fail the whole batch. No tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import (
    AnswerForm,
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)


class ModelLimits(Protocol):
    """The limits of a model. Ids from `token_count` up to `vocab_size` are padding, not tokens."""

    has_head: bool
    max_positions: int
    vocab_size: int
    token_count: int


def sort_out(request: Any, model: ModelLimits) -> tuple[Any | None, list[Any]]:
    """What of a request can run, None if nothing can, and the results of the rest.

    A request that is invalid or leaves no room for an answer cannot run. Raises InputError if the
    model cannot run such requests at all.
    """
    refuse: Any = _refuse_generate if isinstance(request, GenerateRequest) else _refuse_classify
    valid = []
    refused = []
    for question in (request, *request.beside):
        refusal = refuse(question, model)
        if refusal is None:
            valid.append(question)
        else:
            refused.append(refusal)
    if not refused:
        return request, []
    return (replace(valid[0], beside=tuple(valid[1:])) if valid else None), refused


def _refuse_classify(request: ClassifyRequest, model: ModelLimits) -> ClassifyResult | None:
    if model.has_head and request.label_ids is not None:
        raise InputError(
            "the checkpoint has a trained head with its own labels. Leave label_ids out."
        )
    if not model.has_head and request.label_ids is None:
        raise InputError("the checkpoint has no trained head. Set label_ids.")
    labels = request.label_ids or ()
    # The last token of a label is only scored; the ones before it take positions.
    positions = max(map(len, labels), default=1) - 1
    fault = _prompt_fault(request.prompt_ids, positions, model)
    if fault is None and request.label_ids is not None:
        fault = _label_fault(labels, model)
    return None if fault is None else ClassifyResult(request.index, (), fault)


def _refuse_generate(request: GenerateRequest, model: ModelLimits) -> GenerateResult | None:
    if model.has_head:
        raise InputError(
            "the checkpoint has a trained head and cannot generate. "
            "Set another model for this step."
        )
    # No positions for the answer: it may be cut off at the model's last position.
    fault = _prompt_fault(request.prompt_ids, 0, model)
    if fault is None and request.form is not None:
        fault = _form_fault(request, request.form, model)
    if fault is not None:
        return GenerateResult(request.index, (), "error", fault)
    if request.max_tokens < 1 or len(request.prompt_ids) == model.max_positions:
        return GenerateResult(request.index, (), "length")
    return None


def _form_fault(request: GenerateRequest, form: AnswerForm, model: ModelLimits) -> str | None:
    # A form has no end before its last character, so all of it must have positions.
    tokens = len(request.prompt_ids)
    if tokens + form.longest <= model.max_positions:
        return None
    return (
        f"the prompt has {tokens} tokens and its answer up to {form.longest}; the model has "
        f"{model.max_positions} positions"
    )


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
    # Checked on the host: an index out of range on CUDA makes the device unusable for the process.
    if not _all_within(prompt_ids, model.vocab_size):
        return f"the prompt has an id outside the model's vocabulary of {model.vocab_size}"
    return None


def _label_fault(labels: Sequence[Sequence[int]], model: ModelLimits) -> str | None:
    if not labels or not all(labels):
        return "there is no label, or a label has no tokens"
    if not _all_within(chain.from_iterable(labels), model.token_count):
        return f"a label has an id outside the model's {model.token_count} tokens"
    return None


def _all_within(ids: Iterable[int], end: int) -> bool:
    distinct = set(ids)  # runs in C, since it sees every token of every prompt
    return min(distinct) >= 0 and max(distinct) < end
