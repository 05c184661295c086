"""Small GLM models of random weights, an engine over them, and plain loops to compare it with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, GlmForSequenceClassification

from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine

EOS = 2
VOCAB = 160
TOKENS = 150  # the ids above are padding
# The embedding of this id is nan: a prompt with it has no finite score. It is never generated.
NOT_A_NUMBER = 155
POSITIONS = 256

Labels = tuple[tuple[int, ...], ...]


def config(**changes: Any) -> GlmConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    return GlmConfig(**settings | changes)


def causal_model(prefix_places: int = 0) -> Any:
    """A language model with weights large enough that different prompts get different answers."""
    return _filled(GlmForCausalLM(config()), prefix_places)


def head_model(prefix_places: int = 0, labels: int = 3) -> Any:
    """A classifier whose head has a bias."""
    settings = config(num_labels=labels)
    model: Any = GlmForSequenceClassification(settings)  # type: ignore[no-untyped-call]
    model.score = torch.nn.Linear(64, labels)
    return _filled(model, prefix_places)


def _filled(model: Any, prefix_places: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.09)
            elif (parameter != 1).any():  # norms are ones
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.model.embed_tokens.weight[NOT_A_NUMBER] = torch.nan
    model.prefix_kv = (
        torch.randn(3, 2, 2, prefix_places, 16, generator=generator) if prefix_places else None
    )
    return model.eval().requires_grad_(False)


@contextmanager
def engine_over(model: Any, **limits: Any) -> Iterator[TorchEngine]:
    """An engine over a copy of `model`, closed at the end."""
    engine = TorchEngine(copy.deepcopy(model), eos_id=EOS, token_count=TOKENS, **limits)
    try:
        yield engine
    finally:
        engine.close()


def classified(engine: Any, requests: Sequence[ClassifyRequest]) -> dict[int, ClassifyResult]:
    """The result of each request and of those beside it, by index."""
    results = {result.index: result for result in engine.classify(requests)}
    assert len(results) == sum(1 + len(request.beside) for request in requests)
    return results


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` ids, none of them EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, TOKENS, (length,), generator=generator).tolist() for length in lengths]


def cache_argument(model: Any) -> str:
    """The name of the argument with which the model's forward takes a filled cache.

    transformers 5.24 renamed it and warns about the old name. A later version would ignore the old
    name, as it does any unknown one, and with it the prefix.
    """
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def behind_prefix(model: Any, length: int) -> dict[str, Any]:
    """Arguments of a forward over `length` tokens of one sequence after the model's prefix.

    As the published code runs a prefix: a filled cache, and positions of the text from 0.
    """
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(model.prefix_kv):
        cache.update(key[None], value[None], layer)
    places = model.prefix_kv.shape[3] + length
    return {
        cache_argument(model): cache,
        "attention_mask": torch.ones(1, places, dtype=torch.long),
        "position_ids": torch.arange(length)[None],
    }


@torch.no_grad()
def whole_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits of one sequence from the model's own forward, after its prefix if it has one."""
    has_prefix = getattr(model, "prefix_kv", None) is not None
    settings = behind_prefix(model, len(ids)) if has_prefix else {}
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), **settings).logits[0]
    return logits


@torch.inference_mode()
def plain_states(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Final states of one sequence from one call of the model's own forward."""
    settings: dict[str, Any] = {"use_cache": False}
    if model.prefix_kv is not None:
        settings = behind_prefix(model, len(ids))
    output = model.model(input_ids=torch.tensor([list(ids)]), **settings)
    states: torch.Tensor = output.last_hidden_state[0]
    return states


@torch.inference_mode()
def plain_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(plain_states(model, ids))
    return logits[:, :TOKENS]


def plain_greedy(model: Any, ids: Sequence[int], max_tokens: int) -> tuple[tuple[int, ...], str]:
    """Greedy generation with a forward over the whole sequence for each token."""
    written: list[int] = []
    while len(written) < max_tokens and len(ids) + len(written) < POSITIONS:
        token = int(plain_logits(model, [*ids, *written])[-1].argmax())
        if token == EOS:
            return tuple(written), "stop"
        written.append(token)
    return tuple(written), "length"


def plain_label_score(model: Any, ids: Sequence[int], label: Sequence[int]) -> float:
    """Log-likelihood of one label, from one forward over prompt and label."""
    log_probs = plain_logits(model, [*ids, *label]).log_softmax(-1)
    return sum(float(log_probs[len(ids) - 1 + at, token]) for at, token in enumerate(label))


@torch.inference_mode()
def plain_class_logits(model: Any, ids: Sequence[int]) -> list[float]:
    scores: list[float] = model.score(plain_states(model, ids)[-1]).tolist()
    return scores
