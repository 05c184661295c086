"""Contestant: llama.cpp through its C interface, with continuous batching like its server's.

Each step decodes one batch: the last token of every running sequence, and prompts for the free
slots.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from protocol import Run, serve

GGML_TYPE_BF16 = 30  # of ggml.h; llama_cpp does not name it


@dataclass
class _Sequence:
    row: int
    ids: list[int]  # not yet decoded
    position: int = 0  # ids decoded so far
    answer: list[int] = field(default_factory=list)


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    path = str(options.checkpoint / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    rows = work["rows"]
    lengths = work["answer_tokens"]
    slots = work["slots"]
    longest = max(len(row) + length for row, length in zip(rows, lengths, strict=True))
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = slots
    params.n_ctx = slots * (-(-longest // 256) * 256)  # for all slots; llama.cpp pads to 256
    # As in its server: a third faster here than a separate cache for each sequence.
    params.kv_unified = True
    params.n_batch = work["batch_tokens"] or 2048
    if options.threads:
        params.n_threads = params.n_threads_batch = options.threads
    if options.way == "f32":
        # The default of 16 bits is about a tenth faster, but changes some tokens.
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    if options.way == "bf16":
        params.type_k = params.type_v = GGML_TYPE_BF16
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp could not load {options.checkpoint}")
    engine = _Engine(context, slots, params.n_batch, work["config"]["vocab_size"])
    kept = (silent, model)  # keeps these alive while llama.cpp uses them

    def run() -> list[list[int]]:
        assert kept
        return engine.generate(rows, lengths)

    return f"llama-cpp-python {llama_cpp.__version__}", run


class _Engine:
    """The sequences in their slots, and the next batch to decode."""

    def __init__(self, context: Any, slots: int, batch_tokens: int, vocabulary: int) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._memory = llama_cpp.llama_get_memory(context)
        self._batch = llama_cpp.llama_batch_init(batch_tokens, 0, 1)
        self._batch_tokens = batch_tokens
        self._slots = slots

    def generate(self, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
        llama_cpp.llama_memory_clear(self._memory, True)
        waiting = deque(range(len(rows)))
        live: dict[int, _Sequence] = {}
        answers: dict[int, list[int]] = {}
        while waiting or live:
            for slot in range(self._slots):
                if waiting and slot not in live:
                    row = waiting.popleft()
                    live[slot] = _Sequence(row, list(rows[row]))
            for slot, token in self._step(live):
                sequence = live[slot]
                sequence.answer.append(token)
                sequence.ids = [token]
                if len(sequence.answer) == lengths[sequence.row]:
                    answers[sequence.row] = sequence.answer
                    llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
                    del live[slot]
        return [answers[row] for row in range(len(rows))]

    def _step(self, live: dict[int, _Sequence]) -> Iterator[tuple[int, int]]:
        """Decode one batch; yield the next token of each slot whose ids are all decoded."""
        batch = self._batch
        batch.n_tokens = 0
        asked = []
        # Running sequences come first, so that a long prompt does not stall them.
        for slot in sorted(live, key=lambda slot: not live[slot].answer):
            sequence = live[slot]
            taken = min(len(sequence.ids), self._batch_tokens - batch.n_tokens)
            for token in sequence.ids[:taken]:
                at = batch.n_tokens
                batch.token[at] = token
                batch.pos[at] = sequence.position
                batch.logits[at] = 0
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = slot
                sequence.position += 1
                batch.n_tokens += 1
            sequence.ids = sequence.ids[taken:]
            if taken and not sequence.ids:
                batch.logits[batch.n_tokens - 1] = 1
                asked.append((slot, batch.n_tokens - 1))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        for slot, at in asked:
            scores = llama_cpp.llama_get_logits_ith(self._context, at)
            yield slot, int(np.ctypeslib.as_array(scores, (self._vocabulary,)).argmax())


if __name__ == "__main__":
    serve(load)
