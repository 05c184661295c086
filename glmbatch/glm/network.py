"""The GLM model over packed prompts and over slots: token ids in, the final state of the tokens that are read out.

transformers' own modules do the arithmetic; only the order of the calls is here, so that the last layer can leave out
what nobody reads. Knows no requests.

Shapes: T tokens of a packed row, R of them read, S live slots, F places of a prefix, C hidden size, V tokens,
G key/value groups, D head size, N layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from glmbatch.glm import attention
from glmbatch.glm.attention import Plan, SlotPlan, Store
from glmbatch.glm.kv_cache import KvPrefix, KvShape, SlotCache
from glmbatch.glm.packing import Segment, pack

# Prefixes kept for later batches; a step has one, and few steps run at once.
PREFIXES = 8


class Network:
    """A `GlmForCausalLM` or `GlmForSequenceClassification`, taken over: its attention becomes ours.

    `has_head`: it classifies with a trained head; otherwise it predicts tokens. `token_count`: ids from there on have
    scores but no token.
    """

    def __init__(self, model: Any, token_count: int) -> None:
        model.set_attn_implementation(attention.NAME)
        config = model.config
        self._body = model.model
        self._layers = tuple(model.model.layers)
        self.has_head = hasattr(model, "score")
        self._score: Any = getattr(model, "score", None)
        self._lm_head: Any = getattr(model, "lm_head", None)
        self.token_count = token_count
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.kv_shape = KvShape(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.dtype, self.device
        )
        trained = getattr(model, "prefix_kv", None)
        self._trained_prefix = None if trained is None else KvPrefix(trained.to(self.device, self.dtype), 0)
        self._prefixes: OrderedDict[tuple[int, ...], KvPrefix] = OrderedDict()

    @property
    def trained_places(self) -> int:
        """Places that a trained prefix takes at the head of every slot."""
        return 0 if self._trained_prefix is None else self._trained_prefix.places

    def prefix(self, ids: tuple[int, ...]) -> KvPrefix | None:
        """Keys and values of the trained prefix and of `ids` after it, kept for the next time; None without either."""
        if not ids:
            return self._trained_prefix
        if ids not in self._prefixes:
            self._prefixes[ids] = self._read_prefix(ids)
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(ids)
        return self._prefixes[ids]

    def forget_prefixes(self) -> None:
        self._prefixes.clear()

    def _read_prefix(self, ids: tuple[int, ...]) -> KvPrefix:
        layers: list[torch.Tensor] = []
        self.read([Segment(ids)], self._trained_prefix, lambda _, k, v: layers.append(torch.cat((k, v))))
        kv_N2GFD = torch.stack(layers)
        if self._trained_prefix is not None:
            kv_N2GFD = torch.cat((self._trained_prefix.kv_N2GFD, kv_N2GFD), dim=3)
        return KvPrefix(kv_N2GFD, len(ids))

    def read(self, segments: Sequence[Segment], prefix: KvPrefix | None, store: Store | None = None) -> torch.Tensor:
        """Final states [R, C]: of the last token of each segment, then of all tree nodes, segment by segment."""
        packed = pack(segments, prefix, store, self.device, self.dtype)
        hidden_1TC = self._body.embed_tokens(packed.ids_T[None])
        rope = self._body.rotary_emb(hidden_1TC, position_ids=packed.positions_T[None])
        for layer in self._layers[:-1]:
            hidden_1TC = layer(hidden_1TC, position_embeddings=rope, plan=packed.plan)
        hidden_1RC = _last_layer(self._layers[-1], hidden_1TC, rope, packed.last_plan, packed.reads_R)
        final_1RC: torch.Tensor = self._body.norm(hidden_1RC)
        return final_1RC[0]

    def step(self, ids: Sequence[int], positions: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Final states [S, C] of one more token for each of the first S slots."""
        ids_2S1 = torch.tensor([ids, positions], device=self.device)[:, :, None]
        plan = SlotPlan(cache, [self.trained_places + position for position in positions])
        hidden_S1C = self._body.embed_tokens(ids_2S1[0])
        rope = self._body.rotary_emb(hidden_S1C, position_ids=ids_2S1[1])
        for layer in self._layers:
            hidden_S1C = layer(hidden_S1C, position_embeddings=rope, plan=plan)
        final_S1C: torch.Tensor = self._body.norm(hidden_S1C)
        return final_S1C[:, 0]

    def token_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] in float32 of the ids that have a token."""
        logits_RV: torch.Tensor = self._lm_head(hidden_RC)
        return logits_RV[:, : self.token_count].float()

    def class_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Scores of the trained head's classes, in float32."""
        logits: torch.Tensor = self._score(hidden_RC)
        return logits.float()


def _last_layer(
    layer: Any,
    hidden_1TC: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    reads_R: torch.Tensor,
) -> torch.Tensor:
    """The layer's answer for the tokens that are read; the others only lend it their keys and values.

    Saves their query, output and MLP products: 3.6 % of a ChatGLM2-6B forward.
    """
    attn = layer.self_attn
    normed_1TC = layer.input_layernorm(hidden_1TC)
    query = _heads(attn.q_proj(normed_1TC[:, reads_R]), attn.head_dim)
    key = _heads(attn.k_proj(normed_1TC), attn.head_dim)
    value = _heads(attn.v_proj(normed_1TC), attn.head_dim)
    cos, sin = rope
    query = _rotate(query, cos[:, reads_R], sin[:, reads_R])
    key = _rotate(key, cos, sin)
    attended = plan.attend(attn.layer_idx, query, key, value, attn.scaling)
    hidden_1RC: torch.Tensor = hidden_1TC[:, reads_R] + attn.o_proj(attended.flatten(2))
    out_1RC: torch.Tensor = hidden_1RC + layer.mlp(layer.post_attention_layernorm(hidden_1RC))
    return out_1RC


def _heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    return projected.view(*projected.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated: torch.Tensor = apply_rotary_pos_emb(heads, heads[:, :1], cos, sin)[0]  # type: ignore[no-untyped-call]
    return rotated
