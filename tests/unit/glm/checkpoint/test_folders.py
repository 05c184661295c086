"""Folders as users make them load and equal the reference's forward, or fail with one message.

FOLDERS sets the number of folders, FOLDERS_SEED the first seed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import examine
from glmbatch.glm.checkpoint.load import load_model
from tests.unit.glm.checkpoints import (
    GOLDENS,
    VARIANTS,
    edit_config,
    make_variant,
    read_json,
    write_json,
)
from tests.unit.glm.reference import reference_logits
from tests.unit.glm.tiny_glm import whole_logits

IDS = [1001, 1003, 623, 94, 85, 627, 645]
FOLDERS = int(os.environ.get("FOLDERS", "40"))
FIRST_SEED = int(os.environ.get("FOLDERS_SEED", "0"))
OUTPUT = "transformer.output_layer.weight"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:e7dc\nsize 1018370\n"
State = dict[str, torch.Tensor]


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def weights_of(directory: Path) -> list[Path]:
    return [path for path in files_of(directory) if path.suffix in (".bin", ".safetensors")]


def load_file_state(file: Path) -> State:
    try:
        state: State = torch.load(file, weights_only=True)
    except Exception as error:  # an edit before this one damaged it
        raise OSError(file) from error
    return state


def edit_states(directory: Path, change: Callable[[State], State]) -> None:
    """Apply `change` to the tensors of each .bin file, as a trainer that saves shards does."""
    for file in weights_of(directory):
        if file.suffix == ".bin":
            torch.save(change(load_file_state(file)), file)


def prefixed(directory: Path, dice: random.Random) -> None:
    prefix = dice.choice(["module.", "base_model.model.", "_orig_mod.", "model.", "transformer."])
    edit_states(directory, lambda state: {prefix + key: state[key] for key in state})


def one_renamed(directory: Path, dice: random.Random) -> None:
    part = dice.choice([".0.", ".base_layer.", ".module.", ".lora_A.default."])

    def change(state: State) -> State:
        key = dice.choice(list(state))
        head, _, last = key.rpartition(".")
        return {(head + part + last if name == key else name): state[name] for name in state}

    edit_states(directory, change)


def alias(directory: Path, dice: random.Random) -> None:
    name = dice.choice(["lm_head.weight", "transformer.lm_head.weight", "tied.weight"])
    factor = dice.choice([1, 1, 1, 1.5])

    def change(state: State) -> State:
        if OUTPUT in state:
            state[name] = state[OUTPUT] * factor
        return state

    edit_states(directory, change)


def retyped(directory: Path, dice: random.Random) -> None:
    dtype = dice.choice([torch.float64, torch.int8, torch.uint8, torch.bfloat16, torch.int32])
    all_of_them = dice.random() < 0.5

    def change(state: State) -> State:
        return {
            key: state[key].to(dtype) if all_of_them or dice.random() < 0.1 else state[key]
            for key in state
        }

    edit_states(directory, change)


def reshaped(directory: Path, dice: random.Random) -> None:
    def change(state: State) -> State:
        key = dice.choice(list(state))
        odd = [
            state[key][None],
            state[key][:0],
            state[key].flatten(),
            state[key].repeat(2, *[1] * (state[key].dim() - 1)),
        ]
        return state | {key: dice.choice(odd)}

    edit_states(directory, change)


def not_finite(directory: Path, dice: random.Random) -> None:
    def change(state: State) -> State:
        tensor = state[dice.choice(list(state))]
        if tensor.is_floating_point():
            tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([torch.nan, torch.inf])
        return state

    edit_states(directory, change)


def dropped_tensor(directory: Path, dice: random.Random) -> None:
    gone = dice.choice(["rotary", "0.mlp", "layernorm", "output_layer", "prefix", "classifier"])
    edit_states(directory, lambda state: {key: state[key] for key in state if gone not in key})


def extra_tensor(directory: Path, dice: random.Random) -> None:
    names = ["v_head.weight", "transformer.encoder.layers.0.extra.qweight", "step", "a.SCB"]
    name = dice.choice(names)
    edit_states(directory, lambda state: state | {name: torch.zeros(2, 2)})


def replaced(directory: Path, dice: random.Random) -> None:
    file = dice.choice(files_of(directory))
    kind = dice.choice(["pointer", "page", "folder", "link", "gone", "empty", "cut"])
    content = file.read_bytes()
    file.unlink()
    if kind == "pointer":
        file.write_text(POINTER)
    elif kind == "page":
        file.write_text("<html>Access denied</html>")
    elif kind == "folder":
        file.mkdir()
        (file / file.name).write_bytes(content)
    elif kind == "link":
        aside = directory / "blobs"
        aside.mkdir(exist_ok=True)
        if dice.random() < 0.6:
            (aside / file.name).write_bytes(content)
        file.symlink_to(aside / file.name)
    elif kind != "gone":
        file.write_bytes(b"" if kind == "empty" else content[: len(content) // 2])


def extra_file(directory: Path, dice: random.Random) -> None:
    names = [
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model-old.bin",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "adapter_config.json",
        "model.gguf",
        "tokenizer.json",
        "README.md",
        ".gitattributes",
        "checkpoint-9",
        "model-00001-of-00002.safetensors",
        "special_tokens_map.json",
    ]
    name = dice.choice(names)
    if not (directory / name).exists():
        (directory / name).write_bytes(dice.choice([b"", b"{}", b"PK\x03\x04", POINTER.encode()]))


def second_format(directory: Path, dice: random.Random) -> None:
    state: State = {}
    for file in weights_of(directory):
        if file.suffix == ".bin":
            state |= load_file_state(file)
    if state and not (directory / "model.safetensors").exists():
        if dice.random() < 0.3:  # of another training
            state = {key: tensor + 1 for key, tensor in state.items()}
        save_file(
            {key: state[key].contiguous().clone() for key in state}, directory / "model.safetensors"
        )


def renamed_file(directory: Path, dice: random.Random) -> None:
    file = dice.choice(files_of(directory))
    names = ["pytorch_model.bin", "model.safetensors", f"{file.name}.bak", file.name.upper()]
    target = directory / dice.choice(names)
    if not target.exists():
        file.rename(target)


def index_of_others(directory: Path, dice: random.Random) -> None:
    for file in directory.glob("*.index.json"):
        index = read_json(file)
        key = dice.choice(list(index["weight_map"]))
        odd = ["missing.bin", "../x.bin", 3, "pytorch_model-00001-of-00003.bin", None]
        index["weight_map"][dice.choice([key, "surplus"])] = dice.choice(odd)
        write_json(file, index)


def other_config(directory: Path, dice: random.Random) -> None:
    if not (directory / "config.json").is_file():
        return
    key, value = dice.choice(
        [
            ("_name_or_path", "THUDM/chatglm3-6b"),
            ("_name_or_path", "THUDM/codegeex2-6b"),
            ("_name_or_path", "/data/out/checkpoint-3000"),
            ("_name_or_path", "THUDM/glm-4-9b"),
            ("model_type", "llama"),
            ("quantization_bit", dice.choice([0, 4, 8, 3])),
            ("quantization_config", {"quant_method": "gptq"}),
            ("pre_seq_len", 6),
            ("problem_type", "regression"),
            ("eos_token_id", dice.choice([2, 600, [2, 64795], None])),
            ("padded_vocab_size", dice.choice([1024, 2048, 65024, 151552])),
            ("num_layers", dice.choice([1, 3])),
            ("torch_dtype", "bfloat16"),
            ("id2label", dice.choice([{"0": "a"}, {"0": "a", "1": "a"}, {"a": 1}])),
            ("layernorm_epsilon", "1e-5"),
        ]
    )
    edit_config(directory, **{key: value})


def other_tokenizer(directory: Path, dice: random.Random) -> None:
    file = directory / "tokenizer.model"
    if dice.random() < 0.5 and not file.is_dir():
        file.unlink(missing_ok=True)
        shutil.copy(GOLDENS / dice.choice(["classifier", "int4"]) / "tokenizer.model", file)
    else:
        write_json(directory / "added_tokens.json", {"[gMASK]": dice.choice([1001, 64790])})


EDITS = (
    prefixed, one_renamed, alias, retyped, reshaped, not_finite, dropped_tensor, extra_tensor,
    replaced, extra_file, second_format, renamed_file, index_of_others, other_config,
    other_tokenizer,
)  # fmt: skip


def stored_state(directory: Path) -> State:
    """The tensors of the weight files in `directory`, for the reference."""
    from safetensors.torch import load_file

    names = {path.name: path for path in weights_of(directory)}
    kind = ".safetensors" if any(name.startswith("model") for name in names) else ".bin"
    state: State = {}
    for index in directory.glob("*.index.json"):
        if kind in index.name:
            shards = set(read_json(index)["weight_map"].values())
            names = {
                name: names[name]
                for name in names
                if name in shards or name == f"pytorch_model{kind}"
            }
    for name, path in names.items():
        if name.endswith(kind) and name.startswith(("model", "pytorch_model")):
            state |= load_file(path) if kind == ".safetensors" else load_file_state(path)
    return state


def test_folders_equal_the_reference_or_are_refused(tmp_path: Path) -> None:
    loaded = 0
    for seed in range(FIRST_SEED, FIRST_SEED + FOLDERS):
        dice = random.Random(seed)
        directory = make_variant(tmp_path / "model", dice.choice(list(VARIANTS)), seed=seed)
        edits = dice.sample(EDITS, dice.choice([1, 1, 1, 2, 3]))
        label = f"seed {seed}: {[edit.__name__ for edit in edits]}"
        for edit in edits:
            try:
                edit(directory, dice)
            except (OSError, ValueError, KeyError, IndexError, RuntimeError):
                continue  # an earlier edit removed what this one changes
        loaded += loads_like_reference(directory, label)
        shutil.rmtree(directory)
    assert loaded >= FOLDERS / 10


def loads_like_reference(directory: Path, label: str) -> bool:
    """Whether the folder loads. Asserts that it equals the reference, or else that it says why."""
    diagnosis = examine(directory)
    try:
        model = load_model(directory)
    except InputError as error:
        for problem in (str(error), *diagnosis.problems):
            line = problem.replace(str(directory), "model")
            assert "\n" not in line and len(line) <= 300, f"{label}: {line}"
        # Without a tokenizer, the weights load, but the doctor reports it as a problem.
        assert diagnosis.problems, f"{label}: {error}"
        return False
    other_problems = [line for line in diagnosis.problems if "tokenizer.model" not in line]
    assert other_problems == [], f"{label}: {other_problems}"
    state = {key: tensor for key, tensor in stored_state(directory).items()}
    config = read_json(directory / "config.json")
    if "id2label" not in config:
        state.pop("classifier_head.weight", None)
    expected = reference_logits(state, config, IDS)
    logits = whole_logits(model, IDS)
    torch.testing.assert_close(
        logits, expected.view_as(logits), atol=1e-4, rtol=0, msg=lambda text: f"{label}: {text}"
    )
    return True
