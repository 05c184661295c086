"""Records a sample of the weights that an adapter was trained on, and checks it before merging.

An adapter also loads on other weights of the same shapes, but its answers are then nonsense.
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

# The sample of each weight: 8 numbers of row 3. Any other training changes some of them.
_ROW, _COLUMNS = 3, 8
# The largest relative rounding error of each dtype, and the absolute one of float16 below 2^-14.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_SMALLEST = 2.0**-25

Sample = Mapping[str, tuple[float, list[float]]]


def sample_weights(
    architecture: Architecture,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[Path, Mapping[str, Header]],
) -> Sample:
    """A few numbers of each native weight, except heads, and the largest rounding error in them.

    Both as they are in the dtype that the checkpoint is stored in.
    """
    rows: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for file, headers in tensors.items():
        for key, stored in read_tensors(file, headers):
            of_weight = key.removesuffix("_scale")
            place = rows if key == of_weight else scales
            for name, native in split_rows(architecture, specs[of_weight], stored):
                # Heads are left out: a classifier has no language head, and training may replace
                # the classification head.
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
        return 0.51 * float(scale[0]), values  # half a step, plus the rounding of the scale
    values = row[0].float().tolist()
    share = _ROUNDING[str(row.dtype).removeprefix("torch.")]
    return max(map(abs, values)) * share + _SMALLEST, values


def note_base(directory: Path, base: Path, sample: Sample) -> None:
    """Record in an adapter's `directory` that it was trained on the checkpoint `base`.

    Writes ADAPTER_BASE, with `sample`, and 'base_model_name_or_path' of ADAPTER_CONFIG.
    """
    config = read_json(directory / ADAPTER_CONFIG) | {"base_model_name_or_path": str(base)}
    write_config(directory, config)
    note = {
        "path": str(base),
        "weights": {name: [off, *row] for name, (off, row) in sample.items()},
    }
    (directory / ADAPTER_BASE).write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write `config` as the ADAPTER_CONFIG of `directory`, formatted as peft does."""
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def check_base(
    directory: Path,
    checkpoint: Path,
    architecture: Architecture,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[Path, Mapping[str, Header]],
) -> Iterator[str]:
    """Yield notes on whether the adapter in `directory` belongs to a checkpoint.

    Raises InputError if it was trained on other weights. An adapter that glmbatch did not train has
    no sample, so only the names of the two bases are compared.
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
                f"{directory}: was trained over {trained_over}, but {checkpoint} has other "
                f"weights ({name}). Set model.path to what it was trained over, or model.adapter."
            )
        rounded = rounded or max(far) > 0
    if rounded:
        yield (
            f"the adapter was trained over {trained_over}; these are the same weights in another "
            "dtype or quantization, so answers may differ slightly"
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
        raise InputError(f"{file}: damaged. Copy the adapter again.") from error


def _other_name(directory: Path, checkpoint: Path) -> Iterator[str]:
    """A note if peft's config names another base than this checkpoint and its config do."""
    stated = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = read_json(checkpoint / "config.json").get("_name_or_path")
    if not isinstance(stated, str) or not stated:
        return
    names = {checkpoint.resolve().name, checkpoint.name, PurePath(str(named)).name}
    if PurePath(stated).name.casefold() not in {name.casefold() for name in names}:
        yield (
            f"{ADAPTER_CONFIG}: trained on {stated!r}; on other weights, its answers are "
            "meaningless"
        )
