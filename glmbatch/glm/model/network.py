"""The GLM model over packed prompts and over slots: token ids in, the final state of the tokens that are read out.

Knows no requests.

Shapes: T tokens of a packed row, R of them read, S live slots, F places of a prefix, C hidden size, V tokens,
G key/value groups, D head size, N layers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from glmbatch.glm.model.attention import Plan, SlotLoop, SlotPlan, Store
from glmbatch.glm.model.cuda_graphs import StepGraphs
from glmbatch.glm.model.kv_cache import KvPrefix, KvShape, SlotCache, round_up
from glmbatch.glm.model.layer import Layer, Norm, turns
from glmbatch.glm.model.linear import choose_form, product
from glmbatch.glm.model.packing import Segment, pack

logger = logging.getLogger(__name__)

# Prefixes kept for later batches; a step has one, and few steps run at once.
PREFIXES = 8


class Network:
    """A `GlmForCausalLM` or `GlmForSequenceClassification`, taken over: its layers are emptied into ours one by one.

    `has_head`: it classifies with a trained head; otherwise it predicts tokens. `token_count`: ids from there on have
    scores but no token. `quantization`: "int8" or "none"; the layers', for the scores of tokens stay as exact as they
    are.
    """

    def __init__(self, model: Any, token_count: int, quantization: str = "none") -> None:
        config = model.config
        self.has_head = hasattr(model, "score")
        self.token_count = token_count
        self._embed = model.model.embed_tokens
        self.device, self.dtype = self._embed.weight.device, self._embed.weight.dtype
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.kv_shape = KvShape(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            self.device,
        )
        device, dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        form = choose_form(quantization, device, dtype)
        self._inverse_frequencies_P = model.model.rotary_emb.inv_freq.to(self.device, torch.float32)
        self._layers = [Layer(module, form) for module in model.model.layers]
        self._norm = Norm(model.model.norm)
        if self.has_head:
            self._score: Any = model.score
        else:
            self._lm_head = product(
                model.lm_head.weight[:token_count], None, choose_form("none", device, dtype)
            )
            model.lm_head = None
        trained = getattr(model, "prefix_kv", None)
        if trained is not None:
            trained = trained.permute(0, 1, 3, 2, 4).to(self.device, self.dtype).contiguous()
        self._trained_prefix = None if trained is None else KvPrefix(trained, 0)
        self._prefixes: OrderedDict[tuple[int, ...], KvPrefix] = OrderedDict()
        self._graphs = StepGraphs(self._padded_step) if self.device.type == "cuda" else None

    @property
    def trained_places(self) -> int:
        """Places that a trained prefix takes at the head of every slot."""
        return 0 if self._trained_prefix is None else self._trained_prefix.places

    def prefix(self, ids: tuple[int, ...], chunk_tokens: int) -> KvPrefix | None:
        """Keys and values of the trained prefix and of `ids` after it, kept for the next time; None without either."""
        if not ids:
            return self._trained_prefix
        if ids not in self._prefixes:
            self._prefixes[ids] = self.extend(self._trained_prefix, ids, chunk_tokens)
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(ids)
        return self._prefixes[ids]

    def give_back(self) -> None:
        """Free what can be made again: prefixes and recorded steps."""
        self._prefixes.clear()
        if self._graphs is not None:
            self._graphs.forget()

    def extend(self, prefix: KvPrefix | None, ids: Sequence[int], chunk_tokens: int) -> KvPrefix:
        """`prefix` with keys and values of `ids` behind it, read in forwards of at most `chunk_tokens`."""
        assert ids
        for first in range(0, len(ids), chunk_tokens):
            chunk = ids[first : first + chunk_tokens]
            kv_N2FGD = self._keys_and_values(chunk, prefix)
            if prefix is not None:
                kv_N2FGD = torch.cat((prefix.kv_N2FGD, kv_N2FGD), dim=2)
            prefix = KvPrefix(kv_N2FGD, len(chunk) + (prefix.next_position if prefix else 0))
        assert prefix is not None
        return prefix

    def _keys_and_values(self, ids: Sequence[int], prefix: KvPrefix | None) -> torch.Tensor:
        layers: list[torch.Tensor] = []
        self.read(
            [Segment(ids)], prefix, lambda _, key, value: layers.append(torch.stack((key, value)))
        )
        return torch.stack(layers)

    def shorten(
        self, segment: Segment, prefix: KvPrefix | None, chunk_tokens: int
    ) -> tuple[Segment, KvPrefix | None]:
        """`segment` cut to its last `chunk_tokens` at most, behind a prefix that holds what was cut off."""
        ahead = len(segment.ids) - chunk_tokens
        if ahead <= 0:
            return segment, prefix
        return Segment(segment.ids[ahead:], segment.tree), self.extend(
            prefix, segment.ids[:ahead], chunk_tokens
        )

    def read(
        self, segments: Sequence[Segment], prefix: KvPrefix | None, store: Store | None = None
    ) -> torch.Tensor:
        """Final states [R, C]: of the last token of each segment, then of all tree nodes, segment by segment."""
        packed = pack(segments, prefix, store, self.device, self.dtype)
        hidden_TC = self._embed(packed.ids_T[None])[0]
        turns_TP = turns(packed.positions_T, self._inverse_frequencies_P)
        for layer in self._layers[:-1]:
            hidden_TC = layer(hidden_TC, turns_TP, packed.plan)
        return self._norm(self._layers[-1](hidden_TC, turns_TP, packed.last_plan, packed.reads_R))

    def step(self, ids: Sequence[int], positions: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Final states [S, C] of one more token for each of the first S slots."""
        inputs_2S = torch.tensor([ids, positions], device=self.device)
        places = [self.trained_places + position for position in positions]
        if self._graphs is None:
            return self._step(inputs_2S, self._slot_plan(cache, places))
        return self._graphs(inputs_2S, round_up(max(places) + 1), cache)

    @cached_property
    def _slot_plan(self) -> Callable[[SlotCache, Sequence[int]], Plan]:
        """How slots attend outside CUDA graphs: float32 on CPU compiled, where numba is there, otherwise by torch."""
        if self.device.type == "cpu" and self.dtype == torch.float32:
            try:
                from glmbatch.glm.model.slot_kernel import SlotKernel
            except ImportError as error:
                logger.info("attention is not compiled: %s", error)
            else:
                return SlotKernel
        return SlotLoop

    def _padded_step(self, inputs_2S: torch.Tensor, seen: int, cache: SlotCache) -> torch.Tensor:
        return self._step(inputs_2S, SlotPlan(cache, inputs_2S[1] + self.trained_places, seen))

    def _step(self, inputs_2S: torch.Tensor, plan: Plan) -> torch.Tensor:
        hidden_SC: torch.Tensor = self._embed(inputs_2S[0][:, None])[:, 0]
        turns_SP = turns(inputs_2S[1], self._inverse_frequencies_P)
        for layer in self._layers:
            hidden_SC = layer(hidden_SC, turns_SP, plan)
        return self._norm(hidden_SC)

    def token_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] in float32 of the ids that have a token."""
        return self._lm_head(hidden_RC).float()

    def class_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Scores of the trained head's classes, in float32."""
        logits: torch.Tensor = self._score(hidden_RC)
        return logits.float()
