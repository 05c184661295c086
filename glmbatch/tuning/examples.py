"""Reads labelled rows from files: text, label and place. No splits, no tensors."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, some_of
from glmbatch.settings.tuning import LabelledData
from glmbatch.store.files import digest_file
from glmbatch.store.inputs.find import find_files
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import open_parquet, read_rows
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import converted
from glmbatch.store.values import is_list, is_text, prompt_values, value_type

logger = logging.getLogger(__name__)

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
# The labels of a row are a list where it may have several.
Value = str | bytes | list[str | None] | None


class Example(NamedTuple):
    """A text, its label or the answer to learn, and its place, such as "a.parquet row 7".

    Where a row may have several labels, or none, they are in `several`, in sorted order, and
    `label` names them for people.
    """

    place: str
    text: str
    label: str
    several: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All labels of the row."""
        return (self.label,) if self.several is None else self.several

    @property
    def same(self) -> str:
        """The text normalised (NFKC, case, white space): equal for texts that read the same."""
        return " ".join(unicodedata.normalize("NFKC", self.text).casefold().split())


class Rows(NamedTuple):
    """All usable rows of the input.

    examples  the rows, in order
    given     part of each row by its place, from the split column; empty without one
    skipped   number of unusable rows by what they lack, "text" or "label"
    files     SHA-256 digest of each file
    """

    examples: list[Example]
    given: Mapping[str, Part]
    skipped: Mapping[str, int]
    files: Mapping[str, str]


def read_examples(data: LabelledData) -> Rows:
    """All rows that have a text and a label. InputError if there are none."""
    found = find_files(data.input)
    for reason in found.refused.values():
        raise InputError(reason)
    if found.skipped:
        logger.warning("%s: not read: %s", data.input, ", ".join(map(str, found.skipped)))
    root, names = found.root, found.names
    files: dict[str, str] = {}
    examples: list[Example] = []
    given: dict[str, Part] = {}
    skipped = Counter[str]()
    for name in names:
        # The run's id includes the digests, so a changed file makes another run.
        files[name] = digest_file(root / name)
        for row, values in enumerate(_read_rows(root / name, data)):
            place = f"{name} row {row}"
            example = _example(place, values, data)
            if isinstance(example, Example):
                examples.append(example)
                if data.split_column is not None:
                    given[place] = _part(place, values[2], data.split_column)
            else:
                skipped[example] += 1
    if not examples:
        raise _nothing_to_read(data, skipped)
    if len({example.several is None for example in examples}) > 1:
        raise InputError(
            f"{data.input}: column {data.label_column!r} has lists in some files and single labels "
            "in others. Give it one type."
        )
    return Rows(examples, given, skipped, files)


def _nothing_to_read(data: LabelledData, skipped: Mapping[str, int]) -> InputError:
    """The error if no row is usable; it names the setting of what the rows lack."""
    learned, setting = "a label", "data.label_column"
    if data.response_column is not None:
        learned, setting = "an answer", "data.response_column"
    without_text, without_label = skipped.get("text", 0), skipped.get("label", 0)
    rows = without_text + without_label
    if not rows:
        lack, setting = "there are none", "data.input"
    elif not without_text:
        lack = f"all lack {learned}"
    elif not without_label:
        lack, setting = "all lack a text", "data.text_column"
    else:
        lack = f"{without_text} lack a text, the others lack {learned}"
        setting = f"data.text_column or {setting}"
    return InputError(
        f"{data.input}: none of {rows} rows has a text and {learned}: {lack}. Set {setting}."
    )


def text_keys(examples: Sequence[Example]) -> np.ndarray:
    """A 64-bit key of each example's normalised text, as a uint64 array in the same order."""
    digests = []
    for example in examples:
        text = example.same.encode(errors="replace")
        digests.append(hashlib.blake2b(text, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), np.uint64)


def _example(place: str, values: Sequence[Value], data: LabelledData) -> Example | str:
    """The example, or the name of what the row lacks."""
    text, label, *_ = values
    if not isinstance(text, str) or not text.strip():
        return "text"
    if isinstance(label, list):
        if not all(name and name.strip() for name in label):
            return "label"
        several = tuple(sorted({name.strip() for name in label if name}))
        return Example(place, text, ", ".join(several), several)
    if not isinstance(label, str) or not label.strip():
        return "label"
    # Spaces around an answer are learned with it, but a label is a name.
    return Example(place, text, label if data.response_column is not None else label.strip())


