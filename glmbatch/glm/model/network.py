"""The GLM model: one forward over a packed batch, or over rows of an arena; then logits.

Token ids in, final states and logits out. Knows no requests.

Shapes: T tokens of a batch, R rows, K read tokens, F places of a prefix, C hidden size, V tokens, G
key/value groups, D head size, P rotated pairs, N layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from glmbatch.glm.model.arena import Arena, ArenaKeys, KvPrefix, KvShape
from glmbatch.glm.model.attention import ForwardPlan
from glmbatch.glm.model.cuda_graphs import StepGraphs
from glmbatch.glm.model.flash import FlashPlan, serves, single_queries
from glmbatch.glm.model.layer import Layer, Norm, inverse_frequencies, rotary_factors
from glmbatch.glm.model.linear.form import choose_form, product
from glmbatch.glm.model.packing import PackedPrompt, pack
from glmbatch.glm.model.rows import Rows, plan_rows

# Prefixes cached for later batches: a step has one, and few steps run at once.
PREFIXES = 8


class Network:
    """Runs a GLM model, whose weights it takes over.

    `model` comes from `load_weights`, or is a `GlmForCausalLM` or `GlmForSequenceClassification`.
    With `has_head` it classifies by a trained head, otherwise it predicts tokens. Ids from
    `token_count` on are padding of the vocabulary. `quantization` is "int8", "fp8" or "none"; it
    applies to the layers, not to the language head. Raises InputError if the device does not
    support it.
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
            # On CPU, the kernel of decode steps reads float32.
            torch.float32 if self.device.type == "cpu" else self.dtype,
            self.device,
        )
        device = str(self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        form = choose_form(quantization, device, self.dtype_name)
        # Always float32: in half precision, angles far into a text would be off by whole radians.
        self._inverse_frequencies_P = inverse_frequencies(config).to(self.device)
        self._layers = [
            Layer(model.model.layers.get_submodule(str(index)), index, config, form)
            for index in range(config.num_hidden_layers)
        ]
        self._norm = Norm(model.model.norm, config)
        if self.has_head:
            score = model.score
            self._head_dtype: torch.dtype = score.weight.dtype  # float32 in a model of any dtype
            exact = choose_form("none", device, str(self._head_dtype).removeprefix("torch."))
            self._score = product(score.weight, score.bias, exact)
        else:
            exact = choose_form("none", device, self.dtype_name)
            # With the rows of padding ids, because a GPU's fast kernels need rows of the result
            # that are a multiple of 16 bytes.
            self._lm_head = product(model.lm_head.weight, None, exact)
            model.lm_head = None  # the product may have a copy of its own
        self._trained_prefix = self._take_prefix(model)
        self._prefixes: OrderedDict[tuple[int, ...], KvPrefix] = OrderedDict()
        self._scratch: Arena | None = None

    def _take_prefix(self, model: Any) -> KvPrefix | None:
        """The model's P-Tuning prefix, or None."""
        prefix_N2GFD = getattr(model, "prefix_kv", None)
        if prefix_N2GFD is None:
            return None
        kv_N2GFD = prefix_N2GFD.to(self.kv_shape.device, self.kv_shape.dtype).contiguous()
        return KvPrefix(kv_N2GFD, next_position=0)

    @property
    def trained_places(self) -> int:
        """Number of places that the trained prefix takes at the start of every row; 0 without."""
        return 0 if self._trained_prefix is None else self._trained_prefix.places

    @property
    def row_places(self) -> int:
        """Number of places of the longest row."""
        return self.trained_places + self.max_positions

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
        """Free cached prefixes and the scratch arena, which are made again when needed."""
        self._prefixes.clear()
        self._scratch = None

    def _extend_prefix(
        self, prefix: KvPrefix | None, ids: Sequence[int], chunk_tokens: int
    ) -> KvPrefix:
        """`prefix` extended by the keys and values of `ids`."""
        assert ids
        places = next_position = 0
        if prefix is not None:
            places, next_position = prefix.places, prefix.next_position
        arena = Arena(self.kv_shape, places + len(ids))
        if prefix is not None:
            arena.write_prefix(0, prefix)
        # Each chunk attends to the earlier ones, which are in the arena.
        for first in range(0, len(ids), chunk_tokens):
            chunk = ids[first : first + chunk_tokens]
            rows = Rows([0], [places + first + len(chunk)], [len(chunk)], single=0)
            self.forward(torch.tensor(chunk, device=self.device), rows, arena)
        return KvPrefix(arena.kv_N2GPD, next_position + len(ids))

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

    def prefill(self, prompts: Sequence[PackedPrompt], prefix: KvPrefix | None) -> torch.Tensor:
        """Run one forward over `prompts`, each after `prefix`, as a packed batch.

        Returns final states [K, C]: for each prompt, of its last token, then of all nodes of its
        label tree.
        """
        return self._run(*pack(prompts, prefix, self._scratch_arena, self.device, self.dtype))

    def forward(self, ids_T: torch.Tensor, rows: Rows, arena: Arena) -> torch.Tensor:
        """Run one forward over `rows` of `arena`, whose new tokens are `ids_T`, row by row.

        Stores their keys and values. Returns final states [R, C] of the last token of each row.
        """
        return self._run(ids_T, plan_rows(arena, rows, self.trained_places))

    def step_graphs(self, arena: Arena, spare_place: int) -> StepGraphs | None:
        """Recorded decode steps over `arena`; None where there are no CUDA graphs."""
        if not serves(self.device, arena.kv_N2GPD.dtype):
            return None

        def step(inputs_4R: torch.Tensor, max_used: int) -> torch.Tensor:
            ids_R, positions_R, starts_R, used_R = inputs_4R
            rows = inputs_4R.shape[1]
            each_R1 = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
            # The operator wants one start more than there are rows, and does not read it.
            starts_R1 = torch.nn.functional.pad(starts_R, (0, 1)).int()
            call = single_queries(each_R1, starts_R1, used_R.int(), max_used)
            store = ArenaKeys(arena, starts_R + used_R - 1)
            plan = FlashPlan(store, [(slice(None), call)])
            return self._run(ids_R, ForwardPlan(positions_R, None, plan, plan))

        return StepGraphs(step, spare_place)

    def _scratch_arena(self, places: int) -> Arena:
        """An arena of one layer with at least `places` places, kept for later batches."""
        if self._scratch is None or self._scratch.places < places:
            self._scratch = None  # frees the smaller one first
            self._scratch = Arena(self.kv_shape, places, one_layer=True)
        return self._scratch

    def _run(self, ids_T: torch.Tensor, plan: ForwardPlan) -> torch.Tensor:
        """Final states [K, C] of the tokens that `plan` reads."""
        hidden_TC = self._embed(ids_T[None])[0]
        rotary_TP = rotary_factors(plan.positions_T, self._inverse_frequencies_P)
        for layer in self._layers[:-1]:
            hidden_TC = layer(hidden_TC, rotary_TP, plan.attention)
        # The last layer needs the keys and values of all tokens, but the states of few.
        hidden_KC = self._layers[-1](hidden_TC, rotary_TP, plan.last, plan.reads_K)
        return self._norm(hidden_KC)

    def token_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] in float32 of the `token_count` ids that are tokens."""
        # Padding ids are cut off, so that they can never be chosen.
        return self._lm_head(hidden_RC)[:, : self.token_count].float()

    def class_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """Logits [R, labels] of the trained head in float32."""
        return self._score(hidden_RC.to(self._head_dtype)).float()
