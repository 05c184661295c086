"""A LoRA adapter's directory, as peft writes it, compared with the checkpoint that it is to change.

Trusts nothing, as with a checkpoint. An adapter names its modules as either layout does, whichever
layout the checkpoint has. Changes no weights itself.

    R rank   I numbers in   O numbers out
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
from glmbatch.glm.checkpoint.config_check import ConfigCheck, default_labels, other_losses
from glmbatch.glm.checkpoint.layout import HEAD_KEYS, TensorSpec, list_tensors, split_rows
from glmbatch.glm.checkpoint.shards import Header, read_headers, read_tensors
from glmbatch.glm.device import DTYPE_BYTES
from glmbatch.glm.files import ADAPTER_CONFIG, ADAPTER_LABELS, ADAPTER_WEIGHTS, read_json

# peft wraps the model twice, and every saved name begins with both wrappers.
PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_ADVICE = "Set model.adapter to one that was made on this model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A sound adapter, without its weights. Tensors and modules have their names in `layout`.

    `scales` has each linear module that it adds to, `whole` each tensor that it replaces. `labels`
    are those of the head that it brings; empty when it brings none.
    """

    path: Path
    layout: Layout
    tensors: Mapping[str, Header]
    scales: Mapping[str, float]
    whole: tuple[str, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The file of its weights."""
        return self.path / ADAPTER_WEIGHTS

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its matrices, smallest first."""
        return tuple(sorted({self.tensors[module + _A].shape[0] for module in self.scales}))


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one weight: a_RI and b_OR in float32, their product times `scale`."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    def added_to(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The sum [O, I], in float32 whatever `weight_OI` is stored in."""
        return torch.addmm(weight_OI.float(), self.b_OR, self.a_RI, alpha=self.scale)


def read_adapter(
    path: str | Path, architecture: Architecture, layout: Layout, has_head: bool
) -> Adapter:
    """The adapter in directory `path` for a checkpoint of this kind.

    InputError that names the first thing wrong.
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
    # Against the layout it was made on, which may differ from the checkpoint's.
    specs = _specs(replace(architecture, labels=labels or architecture.labels), made_on, has_head)
    _refuse_unfit(file, specs, tensors, config)
    _refuse_incomplete(file, specs, tensors, config)
    _refuse_non_finite(file, tensors)
    for key in config.unknown:
        warnings.append(f"{ADAPTER_CONFIG}: {key!r} is not known here and has no effect")
    modules = [_module(name) for name in tensors if name.endswith(_A)]
    return Adapter(
        path=directory,
        layout=made_on,
        tensors=tensors,
        scales={module: config.scale_of(module) for module in modules},
        whole=tuple(name for name in tensors if not name.endswith((_A, _B))),
        labels=labels,
        warnings=tuple(warnings),
    )


def load_adapter(
    adapter: Adapter, architecture: Architecture, has_head: bool
) -> tuple[dict[str, LowRank], dict[str, torch.Tensor]]:
    """What is added to which native weight, and the native tensors that replace the checkpoint's.

    `architecture` and `has_head` are those of the checkpoint with the adapter.
    """
    specs = _specs(architecture, adapter.layout, has_head)
    # Cloned, because a tensor lives in its file's pages; an adapter is small.
    held = {name: tensor.clone() for name, tensor in _read(adapter.file, adapter.tensors)}
    added: dict[str, LowRank] = {}
    for module, scale in adapter.scales.items():
        a_RI = held[module + _A].float()
        b_OR = held[module + _B].float()
        # Only the second matrix has the rows of the fused weight: it is split as they are.
        for name, rows in split_rows(architecture, specs[f"{module}.weight"], b_OR):
            added[name] = LowRank(a_RI, rows, scale)
    replaced: dict[str, torch.Tensor] = {}
    for name in adapter.whole:
        replaced |= split_rows(architecture, specs[name], held[name])
    if "score.weight" in replaced:  # the head of transformers' own class has no bias
        replaced.setdefault("score.bias", torch.zeros(len(architecture.labels)))
    return added, replaced


def _require_files(directory: Path) -> None:
    # os.path, not pathlib: it takes a path that may not be looked at for a missing one.
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
    """What `file` holds, by its name in the model that the adapter was made on."""
    headers = read_headers(file)
    for key, header in headers.items():
        if not key.startswith(PREFIX):
            raise InputError(
                f"{file}: {key!r} does not begin with {PREFIX!r}, as peft writes it. "
                "Set model.adapter."
            )
        if header.dtype not in DTYPE_BYTES:
            allowed = " or ".join(DTYPE_BYTES)
            raise InputError(
                f"{file}: {key!r} is stored as {header.dtype}; it must be {allowed}. "
                "Set model.adapter."
            )
    # It would load, and every answer would be the base's own.
    if not headers:
        raise InputError(f"{file}: holds no weights. Set model.adapter.")
    return {key.removeprefix(PREFIX): header for key, header in headers.items()}


def _layout_of(tensors: Mapping[str, Header]) -> Layout:
    """The layout of the model that the adapter was made on, by the names of its tensors."""
    original = ("transformer.", HEAD_KEYS["original"])
    return "original" if any(name.startswith(original) for name in tensors) else "native"


def _refuse_lost_order(
    file: Path, layout: Layout, made_on: Layout, architecture: Architecture
) -> None:
    """InputError when the rows of fused heads cannot be matched with the adapter's.

    The original classes fuse them head by head without multi-query, which the native layout does
    not record.
    """
    every_head_a_group = architecture.groups == architecture.heads
    if (layout, made_on) == ("native", "original") and every_head_a_group:
        raise InputError(
            f"{file}: made on the original classes, and the checkpoint no longer says in which "
            "order their rows of heads were fused. Set model.path to the checkpoint in its "
            "original layout."
        )


def _read(file: Path, tensors: Mapping[str, Header]) -> Iterator[tuple[str, torch.Tensor]]:
    headers = {PREFIX + name: header for name, header in tensors.items()}
    for key, tensor in read_tensors(file, headers):
        yield key.removeprefix(PREFIX), tensor


def _labels(
    directory: Path, architecture: Architecture, head: Header
) -> tuple[tuple[str, ...], list[str]]:
    """Names of the rows of the adapter's head, and warnings.

    peft saves none; a config.json beside the adapter may have them.
    """
    rows = 0
    # Else its shape is refused later, with the shape that it must have.
    if head.shape[1:] == (architecture.hidden_size,):
        rows = head.shape[0]
    file = directory / ADAPTER_LABELS
    config = read_json(file) if os.path.isfile(file) else {}
    for problem in other_losses(config, rows, str(file)):
        raise InputError(problem.replace("model.path", "model.adapter"))
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
        f"the adapter does not name its labels; 'id2label' of a {ADAPTER_LABELS} beside it would"
    )
    return default_labels(rows), [warning]


def _specs(architecture: Architecture, layout: Layout, has_head: bool) -> dict[str, TensorSpec]:
    """Every tensor that the model computes with, by its name in `layout`."""
    # An adapter adds to dequantized weights, and never to a prefix.
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
                f"{file}: {PREFIX + name!r} belongs to nothing that can be changed here. {_ADVICE}"
            )
        if header.shape != wanted:
            raise InputError(
                f"{file}: {PREFIX + name!r} has shape {list(header.shape)}; the checkpoint and "
                f"{ADAPTER_CONFIG} make it {list(wanted)}. {_ADVICE}"
            )


def _shape(
    name: str, specs: Mapping[str, TensorSpec], config: AdapterConfig
) -> tuple[int, ...] | None:
    """The shape that tensor `name` of an adapter must have; None when nothing can take it."""
    module = _module(name)
    if not name.endswith((_A, _B)):
        return specs[name].shape if name in specs and config.saves(module) else None
    # Two matrices replace a product, so only a weight of two dimensions can have them.
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
    """InputError when a matrix lacks its other, or something that the config says is there."""
    needed: set[str] = set()
    for name in tensors:
        if name.endswith((_A, _B)):
            needed |= {_module(name) + _A, _module(name) + _B}
    for name in specs:
        # A head of transformers' own class has no bias, so its absence is no fault.
        if config.saves(_module(name)) and name not in ("score.bias", "classifier_head.bias"):
            needed.add(name)
        elif name.endswith(".weight") and config.adapts(_module(name)):
            needed |= {_module(name) + _A, _module(name) + _B}
    absent = sorted(needed - tensors.keys())
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"{file}: no {PREFIX + absent[0]!r}{more}: it is incomplete, or made on fewer layers. "
            f"{_ADVICE}"
        )


def _refuse_non_finite(file: Path, tensors: Mapping[str, Header]) -> None:
    # Merged, a single nan would make every answer fail.
    for name, tensor in _read(file, tensors):
        if not tensor.isfinite().all():
            raise InputError(
                f"{file}: {PREFIX + name!r} holds values that are not finite. Set model.adapter."
            )
