"""The GLM model: prefill of packed batches and decode steps over slots, then logits.

Token ids in, final states and logits out. Knows no requests.

Shapes: T tokens of a packed batch, R of them read, S live slots, F places of a prefix, C hidden
size, V tokens, G key/value groups, D head size, P rotated pairs, N layers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from glmbatch.glm.model.attention import AttentionPlan, SlotLoop, SlotPlan, Store
from glmbatch.glm.model.cuda_graphs import StepGraphs
from glmbatch.glm.model.kv_cache import KvPrefix, KvShape, SlotCache, round_up
from glmbatch.glm.model.layer import Layer, Norm, rotary_factors
from glmbatch.glm.model.linear import choose_form, product
from glmbatch.glm.model.packing import PackedPrompt, pack

logger = logging.getLogger(__name__)

# Prefixes cached for later batches: a step has one, and few steps run at once.
PREFIXES = 8


class Network:
    """Runs a `GlmForCausalLM` or `GlmForSequenceClassification`, whose weights it takes over.

    With `has_head` it classifies by a trained head, otherwise it predicts tokens. Ids from
    `token_count` on are padding of the vocabulary. `quantization` is "int8" or "none"; it applies
    to the layers, not to the language head. Raises InputError if the device does not support it.
    """

    def __init__(self, model: Any, token_count: int, quantization: str = "none") -> None:
        config = model.config
        self.has_head = hasattr(model, "score")
        self.token_count = token_count
        self._embed = model.model.embed_tokens
        self.device: torch.device = self._embed.weight.device
        self.dtype: torch.dtype = self._embed.weight.dtype
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.kv_shape = KvShape(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            self.device,
        )
        device = str(self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        form = choose_form(quantization, device, self.dtype_name)
        # Always float32: in half precision, angles far into a text would be off by whole radians.
        self._inverse_frequencies_P = model.model.rotary_emb.inv_freq.to(self.device, torch.float32)
        self._layers = [Layer(module, form) for module in model.model.layers]
        self._norm = Norm(model.model.norm)
        if self.has_head:
            self._score: Any = model.score
        else:
            exact = choose_form("none", device, self.dtype_name)
            # With the rows of padding ids, because a GPU's fast kernels need rows of the result
            # that are a multiple of 16 bytes.
            self._lm_head = product(model.lm_head.weight, None, exact)
            model.lm_head = None  # the product may have a copy of its own
        self._trained_prefix = self._take_prefix(model)
        self._prefixes: OrderedDict[tuple[int, ...], KvPrefix] = OrderedDict()
        self._graphs = StepGraphs(self._padded_step) if self.device.type == "cuda" else None

    def _take_prefix(self, model: Any) -> KvPrefix | None:
        """The model's P-Tuning prefix, or None."""
        prefix_N2GFD = getattr(model, "prefix_kv", None)
        if prefix_N2GFD is None:
            return None
        kv_N2FGD = prefix_N2GFD.permute(0, 1, 3, 2, 4).to(self.device, self.dtype).contiguous()
        return KvPrefix(kv_N2FGD, next_position=0)

    @property
    def trained_places(self) -> int:
        """Number of places that the trained prefix takes at the start of every slot; 0 without."""
        return 0 if self._trained_prefix is None else self._trained_prefix.places

    def cached_prefix(self, ids: tuple[int, ...], chunk_tokens: int) -> KvPrefix | None:
        """Keys and values of the trained prefix and of `ids` after it; None without either.

        Computed on first use, in chunks of at most `chunk_tokens`; the PREFIXES used last are kept.
        """
        if not ids:
            return self._trained_prefix
        if ids not in self._prefixes:
            self._prefixes[ids] = self._extend_prefix(self._trained_prefix, ids, chunk_tokens)
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(ids)  # the least recently used one is dropped first
        return self._prefixes[ids]

    def release_memory(self) -> None:
        """Free cached prefixes and CUDA graphs, which are recomputed when needed."""
        self._prefixes.clear()
        if self._graphs is not None:
            self._graphs.clear()

    def _extend_prefix(
        self, prefix: KvPrefix | None, ids: Sequence[int], chunk_tokens: int
    ) -> KvPrefix:
        """`prefix` extended by the keys and values of `ids`."""
        assert ids
        # Each chunk attends to the earlier ones as part of its prefix.
        for first in range(0, len(ids), chunk_tokens):
            chunk = ids[first : first + chunk_tokens]
            kv_N2FGD = self._keys_and_values(chunk, prefix)
            next_position = len(chunk)
            if prefix is not None:
                kv_N2FGD = torch.cat((prefix.kv_N2FGD, kv_N2FGD), dim=2)
                next_position += prefix.next_position
            prefix = KvPrefix(kv_N2FGD, next_position)
        assert prefix is not None
        return prefix

    def _keys_and_values(self, ids: Sequence[int], prefix: KvPrefix | None) -> torch.Tensor:
        """Keys and values [N, 2, F, G, D] of `ids` after `prefix`."""
        layers: list[torch.Tensor] = []

        def store(layer: int, key_FGD: torch.Tensor, value_FGD: torch.Tensor) -> None:
            layers.append(torch.stack((key_FGD, value_FGD)))

        self.prefill([PackedPrompt(ids)], prefix, store)
        return torch.stack(layers)

    def prefill_ahead(
        self, prompt: PackedPrompt, prefix: KvPrefix | None, chunk_tokens: int
    ) -> tuple[PackedPrompt, KvPrefix | None]:
        """Prefill all but the last `chunk_tokens` tokens of `prompt`, in chunks.

        Returns the rest of the prompt, and `prefix` extended by the tokens that were prefilled.
        """
        ahead = len(prompt.ids) - chunk_tokens
        if ahead <= 0:
            return prompt, prefix
        longer = self._extend_prefix(prefix, prompt.ids[:ahead], chunk_tokens)
        return PackedPrompt(prompt.ids[ahead:], prompt.tree), longer

    def prefill(
        self, prompts: Sequence[PackedPrompt], prefix: KvPrefix | None, store: Store | None = None
    ) -> torch.Tensor:
        """Run one forward over `prompts`, each after `prefix`, as a packed batch.

        Returns final states [R, C]: of the last token of each prompt, then of all nodes of the
        label trees, prompt by prompt. `store` is called with the keys and values of every layer.
        """
        batch = pack(prompts, prefix, store, self.device, self.dtype)
        hidden_TC = self._embed(batch.ids_T[None])[0]
        rotary_TP = rotary_factors(batch.positions_T, self._inverse_frequencies_P)
        for layer in self._layers[:-1]:
            hidden_TC = layer(hidden_TC, rotary_TP, batch.plan)
        # The last layer needs the keys and values of all tokens, but the states of few.
        hidden_RC = self._layers[-1](hidden_TC, rotary_TP, batch.last_plan, batch.reads_R)
        return self._norm(hidden_RC)

    def decode(
        self, ids: Sequence[int], positions: Sequence[int], cache: SlotCache
    ) -> torch.Tensor:
        """Run one decode step: returns final states [S, C] of one new token in each of S slots.

        `ids` are the last tokens of the sequences in the first S slots of `cache`, and `positions`
        their positions. Their keys and values are stored in the cache.
        """
        inputs_2S = torch.tensor([ids, positions], device=self.device)
        # A trained prefix fills the first places of a slot but has no positions.
        places = [self.trained_places + position for position in positions]
        if self._graphs is None:
            return self._step(inputs_2S, self._slot_plan(cache, places))
        return self._graphs(inputs_2S, round_up(max(places) + 1), cache)

    @cached_property
    def _slot_plan(self) -> Callable[[SlotCache, Sequence[int]], AttentionPlan]:
        """The attention of decode steps without CUDA graphs: `SlotKernel` if it can run here."""
        if self.device.type == "cpu" and self.dtype == torch.float32:
            try:
                from glmbatch.glm.model.slot_kernel import SlotKernel
            except ImportError as error:
                logger.info("decode steps use torch's attention: %s", error)
            else:
                return SlotKernel
        return SlotLoop

    def _padded_step(self, inputs_2S: torch.Tensor, places: int, cache: SlotCache) -> torch.Tensor:
        return self._step(inputs_2S, SlotPlan(cache, inputs_2S[1] + self.trained_places, places))

    def _step(self, inputs_2S: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        hidden_SC: torch.Tensor = self._embed(inputs_2S[0][:, None])[:, 0]
        rotary_SP = rotary_factors(inputs_2S[1], self._inverse_frequencies_P)
        for layer in self._layers:
            hidden_SC = layer(hidden_SC, rotary_SP, plan)
        return self._norm(hidden_SC)

    def token_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in float32 of the `token_count` ids that are tokens."""
        # Padding ids are cut off, so that they can never be chosen.
        return self._lm_head(hidden_RC)[:, : self.token_count].float()

    def class_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Logits [R, labels] of the trained head in float32."""
        logits: torch.Tensor = self._score(hidden_RC)
        return logits.float()
