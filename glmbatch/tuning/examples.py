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
from glmbatch.settings.job import TEXT, placeholders
from glmbatch.settings.tuning import LabelledData
from glmbatch.steps.prompt import check_value
from glmbatch.store.files import digest_file
from glmbatch.store.inputs.labelled import labelled_files
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import check_column, open_parquet, read_rows
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import converted
from glmbatch.store.values import is_list, is_text, prompt_values, value_type

logger = logging.getLogger(__name__)

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
# The labels of a row are a list where it may have several.
Value = str | bytes | list[str | None] | None
TEXT_ALONE = "{text}"
# In the place of a setting, if a column is missing.
OF_CURRENT = "another output, because the prompt of the current checkpoint has this column"


class Example(NamedTuple):
    """A text, its label or the answer to learn, and its place, such as "a.parquet row 7".

    Where a row may have several labels, or none, they are in `several`, in sorted order, and
    `label` names them for people.

    With several columns in its prompt, or other than the text, `columns` has their values by
    placeholder, `text` has all of them, and `asked` is the filled template.
    """

    place: str
    text: str
    label: str
    several: tuple[str, ...] | None = None
    columns: Mapping[str, str | None] = {}
    asked: str = ""

    @property
    def values(self) -> Mapping[str, str | None]:
        """What the row has for placeholders, by their names."""
        return self.columns or {TEXT: self.text}

    @property
    def names(self) -> tuple[str, ...]:
        """All labels of the row."""
        return (self.label,) if self.several is None else self.several

    @property
    def same(self) -> str:
        """The text normalised (NFKC, case, white space): equal for texts that read the same.

        With several columns, it is the whole prompt: ("ab", "c") and ("a", "bc") may read the same.
        """
        text = self.asked or self.text
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    def with_template(self, template: str) -> Example:
        """The same row, asked by another template."""
        names = placeholders(template)
        values = {name: self.values.get(name) or "" for name in names}
        asked = template.format_map(values) if len(names) > 1 else ""
        return self._replace(text="\n".join(values.values()), asked=asked)


class Rows(NamedTuple):
    """All usable rows of the input.

    examples  the rows, in order
    given     part of each row by its place, from the split column; empty without one
    skipped   number of unusable rows by what they lack, "text", "value" (of another column) or
              "label"
    files     SHA-256 digest of each file
    """

    examples: list[Example]
    given: Mapping[str, Part]
    skipped: Mapping[str, int]
    files: Mapping[str, str]


def read_examples(data: LabelledData, template: str = TEXT_ALONE, also: Sequence[str] = ()) -> Rows:
    """All rows that have a label and what `template` asks for. InputError if there are none.

    The current checkpoint's prompt has the placeholders `also`, which may be null.
    """
    sources = {name: data.text_column if name == TEXT else name for name in placeholders(template)}
    found = labelled_files(data.input)
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
        read = _read_rows(root / name, data, sources, also)
        for row, (values, label, part) in enumerate(read):
            place = f"{name} row {row}"
            example = _example(place, values, label, data, template)
            if isinstance(example, Example):
                examples.append(example)
                if data.split_column is not None:
                    given[place] = _part(place, part, data.split_column)
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
    label = ("a label", "data.label_column")
    if data.response_column is not None:
        label = ("an answer", "data.response_column")
    lacks = {
        "text": ("a text", "data.text_column"),
        "value": ("a value of another column in the prompt", "prompt_template"),
        "label": label,
    }
    kinds = [kind for kind in lacks if skipped.get(kind)]
    advice = " or ".join(lacks[kind][1] for kind in kinds) or "data.input"
    if len(kinds) < 2:
        lack = f"all lack {lacks[kinds[0]][0]}" if kinds else "there are none"
    else:
        *first, last = kinds
        shares = [f"{skipped[kind]} lack {lacks[kind][0]}" for kind in first]
        lack = f"{', '.join(shares)}, the others lack {lacks[last][0]}"
    return InputError(
        f"{data.input}: none of {sum(skipped.values())} rows has a text and {label[0]}: {lack}. "
        f"Set {advice}."
    )


