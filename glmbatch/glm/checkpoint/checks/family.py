"""Recognizes which model a folder belongs to, and refuses other models by name.

Other models have configs and folders that resemble ChatGLM2's. Without this check, one would be
reported as a long list of small faults. Reads small files; no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.shards import list_weight_files
from glmbatch.glm.files import (
    ADAPTER_CONFIG,
    POINTER,
    begins_with,
    read_bytes,
    read_json,
    small_json,
)

# Both share one architecture and one tokenizer. CodeGeeX2 writes code and has no chat format.
Family = Literal["ChatGLM2", "CodeGeeX2"]

# Patterns of the model names in configs and paths. In a path, the last match counts.
_NAMES = {
    "ChatGLM2": r"chatglm-?_?2",
    "CodeGeeX2": r"codegeex-?_?2",
    "ChatGLM3": r"chatglm-?_?3|longalign-6b",
    "CodeGeeX4": r"codegeex-?_?4",
    "VisualGLM": r"visualglm",
    "CogVLM": r"cogvlm|cogagent",
    "GLM-Edge": r"glm-?_?edge",
    "GLM-Z1": r"glm-?_?z1",
    "GLM-4": r"(?<!chat)glm-?_?4(?![\d.]|-?bit)",
    "GLM-4.1V": r"(?<!chat)glm-?_?4\.1v",
    "GLM-4.5": r"(?<!chat)glm-?_?4\.5",
    "ChatGLM-6B (the first generation)": r"chatglm-6b",
    "GLM-10B": r"glm-10b|glm-2b|glm-large|glm-roberta",
}
_SERVED = ("ChatGLM2", "CodeGeeX2")
# What follows the model's name in a repository's name, as in glm-4-9b-chat and chatglm3-6b-32k.
_SIZE = r"[-_]\d+b(?:[-_](?:\d+[km]|base|chat|int[48]))*"
# Config keys that only another model has, in either layout.
_KEYS = {
    "GLM-10B": ("block_position_encoding",),
    "VisualGLM": ("image_length", "vision_config", "image_size"),
    "ChatGLM-6B (the first generation)": (
        "inner_hidden_size",
        "position_encoding_2d",
        "max_sequence_length",
    ),
}
# GLM-4 and GLM-Edge have ChatGLM2's layouts, but vocabularies of other sizes.
_VOCABULARIES = {151_552: "GLM-4", 59_264: "GLM-Edge"}
# transformers' model types of other models, and the names that their makers use.
_MODEL_TYPES = {
    "glm4": "GLM-4",
    "glm4_moe": "GLM-4.5",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
}
# The roles of ChatGLM3 and GLM-4 in the files of a tokenizer. ChatGLM2 has none.
_ROLES = re.compile(r"<\|(?:user|assistant|observation|\{\{)")
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenization_chatglm.py",
)
_WHY = {"ChatGLM3": "It has another chat format and other end tokens. "}
# Ids that end a turn, which the configs of these models list with the end token.
_END_IDS = {"GLM-4": {"151329", "151336"}, "GLM-Edge": {"59246"}, "ChatGLM3": {"64795", "64797"}}
_MAX_SMALL_FILE = 2**22  # bytes

# What other programs save instead of weight files that are read here.
_OTHER_FORMATS = {
    "*.gguf": "of llama.cpp (GGUF)",
    "*ggml*.bin": "of chatglm.cpp (GGML)",
    "*.onnx": "an ONNX graph",
    "openvino_model.*": "of OpenVINO",
    "*.engine": "of TensorRT",
    "*.distcp": "of torch.distributed.checkpoint, which can convert it",
    "global_step*": "of DeepSpeed, whose zero_to_fp32.py makes pytorch_model.bin from it",
    "*model_states.pt": "of DeepSpeed, whose zero_to_fp32.py makes pytorch_model.bin from it",
    "checkpoint-*": "a training's checkpoint folder, which may contain them",
}


def refuse_pointers(directory: Path) -> None:
    """Raise InputError if files of the checkpoint in `directory` are Git LFS pointers."""
    files = [*directory.glob("*.json"), *directory.glob("*.model"), *list_weight_files(directory)]
    pointers = [file for file in sorted(files) if begins_with(file, POINTER)]
    if pointers:
        more = f" and {len(pointers) - 1} more files" if len(pointers) > 1 else ""
        raise InputError(
            f"{pointers[0]}{more}: Git LFS pointers, not the files themselves. "
            f"Run `git lfs pull` in {directory}."
        )


def refuse_other_folders(directory: Path) -> None:
    """Raise InputError if `directory`, without weight files, is an adapter or of another format."""
    if (directory / ADAPTER_CONFIG).is_file():
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = f" ({base})" if isinstance(base, str) and len(base) < 100 else ""
        raise InputError(
            f"{directory}: a LoRA adapter, not a checkpoint. "
            f"Set model.adapter to it, and model.path to its base{base}."
        )
    for pattern, what in _OTHER_FORMATS.items():
        file = next(iter(sorted(directory.glob(pattern))), None)
        if file is not None:
            raise InputError(
                f"{directory}: no weights in a supported format; {file.name} is {what}. "
                "Set model.path to the checkpoint that it was made from."
            )


def family_of(directory: Path, config: Mapping[str, Any]) -> tuple[Family, list[str]]:
    """The model that `directory` belongs to, and notes where that is uncertain.

    `config` is the content of its config.json. Raises InputError, naming the model, if it is
    neither ChatGLM2 nor CodeGeeX2.
    """
    named = list(_by_name(directory, config))
    roles = _file_with_roles(directory)
    if roles and not named:
        named = [("ChatGLM3", f"{roles} has its roles, such as <|user|>")]
    served = bool(named) and named[0][0] in _SERVED
    foreign = next(_by_structure(directory, config), None)
    # A foreign structure refuses the checkpoint under any name, but a foreign name is more precise.
    name, seen = foreign if foreign and (served or not named) else (*named, (None, ""))[0]
    if name is not None and name not in _SERVED:
        raise InputError(
            f"{directory / 'config.json'}: not a ChatGLM2 config but one of {name}: {seen}. "
            f"{_WHY.get(name, '')}Set model.path to a ChatGLM2 checkpoint."
        )
    notes = []
    if roles:
        notes.append(f"{roles} has roles of ChatGLM3 such as <|user|>; they are not used")
    if name is None and config.get("model_type") != "glm":  # the native layout names the model
        folder = directory.absolute().name
        hint = _name_in(folder)
        names = f"; its folder {folder[:80]!r} names {hint}" if hint else ""
        notes.append(
            "no file names the model ('_name_or_path' in config.json), so it is treated as "
            f"ChatGLM2{names}; ChatGLM3 has the same layout, and its answers would never end"
        )
    return ("CodeGeeX2" if name == "CodeGeeX2" else "ChatGLM2"), notes


def _by_structure(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each model whose distinctive structure the config has, with the evidence."""
    kind = config.get("model_type")
    for key in ("padded_vocab_size", "vocab_size"):
        if (size := config.get(key)) in _VOCABULARIES:
            yield _VOCABULARIES[size], f"{key!r} is {size}"
    if kind in _MODEL_TYPES:
        yield _MODEL_TYPES[kind], f"'model_type' is {kind!r}"
    yield from _by_end_ids(directory)
    if "vision_config" in config and _is_original(config):
        yield "GLM-4V", "it has 'vision_config'"
    if _is_original(config):
        return
    if isinstance(kind, str) and kind not in ("chatglm", "glm", "") and len(kind) < 40:
        yield kind, f"'model_type' is {kind!r}"
    for name, keys in _KEYS.items():
        for key in keys:
            if key in config:
                yield name, f"it has {key!r}"


