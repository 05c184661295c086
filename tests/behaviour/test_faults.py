"""One bad row in a batch of eight, at any position, leaves the other seven answers unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from glmbatch.glm.model.arena import KvPrefix
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt
from glmbatch.glm.model.rows import Rows
from glmbatch.glm.tokenizer import load_tokenizer
from tests.support import CAUSAL, CLASSIFY, Settings, Write, rows_of, run

pytestmark = pytest.mark.slow

BATCH = 8
GENERATE = {"kind": "generate", "name": "reply", "prompt_template": "{text}", "max_tokens": 5}
POISON = "漏"
TOKENS_WITH_ROOM = 200
SAME_COLUMNS = (
    "text",
    "mood",
    "mood_error",
    "reply",
    "reply_finish_reason",
    "reply_error",
    "reply_key",
)
FAULTS: dict[str, tuple[bytes | None, str]] = {
    "null": (None, "null_value"),
    "empty": (b"", "empty_text"),
    "a megabyte": ("很好 good ".encode() * 80_000, "too_long"),
    "a lone surrogate": ("good \ud800 bad".encode("utf-8", "surrogatepass"), "not_utf8"),
    "no finite scores": (f"good {POISON}".encode(), "model_failed"),
    "no memory": (b"good " * 150, "model_failed"),
}


@pytest.fixture
def poisoned(own_engines: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose scores are not finite after POISON.

    The weights are spoiled after loading, because non-finite weights on disk are refused.
    """
    poison, harmless = load_tokenizer(CAUSAL).encode(
        [f"good {POISON}", "good 很好 batch row 0123456789"]
    )
    take_over = Network.__init__

    def spoiled(self: Network, model: Any, *settings: Any) -> None:
        model.model.embed_tokens.weight[sorted(set(poison) - set(harmless))] = torch.nan
        take_over(self, model, *settings)

    monkeypatch.setattr(Network, "__init__", spoiled)
    return CAUSAL


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs out of memory above TOKENS_WITH_ROOM tokens, prefix included."""
    prefill = Network.prefill

    def within_room(
        self: Network, prompts: Sequence[PackedPrompt], prefix: KvPrefix | None, *store: Any
    ) -> torch.Tensor:
        tokens = sum(len(prompt.ids) for prompt in prompts)
        if prefix is not None:
            tokens += prefix.places
        if tokens > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("out of memory")
        return prefill(self, prompts, prefix, *store)

    forward = Network.forward

    def forward_within_room(self: Network, ids: torch.Tensor, rows: Rows, arena: Any) -> Any:
        if max(rows.used) > TOKENS_WITH_ROOM:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, ids, rows, arena)

    monkeypatch.setattr(Network, "prefill", within_room)
    monkeypatch.setattr(Network, "forward", forward_within_room)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_row_of_eight_affects_no_other_row(
    write_source: Write, job_settings: Settings, tmp_path: Path, poisoned: Path, fault: str
) -> None:
    bad, kind = FAULTS[fault]
    good: list[bytes | None] = []
    for number in range(BATCH * BATCH):
        good.append(f"batch {number // BATCH} row {number % BATCH} 很好".encode())
    with_bad = list(good)
    for batch in range(BATCH):
        with_bad[batch * BATCH + batch] = bad

    def answers(output: str, texts: Sequence[bytes | None]) -> list[dict[str, Any]]:
        write_source("a.parquet", {"text": pa.array(texts, pa.binary())})
        settings = job_settings(
            data__output=str(tmp_path / output), model__path=str(poisoned), max_error_rate=0.5
        )
        settings["steps"] = [CLASSIFY, GENERATE]
        settings["runtime"]["fragments_in_flight"] = 1
        run(settings)
        return rows_of(tmp_path / output)

    clean = answers("clean", good)
    disturbed = answers("out", with_bad)
    for number, (row, expected) in enumerate(zip(disturbed, clean, strict=True)):
        batch, place = divmod(number, BATCH)
        if batch == place:
            assert (row["mood"], row["reply"]) == (None, None)
            assert row["mood_error_type"] == kind, row["mood_error"]
            assert row["reply_error_type"] == kind, row["reply_error"]
            continue
        assert row["mood_scores"] == pytest.approx(expected["mood_scores"], abs=1e-5)
        for column in SAME_COLUMNS:
            assert row[column] == expected[column], (batch, place, column)
