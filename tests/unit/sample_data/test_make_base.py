"""A base with random weights fits the texts of a training, however many characters they have."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from glmbatch.cli.train import describe_plan
from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.tuning.encode import MIXED
from glmbatch.tuning.finetune import preview
from tests.support import ROOT, Tune
from tests.unit.tuning.runs import trained, weights

SAMPLE = ROOT / "sample_data"
sys.path.insert(0, str(SAMPLE))

from make_base import Shape, make_base  # noqa: E402


def many_characters(rows: int) -> list[str]:
    """Texts of evenly frequent characters: any 1,000 of them cover a sixth of the text."""
    dice = random.Random(0)
    characters = [chr(0x4E00 + number) for number in range(6000)]
    return ["".join(dice.choices(characters, k=30)) for _ in range(rows)]


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        (many_characters(1500), 2000),
        (["好"], 262),  # 256 bytes, 3 special tokens, the space, the character, and both together
        (["a b c", "\U0001f600"], None),
    ],
)
def test_spells_every_text_that_it_was_made_for(
    texts: list[str], pieces: int | None, tmp_path: Path
) -> None:
    made = make_base(tmp_path / "base", texts, Shape(32, 1, 2000, 64), seed=0)
    assert pieces in (made, None)
    tokenizer = load_tokenizer(tmp_path / "base")
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_plain(texts)] == texts


def test_its_first_heads_look_one_and_two_tokens_back(tmp_path: Path) -> None:
    texts = many_characters(50)
    make_base(tmp_path / "base", texts, Shape(128, 2, 2000, 64), seed=0, to_classify=True)
    model = load_model(tmp_path / "base")
    model.config._attn_implementation = "eager"
    ids = torch.tensor([load_tokenizer(tmp_path / "base").encode_plain(texts)[0][:40]])
    attention_HTT = model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, distance in [(0, 1), (1, 2)]:
        assert attention_HTT[head].diagonal(-distance)[4:].min() > 0.6
    # The others look at all tokens alike.
    assert attention_HTT[2:, -1].max() < 2 / ids.shape[1]


def test_a_training_starts_from_the_base_made_for_it(tune: Tune, tmp_path: Path) -> None:
    # 24 rows to train on: an epoch is eleven times as long.
    one_day = tmp_path / "in" / "day=0"
    few = {"data__input": str(one_day), "data__valid_share": 0.4, "data__test_share": 0.4}
    small = str(tmp_path / "small")
    config = tune(model=small, prompt_template="{text}\n", training__epochs=2, **few)
    file = tmp_path / "training.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, str(SAMPLE / "make_base.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    planned = preview(config)
    rows = planned.audit.parts["train"]
    assert planned.steps == 2 * math.ceil((1 + MIXED) * rows / config.training.batch_rows)
    learned = f"0.7 of each row's target, and {MIXED * rows} mixed texts an epoch"
    assert learned in describe_plan(planned) and "advice" not in describe_plan(planned)
    no_end = describe_plan(preview(config.model_copy(update={"prompt_template": "{text}"})))
    assert 'set prompt_template to "{text}\\n"' in no_end
    run = trained(config)
    assert weights(run)
    facts = json.loads((run / "trained.json").read_text())
    assert facts["used"]["distill"] == 0.7
    assert facts["steps"] == planned.steps
    evaluated = [line for line in facts["history"] if "eval_loss" in line]
    assert facts["best_step"] == min(evaluated, key=lambda line: line["eval_loss"])["step"]
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert str(tmp_path / "small") in line
