"""Reads a LoRA adapter as peft saves it and checks it against the checkpoint that it changes.

An adapter may name its modules in either layout, whatever the checkpoint's layout. Everything in
its files is checked before use. See https://arxiv.org/abs/2106.09685 for LoRA.

    R rank   I features in   O features out
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from glmbatch.glm.checkpoint.architecture import Architecture, Layout
from glmbatch.glm.checkpoint.config_check import (
    ConfigCheck,
    Predicts,
    default_labels,
    head_predicts,
)
from glmbatch.glm.checkpoint.layout import HEAD_KEYS, TensorSpec, list_tensors, split_rows
from glmbatch.glm.checkpoint.shards import Header, read_headers, read_tensors
from glmbatch.glm.device import DTYPE_BYTES
from glmbatch.glm.files import ADAPTER_CONFIG, ADAPTER_LABELS, ADAPTER_WEIGHTS, read_json

# peft wraps the model twice, and every saved name begins with the names of both wrappers.
PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_ADVICE = "Set model.adapter to one that was trained on this model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A valid adapter, without its weights. Tensors and modules have their names in `layout`.

    `scales` has the factor of each adapted linear module, `whole` the tensors that are replaced
    entirely. `labels` are those of the adapter's classification head; empty without one. `predicts`
    is what that head was trained for, None if nothing beside it says so.
    """

    path: Path
    layout: Layout
    tensors: Mapping[str, Header]
    scales: Mapping[str, float]
    whole: tuple[str, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    predicts: Predicts | None = None

    @property
    def file(self) -> Path:
        """The path of its weights."""
        return self.path / ADAPTER_WEIGHTS

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, in ascending order."""
        return tuple(sorted({self.tensors[module + _A].shape[0] for module in self.scales}))


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one weight: `scale` * b_OR @ a_RI, in float32."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    def added_to(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The updated weight [O, I] in float32, whatever the dtype of `weight_OI`."""
        return torch.addmm(weight_OI.float(), self.b_OR, self.a_RI, alpha=self.scale)


def read_adapter(
    path: str | Path, architecture: Architecture, layout: Layout, has_head: bool
) -> Adapter:
    """The adapter in directory `path`, checked against a checkpoint of this kind.

    Raises InputError for the first problem.
    """
    directory = Path(path)
    _require_files(directory)
    where = directory / ADAPTER_CONFIG
    file = directory / ADAPTER_WEIGHTS
    config = read_adapter_config(read_json(where), str(where))
    tensors = _tensors(file)
    made_on = _layout_of(tensors)
    _refuse_lost_order(file, layout, made_on, architecture)
    head = HEAD_KEYS[made_on]
    labels: tuple[str, ...] = ()
    warnings: list[str] = []
    if head in tensors:
        labels, warnings = _labels(directory, architecture, tensors[head])
    has_head = has_head or head in tensors or config.saves(_module(head))
    if config.classifies and not has_head:
        raise InputError(
            f"{where}: 'task_type' is 'SEQ_CLS', but neither the adapter nor the checkpoint has a "
            "head. Set model.path to a checkpoint with one, or model.adapter to one that was saved "
            "with its head."
        )
    # In the layout that the adapter was trained in, which may differ from the checkpoint's.
    specs = _specs(replace(architecture, labels=labels or architecture.labels), made_on, has_head)
    _refuse_unfit(file, specs, tensors, config)
    _refuse_incomplete(file, specs, tensors, config)
    _refuse_non_finite(file, tensors)
    for key in config.unknown:
        warnings.append(f"{ADAPTER_CONFIG}: {key!r} is unknown and has no effect")
    modules = [_module(name) for name in tensors if name.endswith(_A)]
    return Adapter(
        path=directory,
        layout=made_on,
        tensors=tensors,
        scales={module: config.scale_of(module) for module in modules},
        whole=tuple(name for name in tensors if not name.endswith((_A, _B))),
        labels=labels,
        warnings=tuple(warnings),
        predicts=_predicts(directory, len(labels)) if labels else None,
    )


def load_adapter(
    adapter: Adapter, architecture: Architecture, has_head: bool
) -> tuple[dict[str, LowRank], dict[str, torch.Tensor]]:
    """The updates of native weights, and the native tensors that replace the checkpoint's, by name.

    `architecture` and `has_head` describe the checkpoint with the adapter.
    """
    specs = _specs(architecture, adapter.layout, has_head)
    # Cloned, because the tensors are mapped from the file. An adapter is small.
    held = {name: tensor.clone() for name, tensor in _read(adapter.file, adapter.tensors)}
    added: dict[str, LowRank] = {}
    for module, scale in adapter.scales.items():
        a_RI = held[module + _A].float()
        b_OR = held[module + _B].float()
        # Only the second matrix has the rows of the fused weight, so only it is split.
        for name, rows in split_rows(architecture, specs[f"{module}.weight"], b_OR):
            added[name] = LowRank(a_RI, rows, scale)
    replaced: dict[str, torch.Tensor] = {}
    for name in adapter.whole:
        replaced |= split_rows(architecture, specs[name], held[name])
    if "score.weight" in replaced:  # the head of transformers' class has no bias
        replaced.setdefault("score.bias", torch.zeros(len(architecture.labels)))
    return added, replaced


def _require_files(directory: Path) -> None:
    # os.path treats a path without access rights as missing, where pathlib raises.
    if not os.path.isdir(directory):
        raise InputError(
            f"{directory}: not a directory. Set model.adapter to the adapter's directory."
        )
    weights = directory / ADAPTER_WEIGHTS
    pickled = directory / "adapter_model.bin"
    if os.path.isfile(pickled) and not os.path.isfile(weights):
        raise InputError(
            f"{pickled}: pickled weights are not read. Convert them with "
            f"`safetensors.torch.save_file(torch.load('{pickled.name}', weights_only=True), "
            f"'{weights.name}')`, or set model.adapter."
        )
    for file in (directory / ADAPTER_CONFIG, weights):
        if not os.path.isfile(file):
            raise InputError(
                f"{file}: no such file. Set model.adapter to a directory that peft saved."
            )


def _tensors(file: Path) -> dict[str, Header]:
    """Headers of the tensors in `file`, by their names in the model that was trained."""
    headers = read_headers(file)
    for key, header in headers.items():
        if not key.startswith(PREFIX):
            raise InputError(
                f"{file}: {key!r} does not begin with {PREFIX!r}, as peft's names do. "
                "Set model.adapter to a directory that peft saved."
            )
        if header.dtype not in DTYPE_BYTES:
            allowed = " or ".join(DTYPE_BYTES)
            raise InputError(
                f"{file}: {key!r} is stored as {header.dtype}; it must be {allowed}. "
                "Set model.adapter to another adapter."
            )
    # It would load, and every answer would be the base model's.
    if not headers:
        raise InputError(f"{file}: has no weights. Set model.adapter to another adapter.")
    return {key.removeprefix(PREFIX): header for key, header in headers.items()}


def _layout_of(tensors: Mapping[str, Header]) -> Layout:
    """The layout of the model that was trained, recognized by the names of its tensors."""
    original = ("transformer.", HEAD_KEYS["original"])
    return "original" if any(name.startswith(original) for name in tensors) else "native"


def _refuse_lost_order(
    file: Path, layout: Layout, made_on: Layout, architecture: Architecture
) -> None:
    """Raise InputError if the order of the rows of fused heads is unknown.

    Without multi-query attention, the original classes interleave query, key and value head by
    head. A checkpoint in the native layout does not record whether its base did.
    """
    every_head_a_group = architecture.groups == architecture.heads
    if (layout, made_on) == ("native", "original") and every_head_a_group:
        raise InputError(
            f"{file}: trained on the original classes, but the checkpoint no longer records in "
            "which order they fuse the rows of heads. Set model.path to the checkpoint in its "
            "original layout."
        )


def _read(file: Path, tensors: Mapping[str, Header]) -> Iterator[tuple[str, torch.Tensor]]:
    headers = {PREFIX + name: header for name, header in tensors.items()}
    for key, tensor in read_tensors(file, headers):
        yield key.removeprefix(PREFIX), tensor


def _labels(
    directory: Path, architecture: Architecture, head: Header
) -> tuple[tuple[str, ...], list[str]]:
    """The labels of the adapter's head, and warnings.

    peft does not save them; a config.json beside the adapter may name them.
    """
    rows = 0
    # Any other shape is refused later, in a message with the right one.
    if head.shape[1:] == (architecture.hidden_size,):
        rows = head.shape[0]
    file = directory / ADAPTER_LABELS
    config = read_json(file) if os.path.isfile(file) else {}
    if config.get("id2label") is not None:
        check = ConfigCheck(config, str(file))
        labels = check.labels()
        if not check.problems and len(labels) != rows:
            wanted = f"an object of {rows} labels, one for each row of the adapter's head"
            check.refuse("id2label", wanted)
        if check.problems:
            raise InputError(f"{check.problems[0]} Correct it, or set model.adapter.")
        return labels, []
    if rows == len(architecture.labels):
        return architecture.labels, []
    warning = (
        "the adapter does not name its labels; to name them, add a "
        f"{ADAPTER_LABELS} with 'id2label' beside it"
    )
    return default_labels(rows), [warning]


def _predicts(directory: Path, rows: int) -> Predicts | None:
    """What the adapter's head was trained for; None if nothing beside it says so."""
    file = directory / ADAPTER_LABELS
    config = read_json(file) if os.path.isfile(file) else {}
    predicts, problems = head_predicts(config, rows, str(file))
    for problem in problems:
        raise InputError(problem.replace("model.path", "model.adapter"))
    is_stated = any(config.get(key) for key in ("problem_type", "function_to_apply"))
    return predicts if is_stated else None


def _specs(architecture: Architecture, layout: Layout, has_head: bool) -> dict[str, TensorSpec]:
    """Every tensor that an adapter may change, by its name in `layout`."""
    # An adapter changes dequantized weights and never a prefix.
    return list_tensors(replace(architecture, quantization_bit=0, pre_seq_len=0), layout, has_head)


def _module(name: str) -> str:
    return name.removesuffix(_A).removesuffix(_B).removesuffix(".weight").removesuffix(".bias")


def _refuse_unfit(
    file: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, Header],
    config: AdapterConfig,
) -> None:
    for name, header in tensors.items():
        wanted = _shape(name, specs, config)
        if wanted is None:
            raise InputError(
                f"{file}: {PREFIX + name!r} changes nothing that this model has. {_ADVICE}"
            )
        if header.shape != wanted:
            raise InputError(
                f"{file}: {PREFIX + name!r} has shape {list(header.shape)}; by the checkpoint and "
                f"{ADAPTER_CONFIG}, it must be {list(wanted)}. {_ADVICE}"
            )


