"""The doctor describes a directory, lists every problem in it, and never raises."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from glmbatch.glm.checkpoint.doctor import describe, examine
from glmbatch.glm.checkpoint.load import digest_tokenizer, digest_weights
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import (
    GOLDENS,
    VARIANTS,
    edit_config,
    make_checkpoint,
    make_variant,
    read_state,
)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_valid_variant_is_sound(tmp_path: Path, name: str) -> None:
    diagnosis = examine(make_variant(tmp_path, name))
    assert diagnosis.problems == ()
    assert diagnosis.checkpoint is not None
    assert describe(diagnosis).splitlines()[0] == f"{tmp_path}: sound"


def test_a_valid_checkpoint_is_described_in_full() -> None:
    directory = GOLDENS / "classifier"
    diagnosis = examine(directory)
    text = describe(diagnosis)
    for fact in (
        "original layout, classifier of 3 labels",
        "负面, 中性, 正面",
        "152,259 parameters",
        "512 positions",
        "1218 in the tokenizer, padded to 1280",
        "pytorch_model.bin (float32)",
        digest_weights(directory),
        digest_tokenizer(directory),
        "你好 -> 1214, 1216, 823,",
    ):
        assert fact in text
    assert diagnosis.memory["float32"].weights == 4 * 152_259
    assert diagnosis.memory["bfloat16"].per_token == 2 * (2 * 2 * 2 * 8)


def test_kinds_of_checkpoints_are_distinguished(tmp_path: Path) -> None:
    kinds = {
        "int4": "int4",
        "prefix": "P-Tuning v2 prefix of 7",
        "32k": "positions divided by 16",
    }
    for name, kind in kinds.items():
        assert kind in describe(examine(make_variant(tmp_path / name, name)))


def test_an_adapter_is_examined_with_its_checkpoint(tmp_path: Path) -> None:
    directory, adapter = make_variant(tmp_path / "base", "plain"), tmp_path / "adapter"
    head = {"classifier_head.weight": torch.ones(3, 32)}
    make_original_adapter(
        adapter, whole=head, modules_to_save=["classifier_head"], rank_pattern={"dense": 4}
    )
    diagnosis = examine(directory, adapter=adapter)
    text = describe(diagnosis)
    for fact in (
        "sound",
        "classifier of 3 labels",
        "LABEL_0, LABEL_1, LABEL_2",
        "does not name its labels",
        f"{adapter}: trained on the original classes",
        "rank 4 in 8 linear modules, whole classifier_head.weight",
        digest_weights(directory, adapter),
    ):
        assert fact in text
    (adapter / "adapter_config.json").write_text("{}")
    (problem,) = examine(directory, adapter=adapter).problems
    assert f"{adapter / 'adapter_config.json'}: 'peft_type' is missing" in problem


def test_digests_can_be_left_out(tmp_path: Path) -> None:
    diagnosis = examine(make_variant(tmp_path, "plain"), digests=False)
    assert (diagnosis.weights_digest, diagnosis.tokenizer_digest) == (None, None)
    assert "sha256" not in describe(diagnosis)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    state = read_state(directory) | {"surplus": torch.zeros(1)}
    del state["transformer.encoder.final_layernorm.weight"]
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "tokenizer.model").write_bytes(b"none")
    diagnosis = examine(directory)
    assert diagnosis.checkpoint is None
    assert len(diagnosis.problems) == 3
    text = describe(diagnosis)
    assert text.startswith(f"{directory}: 3 problems\n")
    assert all(named in text for named in ("surplus", "final_layernorm.weight", "tokenizer.model"))
    edit_config(directory, num_layers=0, add_qkv_bias="yes")
    assert len(examine(directory).problems) == 3


@pytest.mark.parametrize("made", ["nothing", "file", "empty", "rubbish"])
def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, made: str) -> None:
    directory = tmp_path / "model"
    if made == "file":
        directory.write_text("")
    elif made != "nothing":
        directory.mkdir()
    if made == "rubbish":
        for name in (
            "config.json",
            "tokenizer.model",
            "pytorch_model.bin",
            "model.safetensors.index.json",
        ):
            (directory / name).write_bytes(b"\xff\x00")
    diagnosis = examine(str(directory))
    assert diagnosis.problems
    assert str(directory) in describe(diagnosis)
    assert "sound" not in describe(diagnosis)


def test_a_tokenizer_of_published_size_has_published_ids(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, config={"padded_vocab_size": 65024})
    tokenizer = directory / "tokenizer.model"
    # Protobuf messages can be concatenated: appended pieces make the vocabulary as large as the
    # published one.
    names = [f"piece{number:05}".encode() for number in range(64_789 - 1_000)]
    tokenizer.write_bytes(
        tokenizer.read_bytes() + b"".join(b"\x0a\x0c\x0a\x0a" + name for name in names)
    )
    (problem,) = examine(directory).problems
    assert f"{tokenizer}: has the size of the published tokenizer, but encodes 你好" in problem
    assert "(36474, 54591)" in problem


@pytest.mark.slow
def test_a_large_checkpoint_takes_seconds(tmp_path: Path) -> None:
    """As many tensors as ChatGLM2-6B has, almost a gigabyte, whose values are not read."""
    wide = {
        "num_layers": 28,
        "hidden_size": 1024,
        "ffn_hidden_size": 3424,
        "padded_vocab_size": 65280,  # 65,024 rows belong to the published tokenizer
    }
    directory = make_checkpoint(tmp_path, config=wide, files="sharded")
    began = time.process_time()
    assert examine(directory, digests=False).problems == ()
    assert time.process_time() - began < 5
