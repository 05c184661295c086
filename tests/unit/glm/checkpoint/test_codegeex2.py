"""CodeGeeX2, ChatGLM2's sibling for code, answers as recorded: prompts without a chat format.

`python -m tests.unit.glm.checkpoint.test_codegeex2` records the answers again, with the plain
forward of reference.py only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from sentencepiece import SentencePieceProcessor

from glmbatch.glm.checkpoint.doctor import describe, examine
from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.run.table import annotate_table
from glmbatch.settings.job import ModelConfig, RuntimeConfig
from tests.unit.glm.checkpoints import CONFIG, GOLDENS, TOKENIZER, make_checkpoint, read_state
from tests.unit.glm.reference import reference_logits
from tests.unit.glm.tiny_glm import whole_logits

GOLDEN = GOLDENS / "codegeex2"
# What the published config has in addition to ChatGLM2's keys and values.
PUBLISHED = {"_name_or_path": "THUDM/codegeex2-6b", "torch_dtype": "bfloat16", "seq_length": 8192}
TASKS = ("# write a bubble sort", "# 写一个快速排序", "def add(a, b):", "# print 'hello'")
TEMPLATE = "# language: Python\n{text}\n"
NEW_TOKENS = 16


def record() -> None:
    """Write the golden set: weights, prompts, and the reference's answers to them."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    make_checkpoint(GOLDEN, config=PUBLISHED, dtype=torch.bfloat16, seed=7)
    state = read_state(GOLDEN)
    processor = SentencePieceProcessor(model_file=str(TOKENIZER))
    pieces = processor.vocab_size()
    rows = []
    for task in TASKS:
        prompt = TEMPLATE.format(text=task)
        # The ids of [gMASK] and sop follow the pieces, after [MASK] and before eop.
        ids = [pieces + 1, pieces + 3, *processor.encode(prompt)]
        written: list[int] = []
        last_logits: list[float] = []
        while len(written) < NEW_TOKENS and 2 not in written:
            logits = reference_logits(state, CONFIG | PUBLISHED, [*ids, *written])[-1]
            last_logits = last_logits or logits.tolist()
            written.append(int(logits[: pieces + 5].argmax()))
        answer = [token for token in written if token != 2]
        rows.append({"prompt": prompt, "ids": ids, "greedy": answer, "logits": last_logits})
    (GOLDEN / "golden.json").write_text(json.dumps(rows, ensure_ascii=False))


def golden() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text())
    return rows


def test_codegeex2_logits_equal_the_recorded_ones() -> None:
    model = load_model(GOLDEN)
    tokenizer = load_tokenizer(GOLDEN)
    for row in golden():
        assert tokenizer.encode([row["prompt"]]) == [row["ids"]]
        expected = torch.tensor(row["logits"])
        logits = whole_logits(model, row["ids"])[-1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_codegeex2_answers_equal_the_recorded_ones() -> None:
    step = {
        "kind": "generate",
        "name": "code",
        "prompt_template": TEMPLATE,
        "max_tokens": NEW_TOKENS,
    }
    table = pa.table({"text": list(TASKS)})
    answers = annotate_table(table, {"model": str(GOLDEN), "steps": [step]})
    tokenizer = load_tokenizer(GOLDEN)
    texts = [tokenizer.decode(row["greedy"], cut=True, continues=True) for row in golden()]
    assert answers.column("code").to_pylist() == texts
    assert answers.column("code_prompt_tokens").to_pylist() == [len(row["ids"]) for row in golden()]
    in_rounds = annotate_table(
        table, {"model": str(GOLDEN), "steps": [step | {"chat": True, "max_tokens": 1}]}
    )
    for bare, longer in zip(golden(), in_rounds.column("code_prompt_tokens"), strict=True):
        assert longer.as_py() > len(bare["ids"])


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b", "THUDM/codegeex2-6b"])
def test_only_the_name_changes_the_prompt_format(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path, config={"_name_or_path": name})
    model = prepare_model(locate_model(ModelConfig(path=str(directory)), RuntimeConfig()))
    assert model.chats == (name == "THUDM/chatglm2-6b")
    # With another prompt format, the answers differ.
    assert model.identity.endswith("/default" if model.chats else "/bare")
    assert ("CodeGeeX2" in describe(examine(directory))) != model.chats


if __name__ == "__main__":
    record()