def _shape(
    name: str, specs: Mapping[str, TensorSpec], config: AdapterConfig
) -> tuple[int, ...] | None:
    """The shape that tensor `name` of an adapter must have; None if it changes nothing."""
    module = _module(name)
    if not name.endswith((_A, _B)):
        return specs[name].shape if name in specs and config.saves(module) else None
    # Two matrices update a linear layer, so its weight has two dimensions.
    spec = specs.get(f"{module}.weight")
    if spec is None or len(spec.shape) != 2:
        return None
    rank = config.rank_of(module)
    return (rank, spec.shape[1]) if name.endswith(_A) else (spec.shape[0], rank)


def _refuse_incomplete(
    file: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, Header],
    config: AdapterConfig,
) -> None:
    """Raise InputError if one matrix of a pair is missing, or a tensor that the config requires."""
    needed: set[str] = set()
    for name in tensors:
        if name.endswith((_A, _B)):
            needed |= {_module(name) + _A, _module(name) + _B}
    for name in specs:
        # A head of transformers' class has no bias, so the bias may be missing.
        if config.saves(_module(name)) and name not in ("score.bias", "classifier_head.bias"):
            needed.add(name)
        elif name.endswith(".weight") and config.adapts(_module(name)):
            needed |= {_module(name) + _A, _module(name) + _B}
    absent = sorted(needed - tensors.keys())
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"{file}: no {PREFIX + absent[0]!r}{more}. It is incomplete, or was trained on fewer "
            f"layers. {_ADVICE}"
        )


def _refuse_non_finite(file: Path, tensors: Mapping[str, Header]) -> None:
    # A single nan, merged into the weights, makes every answer fail.
    for name, tensor in _read(file, tensors):
        if not tensor.isfinite().all():
            raise InputError(
                f"{file}: {PREFIX + name!r} has values that are not finite. "
                "Set model.adapter to an earlier save."
            )
