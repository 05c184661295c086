"""Whose checkpoint a folder is. Another model's is named once, before any of its many small faults.

Other models have configs and folders that resemble ours. Reads small files; no tensors.
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

# Both have one architecture and one tokenizer. CodeGeeX2 writes code, and knows no chat rounds.
Family = Literal["ChatGLM2", "CodeGeeX2"]

# What the names that trainers keep in a config say; in a path the last of them counts.
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
# What follows the model in the name of a repository: glm-4-9b-chat, chatglm3-6b-32k.
_SIZE = r"[-_]\d+b(?:[-_](?:\d+[km]|base|chat|int[48]))*"
# Keys that only another model's config has, in either layout.
_KEYS = {
    "GLM-10B": ("block_position_encoding",),
    "VisualGLM": ("image_length", "vision_config", "image_size"),
    "ChatGLM-6B (the first generation)": (
        "inner_hidden_size",
        "position_encoding_2d",
        "max_sequence_length",
    ),
}
# GLM-4 and GLM-Edge have our layouts with vocabularies of their own.
_VOCABULARIES = {151_552: "GLM-4", 59_264: "GLM-Edge"}
# Model types of transformers that have nothing of ours, and how their makers write them.
_MODEL_TYPES = {
    "glm4": "GLM-4",
    "glm4_moe": "GLM-4.5",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
}
# The roles of ChatGLM3 and GLM-4, as a tokenizer's files list them. ChatGLM2's have none.
_ROLES = re.compile(r"<\|(?:user|assistant|observation|\{\{)")
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenization_chatglm.py",
)
_WHY = {"ChatGLM3": "It has another chat form and other end tokens. "}
# Ends of a turn, which a config lists beside the end of a text.
_END_IDS = {"GLM-4": {"151329", "151336"}, "GLM-Edge": {"59246"}, "ChatGLM3": {"64795", "64797"}}
_MAX_SMALL_FILE = 2**22  # bytes


# What other programs keep in a folder in place of our weight files.
_OTHER_FORMATS = {
    "*.gguf": "of llama.cpp (GGUF)",
    "*ggml*.bin": "of chatglm.cpp (GGML)",
    "*.onnx": "an ONNX graph",
    "openvino_model.*": "of OpenVINO",
    "*.engine": "of TensorRT",
    "*.distcp": "of torch.distributed.checkpoint, which converts it",
    "global_step*": "of DeepSpeed, whose zero_to_fp32.py makes pytorch_model.bin from it",
    "*model_states.pt": "of DeepSpeed, whose zero_to_fp32.py makes pytorch_model.bin from it",
    "checkpoint-*": "a folder of a training, which may hold them",
}


def refuse_pointers(directory: Path) -> None:
    """InputError when files that are to be read are only Git LFS pointers."""
    files = [*directory.glob("*.json"), *directory.glob("*.model"), *list_weight_files(directory)]
    pointers = [file for file in sorted(files) if begins_with(file, POINTER)]
    if pointers:
        more = f" and {len(pointers) - 1} more files" if len(pointers) > 1 else ""
        raise InputError(
            f"{pointers[0]}{more}: Git LFS pointers, not the files themselves. "
            f"Run `git lfs pull` in {directory}."
        )


def refuse_other_folders(directory: Path) -> None:
    """InputError when `directory` holds no checkpoint, but something that people take for one."""
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
                f"{directory}: no weights that are read here; {file.name} is {what}. "
                "Set model.path to the checkpoint that it was made from."
            )


def family_of(directory: Path, config: Mapping[str, Any]) -> tuple[Family, list[str]]:
    """Whose checkpoint it is by all that names it, and notes where that is little.

    InputError with the name of a model that is not served.
    """
    named = list(_by_name(directory, config))
    roles = _file_with_roles(directory)
    if roles and not named:
        named = [("ChatGLM3", f"{roles} has its roles, such as <|user|>")]
    served = bool(named) and named[0][0] in _SERVED
    foreign = next(_by_structure(directory, config), None)
    # A foreign structure is foreign whatever the name, but a name says more.
    name, seen = foreign if foreign and (served or not named) else (*named, (None, ""))[0]
    if name is not None and name not in _SERVED:
        raise InputError(
            f"{directory / 'config.json'}: not a ChatGLM2 config but that of {name}: {seen}. "
            f"{_WHY.get(name, '')}Set model.path to a ChatGLM2 checkpoint."
        )
    notes = []
    if roles:
        notes.append(f"{roles} has roles such as <|user|>, as of ChatGLM3; they are not used")
    if name is None and config.get("model_type") != "glm":  # which our own classes write
        folder = directory.absolute().name
        hint = _name_in(folder)
        names = f"; its folder {folder[:80]!r} names {hint}" if hint else ""
        notes.append(
            "no file names the model ('_name_or_path' of config.json), so it is taken for "
            f"ChatGLM2{names}; ChatGLM3 has the same layout, and would not end its answers"
        )
    return ("CodeGeeX2" if name == "CodeGeeX2" else "ChatGLM2"), notes


def _by_structure(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What only another model's config has."""
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
    """What each place that may name the model says, the surest first."""
    stated: list[tuple[str, object]] = [("'_name_or_path'", config.get("_name_or_path"))]
    # transformers puts the repository before a class of it: "THUDM/chatglm3-6b--modeling_...".
    classes = config.get("auto_map")
    if isinstance(classes, dict):
        stated += [("'auto_map'", value) for value in classes.values() if "--" in str(value)]
    tokenizer = small_json(directory / "tokenizer_config.json")
    stated.append(("'name_or_path' of tokenizer_config.json", tokenizer.get("name_or_path")))
    # The hub's cache has the repository in a folder's name.
    parts = directory.absolute().parts
    cached = [part for part in parts if part.startswith("models--")]
    own = [part for part in parts[-1:] if _names_itself(part)]
    stated += [("its folder", name) for name in (*cached, *own)]
    for place, value in stated:
        name = _name_in(value) if isinstance(value, str) else None
        # Those models never had our layout: the name is that of an old folder.
        if name is not None and not (name in _KEYS and _is_original(config)):
            yield name, f"{place} is {str(value)[:80]!r}"


def _names_itself(folder: str) -> bool:
    """Whether a folder's name says what lies in it: `reviews-glm4` says what it is about."""
    name = _name_in(folder)
    if name is None or name in _SERVED:
        return True
    return re.fullmatch(rf"(?:{_NAMES[name]}){_SIZE}", folder.lower()) is not None


def _name_in(text: str) -> str | None:
    """The model that `text` names last; None when it names none."""
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
