"""An adapter records the weights that it was trained on, and is refused on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.adapter_save import finish_adapter
from glmbatch.glm.checkpoint.load import load_model, read_checkpoint, save_checkpoint
from tests.unit.glm.adapters import make_original_adapter, peft_model
from tests.unit.glm.checkpoint.test_adapter import assert_close, logits_of
from tests.unit.glm.checkpoints import TOKENIZER, edit_config, make_variant

# peft 0.21 still uses attributes of a model that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def finished(base: Path, folder: Path, first: Path | None = None, **settings: Any) -> Any:
    """Save an adapter of `base` with `first`, as training does; returns the trained model."""
    adapted = peft_model(load_model(base, adapter=first), **settings)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    finish_adapter(folder, read_checkpoint(base, first))
    return adapted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 9}},
        {"target_modules": ["v_proj"], "modules_to_save": ["down_proj", "norm"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("first_kind", ["original", "peft", "whole"])
@pytest.mark.parametrize("name", ["plain", "int8", "multi-head"])
def test_two_adapters_are_saved_as_one(
    tmp_path: Path, name: str, first_kind: str, settings: dict[str, Any]
) -> None:
    base, first, both = make_variant(tmp_path / "base", name), tmp_path / "1", tmp_path / "2"
    if first_kind == "original":
        config = json.loads((base / "config.json").read_text())
        make_original_adapter(first, config)
    else:
        targets = {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [0]}
        whole = {"modules_to_save": ["down_proj"]} if first_kind == "whole" else {}
        peft_model(load_model(base), **targets, **whole).save_pretrained(first)
    expected = logits_of(finished(base, both, first, **settings))
    assert_close(logits_of(load_model(base, adapter=both)), expected)
    by_peft = PeftModel.from_pretrained(load_model(base), both).eval()
    assert_close(logits_of(by_peft), expected)
    assert read_checkpoint(base, both).warnings == ()


def resaved(base: Path, folder: Path, dtype: str, **changes: float) -> Path:
    model = load_model(base)
    with torch.no_grad():
        for name, factor in changes.items():
            model.get_parameter(name.replace("__", ".")).mul_(factor)
    save_checkpoint(model, folder, tokenizer_model=TOKENIZER, dtype=dtype)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("trained", ["plain", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("used", ["plain", "float32", "bfloat16", "int8", "int4"])
def test_the_same_weights_in_another_dtype_are_allowed(
    tmp_path: Path, trained: str, used: str
) -> None:
    base = make_variant(tmp_path / "a", trained)
    finished(base, tmp_path / "adapter")
    other = make_variant(tmp_path / "b", used)
    notes = read_checkpoint(other, tmp_path / "adapter").warnings
    assert len(notes) == int(trained != used)
    assert all("another dtype" in note for note in notes)


@pytest.mark.parametrize("form", ["safetensors-sharded", "legacy"])
def test_the_same_weights_in_other_files_are_the_same(tmp_path: Path, form: str) -> None:
    base = make_variant(tmp_path / "a", "plain")
    finished(base, tmp_path / "adapter")
    assert read_checkpoint(make_variant(tmp_path / "b", form), tmp_path / "adapter").warnings == ()
    wide = resaved(base, tmp_path / "wide", "float32")
    assert read_checkpoint(wide, tmp_path / "adapter").warnings == ()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"changed": "model__layers__1__self_attn__k_proj__weight"},
        {"changed": "model__norm__weight"},
        {"adapter": True},
    ],
    ids=str,
)
def test_an_adapter_is_refused_on_other_weights(tmp_path: Path, other: dict[str, Any]) -> None:
    base, adapter = make_variant(tmp_path / "a", "plain"), tmp_path / "adapter"
    finished(base, adapter)
    wrong = tmp_path / "b"
    if "seed" in other:
        make_variant(wrong, "plain", seed=1)
    elif "changed" in other:
        resaved(base, wrong, "float16", **{other["changed"]: 1.05})
    else:  # with another adapter merged in, as training writes it
        make_original_adapter(tmp_path / "first")
        merged = load_model(base, adapter=tmp_path / "first")
        save_checkpoint(merged, wrong, tokenizer_model=TOKENIZER)
    with pytest.raises(InputError, match=f"{adapter}: was trained over {base}, but .* other weigh"):
        read_checkpoint(wrong, adapter)
    assert read_checkpoint(base, adapter).warnings == ()


@pytest.mark.parametrize(
    ("stated", "notes"),
    [
        (None, 0),
        ("", 0),
        ("THUDM/chatglm2-6b", 0),
        ("/home/me/ChatGLM2-6B", 0),
        ("../models/base", 0),
        ("THUDM/chatglm2-6b-32k", 1),
        ("/data/run-7/checkpoint-300", 1),
        (7, 0),
    ],
)
def test_another_base_name_in_peft_config_is_a_note(
    tmp_path: Path, stated: Any, notes: int
) -> None:
    base = make_variant(tmp_path / "base", "plain")
    make_original_adapter(tmp_path / "adapter", base_model_name_or_path=stated)
    warnings = read_checkpoint(base, tmp_path / "adapter").warnings
    assert [str(stated) in warning for warning in warnings] == [True] * notes


@pytest.mark.parametrize("text", ["[]", "{", '{"path": "x"}', '{"path": 1, "weights": {"a": 3}}'])
def test_a_damaged_base_note_is_an_error(tmp_path: Path, text: str) -> None:
    base = make_variant(tmp_path / "base", "plain")
    finished(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "glmbatch_base.json").write_text(text)
    with pytest.raises(InputError, match=r"glmbatch_base\.json") as caught:
        read_checkpoint(base, tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_the_config_names_the_base(tmp_path: Path) -> None:
    base = make_variant(tmp_path / "base", "plain")
    edit_config(base, _name_or_path="THUDM/chatglm2-6b")
    finished(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
