"""Labelled rows: which column has the truth of a step, and its values. Asks no model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, counted, some_of
from glmbatch.evaluation.fields import UNSAID, objects_of, values_of
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep
from glmbatch.settings.tuning import LabelledData
from glmbatch.store.errors import one_line
from glmbatch.store.inputs.labelled import labelled_files
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import open_parquet, with_constants
from glmbatch.store.values import is_list, prompt_values

# What the command line calls the labelled rows, and the truth of a step.
ROWS = "ROWS"
FLAG = "--truth"
logger = logging.getLogger(__name__)

# What `glmbatch train` reads if nothing else is set.
LABEL: str = LabelledData.model_fields["label_column"].default


@dataclass(frozen=True, slots=True)
class Truth:
    """What is right for one step: by the step's name, or by field for an extract step.

    `columns` are the columns that say so; `values` has one value for each row. `known` says in
    which rows it is a truth.
    """

    columns: Mapping[str, str]
    values: Mapping[str, Sequence[Any]]
    known: Mapping[str, Sequence[bool]]

    @property
    def known_rows(self) -> list[bool]:
        """Which rows have a truth, be it of one field alone."""
        return [any(row) for row in zip(*self.known.values(), strict=True)]

    def of_rows(self, rows: Sequence[int]) -> Truth:
        """Only these rows."""
        values, known = {}, {}
        for name in self.values:
            values[name] = [self.values[name][row] for row in rows]
            known[name] = [self.known[name][row] for row in rows]
        return Truth(self.columns, values, known)


def read_labelled_rows(
    address: str, wanted: Collection[str], setting: str = ROWS
) -> tuple[pa.Table, list[str]]:
    """All rows of a Parquet file, folder or glob, and the names of all their columns.

    Of the columns, only those `wanted`. A folder `name=value` is a column as well. InputError if
    there are no rows; it names the `setting` that has the address.
    """
    found = labelled_files(address, setting)
    tables = []
    names: dict[str, None] = {}
    for name in found.names:
        with open_parquet(found.root / name) as file:
            stored = file.schema_arrow.names
            table = file.read(columns=[column for column in stored if column in wanted])
        folders = folder_columns(str(found.root / name))
        given = {column: folders[column] for column in folders if column not in stored}
        names |= dict.fromkeys([*stored, *given])
        asked = {column: value for column, value in given.items() if column in wanted}
        tables.append(with_constants(table, asked))
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{address}: its columns cannot be joined: {one_line(error)}. Give columns of one name "
            "one type, and no file two of them."
        ) from error
    if not rows.num_columns:
        lacks, has = some_of(sorted(wanted)), some_of([*names])
        raise InputError(f"{address}: has none of the columns {lacks}; it has {has}")
    if not len(rows):
        raise InputError(f"{address}: has no rows. Name a file with labelled rows.")
    return rows, list(names)


def check_names(steps: Sequence[AnyStep], given: Mapping[str, str], flag: str = FLAG) -> None:
    """InputError if `given` names something else than a step, or a field of an extract step.

    Here and below, `flag` is what the user set to name a truth.
    """
    named: list[str] = []
    for step in steps:
        named += _names(step)
    for name in given:
        if name not in named:
            raise InputError(
                f"{flag} {name}: the job has no such step or field; it has {some_of(named, name)}."
            )


def _names(step: AnyStep) -> list[str]:
    fields = step.fields if isinstance(step, ExtractStep) else []
    return [step.name, *(f"{step.name}.{field.name}" for field in fields)]


def candidates(
    step: AnyStep, steps: Sequence[AnyStep], given: Mapping[str, str], read: Collection[str]
) -> dict[str, list[str]]:
    """The columns that may have the truth of `step`, best first, by what they are the truth of.

    Those that the user has `given`, else those named as the answer columns. A job with one step
    that chooses labels also takes the column `label`, and a field the column of its own name,
    unless prompts `read` it.
    """
    whole = [given[step.name]] if step.name in given else [step.name]
    if isinstance(step, ExtractStep):
        found = {}
        for field in step.fields:
            own = given.get(f"{step.name}.{field.name}")
            bare = [] if field.name in read else [field.name]
            column = Columns(step.name).field(field.name).answer
            found[field.name] = [own] if own else [column, *whole, *bare]
        return found
    choosing = [other for other in steps if isinstance(other, ClassifyStep)]
    if choosing == [step] and step.name not in given:
        whole.append(LABEL)
    return {step.name: whole}


def columns_to_read(
    steps: Sequence[AnyStep], given: Mapping[str, str], read: Collection[str], text_column: str
) -> tuple[set[str], dict[str, dict[str, list[str]]]]:
    """The columns to read of labelled rows, and those that may have the truth, by step.

    The latter are as `candidates` returns them.
    """
    places = {step.name: candidates(step, steps, given, read) for step in steps}
    wanted = {*read, text_column}
    for choices in places.values():
        wanted.update(*choices.values())
    return wanted, places


def truth_of(
    step: AnyStep,
    rows: pa.Table,
    places: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    flag: str = FLAG,
) -> Truth | None:
    """What is right for `step`, None if no column of `rows` says so; `places` as `candidates`.

    InputError if a column that the user named is missing, or its values cannot be compared.
    """
    columns = {}
    for name, choices in places.items():
        present = [column for column in choices if column in rows.column_names]
        if present:
            columns[name] = present[0]
    for name, column in given.items():
        if name in _names(step) and column not in rows.column_names:
            raise InputError(f"{flag} {name}={column}: the rows have no column {column!r}.")
    if not columns:
        return None
    if isinstance(step, ExtractStep):
        return _truth_of_fields(step, rows, columns, given.get(step.name, step.name), flag)
    (column,) = columns.values()
    values = rows.column(column)
    if isinstance(step, ClassifyStep) and (step.multiple or pa.types.is_nested(values.type)):
        # A trained head may give several labels without the setting; scoring says if it does not.
        read: Sequence[Any] = _label_lists(values)
    else:
        values = _flat(step, column, values, flag)
        read = _labels(values) if isinstance(step, ClassifyStep) else prompt_values(values)
    return Truth(columns, {step.name: read}, {step.name: [value is not None for value in read]})


def allowed_truths(step: AnyStep, labels: Sequence[str] = ()) -> dict[str, list[str]]:
    """What a truth of `step` or of its fields may be, by name, where that is one of a few texts.

    `labels` are those of a trained head, which the step need not name.
    """
    if isinstance(step, ClassifyStep):
        named = labels or step.labels
        return {step.name: [*named]} if named and not step.number else {}
    allowed = {}
    for field in step.fields if isinstance(step, ExtractStep) else ():
        choices = (field.items or field).choices
        if choices is not None:
            allowed[field.name] = [*choices]
    return allowed


def check_labels(
    step: AnyStep, allowed: Mapping[str, Collection[str]], truth: Truth | None, flag: str = FLAG
) -> None:
    """InputError if none of the truths of `step`, or of one of its fields, is `allowed`.

    Every answer would be wrong, which looks like a bad model. If some truths are not allowed, the
    first one is logged.
    """
    for name in allowed if truth is not None else ():
        if truth is not None and name in truth.values:
            whole = name if name == step.name else f"{step.name}.{name}"
            where = f"{flag} {whole}={truth.columns[name]}"
            _check_values(where, truth.values[name], allowed[name], is_field=name != step.name)


def _check_values(
    where: str, values: Sequence[Any], allowed: Collection[str], *, is_field: bool
) -> None:
    """As `check_labels`, for the truths of a step or of a field."""
    seen = Counter[str]()
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        for one in [value] if isinstance(value, str) else value or ():
            seen[one] += 1
            if one not in allowed:
                first.setdefault(one, row)
    what = ("choice of the field", "choices") if is_field else ("label of the step", "labels")
    if seen and len(first) == len(seen):
        named = some_of([value for value, _ in seen.most_common()])
        raise InputError(
            f"{where}: the column has {named}, and none of them is a {what[0]}; the {what[1]} are "
            f"{some_of([*allowed])}. Name another column, or set the {what[1]}."
        )
    if first:
        value, row = next(iter(first.items()))
        others = sum(seen[value] for value in first) - 1
        more = f", and {counted(others, 'more truth')} {'is' if others == 1 else 'are'} none either"
        logger.warning(
            "%s: row %d has %r, which is no %s%s: answers to %s count as wrong; the %s are %s",
            *(where, row, value, what[0], more if others else "", "them" if others else "it"),
            *(what[1], some_of([*allowed])),
        )


def _flat(step: AnyStep, column: str, values: pa.ChunkedArray, flag: str) -> pa.ChunkedArray:
    if pa.types.is_nested(values.type):
        raise InputError(
            f"{flag} {step.name}={column}: column {column!r} holds {values.type}, and the step's "
            "answers are texts. Name another column."
        )
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _labels(values: pa.ChunkedArray) -> list[str | None]:
    """Labels as text; 1.0 is the label "1", as pandas stores it beside a missing value."""
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), None, values)
        if pc.all(pc.equal(values, pc.floor(values))).as_py() is not False:
            values = values.cast(pa.int64())
    labels = []
    for text in prompt_values(values):
        label = text.strip() if isinstance(text, str) else None
        labels.append(label or None)
    return labels


def _label_lists(values: pa.ChunkedArray) -> list[list[str] | None]:
    """Lists of labels, each as in `_labels`; a label is a list of one. None if one is null."""
    if not is_list(values.type):
        return [None if label is None else [label] for label in _labels(values)]
    labels = iter(_labels(pc.list_flatten(values)))
    lists: list[list[str] | None] = []
    for length in pc.list_value_length(values).to_pylist():
        held = {*islice(labels, length or 0)}
        lists.append(None if length is None or None in held else sorted(filter(None, held)))
    return lists


def _truth_of_fields(
    step: ExtractStep, rows: pa.Table, columns: Mapping[str, str], whole: str, flag: str
) -> Truth:
    """The truth of each field; the column `whole` has structs or JSON objects of all fields."""
    values: dict[str, list[Any]] = {}
    said: dict[str, list[bool]] = {}
    objects = []
    if whole in columns.values():
        objects = objects_of(step, rows.column(whole).to_pylist(), f"{flag}: column {whole!r}")
    for field in step.fields:
        column = columns.get(field.name)
        if column is not None:
            cells = rows.column(column).to_pylist()
            if column == whole:
                cells = [{} if each is None else each for each in objects]
                cells = [each.get(field.name, UNSAID) for each in cells]
            said[field.name] = [cell is not UNSAID for cell in cells]
            values[field.name] = values_of(field, cells, f"{flag}: column {column!r}")
    # A null of a nullable field is a truth, unless nothing at all is known of the row. Another
    # field is never null, so that a null says that nobody knows its value.
    is_known = [{*map(type, row)} != {type(None)} for row in zip(*values.values(), strict=True)]
    known: dict[str, Sequence[bool]] = {}
    for field in step.fields:
        if field.name in values:
            own = [value is not None for value in values[field.name]]
            if field.nullable:
                own = [all(both) for both in zip(is_known, said[field.name], strict=True)]
            known[field.name] = own
    return Truth({name: columns[name] for name in values}, values, known)