def _part(place: str, value: Value, column: str) -> Part:
    for part in PARTS:
        if value == part:
            return part
    raise InputError(
        f"{place}: {column!r} is {value!r}, not one of {', '.join(PARTS)}. Set data.split_column."
    )


def _column_names(data: LabelledData) -> dict[str, str]:
    """The columns to read, by the setting that names each: text, label or answer, split."""
    names = {"text_column": data.text_column}
    if data.response_column is None:
        names["label_column"] = data.label_column
    else:
        names["response_column"] = data.response_column
    if data.split_column is not None:
        names["split_column"] = data.split_column
    return names


def _read_rows(where: AnyPath, data: LabelledData) -> Iterator[tuple[Value, ...]]:
    """Rows of one file as (text, label, part), or (text, label) without a split column.

    A folder `name=value` above the file is a column as well.
    """
    with open_parquet(where) as file:
        schema = file.schema_arrow
        groups = list(range(file.metadata.num_row_groups))
        rows = file.metadata.num_rows
    given = folder_columns(str(where))
    # A stored column wins over a folder of the same name, as in Spark and Arrow.
    folders = {name: given[name] for name in given if name not in schema.names}
    names = _column_names(data)
    for setting, name in names.items():
        if name not in folders:
            _check_column(where, schema, folders, (setting, name))
    columns: dict[str, list[Value]] = {name: [] for name in names.values() if name not in folders}
    stored = list(columns)
    if stored:
        for batch in read_rows(where, groups, 0, rows, stored):
            for name in stored:
                column = batch.column(name)
                if name != names.get("label_column"):
                    columns[name] += prompt_values(pa.chunked_array([column]))
                elif is_list(column.type):
                    columns[name] += _lists(where, name, column)
                else:
                    column = _whole(where, name, column)
                    columns[name] += prompt_values(pa.chunked_array([column]))
    for name, value in folders.items():
        columns[name] = [value] * rows
    return zip(*(columns[name] for name in names.values()), strict=True)


def _check_column(
    where: AnyPath, schema: pa.Schema, folders: Mapping[str, Any], column: tuple[str, str]
) -> None:
    """InputError unless the file has `column` (setting, name) exactly once, with a usable type."""
    setting, name = column
    if schema.names.count(name) != 1:
        raise InputError(
            f"{where}: no column {name!r}; it has {some_of([*schema.names, *folders], name)}. "
            f"Set data.{setting}."
        )
    kind = schema.field(name).type
    if setting != "label_column":
        if not is_text(kind):
            raise InputError(
                f"{where}: column {name!r} has type {kind}, not text. Set data.{setting}."
            )
        return
    values = value_type(kind)
    values = value_type(values.value_type) if is_list(values) else values
    is_named = is_text(values)
    is_number = pa.types.is_integer(values) or pa.types.is_floating(values)
    if not (is_named or is_number or pa.types.is_decimal(values) or values == pa.bool_()):
        raise InputError(
            f"{where}: column {name!r} has type {kind}, not text, whole numbers or lists of them. "
            f"Cast it to text, or set data.{setting}."
        )


def _lists(where: AnyPath, name: str, column: pa.Array) -> list[Value]:
    """The labels of each row of a column of lists; None for a null."""
    column = converted(column, value_type(column.type))
    flat = _whole(where, name, pc.list_flatten(column))
    labels = iter(prompt_values(pa.chunked_array([flat])))
    rows: list[Value] = []
    for length in pc.list_value_length(column).to_pylist():
        if length is None:
            rows.append(None)
            continue
        held = [label if isinstance(label, str) else None for label in islice(labels, length)]
        rows.append(held)
    return rows


def _whole(where: AnyPath, name: str, column: pa.Array) -> pa.Array:
    """A column of labels with numbers as integers: 1.0 is the label "1".

    pandas stores integers with a missing value as floats. InputError if a number is not whole.
    """
    kind = column.type
    column = converted(column, value_type(kind))
    try:
        if pa.types.is_floating(column.type):
            numbers = column.cast(pa.float64())
            column = pc.if_else(pc.is_nan(numbers), None, numbers).cast(pa.int64())
        elif pa.types.is_decimal(column.type):
            column = column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{where}: column {name!r} has type {kind} and some numbers are not whole; training "
            "learns labels, and no numbers (regression). Cast it to text or whole numbers, or set "
            "data.label_column."
        ) from error
    return column
