"""What people mistake for a ChatGLM2 checkpoint is named, in one message of one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import describe, examine
from glmbatch.glm.checkpoint.load import load_model, read_checkpoint
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import (
    CLASSIFIER,
    CONFIG,
    change_tensor,
    edit_config,
    make_checkpoint,
    make_variant,
    read_json,
    read_state,
    write_json,
)
from tests.unit.glm.reference import reference_logits
from tests.unit.glm.tiny_glm import whole_logits

OUTPUT = "transformer.output_layer.weight"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
DENSE = "transformer.encoder.layers.0.self_attention.dense"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:e7dc\nsize 1018370\n"
IDS = [1001, 1003, 623, 94, 85, 627, 645]


def problem_of(directory: Path, **settings: Any) -> str:
    """The only problem that the doctor finds; loading fails with the same message."""
    (problem,) = examine(directory, **settings).problems
    with pytest.raises(InputError) as refused:
        load_model(directory, **settings)
    assert str(refused.value) == problem
    assert "\n" not in problem
    assert len(problem.replace(f"{directory}", "model")) <= 300
    return problem


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = read_state(directory)
    changed = change(state)
    torch.save(state if changed is None else changed, directory / "pytorch_model.bin")
    return directory


GLM4 = {"padded_vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]}
HF = {"model_type": "glm", "num_hidden_layers": 40, "vocab_size": 151552}
FIRST = {"model_type": "chatglm", "inner_hidden_size": 16384, "vocab_size": 130528}
PLACELESS = {"_name_or_path": None}
# The model named, and its config: changes to ChatGLM2's, or the whole config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatglm3": ("ChatGLM3", {"_name_or_path": "THUDM/chatglm3-6b"}),
    "chatglm3-32k": ("ChatGLM3", {"_name_or_path": "/mnt/ChatGLM3_6B_32k", "rope_ratio": 50}),
    "chatglm3 by its code": (
        "ChatGLM3",
        {
            "_name_or_path": "/data/out",
            "auto_map": {"AutoModel": "THUDM/chatglm3-6b--modeling_chatglm.ChatGLMModel"},
        },
    ),
    "chatglm3 by its ends": ("ChatGLM3", PLACELESS | {"eos_token_id": [2, 64795, 64797]}),
    "glm-4-9b-chat": ("GLM-4", GLM4 | {"_name_or_path": "THUDM/glm-4-9b-chat"}),
    "glm-4-9b without a name": ("GLM-4", GLM4 | PLACELESS),
    "glm-4v": ("GLM-4", GLM4 | PLACELESS | {"vision_config": {}}),
    "codegeex4": ("CodeGeeX4", GLM4 | {"_name_or_path": "THUDM/codegeex4-all-9b"}),
    "a name of glm-4 over ours": ("GLM-4", {"_name_or_path": "/models/glm4-9b-chat-1m"}),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-4-9b-chat-hf": ("GLM-4", HF | {"eos_token_id": [151329, 151336, 151338]}),
    "glm-edge": ("GLM-Edge", HF | {"vocab_size": 59264}),
    "glm-4-0414": ("GLM-4", {"model_type": "glm4"}),
    "glm-4.5": ("GLM-4.5", {"model_type": "glm4_moe"}),
    "chatglm-6b": ("the first generation", FIRST),
    "chatglm-6b by its name": ("first generation", FIRST | {"_name_or_path": "THUDM/chatglm-6b"}),
    "visualglm": ("VisualGLM", {"model_type": "chatglm", "image_length": 32}),
    "glm-10b": ("GLM-10B", {"model_type": "glm", "block_position_encoding": True}),
    "llama": ("llama", {"model_type": "llama", "hidden_size": 64}),
    "qwen": ("qwen2", {"model_type": "qwen2", "_name_or_path": "Qwen/Qwen2-7B"}),
    "something": ("model_type is None", {"hidden_size": 64}),
}


@pytest.mark.parametrize("case", [*FAMILIES, *WHOLE])
def test_other_models_are_refused_by_name(tmp_path: Path, case: str) -> None:
    named, config = (FAMILIES | WHOLE)[case]
    directory = make_checkpoint(tmp_path / "model", config={} if case in WHOLE else None)
    if case in WHOLE:
        write_json(directory / "config.json", config)
    else:
        edit_config(directory, **config)
    (directory / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as of GLM-4
    problem = examine(directory).problems[0]
    assert "not a ChatGLM2 config" in problem
    assert named in problem
    if case != "something":  # else the tokenizer is at fault too
        assert problem_of(directory) == problem


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<|user|>"}}}'),
        ("tokenizer_config.json", '{"name_or_path": "THUDM/chatglm3-6b"}'),
        ("tokenizer_config.json", '{"chat_template": "{{ \'<|\' }}<|{{ message.role }}|>"}'),
        ("special_tokens_map.json", '{"additional_special_tokens": ["<|observation|>"]}'),
        ("tokenization_chatglm.py", 'role_special_tokens = ["<|system|>", "<|user|>"]'),
        ("generation_config.json", '{"eos_token_id": [2, 64795, 64797]}'),
    ],
)
def test_chatglm3_is_recognized_by_any_of_its_files(
    tmp_path: Path, file: str, content: str
) -> None:
    directory = make_checkpoint(tmp_path / "model", config={"_name_or_path": "/data/out/step-900"})
    (directory / file).write_text(content)
    assert "one of ChatGLM3: " in problem_of(directory)


def test_chatglm3_is_recognized_by_its_folders_name(tmp_path: Path) -> None:
    for name in ("chatglm3-6b", "models--THUDM--chatglm3-6b/snapshots/a10da4c"):
        directory = make_checkpoint(tmp_path / name, config={"_name_or_path": None})
        assert "one of ChatGLM3: its folder is" in problem_of(directory)


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("reviews-glm4", "GLM-4"),
        ("glm-4-teacher-labels", "GLM-4"),
        ("chatglm3-replacement", "ChatGLM3"),
        ("after_cogvlm", "CogVLM"),
        ("vs-chatglm3-6b", "ChatGLM3"),
    ],
)
def test_a_folder_named_otherwise_refuses_no_model(tmp_path: Path, folder: str, model: str) -> None:
    directory = make_checkpoint(tmp_path / folder, config={"_name_or_path": None})
    (note,) = read_checkpoint(directory).warnings
    assert f"its folder '{folder}' names {model}; " in note
    edit_config(directory, _name_or_path="THUDM/chatglm2-6b")
    assert read_checkpoint(directory).warnings == ()


def test_a_folder_that_names_no_model_is_noted(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", config={"_name_or_path": "/data/out"})
    (note,) = read_checkpoint(directory).warnings
    assert "no file names the model" in note and "ChatGLM3 has the same layout" in note
    edit_config(directory, _name_or_path="/data/chatglm2-6b-int4-tuned")
    assert read_checkpoint(directory).warnings == ()
    # The tokenizer's files may have been copied from ChatGLM3, which has the same tokenizer.
    write_json(directory / "added_tokens.json", {"<|user|>": 64795})
    assert "roles of ChatGLM3 such as <|user|>" in read_checkpoint(directory).warnings[0]


@pytest.mark.parametrize("name", ["THUDM/codegeex2-6b", "/models/CodeGeeX2_6B"])
def test_codegeex2_is_recognized_by_its_name(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path / "model", config={"_name_or_path": name})
    assert (read_checkpoint(directory).family, examine(directory).problems) == ("CodeGeeX2", ())


@pytest.mark.parametrize(
    ("stated", "rows", "predicts"),
    [
        ({}, 3, "label"),
        (
            {"problem_type": "single_label_classification", "function_to_apply": "softmax"},
            3,
            "label",
        ),
        ({"problem_type": "multi_label_classification"}, 3, "labels"),
        ({"function_to_apply": "sigmoid"}, 1, "labels"),
        ({"problem_type": "regression", "function_to_apply": "none"}, 1, "number"),
        ({"id2label": None, "num_labels": 1}, 1, "number"),
    ],
)
def test_a_config_says_what_a_head_predicts(
    tmp_path: Path, stated: dict[str, Any], rows: int, predicts: str
) -> None:
    directory = make_head(tmp_path, rows, stated)
    assert read_checkpoint(directory).predicts == predicts
    assert ("head that predicts a number" in describe(examine(directory))) == (predicts == "number")


@pytest.mark.parametrize(
    ("stated", "rows", "problem"),
    [
        ({"problem_type": "regression"}, 3, "predicts 3 numbers at once"),
        ({"function_to_apply": "none"}, 3, "predicts 3 numbers at once"),
        ({"problem_type": "single_label_classification"}, 1, "the head has one row"),
        ({"problem_type": ["regression"]}, 1, "it must be one of single_label_classification"),
        ({"function_to_apply": "tanh"}, 3, "'tanh'; it must be one of softmax, sigmoid, none"),
        (
            {"problem_type": "regression", "function_to_apply": "sigmoid"},
            1,
            "which do not go together",
        ),
    ],
)
def test_a_head_of_another_loss_is_refused(
    tmp_path: Path, stated: dict[str, Any], rows: int, problem: str
) -> None:
    assert problem in problem_of(make_head(tmp_path, rows, stated))
    # A language model has no head, so the keys about one have no effect.
    plain = make_checkpoint(tmp_path / "plain", config=stated)
    assert examine(plain).problems == ()


def make_head(directory: Path, rows: int, stated: dict[str, Any]) -> Path:
    names = CLASSIFIER | {"id2label": {str(row): str(row) for row in range(rows)}}
    make_checkpoint(directory, config=names | {"label2id": None})
    edit_config(directory, **stated)
    return directory


def test_an_adapter_says_what_its_head_predicts(tmp_path: Path) -> None:
    base, adapter = make_variant(tmp_path / "base", "plain"), tmp_path / "adapter"
    head = {"classifier_head.weight": torch.ones(3, 32)}
    make_original_adapter(adapter, whole=head, modules_to_save=["classifier_head"])
    write_json(adapter / "config.json", {"problem_type": "multi_label_classification"})
    assert read_checkpoint(base, adapter=adapter).predicts == "labels"
    assert load_model(base, adapter=adapter).config.problem_type == "multi_label_classification"
    write_json(adapter / "config.json", {"problem_type": "regression"})
    assert "3 numbers at once" in problem_of(base, adapter=adapter)
    # Without a word beside it, the head is of the kind that it replaces.
    (adapter / "config.json").unlink()
    several = make_head(tmp_path / "several", 3, {"problem_type": "multi_label_classification"})
    assert read_checkpoint(several, adapter=adapter).predicts == "labels"
    assert read_checkpoint(base, adapter=adapter).predicts == "label"


@pytest.mark.parametrize("alias", ["lm_head.weight", "transformer.lm_head.weight", "tied.weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_copy_of_the_output_layer_is_dropped(
    tmp_path: Path, alias: str, dtype: torch.dtype
) -> None:
    directory = make_variant(tmp_path, "plain")
    rewrite(directory, lambda state: state.update({alias: state[OUTPUT].to(dtype).clone()}))
    assert read_checkpoint(directory).warnings == (
        f"{alias!r} is a copy of {OUTPUT!r} and is not used",
    )
    expected = reference_logits(read_state(directory), CONFIG, IDS)
    torch.testing.assert_close(
        whole_logits(load_model(directory), IDS), expected, atol=1e-4, rtol=0
    )
    change_tensor(directory, alias, lambda tensor: tensor[3].mul_(2))
    assert repr(alias) in problem_of(directory)


def test_a_language_head_beside_a_classifier_is_not_used(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "classifier")
    rewrite(directory, lambda state: state.update({"lm_head.weight": state.pop(OUTPUT)}))
    assert load_model(directory).score.out_features == 3


def wrap(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({new: state.pop(old)})


def quantize(*ends: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith(("dense.weight", "h.weight"))]:
            state.pop(key)
            for end in ends:
                state[key.removesuffix("weight") + end] = torch.zeros(4, 4, dtype=torch.int32)

    return change


# Changes to all tensors: the kind of checkpoint, the change, and what the one message says.
ALIKE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "module.": ("plain", wrap("module."), ["keys begin with 'module.'", "Strip it"]),
    "peft": ("plain", wrap("base_model.model."), ["begin with 'base_model.model.'"]),
    "compiled": ("plain", wrap("_orig_mod."), ["begin with '_orig_mod.'"]),
    "model.": ("classifier", wrap("model."), ["begin with 'model.'"]),
    "two wrappers": ("int4", wrap("_forward_module.module."), ["'_forward_module.module.'"]),
    "a part of the model": (
        "plain",
        lambda state: {key.removeprefix("transformer."): state[key] for key in state},
        ["keys lack the prefix 'transformer.'"],
    ),
    "cast output": (
        "plain",
        rename(OUTPUT, "transformer.output_layer.0.weight"),
        ["'transformer.output_layer.0.weight' must be named", repr(OUTPUT)],
    ),
    "only lm_head": ("plain", rename(OUTPUT, "lm_head.weight"), ["'lm_head.weight'", repr(OUTPUT)]),
    "wrapped within": (
        "plain",
        lambda state: {
            key.replace("layers.0.", "layers.0._fsdp_wrapped_module."): state[key] for key in state
        },
        ["layers.0._fsdp_wrapped_module.", "(7 such keys)"],
    ),
    "gptq": ("plain", quantize("qweight", "qzeros", "scales"), ["quantized by GPTQ or AWQ"]),
    "bitsandbytes": ("plain", quantize("weight", "SCB"), ["quantized by bitsandbytes"]),
    "nf4": ("plain", quantize("absmax", "quant_map"), ["quantized by bitsandbytes"]),
    "compressed": ("plain", quantize("weight_packed"), ["quantized by compressed-tensors"]),
    "zero-3": (
        "plain",
        lambda state: {key: torch.zeros(0) for key in state},
        ["18 of 18 tensors are empty", "zero_to_fp32.py"],
    ),
    "an adapter within": (
        "plain",
        rename(f"{DENSE}.weight", f"{DENSE}.base_layer.weight"),
        ["contains a LoRA adapter inside", "merge_and_unload"],
    ),
    "all float64": (
        "plain",
        lambda state: {key: state[key].double() for key in state},
        ["is stored as float64", "The same holds for 16 more."],
    ),
    "another width": (
        "plain",
        lambda state: {key: torch.zeros(1, *state[key].shape) for key in state},
        ["has shape [1, 1024, 32]", "The same holds for 16 more."],
    ),
    "many strangers": (
        "plain",
        lambda state: {**state, **{f"v_head.{number}": torch.zeros(2) for number in range(9)}},
        ["'v_head.0' is not a tensor of the model", "The same holds for 8 more."],
    ),
}


@pytest.mark.parametrize("case", ALIKE)
def test_a_problem_of_all_tensors_is_reported_once(tmp_path: Path, case: str) -> None:
    variant, change, message = ALIKE[case]
    problem = problem_of(rewrite(make_variant(tmp_path, variant), change))
    assert [words for words in message if words not in problem] == []


@pytest.mark.parametrize(
    ("weights", "stated", "message"),
    [
        ("plain", 4, "the weights are not quantized"),
        ("plain", 8, "the weights are not quantized"),
        ("int4", 0, "the weights are int4"),
        ("int8", 0, "the weights are int8"),
        ("int8", 4, "the weights are int8"),
        ("int4", 8, "the weights are int4"),
    ],
)
def test_a_foreign_quantization_is_reported_once(
    tmp_path: Path, weights: str, stated: int, message: str
) -> None:
    directory = make_variant(tmp_path, weights)
    edit_config(directory, quantization_bit=stated)
    problem = problem_of(directory)
    assert f"'quantization_bit' is {stated}, but {message}" in problem
    right = problem.removesuffix(".").rpartition(" ")[2]
    edit_config(directory, quantization_bit=int(right))
    load_model(directory)


def test_a_wrong_config_beside_a_prefix_is_named(tmp_path: Path) -> None:
    """P-Tuning's script quantizes the base, and records that only in the config it saves."""
    directory = make_variant(tmp_path, "sharded")
    edit_config(directory, pre_seq_len=6, quantization_bit=4)
    prefix = torch.randn(6, 2 * 2 * 2 * 16)
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": prefix}, tmp_path / "pytorch_model.bin"
    )
    assert "Set it to 0." in problem_of(directory)
    edit_config(directory, quantization_bit=0)
    assert load_model(directory).prefix_kv is not None


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_config_of_another_quantization_is_named(tmp_path: Path, method: str) -> None:
    directory = make_variant(tmp_path, "plain")
    edit_config(directory, quantization_config={"quant_method": method})
    assert examine(directory).problems == ()  # its weights are plain all the same
    rewrite(directory, quantize("qweight", "scales"))
    assert f"quantized by {method}" in problem_of(directory)


