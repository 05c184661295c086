"""Which weights an adapter was trained over: a few numbers of each, kept in a file beside it.

Over other weights of the same shapes an adapter loads, and answers nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.architecture import Architecture
from glmbatch.glm.checkpoint.layout import TensorSpec, split_rows
from glmbatch.glm.checkpoint.shards import Header, dequantized, read_tensors
from glmbatch.glm.files import ADAPTER_BASE, ADAPTER_CONFIG, read_json

# Of each weight: any other training changes some of so many numbers in each of all layers.
_ROW, _COLUMNS = 3, 8
# How far rounding moves a number at most, as a share of it; and float16 the small ones below 2^-14.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_SMALLEST = 2.0**-25

Sample = Mapping[str, tuple[float, list[float]]]


def sample_weights(
    architecture: Architecture,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[Path, Mapping[str, Header]],
) -> Sample:
    """Some numbers of each native weight of the body, and how far storing may have moved them."""
    rows: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for file, headers in tensors.items():
        for key, stored in read_tensors(file, headers):
            of_weight = key.removesuffix("_scale")
            place = rows if key == of_weight else scales
            for name, native in split_rows(architecture, specs[of_weight], stored):
                # A language head is none of a classifier's; training may begin with a new head.
                if name.startswith("model."):
                    place[name] = _row(native, is_scale=place is scales).clone()
    sample: dict[str, tuple[float, list[float]]] = {}
    for name, row in sorted(rows.items()):
        sample[name] = _numbers(row, scales.get(name), architecture.quantization_bit)
    return sample


def _row(native: torch.Tensor, *, is_scale: bool) -> torch.Tensor:
    row = min(_ROW, len(native) - 1)
    if is_scale:
        return native[row : row + 1]
    return native[None, :_COLUMNS] if native.dim() == 1 else native[row : row + 1, :_COLUMNS]


def _numbers(row: torch.Tensor, scale: torch.Tensor | None, bits: int) -> tuple[float, list[float]]:
    if scale is not None:
        values = dequantized(row, scale, bits, torch.float32)[0, :_COLUMNS].tolist()
        return 0.51 * float(scale[0]), values  # half a step, and the rounding of the scale itself
    values = row[0].float().tolist()
    share = _ROUNDING[str(row.dtype).removeprefix("torch.")]
    return max(map(abs, values)) * share + _SMALLEST, values


def note_base(directory: Path, base: Path, sample: Sample) -> None:
    """Note in an adapter's `directory` that it was trained over the checkpoint `base`."""
    config = read_json(directory / ADAPTER_CONFIG) | {"base_model_name_or_path": str(base)}
    write_config(directory, config)
    note = {
        "path": str(base),
        "weights": {name: [off, *row] for name, (off, row) in sample.items()},
    }
    (directory / ADAPTER_BASE).write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the config of the adapter in `directory`, laid out as peft does."""
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def check_base(
    directory: Path,
    checkpoint: Path,
    architecture: Architecture,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[Path, Mapping[str, Header]],
) -> Iterator[str]:
    """Notes on whether the adapter in `directory` belongs to a checkpoint.

    InputError when it was trained over other weights; of one that is not ours only a name tells.
    """
    note = directory / ADAPTER_BASE
    if not note.is_file():
        yield from _other_name(directory, checkpoint)
        return
    trained_over, expected = _read_note(note)
    rounded = False
    sample = sample_weights(architecture, specs, tensors)
    for name, (moved, values) in expected.items():
        moved_here, here = sample.get(name, (0.0, []))
        far = [abs(a - b) for a, b in zip(values, here, strict=False)]
        if len(here) != len(values) or max(far) > moved + moved_here:
            raise InputError(
                f"{directory}: was trained over {trained_over}, and {checkpoint} holds other "
                f"weights ({name}). Set model.path to what it was trained over, or model.adapter."
            )
        rounded = rounded or max(far) > 0
    if rounded:
        yield (
            f"the adapter was trained over {trained_over}; these weights are the same ones stored "
            "in other numbers, so answers may differ a little"
        )


def _read_note(file: Path) -> tuple[str, dict[str, tuple[float, list[float]]]]:
    note: dict[str, Any] = read_json(file)
    try:
        expected = {}
        for name, numbers in note["weights"].items():
            off, *row = map(float, numbers)
            expected[str(name)] = (off, row)
        return str(note["path"]), expected
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: is damaged. Copy the adapter again.") from error


def _other_name(directory: Path, checkpoint: Path) -> Iterator[str]:
    """A note where peft names another base than this checkpoint and its config do."""
    stated = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = read_json(checkpoint / "config.json").get("_name_or_path")
    if not isinstance(stated, str) or not stated:
        return
    names = {checkpoint.resolve().name, checkpoint.name, PurePath(str(named)).name}
    if PurePath(stated).name.casefold() not in {name.casefold() for name in names}:
        yield (
            f"{ADAPTER_CONFIG}: made on {stated!r}; over other weights than those its answers "
            "mean nothing"
        )
