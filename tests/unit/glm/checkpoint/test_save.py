"""A saved model loads as the same model, in the published layout, always with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import load_model, read_checkpoint, save_checkpoint
from tests.unit.glm.checkpoints import (
    GOLDENS,
    LABELS,
    TOKENIZER,
    VARIANTS,
    make_checkpoint,
    make_variant,
    read_json,
    read_state,
)

EVERY = [name for name in VARIANTS if name != "first-revision"]


def assert_same_model(one: Any, other: Any) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert stated_config(other) == stated_config(one)


def stated_config(model: Any) -> dict[str, Any]:
    """The config of the model without bookkeeping keys."""
    config: dict[str, Any] = model.config.to_dict()
    for key in ("architectures", "dtype"):
        config.pop(key, None)
    return config


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_saved_model_loads_bit_for_bit(tmp_path: Path, name: str, safetensors: bool) -> None:
    model = load_model(make_variant(tmp_path / "from", name))
    save_checkpoint(
        model, tmp_path / "to", tokenizer_model=TOKENIZER, dtype="float32", safetensors=safetensors
    )
    assert_same_model(model, load_model(tmp_path / "to"))
    assert read_checkpoint(tmp_path / "to").warnings == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_saved_in_their_dtype_stay_the_same(tmp_path: Path, dtype: str) -> None:
    directory = make_checkpoint(tmp_path / "from", dtype=getattr(torch, dtype))
    save_checkpoint(
        load_model(directory), tmp_path / "to", tokenizer_model=TOKENIZER.read_bytes(), dtype=dtype
    )
    before, after = read_state(directory), read_state(tmp_path / "to")
    assert before.keys() - after.keys() == {"transformer.rotary_pos_emb.inv_freq"}
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_the_saved_config_is_the_published_one(tmp_path: Path) -> None:
    source = GOLDENS / "base-sharded"
    save_checkpoint(
        load_model(source),
        tmp_path,
        tokenizer_model=TOKENIZER,
        extra_config={"_name_or_path": "THUDM/chatglm2-6b"},
    )
    published, saved = read_json(source / "config.json"), read_json(tmp_path / "config.json")
    assert saved.items() <= published.items()
    assert "auto_map" not in saved, "it would have transformers ask to run code"
    # Keys that are left out have their default in the published code, or change no answer.
    assert published.keys() - saved.keys() == {
        "apply_query_key_layer_scaling",
        "attention_dropout",
        "attention_softmax_in_fp32",
        "auto_map",
        "bias_dropout_fusion",
        "fp32_residual_connection",
        "hidden_dropout",
        "original_rope",
        "transformers_version",
        "use_cache",
    }


def test_a_large_model_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    model = load_model(GOLDENS / "base-sharded")
    save_checkpoint(model, tmp_path, tokenizer_model=TOKENIZER, shard_size_bytes=140_000)
    index = read_json(tmp_path / "pytorch_model.bin.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"pytorch_model-{number:05}-of-00004.bin" for number in range(1, 5)]
    assert index["metadata"]["total_size"] == 2 * read_checkpoint(tmp_path).parameters
    assert_same_model(model, load_model(tmp_path))


@pytest.mark.parametrize("safetensors", [False, True])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, safetensors: bool) -> None:
    model = load_model(make_variant(tmp_path / "from", "prefix-classifier"))
    for name in ("a", "b"):
        save_checkpoint(
            model,
            tmp_path / name,
            tokenizer_model=TOKENIZER,
            shard_size_bytes=50_000,
            safetensors=safetensors,
        )
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in files
    )


@pytest.mark.parametrize("name", ["plain", "multi-head", "32k", "classifier", "prefix", "int4"])
@torch.no_grad()
def test_a_save_pretrained_folder_loads(tmp_path: Path, name: str) -> None:
    model = load_model(make_variant(tmp_path / "from", name))
    model.save_pretrained(tmp_path / "to")
    checkpoint = read_checkpoint(tmp_path / "to")
    assert (checkpoint.layout, checkpoint.warnings) == ("native", ("no tokenizer.model",))
    loaded = load_model(tmp_path / "to")
    assert_same_model(model, loaded)
    ids = torch.tensor([[1001, 1003, 5, 77, 300]])
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_native_head_without_its_bias_is_refused(tmp_path: Path) -> None:
    """What transformers' class saves after it dropped the bias with only a log message."""
    model = load_model(make_variant(tmp_path / "from", "classifier"))
    model.score = torch.nn.Linear(model.score.in_features, len(LABELS), bias=False)
    model.save_pretrained(tmp_path / "to")
    with pytest.raises(InputError, match=r"no 'score\.bias'"):
        load_model(tmp_path / "to")


def test_values_that_do_not_fit_the_dtype_are_not_saved(tmp_path: Path) -> None:
    model = load_model(make_variant(tmp_path / "from", "plain"))
    model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"output_layer\.weight.*float16"):
        save_checkpoint(model, tmp_path / "to", tokenizer_model=TOKENIZER)
    assert list((tmp_path / "to").iterdir()) == []
    save_checkpoint(model, tmp_path / "to", tokenizer_model=TOKENIZER, dtype="bfloat16")
    read_checkpoint(tmp_path / "to")


def test_saving_into_a_checkpoint_is_refused(tmp_path: Path) -> None:
    model = load_model(GOLDENS / "base-sharded")
    save_checkpoint(model, tmp_path, tokenizer_model=TOKENIZER)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="already contains a checkpoint"):
        save_checkpoint(model, tmp_path, tokenizer_model=TOKENIZER)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_config_key_cannot_contradict_the_model(tmp_path: Path) -> None:
    model = load_model(GOLDENS / "base-sharded")
    with pytest.raises(InputError, match="extra_config: 'num_layers'"):
        save_checkpoint(model, tmp_path, tokenizer_model=TOKENIZER, extra_config={"num_layers": 2})
    other = GOLDENS / "classifier" / "tokenizer.model"
    with pytest.raises(InputError, match="1218 ids"):
        save_checkpoint(model, tmp_path, tokenizer_model=other)