@pytest.mark.parametrize(
    "files",
    [
        ["config.json"],
        ["tokenizer.model"],
        ["pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin"],
        ["pytorch_model.bin.index.json"],
        ["tokenizer_config.json"],
        ["config.json", "tokenizer.model", "pytorch_model-00002-of-00003.bin"],
    ],
)
def test_git_lfs_pointers_are_recognized(tmp_path: Path, files: list[str]) -> None:
    directory = make_variant(tmp_path, "sharded")
    for file in files:
        (directory / file).write_text(POINTER)
    problem = problem_of(directory)
    assert f"Run `git lfs pull` in {directory}" in problem
    assert "opy" not in problem
    assert (f"and {len(files) - 1} more files" in problem) == (len(files) > 1)


def test_pointers_of_safetensors_and_adapters_are_named(tmp_path: Path) -> None:
    directory, adapter = make_variant(tmp_path / "model", "safetensors"), tmp_path / "adapter"
    make_original_adapter(adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).write_text(POINTER)
        assert f"Run `git lfs pull` in {adapter}" in problem_of(directory, adapter=adapter)
    (directory / "model.safetensors").write_text(POINTER)
    assert f"Run `git lfs pull` in {directory}" in problem_of(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "pytorch_model.bin"])
@pytest.mark.parametrize("made", ["folder", "link", "page"])
def test_what_replaces_a_file_is_named(tmp_path: Path, name: str, made: str) -> None:
    directory = make_variant(tmp_path, "plain")
    file = directory / name
    file.unlink()
    if made == "folder":
        file.mkdir()
        (file / "inside.bin").write_bytes(b"x")
        message = "a folder (containing inside.bin), not a file"
    elif made == "link":
        file.symlink_to(tmp_path / "gone")
        message = f"a broken link to {tmp_path / 'gone'}"
    else:
        file.write_text("<!DOCTYPE html><html><body>429</body></html>")
        message = "a web page"
    problem = problem_of(directory)
    assert f"{file}: {message}" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatglm2-6b-q4_0.gguf", "llama.cpp"),
        ("chatglm2-ggml.bin", "chatglm.cpp"),
        ("model.onnx", "ONNX"),
        ("global_step900", "zero_to_fp32.py"),
        ("checkpoint-900", "checkpoint folder"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, message: str) -> None:
    directory = make_variant(tmp_path, "plain")
    (directory / "pytorch_model.bin").rename(directory / name)
    problem = problem_of(directory)
    assert name in problem and message in problem


