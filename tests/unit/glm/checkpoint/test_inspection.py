"""Every invalid checkpoint is refused before use, with one message that names file and key."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import inspect_checkpoint, load_model, read_checkpoint
from tests.unit.glm.checkpoints import (
    CLASSIFIER,
    GOLDENS,
    VARIANTS,
    edit_config,
    make_checkpoint,
    make_variant,
    read_json,
    read_state,
    write_json,
)

EMBEDDING = "transformer.embedding.word_embeddings.weight"
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
INDEX = "pytorch_model.bin.index.json"
SMALL = {
    "num_layers": 1,
    "hidden_size": 8,
    "ffn_hidden_size": 8,
    "kv_channels": 4,
    "padded_vocab_size": 1010,
}


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = read_state(directory)
        change(state)
        torch.save(state, directory / "pytorch_model.bin")

    return edit


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = read_json(directory / INDEX)
        change(index["weight_map"])
        write_json(directory / INDEX, index)

    return edit


def edit_shard(directory: Path) -> None:
    file = directory / "pytorch_model-00002-of-00003.bin"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"surplus": torch.zeros(1)}, file)


def repeat_a_tensor(directory: Path) -> None:
    """Index and shards match, but the prefix's file has a tensor that is also in a shard."""
    edit_config(directory, pre_seq_len=2)
    key = "transformer.prefix_encoder.embedding.weight"
    edit_index(lambda names: names.update({key: "pytorch_model-00002-of-00003.bin"}))(directory)
    file = directory / "pytorch_model-00002-of-00003.bin"
    prefix = {key: torch.zeros(2, 128)}
    torch.save(torch.load(file, weights_only=True) | prefix, file)
    torch.save(prefix, directory / "pytorch_model.bin")


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return cut