def text_keys(examples: Sequence[Example]) -> np.ndarray:
    """A 64-bit key of each example's normalised text, as a uint64 array in the same order."""
    digests = []
    for example in examples:
        text = example.same.encode(errors="replace")
        digests.append(hashlib.blake2b(text, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), np.uint64)


def _example(
    place: str, values: Mapping[str, Value], label: Value, data: LabelledData, template: str
) -> Example | str:
    """The example, or the name of what the row lacks."""
    needed = placeholders(template)
    columns: dict[str, str | None] = {}
    for name, value in values.items():
        assert not isinstance(value, list)
        text = check_value(name, value, is_text=name == TEXT)
        columns[name] = text if isinstance(text, str) else None
        if name in needed and columns[name] is None:
            return "text" if name == TEXT else "value"
    several = None
    if isinstance(label, list):
        if not all(name and name.strip() for name in label):
            return "label"
        several = tuple(sorted({name.strip() for name in label if name}))
        label = ", ".join(several)
    elif not isinstance(label, str) or not label.strip():
        return "label"
    elif data.response_column is None:
        label = label.strip()  # spaces around an answer are learned with it, but a label is a name
    example = Example(place, columns.get(TEXT) or "", label, several)
    if [*columns] == [TEXT]:
        return example
    return example._replace(columns=columns).with_template(template)


def _part(place: str, value: Value, column: str) -> Part:
    for part in PARTS:
        if value == part:
            return part
    raise InputError(
        f"{place}: {column!r} is {value!r}, not one of {', '.join(PARTS)}. Set data.split_column."
    )


def _column_names(data: LabelledData) -> dict[str, str]:
    """The columns to read beside those of the prompt, by the setting that names each."""
    names = {}
    if data.response_column is None:
        names["label_column"] = data.label_column
    else:
        names["response_column"] = data.response_column
    if data.split_column is not None:
        names["split_column"] = data.split_column
    return names


def _read_rows(
    where: AnyPath, data: LabelledData, sources: Mapping[str, str], also: Sequence[str]
) -> Iterator[tuple[dict[str, Value], Value, Value]]:
    """Rows of one file: values by placeholder, the label or answer, and the part if any.

    `sources` maps placeholders to columns. A folder `name=value` above the file is a column as
    well.
    """
    with open_parquet(where) as file:
        schema = file.schema_arrow
        groups = list(range(file.metadata.num_row_groups))
        rows = file.metadata.num_rows
    given = folder_columns(str(where))
    # A stored column wins over a folder of the same name, as in Spark and Arrow.
    folders = {name: given[name] for name in given if name not in schema.names}
    names = _column_names(data)
    if TEXT in (*sources, *also):
        names["text_column"] = data.text_column
    for setting, name in names.items():
        if name not in folders:
            _check_column(where, schema, folders, (setting, name))
    asked = {name: data.text_column if name == TEXT else name for name in also} | {**sources}
    for name, column in asked.items():
        if name != TEXT and column not in folders:
            setting = "prompt_template" if name in sources else OF_CURRENT
            check_column(str(where), schema, column, setting, text=False, folders=(*folders,))
    read = {*names.values(), *asked.values()}
    stored = [name for name in schema.names if name in read]
    columns = _read_columns(where, names, stored, groups, rows)
    for name, value in folders.items():
        columns[name] = [value] * rows
    learned, part = columns[data.response_column or data.label_column], data.split_column
    parts: Sequence[Value] = [None] * rows if part is None else columns[part]
    for row, (label, of_row) in enumerate(zip(learned, parts, strict=True)):
        yield {name: columns[column][row] for name, column in asked.items()}, label, of_row


def _read_columns(
    where: AnyPath,
    names: Mapping[str, str],
    stored: Sequence[str],
    groups: Sequence[int],
    rows: int,
) -> dict[str, list[Value]]:
    """The values of the columns `stored` in the file; those of labels are whole, or lists."""
    columns: dict[str, list[Value]] = {name: [] for name in stored}
    if not stored:
        return columns
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
    return columns


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