def test_an_adapter_in_place_of_a_model_is_named(tmp_path: Path) -> None:
    make_original_adapter(tmp_path, base_model_name_or_path="THUDM/chatglm2-6b")
    assert "Set model.adapter to it, and model.path to its base (THUDM/chatglm2-6b)" in problem_of(
        tmp_path
    )
    write_json(tmp_path / "config.json", {"id2label": {"0": "bad", "1": "good"}})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter, not a checkpoint" in problem_of(tmp_path)


def test_weights_and_config_of_two_layouts_are_refused(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    save_file(load_model(directory).state_dict(), directory / "model.safetensors")
    (directory / "pytorch_model.bin").unlink()
    assert "layout, the weights in transformers' GLM" in problem_of(directory)


def other_tokenizer(directory: Path, pieces: int) -> None:
    """Append pieces to the tokenizer as bytes: Protobuf messages can be concatenated."""
    names = [f"piece{number:05}".encode() for number in range(pieces)]
    with (directory / "tokenizer.model").open("ab") as file:
        file.write(b"".join(b"\x0a\x0c\x0a\x0a" + name for name in names))


def test_a_tokenizer_much_too_small_is_noted(tmp_path: Path) -> None:
    for rows, doubtful in ((1024, False), (1100, False), (1200, True), (2808, True)):
        directory = make_checkpoint(tmp_path / str(rows), config={"padded_vocab_size": rows})
        diagnosis = examine(directory)
        assert diagnosis.problems == ()
        noted = f"1,005 ids, far fewer than the {rows:,} of the weights" in describe(diagnosis)
        assert noted == doubtful


@pytest.mark.parametrize("pieces", [0, 31_000, 63_000])
def test_published_weights_need_the_published_tokenizer(tmp_path: Path, pieces: int) -> None:
    directory = make_checkpoint(tmp_path, config={"padded_vocab_size": 65024})
    other_tokenizer(directory, pieces)
    assert "need the published tokenizer of 64,794" in problem_of(directory)


def tokenizer_of(words: dict[int, str], size: int) -> bytes:
    """The bytes of a sentencepiece model of `size` pieces, with `words` at their ids."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = []
    for number in range(size):
        word = words.get(number, f"piece{number:05}").encode()
        kind = {0: b"\x18\x02", 1: b"\x18\x03", 2: b"\x18\x03"}.get(number, b"")
        pieces.append(field(1, field(1, word) + kind))
    return b"".join(pieces)


PUBLISHED_WORDS = {0: "<unk>", 1: "<s>", 2: "</s>", 36_474: "▁", 54_591: "你好"}


@pytest.mark.parametrize("added", [0, 1, 230, 231])
def test_pieces_that_a_user_added_are_noted(tmp_path: Path, added: int) -> None:
    directory = make_checkpoint(tmp_path, config={"padded_vocab_size": 65024})
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(tokenizer_of(PUBLISHED_WORDS, 64_789 + added))
    diagnosis = examine(directory)
    noted = f"has {added} ids more than the published one" in describe(diagnosis)
    assert noted == (0 < added < 231)
    assert len(diagnosis.problems) == (added == 231)  # more than there are rows of weights


def test_published_pieces_with_other_ids_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, config={"padded_vocab_size": 65024})
    words = PUBLISHED_WORDS | {54_591: "x", 7: "你好"}
    (directory / "tokenizer.model").write_bytes(tokenizer_of(words, 64_800))
    problem = problem_of(directory)
    assert "is larger than the published tokenizer, but encodes 你好 as (36474, 7)" in problem


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"[gMASK]": 64790}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"64792": {"content": "sop"}}}),
        ("config.json", {"eos_token_id": 700}),
    ],
)
def test_ids_of_other_pieces_are_refused(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    directory = make_variant(tmp_path, "plain")
    before = read_json(directory / file) if (directory / file).exists() else {}
    write_json(directory / file, before | content)
    assert "It belongs to another checkpoint" in problem_of(directory)


def test_a_tokenizer_with_conflicting_pieces_is_refused(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    file = directory / "tokenizer.model"
    sound = file.read_bytes()
    file.write_bytes(sound + b"\x0a\x07\x0a\x05piece" * 2)
    assert "piece is already defined" in problem_of(directory)
    file.write_bytes(sound + b"\x0a\x09\x0a\x07[gMASK]")
    assert "has [gMASK] among its pieces" in problem_of(directory)
    shutil.copy(file, directory / "copy.model")
    file.write_bytes(b"IQ== 0\nIg== 1\n")
    assert "a tiktoken vocabulary" in problem_of(directory)


def test_damaged_optional_files_are_ignored(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json"):
        (directory / name).write_bytes(b"\xff\x00[")
    (directory / "special_tokens_map.json").mkdir()
    assert examine(directory).problems == ()
    assert json.dumps(read_checkpoint(directory).warnings) == "[]"
    assert os.path.isdir(directory)