# The kind of valid checkpoint, the change to it, and what the message must name.
FAULTS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "unknown tensor": (
        "plain",
        edit_weights(lambda state: state.update(surplus=torch.zeros(2))),
        ["pytorch_model.bin", "'surplus'"],
    ),
    "missing tensor": ("plain", edit_weights(lambda state: state.pop(QKV)), [QKV]),
    "many missing tensors": (
        "plain",
        edit_weights(lambda state: [state.pop(key) for key in list(state) if ".1." in key]),
        ["layers.1.input_layernorm.weight", "and 6 more"],
    ),
    "wrong shape": (
        "plain",
        edit_weights(lambda state: state.update({QKV: torch.zeros(128, 31)})),
        ["pytorch_model.bin", QKV, "[128, 31]", "[128, 32]"],
    ),
    "wrong dtype": (
        "plain",
        edit_weights(lambda state: state.update({QKV: torch.zeros(128, 32, dtype=torch.int64)})),
        ["pytorch_model.bin", QKV, "int64"],
    ),
    "not a tensor": (
        "plain",
        edit_weights(lambda state: state.update({QKV: 3})),
        ["pytorch_model.bin", QKV, "int"],
    ),
    "nested": (
        "plain",
        lambda directory: torch.save(
            {"state_dict": read_state(directory)}, directory / "pytorch_model.bin"
        ),
        ["pytorch_model.bin", "'state_dict'"],
    ),
    "a list": (
        "plain",
        lambda directory: torch.save([1], directory / "pytorch_model.bin"),
        ["pytorch_model.bin", "list"],
    ),
    "quantized weights without their scale": (
        "int4",
        edit_weights(lambda state: state.pop(f"{QKV}_scale")),
        [f"{QKV}_scale"],
    ),
    "weights that are not quantized as stated": (
        "int8",
        edit_weights(lambda state: state.update({QKV: torch.zeros(128, 32)})),
        [QKV, "float32", "int8"],
    ),
    "quantized weights that the config does not state": (
        "int8",
        lambda directory: edit_config(directory, quantization_bit=None),
        ["pytorch_model.bin", "query_key_value.weight", "int8"],
    ),
    "truncated zip": ("plain", truncate("pytorch_model.bin", 0.9), ["pytorch_model.bin"]),
    "truncated legacy file": ("legacy", truncate("pytorch_model.bin", 0.9), ["pytorch_model.bin"]),
    "truncated safetensors": (
        "safetensors",
        truncate("model.safetensors", 0.9),
        ["model.safetensors"],
    ),
    "empty weights file": ("plain", truncate("pytorch_model.bin", 0), ["pytorch_model.bin"]),
    "missing shard": (
        "sharded",
        lambda directory: (directory / "pytorch_model-00002-of-00003.bin").unlink(),
        [INDEX, "pytorch_model-00002-of-00003.bin"],
    ),
    "shards without index": ("sharded", lambda directory: (directory / INDEX).unlink(), [INDEX]),
    "index and one whole file": (
        "sharded",
        lambda directory: torch.save(read_state(directory), directory / "pytorch_model.bin"),
        ["pytorch_model.bin", INDEX],
    ),
    "index that climbs out": (
        "sharded",
        edit_index(lambda names: names.update({EMBEDDING: "../pytorch_model-00001-of-00003.bin"})),
        [INDEX, EMBEDDING, "'../"],
    ),
    "index with an absolute name": (
        "sharded",
        edit_index(lambda names: names.update({EMBEDDING: "/etc/passwd"})),
        [INDEX, EMBEDDING],
    ),
    "index that names no string": (
        "sharded",
        edit_index(lambda names: names.update({EMBEDDING: 7})),
        [INDEX, EMBEDDING],
    ),
    "index of a key its shard lacks": (
        "sharded",
        edit_index(lambda names: names.update(surplus="pytorch_model-00002-of-00003.bin")),
        ["pytorch_model-00002-of-00003.bin", "'surplus'"],
    ),
    "shard with a key its index lacks": (
        "sharded",
        edit_shard,
        ["pytorch_model-00002-of-00003.bin", "'surplus'"],
    ),
    "a tensor in two files": ("sharded", repeat_a_tensor, ["prefix_encoder.embedding.weight"]),
    "index without a map": (
        "sharded",
        lambda directory: write_json(directory / INDEX, {}),
        [INDEX, "'weight_map'"],
    ),
    "no weights": (
        "plain",
        lambda directory: (directory / "pytorch_model.bin").unlink(),
        ["no weights"],
    ),
    "no config": (
        "plain",
        lambda directory: (directory / "config.json").unlink(),
        ["config.json", "no such file"],
    ),
    "config that is no JSON": ("plain", truncate("config.json", 0.5), ["config.json", "JSON"]),
    "config that is a list": (
        "plain",
        lambda directory: (directory / "config.json").write_text("[]"),
        ["config.json", "list"],
    ),
    "prefix without its base": (
        "prefix",
        edit_weights(lambda state: [state.pop(key) for key in list(state) if "prefix" not in key]),
        ["trained prefix", "base"],
    ),
    "prefix that the config does not state": (
        "prefix",
        lambda directory: edit_config(directory, pre_seq_len=None),
        ["pytorch_model.bin", "prefix_encoder.embedding.weight"],
    ),
    "classifier without its head": (
        "classifier",
        edit_weights(lambda state: [state.pop(key) for key in list(state) if "classifier" in key]),
        ["classifier_head.weight"],
    ),
    "head without its bias": (
        "classifier",
        edit_weights(lambda state: state.pop("classifier_head.bias")),
        ["head.bias"],
    ),
    "head of other labels": (
        "classifier",
        lambda directory: edit_config(directory, id2label={"0": "no", "1": "yes"}),
        ["classifier_head.weight", "[3, 32]", "[2, 32]"],
    ),
    "tokenizer that is damaged": ("plain", truncate("tokenizer.model", 0.5), ["tokenizer.model"]),
    "tokenizer of a larger model": (
        "plain",
        lambda directory: shutil.copy(GOLDENS / "classifier" / "tokenizer.model", directory),
        ["tokenizer.model", "1218", "1024"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_checkpoint_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    variant, spoil, named = FAULTS[fault]
    directory = make_variant(tmp_path, variant)
    read_checkpoint(directory)
    spoil(directory)
    with pytest.raises(InputError) as refusal:
        load_model(directory)
    message = str(refusal.value)
    assert str(directory) in message
    assert "\n" not in message
    assert [name for name in named if name not in message] == []


def test_a_path_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"not a directory\. Set model\.path"):
            load_model(str(path))


class Intruder:
    """A pickle of this class writes a file when it is loaded unsafely."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weight_file_never_runs(tmp_path: Path, zipped: bool) -> None:
    directory = make_variant(tmp_path / "model", "plain")
    spoiled = read_state(directory) | {"surplus": Intruder(tmp_path / "trace")}
    torch.save(spoiled, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for read in (load_model, read_checkpoint):
        with pytest.raises(
            InputError,
            match=r"pytorch_model\.bin: damaged, or contains something other than tensors",
        ):
            read(directory)
    assert not (tmp_path / "trace").exists()


def test_all_problems_are_found_at_once(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    edit_weights(lambda state: state.update({QKV: torch.zeros(1), "surplus": torch.zeros(1)}))(
        directory
    )
    truncate("tokenizer.model", 0.5)(directory)
    checkpoint, problems = inspect_checkpoint(directory)
    assert checkpoint is None
    for name in (QKV, "surplus", "tokenizer.model"):
        assert any(name in problem for problem in problems)
    edit_config(directory, num_layers="two", rmsnorm=False, quantization_bit=3)
    _, problems = inspect_checkpoint(directory)
    for key in ("num_layers", "rmsnorm", "quantization_bit"):
        assert any(key in problem for problem in problems)


def test_harmless_oddities_are_warnings(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, config=CLASSIFIER | {"interleaved_qkv": False})
    save_file(read_state(directory), directory / "model.safetensors")
    (directory / "tokenizer.model").unlink()
    warnings = read_checkpoint(directory).warnings
    for named in ("interleaved_qkv", "pytorch_model.bin", "tokenizer.model"):
        assert any(named in warning for warning in warnings)
    assert len(warnings) == 3


def test_a_classifier_needs_no_language_head(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "classifier")
    edit_weights(lambda state: state.pop("transformer.output_layer.weight"))(directory)
    assert load_model(directory).score.out_features == 3


@pytest.mark.parametrize("name", ["plain", "legacy", "safetensors", "sharded"])
def test_damaged_bytes_are_refused_or_load(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path, config=SMALL, files=VARIANTS[name].get("files", "bin"))
    sound = {file: file.read_bytes() for file in sorted(directory.iterdir())}
    for seed in range(int(os.environ.get("FUZZ", "40"))):
        dice = random.Random(seed)
        file = dice.choice(list(sound))
        spoiled = bytearray(sound[file])
        if dice.random() < 0.3:
            del spoiled[dice.randrange(len(spoiled)) :]
        else:
            for _ in range(dice.choice((1, 1, 20))):
                # Headers and directories are at the two ends of a file.
                place = min(int(dice.expovariate(1 / 600)), len(spoiled) - 1)
                spoiled[place if dice.random() < 0.5 else -1 - place] = dice.randrange(256)
        file.write_bytes(spoiled)
        try:
            load_model(directory)
        except InputError as error:
            assert "\n" not in str(error)
        file.write_bytes(sound[file])


def test_only_files_in_the_index_are_loaded(
    tmp_path: Path,
) -> None:
    directory = make_variant(tmp_path, "sharded")
    torch.save({"surplus": torch.zeros(1)}, directory / "pytorch_model-old.bin")
    assert read_checkpoint(directory).warnings == (
        f"pytorch_model-old.bin is not listed in {INDEX}, so it is not used",
    )
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-old.bin"}}))
    with pytest.raises(InputError, match="has no 'a'"):
        read_checkpoint(directory)


def test_transposed_weights_load_correctly(tmp_path: Path) -> None:
    """A tensor that was saved as a transposed view keeps its strides in the file."""
    directory = make_variant(tmp_path, "multi-head")
    expected = load_model(directory).state_dict()
    edit_weights(lambda state: state.update({QKV: state[QKV].T.contiguous().T}))(directory)
    loaded = load_model(directory).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