def _by_end_ids(directory: Path) -> Iterator[tuple[str, str]]:
    for file in ("config.json", "generation_config.json"):
        ends = small_json(directory / file).get("eos_token_id")
        for name, ids in _END_IDS.items():
            if isinstance(ends, list) and not ids.isdisjoint(map(str, ends)):
                yield name, f"'eos_token_id' of {file} is {str(ends)[:60]}"


def _is_original(config: Mapping[str, Any]) -> bool:
    return {"num_layers", "padded_vocab_size"} <= config.keys()


def _by_name(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each model that a file or folder names, with the evidence, the most reliable first."""
    stated: list[tuple[str, object]] = [("'_name_or_path'", config.get("_name_or_path"))]
    # transformers writes the repository before a class: "THUDM/chatglm3-6b--modeling_...".
    classes = config.get("auto_map")
    if isinstance(classes, dict):
        stated += [("'auto_map'", value) for value in classes.values() if "--" in str(value)]
    tokenizer = small_json(directory / "tokenizer_config.json")
    stated.append(("'name_or_path' of tokenizer_config.json", tokenizer.get("name_or_path")))
    # A folder of the hub's cache is named after the repository.
    parts = directory.absolute().parts
    cached = [part for part in parts if part.startswith("models--")]
    own = [part for part in parts[-1:] if _names_itself(part)]
    stated += [("its folder", name) for name in (*cached, *own)]
    for place, value in stated:
        name = _name_in(value) if isinstance(value, str) else None
        # The models of _KEYS never had ChatGLM2's layout, so this is the name of an older folder.
        if name is not None and not (name in _KEYS and _is_original(config)):
            yield name, f"{place} is {str(value)[:80]!r}"


def _names_itself(folder: str) -> bool:
    """Whether a folder is named after the model in it; `reviews-glm4` is not."""
    name = _name_in(folder)
    if name is None or name in _SERVED:
        return True
    return re.fullmatch(rf"(?:{_NAMES[name]}){_SIZE}", folder.lower()) is not None


def _name_in(text: str) -> str | None:
    """The last model that `text` names, or None."""
    found: tuple[int, str] | None = None
    for name, pattern in _NAMES.items():
        for match in re.finditer(pattern, text.lower()):
            if found is None or match.start() > found[0]:
                found = match.start(), name
    return found[1] if found else None


def _file_with_roles(directory: Path) -> str | None:
    for name in _TOKENIZER_FILES:
        file = directory / name
        if not file.is_file() or file.stat().st_size > _MAX_SMALL_FILE:
            continue
        if _ROLES.search(read_bytes(file).decode(errors="replace")):
            return name
    return None
